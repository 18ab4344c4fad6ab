"""Outcomes of long benchmarks, one JSON line each: a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.__main__ import ROOT, cpu_model

FOLDER = ROOT / "bench_results" / "ledgers"


class Ledger:
    """A file of outcomes; a line that a dying process tore is ignored, and cut off before the next is written.

    It may hold those of several machines: here only this machine's are read, and added to.
    """

    def __init__(self, path: Path, machine: str = "") -> None:
        self.path = path
        self.machine = machine or cpu_model()

    def read(self) -> list[dict[str, Any]]:
        """Return the outcome in every whole line of this machine."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        outcomes = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [one for one in outcomes if one["machine"] == self.machine]

    def append(self, outcome: dict[str, Any]) -> None:
        """Write one outcome down."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = ""
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                self.path.write_text(whole, encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"machine": self.machine, **outcome}) + "\n")
