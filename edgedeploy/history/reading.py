"""Reads bench_results/ for the index: which files are there, and the few figures of each that history needs."""

from __future__ import annotations

import hashlib
import math
import os
import re
import statistics
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edgedeploy.errors import StoreError
from edgedeploy.records.artifact import OptionValue
from edgedeploy.records.passport import FORMAT as PASSPORT_FORMAT
from edgedeploy.records.run import FORMAT as RUN_FORMAT
from edgedeploy.records.verdict import FORMAT as VERDICT_FORMAT
from edgedeploy.records.verdict import Verdict
from edgedeploy.render.figures import P95_MIN_SAMPLES, one_line, quantile

Kind = Literal["run", "verdict", "passport"]

# kind → where its files are, as folders below the root ("*": any), and the newest format that we read.
_PLACES: dict[Kind, tuple[tuple[str, ...], str]] = {
    "run": (("runs", "*", "*"), RUN_FORMAT),
    "verdict": (("reports",), VERDICT_FORMAT),
    "passport": (("passports", "*"), PASSPORT_FORMAT),
}
# Runs of a whole day's visits stay below a tenth of it.
_LARGEST_BYTES = 256 << 20
_LARGEST_DOCUMENT_BYTES = 64 << 20
# A name that is longer says no more, and a database's index takes no key of any length.
_WORD_CHARACTERS = 300
# A distribution-free 95 % upper bound on the 99th percentile exists from 299 samples on: 0.99 ** 299 < 0.05.
_P99_MIN_SAMPLES = 299

_STAMPED = re.compile(r"\d{8}T\d{6}Z-(?P<digest>[0-9a-f]{8})")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z")

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


@dataclass(frozen=True, slots=True)
class Seen:
    """A file in the results folder, not yet opened.

    Attributes:
        path: below the root, with "/".
    """

    kind: Kind
    path: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Read:
    """What a file said.

    Attributes:
        digest: of its bytes; "" where it could not be read.
        problem: why it is left out; "" where it is not.
        row: column → value, for the table of its kind; None where it is left out, or is no document of this kind.
        cells: of a verdict, one row each.
    """

    seen: Seen
    digest: str
    problem: str = ""
    row: dict[str, Any] | None = None
    cells: list[dict[str, Any]] = field(default_factory=list)


def scan(root: Path) -> Iterator[Seen]:
    """Yield every file that the index is made of, without opening one."""
    for kind, (folders, _) in _PLACES.items():
        for folder, name in _folders(root, folders):
            yield from _files(kind, folder, name)


def _folders(root: Path, steps: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    found = [(root, "")]
    for step in steps:
        inside: list[tuple[Path, str]] = []
        for folder, name in found:
            names = _names(folder) if step == "*" else [step]
            inside += [(folder / one, f"{name}/{one}".lstrip("/")) for one in names]
        found = inside
    yield from ((folder, name) for folder, name in found if folder.is_dir())


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and _is_text(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(kind: Kind, folder: Path, name: str) -> Iterator[Seen]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(".json") or not _is_text(entry.name):
                continue
            try:
                state = entry.stat()
            except FileNotFoundError:  # it went while we looked, or is a link to nowhere
                continue
            if entry.is_file():
                yield Seen(kind, f"{name}/{entry.name}", state.st_size, state.st_mtime_ns)


def _is_text(name: str) -> bool:
    """Say whether a file name can be written down; one of stray bytes is none of ours."""
    return not name.startswith(".") and name.isprintable()


def read(root: Path, seen: Seen) -> Read:
    """Read one file; what is wrong with it is said in the answer, and nothing is raised for it."""
    if seen.size_bytes > _LARGEST_BYTES:
        return Read(seen, "", f"it has {seen.size_bytes >> 20} MiB, and no {seen.kind} has more than 256")
    try:
        data = (root / seen.path).read_bytes()
    except OSError as error:
        return Read(seen, "", f"it cannot be read: {error.strerror or error}")
    digest = hashlib.sha256(data).hexdigest()
    stem = seen.path.rpartition("/")[2].removesuffix(".json")
    named = _STAMPED.fullmatch(stem) if seen.kind != "verdict" else None
    if named is not None and not digest.startswith(named["digest"]):
        return Read(
            seen,
            digest,
            f"its bytes are not those that its name was made of ({named['digest']}): it was edited by hand, or cut off",
        )
    written, newest = _format_of(data), _PLACES[seen.kind][1]
    if written is None:
        return Read(seen, digest, "it is not valid JSON: truncated, or not written by edgedeploy")
    family, _, version = newest.rpartition("/")
    if written.rpartition("/")[0] != family:
        if seen.kind == "verdict":  # other documents may lie beside the reports
            return Read(seen, digest)
        return Read(seen, digest, f'it is a "{one_line(written)[:80]}" document, not a "{newest}"')
    number = written.rpartition("/")[2]
    if not number.isascii() or not number.isdigit() or int(number[:9]) > int(version):
        return Read(seen, digest, f'it is a "{one_line(written)[:80]}" document, written by a newer edgedeploy')
    try:
        return _READERS[seen.kind](seen, digest, stem, data)
    except (msgspec.ValidationError, _Unusable) as error:
        return Read(seen, digest, one_line(str(error))[:_WORD_CHARACTERS])


class _Unusable(Exception):
    """A document that parses, and says what history can make nothing of."""


class _Format(msgspec.Struct, gc=False):
    format: str = ""


def _format_of(data: bytes) -> str | None:
    """Return a document's format, "" for a document of something else, None for what is no JSON at all."""
    try:
        return msgspec.json.decode(data, type=_Format).format
    except msgspec.ValidationError:
        return ""
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


# ---------------------------------------------------------------- runs


class _Artifact(msgspec.Struct, gc=False):
    sha256: str
    size_bytes: _Count
    model: str
    target: str
    backend: str
    precision: str
    options: dict[str, OptionValue] = {}


class _Facts(msgspec.Struct, gc=False):
    hostname: str = ""
    machine: str = ""
    kernel: str = ""
    os_name: str = ""
    l4t: str = ""
    jetpack: str = ""
    gpu_driver: str = ""


class _Moment(msgspec.Struct, gc=False):
    throttled: bool | None = None


class _Burst(msgspec.Struct, gc=False):
    samples_s: list[float]


class _Visit(msgspec.Struct, gc=False):
    load_s: float
    first_inference_s: float
    bursts: list[_Burst]
    before: _Moment
    after: _Moment
    dropped: str = ""


class _Memory(msgspec.Struct, gc=False):
    peak_rss_bytes: _Count


class _Outputs(msgspec.Struct, gc=False):
    dataset: str
    dataset_sha256: str
    metric: str
    value: float | None = None


class _Run(msgspec.Struct, gc=False):
    """What history needs of a run: a tenth of the time that the whole takes to parse."""

    session: str
    cell: str
    side: str
    artifact: _Artifact
    device: str
    facts: _Facts
    runtime: str
    started_utc: str
    visits: list[_Visit]
    memory: list[_Memory]
    edgedeploy: str
    outputs: _Outputs | None = None
    sentinel: list[_Visit] = []
    sentinel_sha256: str = ""


_RUNS = msgspec.json.Decoder(_Run)
_VERDICTS = msgspec.json.Decoder(Verdict)


def cell_id(key: Iterable[str]) -> str:
    """Return a short name for the words that a cell is told by, for a database to look it up by.

    >>> cell_id(["a", "b"]) == cell_id(["a", "b"]), cell_id(["a", "b"]) == cell_id(["ab", ""])
    (True, False)
    """
    return hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]


def _run(seen: Seen, digest: str, stem: str, data: bytes) -> Read:
    run = _RUNS.decode(data)
    if not _UTC.fullmatch(run.started_utc):
        raise _Unusable(f"its time {run.started_utc[:40]!r} is none that edgedeploy writes (2026-11-22T06:30:00Z)")
    artifact, facts = run.artifact, run.facts
    pairs = [(visit, samples_s) for visit in run.visits if (samples_s := _counted_s(visit))]
    counted = [samples_s for _, samples_s in pairs]
    outputs = run.outputs
    row: dict[str, Any] = {
        "digest": digest,
        "name": _word(stem),
        "path": seen.path,
        "cell": _word(run.cell),
        "model": _word(artifact.model),
        "target": _word(artifact.target),
        "backend": _word(artifact.backend),
        "precision": _word(artifact.precision),
        "device": _word(run.device),
        "options": _word(", ".join(f"{name}={_plain(value)}" for name, value in sorted(artifact.options.items()))),
        "session": _word(run.session),
        "side": _word(run.side),
        "started_utc": run.started_utc,
        "artifact_sha256": _word(artifact.sha256),
        "edgedeploy": _word(run.edgedeploy),
        "runtime": _word(run.runtime),
        "kernel": _word(facts.kernel),
        "driver": _word(facts.gpu_driver),
        "system": _word(_system(facts)),
        "hostname": _word(facts.hostname),
        "machine": _word(facts.machine),
        "visits": len(counted),
        "evaluation": "" if outputs is None or outputs.value is None else _word(_evaluation(outputs)),
        "sentinel": _word(f"{run.sentinel_sha256[:16]} on {run.runtime}") if run.sentinel else "",
        "sentinel_s": _median(quantile(one, 0.5) for visit in run.sentinel if (one := _counted_s(visit))),
        "latency_p50": _median(quantile(one, 0.5) for one in counted),
        "latency_p95": _median(_tail_s(one, 0.95) for one in counted if len(one) >= P95_MIN_SAMPLES),
        "latency_p99": _median(_tail_s(one, 0.99) for one in counted if len(one) >= _P99_MIN_SAMPLES),
        "load_time": _median(visit.load_s for visit, _ in pairs),
        "first_inference": _median(visit.first_inference_s for visit, _ in pairs),
        "peak_memory": _median(float(one.peak_rss_bytes) for one in run.memory),
        "artifact_size": float(artifact.size_bytes),
        "accuracy": outputs.value if outputs is not None else None,
    }
    row["cell_id"] = cell_id(row[name] for name in ("model", "target", "backend", "precision", "device", "options"))
    return Read(seen, digest, row=row)


def _counted_s(visit: _Visit) -> list[float]:
    """Return a visit's samples in order of size; [] for a visit that does not count, as `drop_reason` has it."""
    if visit.dropped or visit.before.throttled or visit.after.throttled:
        return []
    return sorted(sample_s for burst in visit.bursts for sample_s in burst.samples_s)


def _tail_s(ordered: list[float], fraction: float) -> float:
    return ordered[math.ceil(fraction * len(ordered)) - 1]


def _median(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return statistics.median(found) if found else None


def _evaluation(outputs: _Outputs) -> str:
    return f"{outputs.metric} of {outputs.dataset} ({outputs.dataset_sha256[:8]})"


def _system(facts: _Facts) -> str:
    parts = [
        facts.os_name,
        f"L4T {facts.l4t}" if facts.l4t else "",
        f"JetPack {facts.jetpack}" if facts.jetpack else "",
    ]
    return ", ".join(part for part in parts if part)


def _plain(value: OptionValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _word(text: str) -> str:
    return one_line(text)[:_WORD_CHARACTERS]


# ---------------------------------------------------------------- verdicts and passports


def _verdict(seen: Seen, digest: str, stem: str, data: bytes) -> Read:
    verdict = _VERDICTS.decode(data)
    if not _UTC.fullmatch(verdict.judged_utc):
        raise _Unusable(f"its time {verdict.judged_utc[:40]!r} is none that edgedeploy writes (2026-11-22T06:30:00Z)")
    cells = [
        {
            "digest": digest,
            "position": position,
            "cell": _word(cell.cell),
            "baseline_cell": _word(cell.baseline_cell),
            "device": _word(cell.device),
            "target": _word(cell.target),
            "decision": cell.decision,
            "baseline_run": _run_name(cell.baseline_run),
            "candidate_run": _run_name(cell.candidate_run),
        }
        for position, cell in enumerate(verdict.cells)
    ]
    row = {
        "digest": digest,
        "path": seen.path,
        "name": _word(verdict.name),
        "decision": verdict.decision,
        "judged_utc": verdict.judged_utc,
        "document": packed(data),
    }
    return Read(seen, digest, row=row, cells=cells)


def _run_name(path: str) -> str:
    """Return what a run's file is called, wherever the verdict's writer had it."""
    return _word(re.split(r"[\\/]", path)[-1].removesuffix(".json"))


class _Passport(msgspec.Struct, gc=False):
    device: str
    started_utc: str
    run_to_run_cv: float | None = None


_PASSPORTS = msgspec.json.Decoder(_Passport)


def _passport(seen: Seen, digest: str, stem: str, data: bytes) -> Read:
    passport = _PASSPORTS.decode(data)
    folder = urllib.parse.unquote(seen.path.split("/")[1])
    if passport.device != folder:
        raise _Unusable(f"it is of the device {passport.device[:80]!r} and lies in the folder of {folder[:80]!r}")
    if not _UTC.fullmatch(passport.started_utc):
        raise _Unusable(f"its time {passport.started_utc[:40]!r} is none that edgedeploy writes")
    row = {
        "digest": digest,
        "path": seen.path,
        "name": _word(stem),
        "device": _word(passport.device),
        "started_utc": passport.started_utc,
        "run_to_run_cv": passport.run_to_run_cv,
    }
    return Read(seen, digest, row=row)


_READERS = {"run": _run, "verdict": _verdict, "passport": _passport}


def packed(document: bytes) -> bytes:
    """Return a document as it is kept in a store."""
    return zlib.compress(document, 6)


def unpacked_verdict(kept: bytes) -> Verdict:
    """Return a verdict out of a store, in which others may have written.

    Raises:
        StoreError: it is none, or larger than any verdict is.
    """
    try:
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(kept, _LARGEST_DOCUMENT_BYTES)
        if not unpacking.eof:
            raise StoreError("a verdict in the store is cut off, or larger than any verdict is; push its file again")
        return _VERDICTS.decode(data)
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(
            f"a verdict in the store cannot be read ({one_line(str(error))[:200]}); it was perhaps written by a newer "
            f"edgedeploy: upgrade, or open its report instead"
        ) from error
