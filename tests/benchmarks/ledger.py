"""Outcomes of long benchmarks, one JSON line each: a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.__main__ import ROOT

FOLDER = ROOT / "bench_results" / "ledgers"


class Ledger:
    """A file of outcomes; a line that a dying process tore is ignored, and cut off before the next is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return every whole line."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

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
            stream.write(json.dumps(outcome) + "\n")
