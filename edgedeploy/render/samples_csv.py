"""Raw samples as CSV: one row an inference, floats so that reading them back gives the very same numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping

from edgedeploy.records.run import Run, Visit
from edgedeploy.records.verdict import Verdict
from edgedeploy.render.figures import drop_reason, one_line

COLUMNS = ("cell", "side", "run", "block", "position", "phase", "pair", "index", "seconds", "dropped")
# A spreadsheet takes what begins like this for a formula, and obeys it (OWASP, CSV Injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

Row = tuple[str | int, ...]


def samples_csv(verdict: Verdict, runs: Mapping[str, Run]) -> Iterator[str]:
    """Yield lines of CSV, one for every inference of a verdict's runs: the first, the warm-up's, the timed ones.

    Args:
        verdict: the verdict.
        runs: by run id; a run that is not at hand has no rows.
    """
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    for row in _rows(verdict, runs):
        writer.writerow(row)
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _rows(verdict: Verdict, runs: Mapping[str, Run]) -> Iterator[Row]:
    yield COLUMNS
    for cell in verdict.cells:
        for side, name in (("baseline", cell.baseline_run), ("candidate", cell.candidate_run)):
            if run := runs.get(name):
                yield from _run_rows((_harmless(cell.cell), side, _harmless(name)), run)


def _run_rows(first: tuple[str, str, str], run: Run) -> Iterator[Row]:
    for visit in run.visits:
        dropped = _harmless(drop_reason(visit))
        for phase, pair, index, sample_s in _inferences(visit):
            yield (*first, visit.block, visit.position, phase, pair, index, repr(float(sample_s)), dropped)


def _inferences(visit: Visit) -> Iterable[tuple[str, int | str, int, float]]:
    yield "first", "", 0, visit.first_inference_s
    for index, sample_s in enumerate(visit.warm_up_samples_s):
        yield "warm-up", "", index, sample_s
    for burst in visit.bursts:
        for index, sample_s in enumerate(burst.samples_s):
            yield "timed", burst.pair, index, sample_s


def _harmless(text: str) -> str:
    """Return text on one line that no spreadsheet takes for a formula.

    >>> _harmless("=1+1"), _harmless("pruned-int8")
    ("'=1+1", 'pruned-int8')
    """
    line = one_line(text)
    return f"'{line}" if line.startswith(_FORMULA) else line
