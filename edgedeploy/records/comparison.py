"""The precisions of one model side by side: what each costs and gains against fp32, measured on one device."""

from __future__ import annotations

from edgedeploy.documents import Record
from edgedeploy.records.verdict import CellVerdict, Contender

# History of edgedeploy.comparison:
#   1 (0.3.0)  first version
FORMAT = "edgedeploy.comparison/1"


class Comparison(Record, frozen=True, kw_only=True):
    """What `bench --compare-precisions` found.

    Attributes:
        contenders: a row for each back end and precision; the baseline of each back end is its own fp32.
        cells: what each row was judged by: latency against "+0%", accuracy against `accuracy_margin`.
        play_offs: the best of two back ends, measured interleaved with each other.
        accuracy_margin: as written; "" where accuracy was not measured.
        conclusions: sentences; the last one names the fastest that keeps accuracy.
        fastest: cell of that one; "" where no latency counts.
        runs: files of all runs.
    """

    format: str = FORMAT
    name: str
    target: str
    device: str
    contenders: tuple[Contender, ...]
    cells: tuple[CellVerdict, ...]
    play_offs: tuple[CellVerdict, ...] = ()
    accuracy_margin: str = ""
    conclusions: tuple[str, ...]
    fastest: str = ""
    runs: tuple[str, ...] = ()
