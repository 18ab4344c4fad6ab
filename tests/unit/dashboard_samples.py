"""A results folder for the dashboard's tests: two cells over some weeks, one of which got slower, and their verdicts."""

import random
from pathlib import Path

from msgspec.structs import replace

from edgedeploy.documents import write_json
from edgedeploy.records.run import Run
from edgedeploy.results import Results

from .render_samples import make_cell, make_run, make_verdict, visit

# What a device or a person may have written: none of it may become markup, a path or a line of a script.
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">{{7*7}}"


def stored(results: Results, run: Run, day: int, hour: int, **changes) -> str:
    """Store a run under a day of its own, as the verdict then names it."""
    when = f"2026-{10 + day // 28:02}-{1 + day % 28:02}T{hour:02}:00:00Z"
    return str(results.save_run(replace(run, started_utc=when, session=f"session-{day}-{hour}", **changes)))


def make_results(folder: Path, *, days: int = 30, slower_from: int = 20, sentinel: bool = False) -> Path:
    """Write runs and verdicts of `days` days; from one day on the candidate is a third slower.

    The cell "pruned-int8" is measured beside "dense-fp32" on pi5-desk each day, and alone on orin-2 every fifth.
    """
    results = Results(folder / "bench_results")
    for day in range(days):
        is_slower = day >= slower_from
        p50_s = 0.0029 * (1.3 if is_slower else 1.0)
        extra = {"sentinel": (visit(random.Random(day), -1, 0, 0.0015, samples=20),)} if sentinel else {}
        few = {"blocks": 3, "samples": 60, "questions": 50, "seed": day}
        old = stored(results, make_run("baseline", name="dense-fp32", **few), day, 9, **extra)
        new = stored(results, make_run("candidate", name="pruned-int8", p50_s=p50_s, **few), day, 9, **extra)
        if day % 5 == 0:
            alone = make_run("candidate", name="pruned-int8", p50_s=0.0011, **few)
            stored(results, alone, day, 11, device="orin-2", side="single")
        decision = "FAIL" if is_slower else "INCONCLUSIVE" if day == 7 else "PASS"
        cell = make_cell(decision, baseline_run=old, candidate_run=new)
        verdict = make_verdict(cell, decision=decision, name=f"fashion-mnist 1.{day}")
        judged = f"2026-{10 + day // 28:02}-{1 + day % 28:02}T10:00:00Z"
        file = results.root / "reports" / f"{judged.replace('-', '').replace(':', '')}-fashion-mnist-1.{day}.json"
        write_json(file, replace(verdict, judged_utc=judged))
        file.with_suffix(".html").write_text(f"<!DOCTYPE html><title>{day}</title><h1>a report</h1>", encoding="utf-8")
    return results.root


def make_hostile_verdict(root: Path) -> None:
    """Add a verdict whose every text is an attack."""
    cell = make_cell("FAIL", cell=HOSTILE, baseline_cell=HOSTILE, device=HOSTILE, target=HOSTILE, notes=(HOSTILE,))
    cell = replace(cell, findings=tuple(replace(one, reason=HOSTILE, needed=HOSTILE) for one in cell.findings))
    verdict = replace(make_verdict(cell, decision="FAIL", name=HOSTILE), judged_utc="2026-12-24T00:00:00Z")
    write_json(root / "reports" / "20261224T000000Z-hostile.json", verdict)
