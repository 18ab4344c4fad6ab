"""The history's store: what bench_results/ holds, indexed for questions, or a lab's.

The JSON files stay the record. The index of a folder is made from them and can be made again at any time; it lies in
the cache, so that nothing derived is committed with the results, and a folder that cannot be written to has a history.
A lab's store is PostgreSQL, to which many folders are pushed; it answers the same questions.
"""

from __future__ import annotations

import getpass
import socket
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgedeploy.documents import closest
from edgedeploy.errors import UsageError
from edgedeploy.history import reading
from edgedeploy.history.database import Database, demand_libraries, open_index, open_shared
from edgedeploy.history.trends import newest_of, trend_of
from edgedeploy.records.history import (
    CellKey,
    CellRow,
    DeviceRow,
    HistoryMetric,
    Point,
    Refreshed,
    Skipped,
    Trend,
    VerdictCell,
    VerdictRow,
    cell_text,
)
from edgedeploy.records.verdict import Verdict
from edgedeploy.render.figures import one_line
from edgedeploy.storage import cache_dir, sha256_bytes

if TYPE_CHECKING:
    import sqlalchemy as sa

Progress = Callable[[str], None]

METRICS: tuple[HistoryMetric, ...] = typing.get_args(HistoryMetric)
# Files read before what they say is written: a transaction a file would wait for the disk ten thousand times.
_BATCH = 256
_SPARKLINE_POINTS = 40


def _silent(text: str) -> None:
    """Tell nobody."""


def open_store(results: Path, url: str = "", *, lab: str = "", rebuild: bool = False) -> Store:
    """Open the history of a results folder, or a lab's shared store.

    Args:
        results: usually ./bench_results; need not exist for a shared store that is only asked.
        url: "": the folder's own index, an SQLite file in the cache; else "postgresql://user@host/database".
        lab: who we are in a shared store; "": user@host.
        rebuild: make the index anew.

    Raises:
        BackendMissing: the extra `history`, or `postgres`, is not installed.
        UsageError: the folder or the URL is wrong.
        StoreError: the database cannot be reached, or was made by a newer edgedeploy.
    """
    demand_libraries(is_shared=bool(url))
    if url:
        if rebuild:
            raise UsageError(
                "a shared store is not made from one folder, and cannot be made anew from it; leave --rebuild out"
            )
        return Store(results, open_shared(url), lab=lab or f"{getpass.getuser()}@{socket.gethostname()}")
    if not results.is_dir():
        raise UsageError(
            f"there is no folder {results}; name the results with --results, or measure something: edgedeploy bench"
        )
    database, rebuilt = open_index(index_path(results), rebuild=rebuild)
    return Store(results, database, rebuilt=rebuilt)


def index_path(results: Path) -> Path:
    """Return where a folder's index is: in the cache, named by the folder's place."""
    return cache_dir() / "history" / f"{sha256_bytes(str(results.resolve()).encode())[:16]}.sqlite"


class Store:
    """Answers questions about runs, verdicts and devices; every answer is of one moment. Usable from several threads.

    Args:
        results: the folder that `refresh` and `push` read.
        database: as opened.
        lab: whose runs are pushed; "" for the index of a folder.
        rebuilt: why the index is new.
    """

    def __init__(self, results: Path, database: Database, *, lab: str = "", rebuilt: str = "") -> None:
        self._results, self._database, self._lab, self._rebuilt = results, database, one_line(lab)[:200], rebuilt

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def where(self) -> str:
        """Say in words which store this is; never with a password."""
        return self._database.where

    @property
    def is_shared(self) -> bool:
        """Whether this is a lab's store, which knows more than one folder."""
        return self._database.is_shared

    @property
    def lab(self) -> str:
        """Who we are in a shared store; "" in the index of a folder."""
        return self._lab

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    # ------------------------------------------------------------ taking in

    def refresh(self, progress: Progress = _silent) -> Refreshed:
        """Read what is new in the folder, and forget what is gone; a shared store is as it is, for it is pushed to."""
        return Refreshed() if self.is_shared else self._take_in(progress, forgets=True)

    def push(self, progress: Progress = _silent) -> Refreshed:
        """Send what is new in the folder to the shared store; what is gone from the folder stays there.

        Raises:
            UsageError: this is no shared store, or there is no folder.
        """
        if not self.is_shared:
            raise UsageError(
                "there is no shared store to push to; name one with --store postgresql://user@host/database"
            )
        if not self._results.is_dir():
            raise UsageError(f"there is no folder {self._results} to push; name the results with --results")
        return self._take_in(progress, forgets=False)

    def _take_in(self, progress: Progress, *, forgets: bool) -> Refreshed:
        seen = {one.path: one for one in reading.scan(self._results)}
        known = self._known_files()
        fresh = [one for path, one in sorted(seen.items()) if known.get(path, ())[:2] != (one.size_bytes, one.mtime_ns)]
        gone = sorted(known.keys() - seen.keys()) if forgets else []
        counts: dict[str, int] = defaultdict(int)
        problems = {path: problem for path, (_, _, problem) in known.items() if problem and path in seen}
        for begin in range(0, len(fresh), _BATCH):
            taken = [reading.read(self._results, one) for one in fresh[begin : begin + _BATCH]]
            self._write(taken)
            if len(fresh) > _BATCH:
                progress(f"reading results: {min(begin + _BATCH, len(fresh))} of {len(fresh)} files")
            for one in taken:
                problems.pop(one.seen.path, None)
                if one.problem:
                    problems[one.seen.path] = one.problem
                elif one.row is not None:
                    counts[one.seen.kind] += 1
        if forgets and (gone or any(one.path in known for one in fresh)):
            self._forget(gone)
        rebuilt, self._rebuilt = self._rebuilt, ""
        return Refreshed(
            runs=counts["run"],
            verdicts=counts["verdict"],
            passports=counts["passport"],
            known=len(seen) - len(fresh),
            removed=len(gone),
            skipped=tuple(Skipped(path=path, why=why) for path, why in sorted(problems.items())),
            rebuilt=rebuilt,
        )

    def _known_files(self) -> dict[str, tuple[int, int, str]]:
        import sqlalchemy as sa

        from edgedeploy.history.schema import files

        chosen = sa.select(files.c.path, files.c.size_bytes, files.c.mtime_ns, files.c.problem)
        with self._database.reading() as connection:
            rows = connection.execute(chosen.where(files.c.lab == self._lab)).all()
        return {path: (size, mtime, problem) for path, size, mtime, problem in rows}

    def _write(self, taken: Sequence[reading.Read]) -> None:
        """Write what a batch of files said; rows go in by their keys' order, so that no two writers lock each other."""
        from edgedeploy.history import schema

        tables = {"run": schema.runs, "verdict": schema.verdicts, "passport": schema.passports}
        by_digest = sorted(taken, key=lambda one: one.digest)
        with self._database.writing() as connection:
            for kind, table in tables.items():
                rows = {one.digest: one.row for one in by_digest if one.seen.kind == kind and one.row is not None}
                self._database.add(connection, table, [{**row, "lab": self._lab} for row in rows.values()])
            cells = {one.digest: one.cells for one in by_digest}
            self._database.add(connection, schema.verdict_cells, [cell for rows in cells.values() for cell in rows])
            self._database.put(
                connection,
                schema.files,
                [
                    {
                        "lab": self._lab,
                        "path": one.seen.path,
                        "kind": one.seen.kind,
                        "size_bytes": one.seen.size_bytes,
                        "mtime_ns": one.seen.mtime_ns,
                        "digest": one.digest,
                        "problem": one.problem,
                    }
                    for one in sorted(taken, key=lambda one: one.seen.path)
                ],
            )

    def _forget(self, gone: Sequence[str]) -> None:
        """Drop files that are gone, and what no file says any more."""
        import sqlalchemy as sa

        from edgedeploy.history import schema

        files = schema.files
        with self._database.writing() as connection:
            if gone:
                drop = sa.delete(files).where(files.c.lab == self._lab, files.c.path == sa.bindparam("gone"))
                connection.execute(drop, [{"gone": path} for path in gone])
            said = sa.select(files.c.digest).where(files.c.problem == "")
            for table in (schema.runs, schema.verdicts, schema.verdict_cells, schema.passports):
                connection.execute(sa.delete(table).where(table.c.digest.not_in(said)))

    # ------------------------------------------------------------ cells and their trends

    def cells(self, metric: str = "latency_p50", *, device: str = "") -> list[CellRow]:
        """Return every cell in one line, with its newest change in one metric; by name and device.

        Args:
            metric: one of METRICS.
            device: only the cells on it.

        Raises:
            UsageError: there is no such metric.
        """
        return [row for row, _ in self.trends(metric, device=device)]

    def trends(
        self, metric: str = "latency_p50", *, cell: CellKey | None = None, device: str = "", last: int = 0
    ) -> list[tuple[CellRow, Trend]]:
        """Return every cell with its whole trend: its changes, whose they are, and what may have done them.

        Args:
            metric: one of METRICS.
            cell: only this one.
            device: only the cells on it.
            last: how many of the newest points to show; changes are found in all of them. 0: all.
        """
        chosen = metric_named(metric)
        with self._database.reading() as connection:
            rows, judged = _runs(connection, cell=cell, device=device), _judged(connection)
        cells: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for row in rows:
            cells[row.lab, row.cell_id].append(row)
        found = []
        for series in cells.values():
            kept = _without_repeats(series)
            trend = trend_of(_key(kept[-1]), chosen, _points(kept, chosen, judged))
            found.append((_line(trend, kept, judged), newest_of(trend, last)))
        return sorted(found, key=lambda one: (one[0].name, one[0].key.device, cell_text(one[0].key)))

    def cell_named(self, word: str, *, device: str = "") -> CellKey:
        """Return the cell that a person means by a word.

        Args:
            word: its name in a release file, its model, or a part of "model/target/backend/precision/device".
            device: where several have that name.

        Raises:
            UsageError: none or several fit; it names them.
        """
        import sqlalchemy as sa

        from edgedeploy.history.schema import runs

        with self._database.reading() as connection:
            found = connection.execute(sa.select(*(runs.c[name] for name in _KEY), runs.c.cell).distinct()).all()
        names: dict[CellKey, set[str]] = defaultdict(set)
        for row in found:
            names[_key(row)].add(row.cell)
        known = {key: {*own, cell_text(key)} for key, own in names.items() if device in ("", key.device)}
        exact = [key for key, own in known.items() if word in own]
        by_model = [key for key in known if key.model == word]
        partly = [key for key, own in known.items() if any(word in one for one in own)]
        fitting = exact or by_model or partly
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            listed = sorted(cell_text(key) for key in fitting)
            more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
            raise UsageError(
                f"{word!r} fits {len(fitting)} cells: {', '.join(listed[:_LISTED])}{more}; give more of the one that "
                f"you mean, or its device with --device"
            )
        where = f" on device {device!r}" if device else ""
        likely = closest(word, {name for own in known.values() for name in own})
        raise UsageError(f"no cell{where} is called {word!r}{likely}; edgedeploy history lists all {len(known)}")

    def trend(self, cell: CellKey, metric: str, last: int = 0) -> list[Point]:
        """Return one metric of a cell's runs, oldest first.

        A run that was measured as the baseline of another run of the same cell is left out: it shows an older artifact
        again.

        Args:
            cell: as of `cells` or `cell_named`.
            metric: one of METRICS.
            last: how many of the newest; 0: all.
        """
        chosen = metric_named(metric)
        with self._database.reading() as connection:
            rows, judged = _runs(connection, cell=cell), _judged(connection)
        points = _points(_without_repeats(rows), chosen, judged)
        return points[-last:] if last else points

    def whole_trend(self, cell: CellKey, metric: str, last: int = 0) -> Trend:
        """Return the trend of one cell, as `trends` has it.

        Raises:
            UsageError: no run is of this cell.
        """
        found = self.trends(metric, cell=cell, last=last)
        if not found:
            raise UsageError(f"{self.where} has no run of {cell_text(cell)}")
        return found[0][1]

    # ------------------------------------------------------------ verdicts and devices

    def verdicts(self, last: int = 50, offset: int = 0) -> list[VerdictRow]:
        """Return verdicts, newest first.

        Args:
            last: how many; 0: all.
            offset: how many of the newest to pass over.
        """
        import sqlalchemy as sa

        from edgedeploy.history.schema import verdict_cells, verdicts

        named = (verdicts.c[name] for name in ("digest", "lab", "path", "name", "decision", "judged_utc"))
        newest = sa.select(*named).order_by(verdicts.c.judged_utc.desc(), verdicts.c.digest).offset(offset)
        newest = newest.limit(last) if last else newest.limit(_ALL)
        page = newest.subquery()
        with self._database.reading() as connection:
            rows = connection.execute(newest).all()
            inside = connection.execute(
                sa.select(verdict_cells)
                .join(page, page.c.digest == verdict_cells.c.digest)
                .order_by(verdict_cells.c.digest, verdict_cells.c.position)
            ).all()
        cells: dict[str, list[VerdictCell]] = defaultdict(list)
        for one in inside:
            cells[one.digest].append(
                VerdictCell(
                    cell=one.cell,
                    baseline_cell=one.baseline_cell,
                    device=one.device,
                    target=one.target,
                    decision=one.decision,
                )
            )
        return [
            VerdictRow(
                id=row.digest,
                name=row.name,
                decision=row.decision,
                judged_utc=row.judged_utc,
                cells=tuple(cells[row.digest]),
                path=row.path,
                lab=row.lab,
            )
            for row in rows
        ]

    def verdict(self, id: str) -> Verdict:
        """Return a whole verdict.

        Args:
            id: of its VerdictRow.

        Raises:
            UsageError: there is none.
            StoreError: what is kept is no verdict that this edgedeploy can read.
        """
        import sqlalchemy as sa

        from edgedeploy.history.schema import verdicts

        with self._database.reading() as connection:
            kept = connection.scalar(sa.select(verdicts.c.document).where(verdicts.c.digest == one_line(id)[:64]))
        if kept is None:
            raise UsageError(f"there is no verdict {one_line(id)[:64]!r} in {self.where}")
        return reading.unpacked_verdict(bytes(kept))

    def devices(self) -> list[DeviceRow]:
        """Return every device that a run was measured on, by name."""
        import sqlalchemy as sa

        from edgedeploy.history.schema import passports

        with self._database.reading() as connection:
            rows = _runs(connection)
            order = passports.c.started_utc, passports.c.digest
            newest = {(one.lab, one.device): one for one in connection.execute(sa.select(passports).order_by(*order))}
        devices: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for row in rows:
            devices[row.lab, row.device].append(row)
        return [_device(series, newest.get(name)) for name, series in sorted(devices.items())]


_LISTED = 8
_ALL = 2**31 - 1  # SQLite knows no OFFSET without a LIMIT
_KEY = ("lab", "model", "target", "backend", "precision", "device", "options")


def metric_named(text: str) -> HistoryMetric:
    """Return a metric of the history by its name.

    Raises:
        UsageError: there is none.
    """
    for metric in METRICS:
        if metric == text:
            return metric
    raise UsageError(f"there is no metric {text!r}{closest(text, METRICS)} (known: {', '.join(METRICS)})")


def _runs(connection: sa.Connection, *, cell: CellKey | None = None, device: str = "") -> list[Any]:
    """Return the rows of runs, oldest first: all, of one cell, or on one device."""
    import sqlalchemy as sa

    from edgedeploy.history.schema import runs

    chosen = sa.select(runs).order_by(runs.c.started_utc, runs.c.digest)
    if cell is not None:
        words = (cell.model, cell.target, cell.backend, cell.precision, cell.device, cell.options)
        chosen = chosen.where(runs.c.lab == cell.lab, runs.c.cell_id == reading.cell_id(words))
    if device:
        chosen = chosen.where(runs.c.device == device)
    return list(connection.execute(chosen).all())


@dataclass(frozen=True, slots=True)
class _Judged:
    """What verdicts say of runs, by their names: the newest verdict on a candidate, the newest that rests on a run."""

    candidates: Mapping[str, Any] = field(default_factory=dict)
    releases: Mapping[str, str] = field(default_factory=dict)


def _judged(connection: sa.Connection) -> _Judged:
    import sqlalchemy as sa

    from edgedeploy.history.schema import verdict_cells, verdicts

    named = verdict_cells.c
    rows = connection.execute(
        sa.select(named.candidate_run, named.baseline_run, named.decision, verdicts.c.name, verdicts.c.judged_utc)
        .join(verdicts, verdicts.c.digest == named.digest)
        .order_by(verdicts.c.judged_utc, verdicts.c.digest, named.position)
    ).all()
    # Of several verdicts on a run the newest counts, which comes last.
    return _Judged(
        {row.candidate_run: row for row in rows if row.candidate_run},
        {run: row.name for row in rows for run in (row.baseline_run, row.candidate_run) if run},
    )


def _key(row: Any) -> CellKey:
    return CellKey(**{name: getattr(row, name) for name in _KEY})


def _without_repeats(rows: Sequence[Any]) -> list[Any]:
    """Leave out runs of baselines whose candidate is a run of the same cell."""
    sessions = {row.session for row in rows if row.side == "candidate"}
    return [row for row in rows if row.side != "baseline" or row.session not in sessions]


def _points(rows: Iterable[Any], metric: HistoryMetric, judged: _Judged) -> list[Point]:
    return [_point(row, value, judged) for row in rows if (value := getattr(row, metric)) is not None]


def _point(row: Any, value: float, judged: _Judged) -> Point:
    verdict = judged.candidates.get(row.name)
    return Point(
        utc=row.started_utc,
        value=value,
        digest=row.digest,
        run=row.name,
        path=row.path,
        cell=row.cell,
        session=row.session,
        side=row.side,
        artifact_sha256=row.artifact_sha256,
        edgedeploy=row.edgedeploy,
        runtime=row.runtime,
        kernel=row.kernel,
        driver=row.driver,
        system=row.system,
        visits=row.visits,
        evaluation=row.evaluation,
        sentinel_s=row.sentinel_s,
        sentinel=row.sentinel,
        release=judged.releases.get(row.name, ""),
        decision=verdict.decision if verdict is not None else None,
    )


def _line(trend: Trend, rows: Sequence[Any], judged: _Judged) -> CellRow:
    newest = rows[-1]
    values = {one: next((v for row in reversed(rows) if (v := getattr(row, one)) is not None), None) for one in METRICS}
    verdicts = [verdict for row in rows if (verdict := judged.candidates.get(row.name)) is not None]
    verdict = max(verdicts, key=lambda one: one.judged_utc, default=None)
    change = trend.changes[-1] if trend.changes else None
    return CellRow(
        key=trend.cell,
        name=newest.cell,
        runs=len(rows),
        first_utc=rows[0].started_utc,
        last_utc=newest.started_utc,
        metric=trend.metric,
        worse=trend.worse,
        last=values[trend.metric],
        values={one: value for one, value in values.items() if value is not None},
        recent=tuple(point.value for point in trend.points[-_SPARKLINE_POINTS:]),
        change=change,
        since=len(trend.points) - change.index if change else len(trend.points),
        note=trend.note,
        decision=verdict.decision if verdict is not None else None,
        release=verdict.name if verdict is not None else "",
        judged_utc=verdict.judged_utc if verdict is not None else "",
        path=newest.path,
    )


def _device(rows: Sequence[Any], passport: Any) -> DeviceRow:
    newest = rows[-1]
    trend = _sentinel_trend(rows)
    return DeviceRow(
        device=newest.device,
        lab=newest.lab,
        cells=len({row.cell_id for row in rows}),
        runs=len(rows),
        first_seen_utc=rows[0].started_utc,
        last_seen_utc=newest.started_utc,
        hostname=newest.hostname,
        machine=newest.machine,
        system=newest.system,
        kernel=newest.kernel,
        driver=newest.driver,
        sentinel_s=trend.points[-1].value if trend.points else None,
        sentinel_change=trend.changes[-1] if trend.changes else None,
        passport=passport.name if passport is not None else "",
        passport_utc=passport.started_utc if passport is not None else "",
        run_to_run_cv=passport.run_to_run_cv if passport is not None else None,
    )


def _sentinel_trend(rows: Sequence[Any]) -> Trend:
    """Return the trend of a device's newest sentinel, one point a session: all its runs carry the same readings."""
    read = [row for row in rows if row.sentinel_s is not None]
    sessions = {row.session: row for row in read if row.sentinel == read[-1].sentinel}
    points = [_point(row, row.sentinel_s, _Judged()) for row in sessions.values()]
    # What was measured in these sessions is not what the sentinel is.
    own = [msgspec.structs.replace(point, artifact_sha256="", sentinel_s=None, sentinel="") for point in points]
    key = CellKey(model="sentinel", target="", backend="", precision="", device=rows[-1].device, lab=rows[-1].lab)
    return trend_of(key, "latency_p50", own)
