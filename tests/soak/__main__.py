"""make soak: measure a matrix again and again while random faults strike, then see whether the books balance.

    python -m tests.soak --minutes 30
    python -m tests.soak --minutes 2 --seed 7 --devices 2 --hybrid

The exit code is 1 when something was lost, done twice, left behind or badly told; then everything is kept to be looked at.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.testbed.cache import TestbedError

from . import ledger
from .faults import FAULTS, Storm
from .hosts import Campaign
from .ledger import Book
from .spots import HybridSpot, PlainSpot, Spot, wait_for_peace

# A lease that nobody renews lasts for 60 s, and its watchdog takes seconds more.
PEACE_S = 120.0
# The last host gets so long after the storm, and each that resumes an unfinished run.
ENDING_S = 420.0
LAST_RESUMES = 4


def main() -> int:
    """Run the soak in a folder of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16))
    parser.add_argument("--devices", type=int, default=3, help="plain ones")
    parser.add_argument("--hybrid", action="store_true", help="an aarch64 device too (root)")
    parser.add_argument("--figures", type=Path, help="write what came of it as JSON here")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="edgedeploy-soak-"))
    print(f"seed {given.seed}, {given.devices} plain devices{' and a hybrid one' if given.hybrid else ''}, in {folder}")
    try:
        found, figures = soak(folder, given.minutes, given.seed, given.devices, is_hybrid=given.hybrid)
    except TestbedError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 3
    for problem in found:
        print(f"PROBLEM: {problem}")
    if given.figures:
        given.figures.parent.mkdir(parents=True, exist_ok=True)
        given.figures.write_text(json.dumps(figures, indent=1) + "\n")
    if found:
        print(f"it does not balance: {len(found)} problems; everything is kept in {folder}")
        return 1
    print("it balances")
    shutil.rmtree(folder)
    return 0


def soak(
    folder: Path, minutes: float, seed: int, devices: int, *, is_hybrid: bool
) -> tuple[list[str], dict[str, object]]:
    """Let the storm rage for some minutes, end everything, and return what is wrong and the figures."""
    with contextlib.ExitStack() as stack:
        spots: list[Spot] = []
        for number in range(devices):
            spots.append(PlainSpot(folder, f"plain-{number}"))
            stack.callback(spots[-1].close)
        if is_hybrid:
            spots.append(HybridSpot("hybrid"))
            stack.callback(spots[-1].close)
        campaign = Campaign(folder, [spot.name for spot in spots], seed)
        (folder / "lab.toml").write_text('format = "edgedeploy.lab/1"\n' + "".join(spot.entry() for spot in spots))
        _compile_for_rival(campaign)
        storm = Storm(campaign, spots, seed)
        started_s = time.monotonic()
        _rage(campaign, storm, started_s, minutes)
        found = _end(campaign, storm)
        found += wait_for_peace(spots, PEACE_S)
        books = [ledger.read_book(path) for path in sorted(campaign.journals.glob("*.jsonl"))]
        found += [problem for book in books for problem in book.problems]
        found += ledger.check_files(books, sorted(campaign.results.glob("runs/*/*/*.json")))
        found += _half_files(campaign, storm)
        found = [*campaign.problems, *found]
        _table(campaign, storm, books)
        if parts := [part for spot in spots for part in spot.parts()]:
            print(f"uploads that were cut off and can be gone on with for a day: {len(parts)}")
        return found, _figures(campaign, storm, books, found, seed, minutes, spots)


def _compile_for_rival(campaign: Campaign) -> None:
    words = ["compile", "../wide.onnx", "--target", "fake-board", "--backend", "fake", "-o", "artifact"]
    host = campaign.command(*words, "-O", "duration_us=2500", "-O", "is_idle=true", own="rival")
    host.wait(120.0)
    if host.code:
        raise TestbedError(f"the artifact of the second host was not built: {host.log.read_text()[-500:]}")


def _rage(campaign: Campaign, storm: Storm, started_s: float, minutes: float) -> None:
    """Measure and strike, and say every minute how far it is."""
    told = 0
    while (passed_s := time.monotonic() - started_s) < 60 * minutes:
        campaign.step()
        storm.step()
        if passed_s >= 60 * (told + 1):
            told += 1
            print(f"minute {told}: {_progress(campaign, storm)}", flush=True)
        time.sleep(0.05)


def _progress(campaign: Campaign, storm: Storm) -> str:
    ends = collections.Counter[str]()
    for path in campaign.journals.glob("*.jsonl"):
        book = ledger.read_book(path)
        ends.update(done=len(book.done), failed=len(book.failed), pending=len(book.pending))
    return (
        f"{storm.struck.total()} faults struck, round {campaign.rounds}, {campaign.resumes} times resumed; cells: "
        f"{ends['done']} done, {ends['failed']} failed, {ends['pending']} under way; load {os.getloadavg()[0]:.1f}"
    )


def _end(campaign: Campaign, storm: Storm) -> list[str]:
    """Take all faults back, let the last host end, and go on with what is unfinished until nothing is pending."""
    storm.calm()
    if campaign.host is not None:
        campaign.host.wait(ENDING_S)
    campaign.step(may_start=False)
    found = []
    for path in sorted(campaign.journals.glob("*.jsonl")):
        for _ in range(LAST_RESUMES):
            if not ledger.planned_release(path) or ledger.is_over(path):
                break
            host = campaign.resume_named(path)
            host.wait(ENDING_S)
            campaign.reap(host)
        if ledger.planned_release(path) and not ledger.is_over(path):
            reasons = ledger.read_book(path).pending
            found.append(f"journal {path.stem}: pending after {LAST_RESUMES} resumes without a fault: {reasons}")
    return found


def _half_files(campaign: Campaign, storm: Storm) -> list[str]:
    """Return the half-written files on the host; each host that was killed may have left one."""
    folders = [campaign.results, campaign.folder / "state", campaign.folder / "cache", campaign.folder / "rival"]
    halves = [path for folder in folders for path in folder.rglob("*") if path.name.endswith(".part")]
    if len(halves) <= storm.struck["host killed"]:
        return []
    return [f"{len(halves)} half files, and {storm.struck['host killed']} hosts were killed: {halves[:5]}"]


def _table(campaign: Campaign, storm: Storm, books: list[Book]) -> None:
    """Print faults by kind, and cells by what became of them."""
    print(f"{'fault':26} struck survived")
    survived = _survived(campaign, storm)
    for fault in FAULTS:
        print(f"{fault.kind:26} {storm.struck[fault.kind]:6} {survived[fault.kind]:8}")
    print(f"{'all':26} {storm.struck.total():6} {survived.total():8}")
    done, failed = sum(len(book.done) for book in books), [text for book in books for text in book.failed.values()]
    pending = sum(len(book.pending) for book in books)
    visits = sum(len(digests) for book in books for digests in book.visits.values())
    print(
        f"{campaign.rounds} rounds, {len(books)} journals, {campaign.resumes} times resumed; cells: {done} done, "
        f"{len(failed)} failed, {pending} pending; {visits} visits, each written down once"
    )
    for reason, count in collections.Counter(text.split("\n")[0][:160] for text in failed).most_common(8):
        print(f"  failed {count}: {reason}")


def _survived(campaign: Campaign, storm: Storm) -> collections.Counter[str]:
    """Return the faults during which the measuring host ended as it should."""
    return collections.Counter(kind for kind, log in storm.during if log not in campaign.badly_ended)


def _figures(
    campaign: Campaign, storm: Storm, books: list[Book], found: list[str], seed: int, minutes: float, spots: list[Spot]
) -> dict[str, object]:
    return {
        "format": "edgedeploy.figures/1",
        "command": f"python -m tests.soak --minutes {minutes:g} --seed {seed}",
        "measured_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "figures": {
            "devices": [spot.name for spot in spots],
            "balances": not found,
            "struck": dict(storm.struck),
            "survived": dict(_survived(campaign, storm)),
            "rounds": campaign.rounds,
            "resumes": campaign.resumes,
            "cells_done": sum(len(book.done) for book in books),
            "cells_failed": sum(len(book.failed) for book in books),
            "cells_pending": sum(len(book.pending) for book in books),
            "visits": sum(len(digests) for book in books for digests in book.visits.values()),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
