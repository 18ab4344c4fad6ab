"""Whether the times in a run can be times: no clock that jumped is believed. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from edgedeploy.judge.percentiles import samples_of
from edgedeploy.records.run import Run, Visit
from edgedeploy.units import format_duration

# Processes that are measured one after the other, and their conditions, cost more than this; what is inside a visit may
# seem longer than the visit by the resolution of a clock only.
_SLACK_S, _SLACK_SHARE = 0.1, 0.05
# Every wait of a visit has a limit, and all of them together are below two hours.
_LONGEST_VISIT_S = 24 * 3600.0
# What a session writes into its events when it went on after a lost link or a reboot, whose clock starts anew.
_CONTINUED = "measuring went on at"


def why_no_clock(side: str, run: Run) -> str | None:
    """Return what no clock can have said in a run, or None.

    Args:
        side: "baseline" or "candidate", for the sentence.
        run: visits that were dropped are not looked at.
    """
    return next(_impossible(side, run), None)


def _impossible(side: str, run: Run) -> Iterator[str]:
    counted = [visit for visit in run.visits if not visit.dropped]
    for visit in counted:
        where = f"the {side}'s visit in block {visit.block}"
        for sample_s in samples_of(visit):
            if not (math.isfinite(sample_s) and sample_s > 0):
                yield f"{where} holds an inference that took {sample_s} s, which no clock can say"
        for what, took_s in (("loading", visit.load_s), ("the first inference", visit.first_inference_s)):
            if not (math.isfinite(took_s) and took_s >= 0):
                yield f"{where} says that {what} took {took_s} s, which no clock can say"
        yield from _jumps(where, visit)
    if any(_CONTINUED in event for event in run.events):
        return
    ordered = sorted(counted, key=lambda visit: visit.block)
    for earlier, later in itertools.pairwise(ordered):
        if later.block > earlier.block and later.before.monotonic_s < earlier.before.monotonic_s:
            back = format_duration(earlier.before.monotonic_s - later.before.monotonic_s)
            yield (
                f"the {side}'s visit in block {later.block} began {back} before that in block {earlier.block} by the "
                f"clock of {run.device}, which jumped"
            )


def _jumps(where: str, visit: Visit) -> Iterator[str]:
    elapsed_s = visit.after.monotonic_s - visit.before.monotonic_s
    if elapsed_s < 0:
        yield f"{where} ended {format_duration(-elapsed_s)} before it began: the device's clock ran backwards"
    if elapsed_s > _LONGEST_VISIT_S:
        yield f"{where} took {elapsed_s / 3600:.0f} hours by the device's clock, which jumped"
    inside_s = visit.load_s + visit.first_inference_s + sum(visit.warm_up_samples_s) + sum(samples_of(visit))
    if 0 < elapsed_s < inside_s * (1 - _SLACK_SHARE) - _SLACK_S:
        yield (
            f"{where} holds {format_duration(inside_s)} of inferences and took {format_duration(elapsed_s)} in all: "
            f"the device's clock jumped"
        )
