"""What a device answers, made records within limits: nothing that it says is taken as it comes. Pure."""

from __future__ import annotations

import array
from typing import Annotated, Any, TypeVar

import msgspec

from edgedeploy.errors import DeviceError

# Longer than any name, path or sentence that a runner of ours sends.
LONGEST_TEXT = 8192
# More than the files of a report, the cores of a machine and the operators of a model.
MOST_ENTRIES = 100_000
# What a JSON reader elsewhere, and our own writer, can still represent.
LARGEST_INTEGER = 2**63 - 1
# Ours nest four deep; a report of a builder somewhat deeper.
DEEPEST = 32
# A text in an error message: a screen of it.
_TOLD_CHARACTERS = 200

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=10**18)]
Count = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_INTEGER)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=LONGEST_TEXT)]


class Opened(msgspec.Struct, frozen=True):
    """The answer to `open`."""

    runtime: Text
    boundary: dict[str, Any]
    load_s: Seconds
    first_inference_ns: Nanoseconds
    warm_up_ns: tuple[Nanoseconds, ...]
    is_steady: bool


class Bursts(msgspec.Struct, frozen=True):
    """The answer to `bursts`: one list of samples per visit that was named."""

    samples_ns: tuple[tuple[Nanoseconds, ...], ...]


class Memory(msgspec.Struct, frozen=True):
    """The answer to `memory`."""

    peak_rss_bytes: Count
    import_rss_bytes: Count


class Written(msgspec.Struct, frozen=True):
    """The answer to `outputs`: the file is in the device's folder of outputs, under its digest."""

    sha256: Digest
    size_bytes: Count
    samples: Count
    is_repeatable: bool
    runtime: Text
    boundary: dict[str, Any]


class Lease(msgspec.Struct, frozen=True):
    """What hello says of our lease: its fencing token, and how long it lasts unless it is renewed."""

    token: Count
    seconds: Annotated[float, msgspec.Meta(gt=0, le=86400)]


class Applied(msgspec.Struct, frozen=True):
    """The answer to `set`: what the device is set to now, and why it is not set to the rest."""

    applied: dict[Text, Text]
    refused: dict[Text, Text]


class Cooled(msgspec.Struct, frozen=True):
    """The answer to `cool`: None where the device has no thermal zone."""

    celsius: float | None
    waited_s: Seconds
    reached: bool | None


class Missing(msgspec.Struct, frozen=True):
    """The answer to `have`: which files are missing, of which some has arrived, and how much room there is."""

    missing: tuple[Text, ...]
    parts: tuple[Text, ...]
    free_bytes: Count


class Part(msgspec.Struct, frozen=True):
    """The answer to `part`: what has arrived of a file."""

    size_bytes: Count
    sha256: Digest


class Space(msgspec.Struct, frozen=True):
    """The answer to `space`."""

    free_bytes: Count


class State(msgspec.Struct, frozen=True):
    """The answer to `conditions`."""

    conditions: dict[str, Any]
    own_core_s: dict[Text, float | None]


Kind = TypeVar("Kind")


def read(fields: Any, kind: type[Kind], label: str, what: str) -> Kind:
    """Return an answer, or a part of one, as a record of the kind that was asked for.

    Args:
        fields: what the runner sent.
        kind: a msgspec type; what it does not name is ignored: a newer runner may say more.
        label: how errors name the device.
        what: the question, for errors.

    Raises:
        DeviceError: a part is missing, of another type, or beyond its limits.
    """
    try:
        return msgspec.convert(bounded(fields), kind)
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        raise DeviceError(
            f"{label}: the runner's answer to {what} is not what its protocol allows ({told(error)}); "
            f"is what runs there our runner?"
        ) from error


def bounded(value: Any, depth: int = 0) -> Any:
    """Return a JSON value as it is.

    Raises:
        ValueError: a text in it is too long, a number too large, or it has too many parts or levels.
    """
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ValueError(f"a text of {len(value)} characters; at most {LONGEST_TEXT} are read")
    if isinstance(value, int) and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        raise ValueError("an integer of more than 63 bits")
    if isinstance(value, (dict, list)) and depth >= DEEPEST:
        raise ValueError(f"more than {DEEPEST} levels")
    if isinstance(value, dict):
        if len(value) > MOST_ENTRIES:
            raise ValueError(f"{len(value)} entries; at most {MOST_ENTRIES} are read")
        for key, inner in value.items():
            bounded(key, depth + 1)
            bounded(inner, depth + 1)
    if isinstance(value, list) and not _is_numbers(value):
        if len(value) > MOST_ENTRIES:
            raise ValueError(f"{len(value)} entries; at most {MOST_ENTRIES} are read")
        for inner in value:
            bounded(inner, depth + 1)
    return value


def _is_numbers(values: list[Any]) -> bool:
    """Say whether a list holds 64-bit integers alone: samples are many, and a line's length already bounds them."""
    try:
        array.array("q", values)
    except (TypeError, OverflowError):
        return False
    return True


def told(text: object) -> str:
    """Return what a device said, or an error about it, short enough for a message.

    >>> len(told("x" * 10_000))
    200
    """
    words = visible(str(text)[: _TOLD_CHARACTERS + 1])
    return words if len(words) <= _TOLD_CHARACTERS else words[: _TOLD_CHARACTERS - 1] + "…"


def visible(text: str) -> str:
    r"""Return a text in which a terminal finds nothing to obey: control characters are spelt out.

    >>> print(visible("red: \x1b[31m and a bell: \a"))
    red: \x1b[31m and a bell: \x07
    """
    return "".join(
        letter if letter in "\n\t" or letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def clipped(text: object, most: int = LONGEST_TEXT) -> str:
    """Return a sentence of the device, cut where it is longer than any of ours.

    >>> clipped("no such file", 7)
    'no such'
    """
    return visible(str(text)[:most])
