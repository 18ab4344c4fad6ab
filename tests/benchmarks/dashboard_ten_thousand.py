"""How long the dashboard's pages take over 10,000 runs: from the command to the first page, and each page again.

The runs are those of `history_ten_thousand`. Every page is asked for over HTTP as a browser does, in full. `--runs N`
measures another number.
"""

import argparse
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.history_ten_thousand import CELLS, series
from tests.unit.render_samples import make_run

REPEATS = 7


def get(url: str, address: str) -> tuple[bytes, float]:
    """Return a page and the seconds that it took, with a connection of its own."""
    started_s = time.perf_counter()
    connection = http.client.HTTPConnection(re.sub(r"^http://|/$", "", url), timeout=600)
    connection.request("GET", address)
    answer = connection.getresponse()
    page = answer.read()
    connection.close()
    assert answer.status == 200, (address, answer.status, page[:500])
    return page, time.perf_counter() - started_s


class Dashboard:
    """`edgedeploy serve` over a folder, as a person starts it."""

    def __init__(self, results: Path) -> None:
        self._results = results

    def __enter__(self) -> "Dashboard":
        self._started_s = time.perf_counter()
        command = [sys.executable, "-m", "edgedeploy", "serve", "--results", str(self._results), "--port", "0", "-q"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = re.match(r"(http://\S+)", self._process.stdout.readline())[1]
        _, _ = get(self.url, "/")
        self.first_page_s = time.perf_counter() - self._started_s
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGINT)
        assert self._process.wait(30) == 0


def main() -> None:
    """Write the runs, measure, and print the figures."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--runs", type=int, default=10_000)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGEDEPLOY_CACHE_DIR"] = f"{folder}/cache"
        os.environ["EDGEDEPLOY_STATE_DIR"] = f"{folder}/state"
        results = Path(folder) / "bench_results"
        template = make_run("candidate", blocks=16, samples=64, questions=500)
        for cell in range(CELLS):
            series(results, template, cell, given.runs // CELLS)
        with Dashboard(results) as dashboard:
            without_index_s = dashboard.first_page_s
        with Dashboard(results) as dashboard:
            cell = json.loads(get(dashboard.url, "/api/cells")[0])["cells"][7]["id"]
            verdict = json.loads(get(dashboard.url, "/api/verdicts")[0])["verdicts"][0]["id"]
            pages = {
                "verdicts": "/",
                "verdicts_filtered": "/?decision=PASS&device=board-3&page=2",
                "verdict": f"/verdict/{verdict}",
                "cells": "/trends",
                "trend": f"/trends?cell={cell}",
                "devices": "/devices",
            }
            times_s = {name: [get(dashboard.url, page)[1] for _ in range(REPEATS)] for name, page in pages.items()}
            sizes = {name: len(get(dashboard.url, page)[0]) for name, page in pages.items()}
            with_index_s = dashboard.first_page_s
        figures = {
            "runs": given.runs,
            "start_to_first_page_without_index_s": round(without_index_s, 2),
            "start_to_first_page_s": round(with_index_s, 2),
            "page_s": {name: round(statistics.median(taken), 3) for name, taken in times_s.items()},
            "page_slowest_s": {name: round(max(taken), 3) for name, taken in times_s.items()},
            "page_kilobytes": {name: round(size / 1000) for name, size in sizes.items()},
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
