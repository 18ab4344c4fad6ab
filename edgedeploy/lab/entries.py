"""Entries of lab.toml, written and removed as text: a person's comments, order and spelling stay as they are.

What was written is parsed again before it takes the file's place, and must be the old lab with that one change.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgedeploy.documents import read_toml
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.records.device import FORMAT, Device, Lab
from edgedeploy.storage import atomic_path

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_HEADER = re.compile(r"[ \t]*\[(?P<double>\[?)[ \t]*(?P<path>[^\]]*?)[ \t]*\]\]?[ \t]*(?:#.*)?")
_PATH_PART = re.compile(r'[ \t]*(?:"((?:[^"\\]|\\.)*)"|\'([^\']*)\'|([A-Za-z0-9_-]+))[ \t]*(?:\.|$)')
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_QUOTES = re.compile(r"\"{3}|'{3}")
_COMMENT = re.compile(r"[ \t]*#.*")


def add_entry(path: Path, name: str, device: Device, *, replace: bool = False) -> None:
    """Write a device into lab.toml, which is made where there is none.

    Args:
        path: lab.toml.
        name: the device's.
        device: its entry; paths as they should stand there.
        replace: an entry of that name gives way to it.

    Raises:
        UsageError: there is a device of that name already.
        DocumentError: the file cannot be read or edited.
    """
    with _locked(path):
        text = _text(path)
        before = _devices(path, text)
        if name in before and not replace:
            raise UsageError(f"{path} has a device {name!r} already; choose another name, or replace it with --replace")
        kept, comments = _without(text, name) if name in before else (text, "")
        newline = "\r\n" if "\r\n" in text else "\n"
        entry = (comments + entry_text(name, device)).replace("\n", newline)
        if kept.strip():
            gap = "" if kept.endswith(("\n\n", "\r\n\r\n")) else newline if kept.endswith("\n") else newline * 2
            entry = kept + gap + entry
        else:
            entry = f'{kept}format = "{FORMAT}"{newline * 2}{entry}'
        _write(path, entry, {**before, name: device})


def remove_entry(path: Path, name: str) -> None:
    """Remove a device from lab.toml.

    Raises:
        UsageError: there is none of that name.
        DocumentError: the file cannot be read or edited.
    """
    with _locked(path):
        text = _text(path)
        before = _devices(path, text)
        if name not in before:
            known = ", ".join(sorted(before)) or "none"
            raise UsageError(f"{path} has no device {name!r} (it has: {known})")
        kept, _ = _without(text, name)
        _write(path, kept, {key: entry for key, entry in before.items() if key != name})


def read_entry(path: Path, name: str) -> Device | None:
    """Return a device's entry as it stands in lab.toml, or None where there is none."""
    return _devices(path, _text(path)).get(name)


def entry_text(name: str, device: Device) -> str:
    r"""Return the tables of a device; what is as by default is left out.

    >>> print(entry_text("pi", Device(transport="ssh", host="10.0.0.7")), end="")
    [devices.pi]
    transport = "ssh"
    host = "10.0.0.7"
    """
    values: dict[str, Any] = {"transport": device.transport, **_changed(device)}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"[devices.{_key(name)}]"]
    lines += [f"{_key(key)} = {_value(value)}" for key, value in values.items() if key not in tables]
    for table, inside in tables.items():
        lines += ["", f"[devices.{_key(name)}.{_key(table)}]"]
        lines += [f"{_key(key)} = {_value(value)}" for key, value in inside.items()]
    return "\n".join(lines) + "\n"


def _changed(record: msgspec.Struct) -> dict[str, Any]:
    """Return the fields that are not as by default; records inside as dictionaries."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(record):
        value = getattr(record, field.name)
        default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
        if value == default:
            continue
        found[field.encode_name] = _changed(value) if isinstance(value, msgspec.Struct) else value
    return found


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    """Return a value as TOML spells it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(inner)}" for key, inner in value.items()) + " }"
    return "[" + ", ".join(_value(inner) for inner in value) + "]"


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"the lab file {path} cannot be read: {error}") from error


def _devices(path: Path, text: str) -> dict[str, Device]:
    """Return the entries of a lab file, as written."""
    return dict(read_toml(path, Lab, FORMAT).devices) if text.strip() else {}


def _without(text: str, name: str) -> tuple[str, str]:
    """Return a lab file without the tables of a device, and the comments that stood inside them.

    Comments after a table's last key belong to what follows, and stay. A text of several lines is not looked into.
    """
    kept: list[str] = []
    comments: list[str] = []
    last: list[str] = []
    is_inside, quotes = False, ""
    for line in _LINE.findall(text):
        bare = line.rstrip("\r\n")
        was_quoted, quotes = bool(quotes), _open_quotes(bare, quotes)
        if not was_quoted and (header := _HEADER.fullmatch(bare)):
            is_inside = not header["double"] and _parts(header["path"])[:2] == ("devices", name)
            kept += last[1:] if last and not last[0].strip() and kept and not kept[-1].strip() else last
            last = []
        if not is_inside:
            kept.append(line)
        elif not was_quoted and (not bare.strip() or _COMMENT.fullmatch(bare)):
            last.append(line)
        else:
            comments += [f"{one.strip()}\n" for one in last if one.strip()]
            last = []
    return "".join(kept + last), "".join(comments)


def _open_quotes(line: str, quotes: str) -> str:
    """Return which triple quotes are open after a line, given which were before it; "" for none."""
    for found in _QUOTES.findall(line):
        quotes = "" if found == quotes else quotes or found
    return quotes


def _parts(path: str) -> tuple[str, ...]:
    parts, position = [], 0
    while match := _PATH_PART.match(path, position):
        quoted, literal, bare = match.groups()
        parts.append(bare or literal or (_unquoted(quoted) if quoted else ""))
        position = match.end()
    return tuple(parts) if position == len(path) else ()


def _unquoted(text: str) -> str:
    try:
        return str(tomllib.loads(f'key = "{text}"')["key"])
    except tomllib.TOMLDecodeError:
        return ""


def _write(path: Path, text: str, wanted: Mapping[str, Device]) -> None:
    """Put a lab file in its place, if it says what it should; its permissions stay, and a link stays a link."""
    place = path.resolve()
    mode = place.stat().st_mode & 0o777 if place.exists() else None
    with atomic_path(place) as part:
        part.write_bytes(text.encode("utf-8"))
        try:
            found = _devices(part, text)
        except DocumentError:
            found = None
        if found != wanted:
            raise DocumentError(
                f"{path} is written in a way that edgedeploy cannot edit (are devices in one inline table, or dotted "
                "keys?); write each device as a table [devices.NAME], or make the change by hand; nothing was changed"
            )
    if mode is not None:
        place.chmod(mode)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep others who write the same lab file waiting; the folder is locked, for the file itself is replaced."""
    folder = path.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
