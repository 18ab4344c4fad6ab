"""What the pages show: the history's store, joined with the lab file and what is known of its devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedeploy.documents import encode_json
from edgedeploy.errors import EdgedeployError
from edgedeploy.lab import health
from edgedeploy.lab.inventory import lab_path, load_lab
from edgedeploy.records.device import Device
from edgedeploy.records.history import CellKey, CellRow, DeviceRow, HistoryMetric, Refreshed, Trend, VerdictRow
from edgedeploy.records.verdict import Verdict
from edgedeploy.storage import sha256_bytes, sha256_file

if TYPE_CHECKING:
    from edgedeploy.history.store import Store

Progress = Callable[[str], None]

# A page that is loaded again right away need not look at ten thousand files again.
_REFRESH_S = 5.0
# In a shared store nothing tells us that something is new.
_SHARED_S = 20.0
_ID_CHARACTERS = 16
_SENTINEL_POINTS = 60


class NotThere(EdgedeployError):
    """What an address names does not exist (any more)."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Filter:
    """Which verdicts are wanted; "" is any.

    Attributes:
        text: occurs somewhere in the verdict's name, its cells, devices, targets or models.
    """

    decision: str = ""
    model: str = ""
    target: str = ""
    device: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the filters can be set to."""

    models: tuple[str, ...]
    targets: tuple[str, ...]
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """A part of the verdicts that are wanted.

    Attributes:
        number: from 1; pages: how many there are, at least one.
        total: verdicts that are wanted; known: verdicts that there are.
    """

    verdicts: tuple[VerdictRow, ...]
    number: int
    pages: int
    total: int
    known: int


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device, as the lab file and its runs know it.

    Attributes:
        entry: of the lab file; None for a device that is known from runs alone.
        row: None for a device without a run.
        sentinel_s: its sentinel in the newest sessions of the cell that was measured most often on it, oldest first.
        state: "ready" is in the lab file and not kept out; whether somebody uses it now only the device knows.
    """

    name: str
    lab: str
    entry: Device | None
    row: DeviceRow | None
    state: Literal["ready", "quarantined", "not in the lab file"]
    why: str = ""
    since_utc: str = ""
    by: str = ""
    sentinel_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class _Known:
    """One state of the store, with what was computed of it."""

    verdicts: tuple[VerdictRow, ...]
    cells: tuple[CellRow, ...]


def cell_id(key: CellKey) -> str:
    """Return what a cell is called in addresses."""
    return sha256_bytes(encode_json(key))[:_ID_CHARACTERS]


class Source:
    """Answers the pages' questions; several threads may ask at once.

    Args:
        store: open while this is used.
        results: the folder with the reports.
        lab: the lab file; None: the usual one.
        clock: seconds that never go back.
    """

    def __init__(
        self, store: Store, results: Path, lab: Path | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._results, self._lab, self._clock = store, results, lab, clock
        self._lock = threading.Lock()
        self._known: _Known | None = None
        self._devices: tuple[_Known, tuple[tuple[DeviceRow, tuple[float, ...]], ...]] | None = None
        self._refreshed_s = float("-inf")
        self._news = Refreshed()

    # ------------------------------------------------------------ verdicts

    def verdicts(self, wanted: Filter, number: int, per_page: int) -> Page:
        """Return a page of the verdicts that are wanted, newest first; a number beyond the last is the last."""
        known = self._now()
        models = _models_of(known.cells)
        found = [row for row in known.verdicts if _is_wanted(row, wanted, models)]
        pages = max(-(-len(found) // per_page), 1)
        number = min(max(number, 1), pages)
        shown = tuple(found[(number - 1) * per_page : number * per_page])
        return Page(shown, number, pages, len(found), len(known.verdicts))

    def choices(self) -> Choices:
        """Return what verdicts can be filtered by."""
        known = self._now()
        cells = [cell for row in known.verdicts for cell in row.cells]
        return Choices(
            models=_sorted(row.key.model for row in known.cells),
            targets=_sorted(cell.target for cell in cells),
            devices=_sorted(cell.device for cell in cells),
        )

    def verdict(self, verdict_id: str) -> tuple[VerdictRow, Verdict]:
        """Return a verdict; raises NotThere."""
        for row in self._now().verdicts:
            if row.id == verdict_id:
                return row, self._store.verdict(verdict_id)
        raise NotThere(f"there is no verdict {verdict_id[:80]}; it may have been deleted since the list was shown")

    def report(self, row: VerdictRow) -> Path | None:
        """Return the stored HTML report of a verdict, or None.

        Only the verdict's own file beside it vouches for a report: a store that many write to names no path here.
        """
        folder = self._results / "reports"
        document = folder / f"{Path(row.path).stem}.json"
        report = document.with_suffix(".html")
        for file in (document, report):
            if file.is_symlink() or not file.is_file() or file.resolve().parent != folder.resolve():
                return None
        return report if sha256_file(document) == row.id else None

    # ------------------------------------------------------------ trends

    def cells(self) -> tuple[CellRow, ...]:
        """Return every cell that was measured."""
        return self._now().cells

    def cell(self, wanted: str) -> CellRow:
        """Return a cell by its id; raises NotThere."""
        for row in self.cells():
            if cell_id(row.key) == wanted:
                return row
        raise NotThere(f"there is no cell {wanted[:80]}; its runs may have been deleted since the list was shown")

    def trend(self, row: CellRow, metric: HistoryMetric, last: int) -> Trend:
        """Return a metric of a cell over time, its newest `last` runs; 0: all."""
        return self._store.whole_trend(row.key, metric, last)

    # ------------------------------------------------------------ devices

    def devices(self) -> tuple[DeviceState, ...]:
        """Return the devices of the lab file and those that runs know, in quarantine first."""
        measured = self._measured()
        entries = dict(load_lab(lab_path(self._lab)).devices)
        kept_out = health.quarantined()
        # Another lab's device may bear the name of one of ours.
        ours = {row.device for row, _ in measured if row.lab in ("", self._store.lab)}
        found = []
        for row, sentinel_s in measured:
            is_ours = row.lab in ("", self._store.lab)
            entry, quarantined = (entries.get(row.device), kept_out.get(row.device)) if is_ours else (None, None)
            found.append(_state(row.device, entry, row, quarantined, sentinel_s))
        found += [_state(name, entry, None, kept_out.get(name)) for name, entry in entries.items() if name not in ours]
        return tuple(sorted(found, key=lambda one: (one.state != "quarantined", one.name, one.lab)))

    def _measured(self) -> tuple[tuple[DeviceRow, tuple[float, ...]], ...]:
        """Return the devices that runs know, with their sentinels; all runs are looked at for it, so it is kept."""
        known = self._now()
        if self._devices is None or self._devices[0] is not known:
            rows = self._store.devices()
            self._devices = known, tuple((row, self._sentinel_s(row, known.cells)) for row in rows)
        return self._devices[1]

    def _sentinel_s(self, row: DeviceRow, cells: Sequence[CellRow]) -> tuple[float, ...]:
        """Return the newest readings of a device's sentinel, as the sessions of one cell saw them."""
        own = [cell for cell in cells if cell.key.device == row.device and cell.key.lab == row.lab]
        if row.sentinel_s is None or not own:
            return ()
        busiest = max(own, key=lambda cell: cell.runs)
        points = self._store.trend(busiest.key, "latency_p50", _SENTINEL_POINTS)
        return tuple(point.sentinel_s for point in points if point.sentinel_s is not None)

    # ------------------------------------------------------------ what is known now

    @property
    def where(self) -> str:
        """Say in words where all of this comes from."""
        return self._store.where

    def skipped(self) -> tuple[str, ...]:
        """Say which files of the results folder are left out."""
        self._now()
        return tuple(f"{one.path}: {one.why}" for one in self._news.skipped)

    def refresh(self) -> Refreshed:
        """Read what is new in the results folder, whenever that was done last."""
        with self._lock:
            self._refreshed_s = float("-inf")
        self._now()
        return self._news

    def _now(self) -> _Known:
        """Return what is known, after a look whether there is more; one thread looks, the others wait for it."""
        with self._lock:
            passed_s = self._clock() - self._refreshed_s
            if self._known is not None and passed_s < _REFRESH_S:
                return self._known
            news = self._store.refresh()
            is_new = bool(news.runs or news.verdicts or news.passports or news.removed or news.rebuilt)
            is_old = self._store.is_shared and passed_s >= _SHARED_S
            if self._known is None or is_new or is_old:
                self._known = _Known(tuple(self._store.verdicts(0)), tuple(self._store.cells()))
            if not self._store.is_shared or is_old:
                self._refreshed_s = self._clock()
            self._news = news
            return self._known


@contextmanager
def open_source(
    results: Path, url: str, lab: Path | None, *, progress: Progress = lambda text: None
) -> Iterator[Source]:
    """Open the store and read what is new; the first time that takes seconds for thousands of runs.

    Raises:
        DocumentError: a lab file that was asked for does not exist.
        BackendMissing, UsageError, StoreError: as of `open_store`.
    """
    from edgedeploy.history.store import open_store

    load_lab(lab_path(lab))
    with open_store(results, url) as store:
        source = Source(store, results, lab)
        progress(f"reading {store.where}")
        news = source.refresh()
        if news.rebuilt:
            progress(f"the index was made anew: {news.rebuilt}")
        if news.skipped:
            names = ", ".join(one.path for one in news.skipped[:3])
            progress(f"{len(news.skipped)} files are left out ({names}{', …' if len(news.skipped) > 3 else ''})")
        yield source


def _models_of(cells: Iterable[CellRow]) -> dict[tuple[str, str], set[str]]:
    """Return the models of (name of a cell, device): a verdict's own line does not say them."""
    models: dict[tuple[str, str], set[str]] = {}
    for row in cells:
        models.setdefault((row.name, row.key.device), set()).add(row.key.model)
    return models


def _is_wanted(row: VerdictRow, wanted: Filter, models: dict[tuple[str, str], set[str]]) -> bool:
    """Say whether a verdict has a cell for which all of a filter holds."""
    if wanted.decision and row.decision != wanted.decision:
        return False
    text = wanted.text.casefold()
    is_named = text in row.name.casefold()
    for cell in row.cells:
        own = models.get((cell.cell, cell.device), set())
        words = (cell.cell, cell.baseline_cell, cell.device, cell.target, *own)
        if (
            wanted.device in ("", cell.device)
            and wanted.target in ("", cell.target)
            and (not wanted.model or wanted.model in own)
            and (is_named or any(text in word.casefold() for word in words))
        ):
            return True
    return not row.cells and is_named and not (wanted.device or wanted.target or wanted.model)


def _state(
    name: str,
    entry: Device | None,
    row: DeviceRow | None,
    quarantined: health.Quarantined | None,
    sentinel_s: tuple[float, ...] = (),
) -> DeviceState:
    lab = row.lab if row is not None else ""
    if quarantined is None:
        state: Literal["ready", "not in the lab file"] = "ready" if entry is not None else "not in the lab file"
        return DeviceState(name=name, lab=lab, entry=entry, row=row, state=state, sentinel_s=sentinel_s)
    return DeviceState(
        name=name,
        lab=lab,
        entry=entry,
        row=row,
        state="quarantined",
        why=quarantined.why,
        since_utc=quarantined.since_utc,
        by=quarantined.by,
        sentinel_s=sentinel_s,
    )


def _sorted(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({word for word in words if word}))
