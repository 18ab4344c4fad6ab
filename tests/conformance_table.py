"""The conformance table: every micro-net × back end × precision, right or refused, with reasons and versions.

    python -m tests.conformance_table [--write FILE.md] [--backend NAME] [--precision NAME] [--cache DIR] [--jobs N] [NET ...]

Cells that are not tried now keep what FILE.md says of them. Ends with 1 where a cell is neither right nor built nor refused.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgedeploy.storage import write_atomic
from tests.conformance import FAILURES, MOST_RELATIVE, ROOT, TARGET, TARGETS, Outcome, Worker, absent, columns

FILE = ROOT / "edgedeploy" / "CONFORMANCE.md"
Cell = tuple[str, str]
HEAD = f"""\
# What each runtime makes of each trap

Made by `python -m tests.conformance_table --write edgedeploy/CONFORMANCE.md`; do not edit. Every net is one trap for
converters and runtimes, made in `tests/backends/micro_nets.py`, compiled for the target `{TARGET}` and run by the device half
of each back end. *right*: fp32 and fp16 within {MOST_RELATIVE["fp32"]:g} and {MOST_RELATIVE["fp16"]:g} of PyTorch, in ratio to the largest value; int8 as near
as rounding allows to the int8 form that it was compiled from. *right, mixed*: so, and some operators of the int8 artifact
compute in float, which its manifest lists. *built*: compiled, and not run, since the table was made without such a device; it
says nothing of the answers. *refused*: not compiled, with the sentence below. The fake runtime computes nothing: only names
and shapes are compared. {", ".join(f"{name} is compiled for {other}" for name, other in TARGETS.items())}.
"""
VERSIONS = "| back end | made with |"
CELL = re.compile(r"(?P<word>\w+)(?P<mixed>, mixed)?(?: \[(?P<note>\d+)\])?")


def table(
    nets: Mapping[str, str], heads: Iterable[str], cells: Mapping[Cell, Outcome], versions: Mapping[str, str]
) -> str:
    """Return the document.

    Args:
        nets: name → trap, in the order of the rows.
        heads: "back end precision", in the order of the columns.
        cells: (net, column) → what became of it; a cell that is absent was never tried.
        versions: back end → what its artifacts were made with.
    """
    heads = list(heads)
    notes: dict[str, int] = {}
    rows = []
    for net, trap in nets.items():
        words = [_cell_text(cells.get((net, head)), notes) for head in heads]
        rows.append(f"| `{net}` | {trap} | {' | '.join(words)} |")
    counts = {head: Counter(found.word for (_, column), found in cells.items() if column == head) for head in heads}
    totals = [", ".join(f"{number} {word}" for word, number in sorted(counts[head].items())) or "–" for head in heads]
    lines = [
        HEAD,
        f"| net | trap | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
        *rows,
        f"| {len(nets)} nets | | {' | '.join(totals)} |",
        "",
        VERSIONS,
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in sorted(versions.items())),
        "",
        *(f"[{number}] {why}" + "\n" for why, number in notes.items()),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _cell_text(found: Outcome | None, notes: dict[str, int]) -> str:
    if found is None or found.word == "missing":
        return "–"
    if found.word == "right":
        return "right, mixed" if found.is_mixed else "right"
    # A row of a table and a footnote are one line each.
    number = notes.setdefault(" ".join(found.why.replace("|", "/").split()), len(notes) + 1)
    return f"{found.word}{', mixed' if found.word == 'built' and found.is_mixed else ''} [{number}]"


def read_table(text: str) -> tuple[dict[Cell, Outcome], dict[str, str]]:
    """Return what a document says: cells, without figures, and the versions of each back end."""
    notes = dict(re.findall(r"^\[(\d+)\] (.+)$", text, re.MULTILINE))
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    cells: dict[Cell, Outcome] = {}
    versions: dict[str, str] = {}
    heads: list[str] = []
    for row in rows:
        if row[:2] == ["net", "trap"]:
            heads = row[2:]
        elif row[0].startswith("`"):
            for head, part in zip(heads, row[2:], strict=True):
                if found := CELL.fullmatch(part):
                    why = notes.get(found["note"] or "", "")
                    cells[row[0].strip("`"), head] = Outcome(found["word"], why, is_mixed=bool(found["mixed"]))  # type: ignore[arg-type]  # a word that we wrote
        elif len(row) == 2 and row[0] != "back end" and not row[0].startswith("-"):
            versions[row[0]] = row[1]
    return cells, versions


def main() -> int:
    from tests.backends.micro_nets import NETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    parser.add_argument("--backend", action="append", help="only this one; repeatable")
    parser.add_argument("--precision", action="append", help="only this one; repeatable")
    parser.add_argument("--cache", type=Path, help="a folder that keeps the exported nets for the next time")
    parser.add_argument("--jobs", type=int, default=2, help="how many nets are tried at a time")
    parser.add_argument("names", nargs="*", metavar="NET")
    given = parser.parse_args()
    if odd := [name for name in given.names if name not in NETS]:
        parser.error(f"there is no net {', '.join(odd)}")
    cells: dict[Cell, Outcome] = {}
    versions: dict[str, str] = {}
    if given.write and given.write.exists():
        cells, versions = read_table(given.write.read_text(encoding="utf-8"))
    wanted = [
        (backend, precision)
        for backend, precision in columns()
        if backend in (given.backend or [backend]) and precision in (given.precision or [precision])
    ]
    reasons = {backend: absent(backend) for backend, _ in wanted}
    for backend in (name for name, reason in reasons.items() if reason):
        print(f"{backend} is not tried: {reasons[backend]}", file=sys.stderr)
    columns_here = [(backend, precision) for backend, precision in wanted if reasons[backend] is None]
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.cache or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        # What was compiled by yesterday's code says nothing about today's.
        shutil.rmtree(folder / "cache" / "artifacts", ignore_errors=True)
        for (net, backend, precision), found in _judged(given.names or list(NETS), columns_here, folder, given.jobs):
            cells[net, f"{backend} {precision}"] = found
            if found.made_with:
                versions[backend] = _made_with(found.made_with)
            print(f"{net} {backend} {precision}: {_told(found)}", file=sys.stderr, flush=True)
    heads = [f"{backend} {precision}" for backend, precision in columns()]
    cells = {key: found for key, found in cells.items() if key[0] in NETS and key[1] in heads}
    text = table({name: net.trap for name, net in NETS.items()}, heads, cells, versions)
    if given.write:
        write_atomic(given.write, text.encode())
    failed = [f"{net} {head}: {found.word}" for (net, head), found in cells.items() if found.word in FAILURES]
    print("\n".join([*failed, f"{len(failed)} of {len(cells)} cells fail"]), file=sys.stderr)
    return 1 if failed else 0


def _judged(
    nets: Sequence[str], columns_here: Sequence[Cell], folder: Path, jobs: int
) -> Iterator[tuple[tuple[str, str, str], Outcome]]:
    """Yield cells as they are judged, all of one net by the same worker, which exports it once."""
    with contextlib.ExitStack() as stack:
        free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(jobs):
            free.put(stack.enter_context(Worker(folder)))

        def judged(net: str) -> list[tuple[tuple[str, str, str], Outcome]]:
            worker = free.get()
            found = [((net, *column), worker.judge(net, *column)) for column in columns_here]
            free.put(worker)
            return found

        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        for cells in pool.map(judged, nets):
            yield from cells


def _told(found: Outcome) -> str:
    figure = f" {found.error:.1e}" if found.word == "right" else ""
    return f"{found.word}{', mixed' if found.is_mixed else ''}{figure}{': ' if found.why else ''}{found.why}"


def _made_with(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


if __name__ == "__main__":
    sys.exit(main())
