"""How long the history of 10,000 runs takes: to index, to look for news, all cells, one trend; SQLite.

The runs are those that a session of 16 blocks writes, each with levels, dates and releases of its own: 40 cells of 250
runs, and a verdict for every fourth run. `--store URL` measures a PostgreSQL too, `--runs N` another number. On a busy
machine the processor's seconds say more than those of the wall.
"""

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from msgspec.structs import replace

from edgedeploy.documents import encode_json
from edgedeploy.records.run import Run
from edgedeploy.results import Results
from tests.unit.render_samples import make_cell, make_run, make_verdict

CELLS = 40
REPEATS = 5
PLAINLY = 1000  # files that are read with json.loads, for comparison; the time is scaled to all
START = datetime(2026, 1, 1, tzinfo=UTC)


def series(results: Path, template: Run, cell: int, runs: int) -> None:
    """Write the runs of one cell: noise that remembers itself, one change of level, some releases."""
    draws = random.Random(cell)
    store, drift = Results(results), 0.0
    for number in range(runs):
        drift = 0.3 * drift + draws.gauss(0, 0.02)
        factor = math.exp(drift) * (1.12 if number >= runs // 2 + cell else 1.0)
        when = (START + number * timedelta(hours=6, seconds=cell)).strftime("%Y-%m-%dT%H:%M:%SZ")
        release = number // 25
        run = replace(
            template,
            cell=f"cell-{cell}",
            device=f"board-{cell % 8}",
            session=f"session-{cell}-{number}",
            started_utc=when,
            artifact=replace(template.artifact, model=f"model-{cell}", sha256=f"{cell:02x}{release:02x}" * 16),
            visits=tuple(
                replace(
                    visit,
                    bursts=tuple(
                        replace(burst, samples_s=tuple(sample_s * factor for sample_s in burst.samples_s))
                        for burst in visit.bursts
                    ),
                )
                for visit in template.visits
            ),
        )
        path = store.save_run(run)
        if number % 4 == 0:
            judged = replace(
                make_verdict(make_cell(cell=run.cell, candidate_run=str(path), baseline_run="")),
                judged_utc=when,
                name=f"release {release}",
            )
            report = results / "reports" / f"{path.stem}-{cell}.json"
            report.parent.mkdir(exist_ok=True)
            report.write_bytes(encode_json(judged))


# In a process of its own, as a person's command is: with what the libraries take to load.
_COMMAND = "import sys, edgedeploy.cli; sys.exit(edgedeploy.cli.run(sys.argv[1:]))"


def command_s(*arguments: str) -> dict[str, float]:
    """Return the seconds of one `edgedeploy history`, by the wall and of the processor."""
    started, cpu_s = time.perf_counter(), _children_s()
    subprocess.run([sys.executable, "-c", _COMMAND, "history", "-q", *arguments], check=True, capture_output=True)
    return {"wall_s": time.perf_counter() - started, "cpu_s": _children_s() - cpu_s}


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def questions(results: Path, url: str) -> dict[str, dict[str, float]]:
    """Return the seconds of what a dashboard asks, in a process that is running already."""
    from edgedeploy.history.store import open_store

    with open_store(results, url) as store:
        key = store.cell_named("model-7")
        asked = {
            "refresh_nothing_new": store.refresh,
            "all_cells": store.cells,
            "one_trend": lambda: store.whole_trend(key, "latency_p50"),
            "newest_50_verdicts": store.verdicts,
            "devices": store.devices,
        }
        return {name: median_s(ask) for name, ask in asked.items()}


def median_s(act) -> dict[str, float]:
    """Return the median seconds of some repeats, by the wall and of the processor."""
    taken = []
    for _ in range(REPEATS):
        started, cpu_s = time.perf_counter(), time.process_time()
        act()
        taken.append((time.perf_counter() - started, time.process_time() - cpu_s))
    wall_s, cpu_s = (statistics.median(column) for column in zip(*taken, strict=True))
    return {"wall_s": wall_s, "cpu_s": cpu_s}


def main() -> None:
    """Write the runs, measure, and print the figures."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--runs", type=int, default=10_000)
    asked.add_argument("--store", default="")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGEDEPLOY_CACHE_DIR"] = f"{folder}/cache"
        results = Path(folder) / "bench_results"
        template = make_run("candidate", blocks=16, samples=64, questions=500)
        for cell in range(CELLS):
            series(results, template, cell, given.runs // CELLS)
        files = list(results.rglob("*.json"))
        size_bytes = sum(path.stat().st_size for path in files)
        where = ("--results", str(results))
        some = files[:: max(len(files) // PLAINLY, 1)]
        cpu_s = time.process_time()
        for path in some:  # what any reader of them must do at least
            json.loads(path.read_bytes())
        plain_s = (time.process_time() - cpu_s) * len(files) / len(some)
        build = command_s(*where)
        figures = {
            "runs": given.runs,
            "files": len(files),
            "megabytes": round(size_bytes / 1e6),
            "load_average": os.getloadavg()[0],
            "json_loads_of_all_cpu_s": plain_s,
            "build_index": build,
            "build_cpu_against_json": build["cpu_s"] / plain_s,
            "index_megabytes": round(sum(one.stat().st_size for one in Path(folder).glob("cache/history/*")) / 1e6, 1),
            "command_nothing_but_help": command_s("--help"),
            "command_all_cells": command_s(*where),
            "command_one_trend": command_s("model-7", *where),
            "in_process": questions(results, ""),
        }
        if given.store:
            push = command_s(*where, "--store", given.store, "--push")
            figures["shared"] = {"push": push, "in_process": questions(results, given.store)}
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
