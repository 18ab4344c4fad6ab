"""Typed documents: TOML that people write and JSON that machines write, parsed at the border into frozen records.

A document's first key is `format = "edgedeploy.<kind>/<int>"`. A file newer than us is refused by name; an older one is
upgraded by pure functions. Every complaint names the file, the line where it can be found, and the likely intended key.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgedeploy.errors import DocumentError
from edgedeploy.storage import write_atomic


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is written down: immutable, typed, no behaviour; unknown keys are errors.

    Subclasses repeat `frozen=True, kw_only=True`: msgspec does not inherit keyword-only fields.
    """


RecordType = TypeVar("RecordType", bound=Record)
Upgrades = Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]

Path_ = tuple[str | int, ...]


def read_toml(path: Path, record: type[RecordType], kind: str, upgrades: Upgrades | None = None) -> RecordType:
    """Read a TOML file into a record.

    Args:
        path: the file.
        record: the type to parse into.
        kind: "edgedeploy.release/1": the newest format that we write.
        upgrades: version → function to the next version.

    Raises:
        DocumentError: unreadable, not TOML, wrong format, unknown key, wrong type or missing key.
    """
    text = _read_text(path)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{path} is not valid TOML: {error}") from error
    return _convert(path, text, data, record, kind, upgrades or {})


def read_json(path: Path, record: type[RecordType], kind: str, upgrades: Upgrades | None = None) -> RecordType:
    """Read a JSON file into a record; raises as `read_toml` does."""
    text = _read_text(path)
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{path} is not valid JSON (truncated, or not written by edgedeploy?): {error}") from error
    if not isinstance(data, dict):
        raise DocumentError(f"{path} holds a JSON {type(data).__name__}, not an edgedeploy document")
    return _convert(path, "", data, record, kind, upgrades or {})


def encode_json(record: Record) -> bytes:
    """Return a record as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def write_json(path: Path, record: Record) -> None:
    """Write a record as JSON, whole or not at all."""
    write_atomic(path, encode_json(record))


def to_builtins(record: Record) -> Any:
    """Return a record as plain dictionaries, lists and numbers."""
    return msgspec.to_builtins(record)


def as_document(record: Record) -> dict[str, Any]:
    """Return a record as one JSON document whose first key is its format."""
    document: dict[str, Any] = to_builtins(record)
    return {"format": f"edgedeploy.{type(record).__name__.lower()}/1", **document}


def closest(word: str, known: typing.Iterable[str]) -> str:
    """Return '; did you mean "x"?' for a misspelt name, or ''.

    >>> closest("precison", ["precision", "target"])
    '; did you mean "precision"?'
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{match[0]}"?' if match else ""


_INVALID_CHOICE = re.compile(r"Invalid enum value (?P<given>'[^']*'|\S+)")


def complaint(error: Exception, kind: Any) -> str:
    r"""Say what a parser found wrong with a value, without the parser's own notation.

    Args:
        error: what it raised.
        kind: the type that the value should have had.

    >>> complaint(ValueError("Invalid enum value 'mze' - at `$.ranges`"), typing.Literal["mse", "entropy"])
    '\'mze\' is not known; did you mean "mse"? (known: mse, entropy)'
    """
    what = _AT.sub("", str(error))
    choices = [str(one) for one in _choices(kind)]
    if (match := _INVALID_CHOICE.match(what)) and choices:
        given = match["given"]
        likely = closest(given.strip("'"), choices)
        shown = [one or "''" for one in choices]
        return f"{given} is not known{likely} (known: {', '.join(shown)})"
    return what[0].lower() + what[1:]


def _choices(kind: Any) -> list[Any]:
    """Return the values of a Literal, also of one that may be None."""
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    return [one for option in _alternatives(kind) if option is not kind for one in _choices(option)]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON knows")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DocumentError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise DocumentError(f"{path} is a directory, not a file") from error
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror or error}") from error


def _convert(
    path: Path, text: str, data: dict[str, Any], record: type[RecordType], kind: str, upgrades: Upgrades
) -> RecordType:
    data = _upgraded(path, text, data, kind, upgrades)
    try:
        return msgspec.convert(data, record, strict=True)
    except msgspec.ValidationError as error:
        raise DocumentError(_explain(path, text, data, record, error)) from error


def _upgraded(path: Path, text: str, data: dict[str, Any], kind: str, upgrades: Upgrades) -> dict[str, Any]:
    family, newest = kind.rsplit("/", 1)
    written = data.get("format")
    if not isinstance(written, str):
        raise DocumentError(f'{path} has no key format; its first line should be format = "{kind}"')
    found_family, _, version = written.partition("/")
    if found_family != family or not version.isdigit():
        raise DocumentError(f'{path}{_at_line(text, ("format",))} is a "{written}" document; expected "{kind}"')
    number = int(version)
    if number > int(newest):
        raise DocumentError(f'{path} is a "{written}" document, written by a newer edgedeploy; upgrade edgedeploy')
    while number < int(newest):
        if number not in upgrades:
            raise DocumentError(f'{path} is a "{written}" document, too old for this edgedeploy to upgrade')
        data = upgrades[number](data)
        number += 1
    return data


_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`")
_AT = re.compile(r" - at `\$(?P<path>[^`]*)`$")
_STEP = re.compile(r"\.(?P<key>[^.\[]+)|\[(?P<index>\d+)\]|(?P<any>\[\.\.\.\])")


def _explain(path: Path, text: str, data: dict[str, Any], record: type[Record], error: Exception) -> str:
    message = str(error)
    where = _concrete_path(data, record, message)
    what = _AT.sub("", message)
    if match := _UNKNOWN.match(what):
        field = match["field"]
        known = _fields_at(record, where)
        line = _at_line(text, (*where, field))
        options = closest(field, known) or (f"; known keys are {', '.join(known)}" if known else "")
        return f'unknown key "{field}" in {path}{line}{options}'
    name = ".".join(str(step) for step in where)
    line = _at_line(text, where)
    if match := _MISSING.match(what):
        inside = f" under {name}" if name else ""
        return f'missing key "{match["field"]}" in {path}{line}{inside}'
    return f"{name or 'the document'} in {path}{line}: {complaint(error, _kind_at(record, where))}"


def _steps(message: str) -> list[str | int | None]:
    match = _AT.search(message)
    steps: list[str | int | None] = []
    for step in _STEP.finditer(match["path"] if match else ""):
        steps.append(step["key"] if step["key"] else int(step["index"]) if step["index"] else None)
    return steps


def _concrete_path(data: dict[str, Any], record: type[Record], message: str) -> Path_:
    """Resolve msgspec's `[...]` (any value of a mapping) by asking which entry alone still gives the same complaint."""
    steps = _steps(message)
    resolved: list[str | int] = []
    for position, step in enumerate(steps):
        if step is not None:
            resolved.append(step)
            continue
        for key in _mapping_at(data, resolved):
            alone = _with_only(data, resolved, key)
            try:
                msgspec.convert(alone, record, strict=True)
            except msgspec.ValidationError as error:
                if str(error) == message:
                    data = alone
                    resolved.append(key)
                    break
        else:
            return tuple(resolved[:position])
    return tuple(resolved)


def _mapping_at(data: Any, steps: list[str | int]) -> list[str]:
    for step in steps:
        data = data[step]
    return list(data) if isinstance(data, dict) else []


def _with_only(data: Any, steps: list[str | int], key: str) -> Any:
    if not steps:
        return {key: data[key]}
    copy: Any = dict(data) if isinstance(data, dict) else list(data)
    copy[steps[0]] = _with_only(data[steps[0]], steps[1:], key)
    return copy


def _fields_at(record: Any, where: Path_) -> list[str]:
    for option in _alternatives(_kind_at(record, where)):
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            return [field.encode_name for field in msgspec.structs.fields(option)]
    return []


def _kind_at(record: Any, where: Path_) -> Any:
    kind: Any = record
    for step in where:
        kind = _step_into(kind, step)
    return kind


def _alternatives(kind: Any) -> tuple[Any, ...]:
    arguments = typing.get_args(kind)
    return arguments if arguments and typing.get_origin(kind) not in (dict, list, tuple) else (kind,)


def _step_into(kind: Any, step: str | int) -> Any:
    for option in _alternatives(kind):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin in (list, tuple) and isinstance(step, int):
            return arguments[0]
        if origin is not None and len(arguments) == 2 and isinstance(step, str):
            return arguments[1]
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            for field in msgspec.structs.fields(option):
                if field.encode_name == step:
                    return field.type
    return object


_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)(?:\s*\.\s*(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+))*)\s*=""")
_PART = re.compile(r""""([^"]*)"|'([^']*)'|([A-Za-z0-9_-]+)""")


def _key_parts(text: str) -> Path_:
    return tuple(a or b or c for a, b, c in _PART.findall(text))


def _key_lines(text: str) -> Iterator[tuple[Path_, int]]:
    """Yield (path, line number) of every table header and key that starts a line of a TOML text."""
    counts: dict[Path_, int] = {}
    table: Path_ = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _indexed(_key_parts(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            yield table, number
        elif key := _KEY.match(line):
            yield (*table, *_key_parts(key[1])), number


def _indexed(parts: Path_, counts: dict[Path_, int]) -> Path_:
    """Insert the current index after every array of tables on the way, but not after the last part itself."""
    path: Path_ = ()
    for position, part in enumerate(parts):
        path = (*path, part)
        if path in counts and position < len(parts) - 1:
            path = (*path, counts[path])
    return path


def _at_line(text: str, where: Path_) -> str:
    """Return ', line N' for the deepest part of `where` that the text shows, or ''."""
    lines: dict[Path_, int] = {}
    for path, number in _key_lines(text):
        lines.setdefault(path, number)
    for length in range(len(where), 0, -1):
        if where[:length] in lines:
            return f", line {lines[where[:length]]}"
    return ""


def line_of(path: Path, *where: str | int) -> str:
    """Return 'FILE, line N' for a key of a TOML file that has already been read: for errors found after parsing."""
    return f"{path}{_at_line(_read_text(path), where)}"


def line_number(path: Path, *where: str | int) -> int:
    """Return the line of a key of a TOML file that has already been read; 1 where the text does not show it."""
    found = _at_line(_read_text(path), where)
    return int(found.removeprefix(", line ")) if found else 1
