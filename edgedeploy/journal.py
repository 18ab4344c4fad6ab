"""A journal of `run`, one fsynced line a step, from which a run that was killed at any point goes on.

A journal is appended to by every process that works for the run, under a lock; a line that a dying process tore is
ignored, and cut off before the next one is written. What is in it is trusted as far as the person's own files are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from edgedeploy.documents import Record
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.records.session import Begun, BlockEnded, Step
from edgedeploy.records.verdict import LedgerEntry
from edgedeploy.storage import state_dir

# History of edgedeploy.journal:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.journal/1"

_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}")
# Finished journals are kept to be looked at, unfinished ones to go on from; both end some day.
KEPT_FINISHED = 50
KEPT_UNFINISHED_S = 30 * 24 * 3600.0


class PlannedCell(Record, frozen=True, kw_only=True):
    """One candidate cell that a run was asked for."""

    candidate: str
    baseline: str
    target: str
    device: str


class Planned(Record, frozen=True, kw_only=True, tag_field="record", tag="planned"):
    """The first line: what the run was started with, and what must be the same when it goes on.

    Attributes:
        cells: all that it will judge.
        names, targets, backends, device: as the person gave them.
        against_itself: whether each candidate is its own baseline; blocks: cell → its most blocks, by a time budget.
        edgedeploy: its version; code: file that decides a number → its digest.
    """

    format: str = FORMAT
    started_utc: str
    release: str
    release_sha256: str
    lab: str
    results: str
    cells: tuple[PlannedCell, ...]
    names: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    device: str = ""
    seed: int = 0
    rebuild: bool = False
    trust_pickle: bool = False
    against_itself: bool = False
    blocks: dict[str, int] = {}
    edgedeploy: str
    code: dict[str, str]


class CellBuilt(Record, frozen=True, kw_only=True, tag_field="record", tag="built"):
    """A cell's artifact is in the cache; `device` is where it was built, for runtimes that are tied to one."""

    cell: str
    folder: str
    sha256: str
    device: str = ""


class SessionStep(Record, frozen=True, kw_only=True, tag_field="record", tag="step"):
    """Something happened in the session that measures a cell."""

    cell: str
    session: str
    did: Step


class SessionStored(Record, frozen=True, kw_only=True, tag_field="record", tag="stored"):
    """A session is complete and its runs are files: baseline's and candidate's."""

    cell: str
    session: str
    device: str
    files: tuple[str, str]


class SessionAbandoned(Record, frozen=True, kw_only=True, tag_field="record", tag="abandoned"):
    """A session will not go on where it began; what it had measured is kept in files, and another one may begin."""

    cell: str
    session: str
    reason: str
    files: tuple[str, ...]


class CellFailed(Record, frozen=True, kw_only=True, tag_field="record", tag="failed"):
    """A cell cannot be built or measured.

    Attributes:
        kind: the class of the error.
        is_not_installed: what it rests on is a runtime or converter that is not installed.
    """

    cell: str
    kind: str
    reason: str
    is_not_installed: bool = False


class Resumed(Record, frozen=True, kw_only=True, tag_field="record", tag="resumed"):
    """Another process took the run over."""

    utc: str


class Finished(Record, frozen=True, kw_only=True, tag_field="record", tag="finished"):
    """The run was judged; it may go on where a cell is pending."""

    utc: str
    decision: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    ledger: tuple[LedgerEntry, ...]


Line = Planned | CellBuilt | SessionStep | SessionStored | SessionAbandoned | CellFailed | Resumed | Finished
_DECODER = msgspec.json.Decoder(Line)
_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Journal:
    """A file that lines are appended to; it may be handed to other threads and processes."""

    path: Path

    @property
    def name(self) -> str:
        """What people call it: --resume NAME."""
        return self.path.stem

    def append(self, line: Line) -> None:
        """Write one line down so that it survives a power cut."""
        data = _ENCODER.encode(line) + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = _whole_bytes(descriptor)
            os.ftruncate(descriptor, end)
            with os.fdopen(os.dup(descriptor), "r+b") as stream:
                stream.seek(end)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            os.close(descriptor)

    def lines(self) -> list[Line]:
        """Return every whole line.

        Raises:
            DocumentError: a line in the middle is damaged, or a newer edgedeploy wrote it.
        """
        text = self.path.read_bytes()
        found: list[Line] = []
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                found.append(_DECODER.decode(line))
            except msgspec.DecodeError as error:
                raise DocumentError(
                    f"line {number} of the journal {self.path} cannot be read ({error}); the run cannot go on from it: "
                    f"start it afresh"
                ) from error
        return found

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the run that the journal is of, until the block ends or the process dies.

        Raises:
            UsageError: another process is at it.
        """
        with self.path.with_suffix(".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"the run {self.name} is going on in another process; wait for that one") from error
            yield

    def is_owned(self) -> bool:
        """Say whether some process is at it."""
        try:
            with self.owned():
                return False
        except UsageError:
            return True


def _whole_bytes(descriptor: int) -> int:
    """Return how many bytes of a journal are whole lines: a torn one is at its end, and its writer is dead."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    step = 1 << 16
    while end > 0:
        begin = max(0, end - step)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


@dataclass(slots=True)
class SessionHistory:
    """What a session had done."""

    name: str
    steps: list[Step] = field(default_factory=list)

    @property
    def device(self) -> str:
        """Where it measures."""
        return next((step.device for step in self.steps if isinstance(step, Begun)), "")

    @property
    def blocks(self) -> int:
        """How many blocks are over."""
        return sum(isinstance(step, BlockEnded) for step in self.steps)


@dataclass(slots=True)
class History:
    """All that a journal says, by cell.

    Attributes:
        built: (cell, device that it was built on, or "") → its last record.
        open: candidate → the session that is not over.
        stored, failed: candidate → how it ended.
    """

    planned: Planned
    built: dict[tuple[str, str], CellBuilt] = field(default_factory=dict)
    open: dict[str, SessionHistory] = field(default_factory=dict)
    stored: dict[str, SessionStored] = field(default_factory=dict)
    failed: dict[str, CellFailed] = field(default_factory=dict)
    finished: Finished | None = None

    @property
    def is_over(self) -> bool:
        """Nothing is left to be done."""
        return self.finished is not None and all(entry.state != "pending" for entry in self.finished.ledger)


def history(journal: Journal) -> History:
    """Fold a journal's lines.

    Raises:
        DocumentError: it is empty or damaged.
    """
    lines = journal.lines()
    if not lines or not isinstance(lines[0], Planned):
        raise DocumentError(f"the journal {journal.path} does not say what was planned; start the run afresh")
    if lines[0].format != FORMAT:
        raise DocumentError(f'the journal {journal.path} is a "{lines[0].format}", not a "{FORMAT}"; start afresh')
    found = History(lines[0])
    for line in lines[1:]:
        match line:
            case CellBuilt():
                found.built[line.cell, line.device] = line
            case SessionStep():
                if line.cell not in found.open or found.open[line.cell].name != line.session:
                    found.open[line.cell] = SessionHistory(line.session)
                found.open[line.cell].steps.append(line.did)
            case SessionStored():
                found.stored[line.cell] = line
                found.open.pop(line.cell, None)
            case SessionAbandoned():
                found.open.pop(line.cell, None)
            case CellFailed():
                found.failed[line.cell] = line
                found.open.pop(line.cell, None)
            case Resumed():
                found.finished = None
            case Finished():
                found.finished = line
    return found


def journals_dir() -> Path:
    """Return where journals lie."""
    return state_dir() / "journals"


def is_name(text: str) -> bool:
    """Say whether a text looks like a journal's name.

    >>> is_name("20261122T191500Z-a1b2c3"), is_name("edgedeploy.toml")
    (True, False)
    """
    return _ID.fullmatch(text) is not None


def start() -> Journal:
    """Return a new journal, without a line yet, and delete those that nobody will want."""
    prune()
    folder = journals_dir()
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Journal(folder / f"{now}-{secrets.token_hex(3)}.jsonl")


def journals() -> list[Journal]:
    """Return every journal, newest first."""
    paths = [path for path in journals_dir().glob("*.jsonl") if is_name(path.stem)]
    return [Journal(path) for path in sorted(paths, key=lambda path: path.name, reverse=True)]


def named(name: str) -> Journal:
    """Return one journal.

    Raises:
        UsageError: there is none of that name.
    """
    path = journals_dir() / f"{name}.jsonl"
    if not is_name(name) or not path.is_file():
        known = ", ".join(one.name for one in journals()[:5]) or "none"
        raise UsageError(f"there is no run {name!r} to go on with (the newest are: {known})")
    return Journal(path)


def unfinished(release: Path) -> list[Journal]:
    """Return the journals of a release file that stopped in the middle, newest first; not those that are going on."""
    found = []
    for journal in journals():
        with contextlib.suppress(OSError):  # another process has just pruned it
            planned = _planned(journal)
            if planned is None or Path(planned.release) != release.absolute():
                continue
            if not _is_over(journal) and not journal.is_owned():
                found.append(journal)
    return found


def prune(now_s: float | None = None) -> None:
    """Delete finished journals beyond the newest ones, and unfinished ones that nobody went on with for a month.

    Args:
        now_s: seconds since the epoch; None: now.
    """
    now_s = time.time() if now_s is None else now_s
    finished = 0
    for journal in journals():
        with contextlib.suppress(OSError, UsageError, DocumentError), journal.owned():
            age_s = now_s - journal.path.stat().st_mtime
            is_over = _is_over(journal)
            finished += is_over
            if (is_over and finished > KEPT_FINISHED) or age_s > KEPT_UNFINISHED_S:
                journal.path.unlink()
                journal.path.with_suffix(".lock").unlink(missing_ok=True)


def _planned(journal: Journal) -> Planned | None:
    """Return the first line, if it is whole and ours."""
    with journal.path.open("rb") as stream:
        try:
            line = _DECODER.decode(stream.readline())
        except msgspec.DecodeError:
            return None
    return line if isinstance(line, Planned) else None


def _is_over(journal: Journal) -> bool:
    """Say whether the last line ends the run, without reading what may be megabytes of samples."""
    with journal.path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - (1 << 20)))
        last = stream.read().rstrip(b"\n").rpartition(b"\n")[2]
    try:
        line = _DECODER.decode(last)
    except msgspec.DecodeError:
        return False
    return isinstance(line, Finished) and all(entry.state != "pending" for entry in line.ledger)
