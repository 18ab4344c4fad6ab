"""How a time budget is spent over cells, settled before anything is measured. Pure: no I/O, no clock, no randomness.

The most blocks of each cell follow from the noise of its device alone, and are fixed before the first of them is
measured: the spending function needs them, and blocks that were shifted to where an effect shows would make the error
rates wrong. What a cell does not use, because it was decided early, is not given to another one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from edgedeploy.errors import UsageError
from edgedeploy.judge.noise import MOST_BLOCKS, blocks_to_decide, smallest_effect
from edgedeploy.records.passport import PlannedBlocks
from edgedeploy.records.verdict import Margin, Metric, Policy

# Metrics that are estimated and so share a cell's error rate; a size is counted.
_COUNTED: frozenset[Metric] = frozenset({"artifact_size"})
# For a margin of +0 %, on which an unchanged candidate lies: what else is worth telling from it.
_LEAST_DISTANCE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class CellNoise:
    """A cell that blocks are planned for.

    Attributes:
        devices: it is measured on one of these.
        spread: standard deviation of a block's effect (log ratio); source: where that is known from.
        seconds_per_block, setup_s: what a block takes, and what is done once in its session.
        margin: of the median latency, a fraction; None: it is not judged.
    """

    cell: str
    devices: tuple[str, ...]
    spread: float
    seconds_per_block: float
    setup_s: float
    margin: float | None
    source: str


def policy_of(policy: Policy, cell: str) -> Policy:
    """Return the policy that one cell is measured and judged by."""
    blocks = policy.blocks.get(cell, policy.max_blocks)
    return policy if blocks == policy.max_blocks else msgspec.structs.replace(policy, max_blocks=blocks)


def latency_error_rate(policy: Policy, cells: int) -> float:
    """Return what the median latency of one cell may err at first, before other metrics and cells leave it more.

    >>> latency_error_rate(Policy(margins={}, error_rate=0.05), 2)
    0.025
    """
    estimated = sum(metric not in _COUNTED for metric in policy.margins)
    return policy.error_rate / max(cells, 1) / max(estimated, 1)


def relative_margin(margin: Margin | None, level_s: float | None) -> float | None:
    """Return what a margin allows the median latency to change by, as a fraction; None where it is not judged so.

    A limit on the candidate itself asks nothing of its change; of an absolute margin the level must be known.
    """
    if margin is None or margin.kind not in ("relative", "absolute"):
        return None
    if margin.kind == "relative":
        return margin.value
    return margin.value / level_s if level_s else None


def spend(
    cells: Sequence[CellNoise], budget_s: float, *, min_blocks: int, error_rate: float
) -> tuple[PlannedBlocks, ...]:
    """Give each cell its most blocks: as many cells as possible are likely to be decided, then all see as finely.

    Each cell gets the blocks of the first look; then those whose smallest effect comes within the margin for the least
    time get what they need; then, block by block, whichever cell lags furthest behind its margin. Devices work side by
    side; those that share cells are reckoned as one group that has the budget once for each of them.

    Args:
        cells: in the order of the plan.
        budget_s: wall-clock time.
        min_blocks: of the first look.
        error_rate: one-sided, of one cell's median latency.

    Raises:
        UsageError: not even the first look of every cell fits; the sentence says how long they take.
    """
    blocks = {cell.cell: min_blocks for cell in cells}
    for group in _groups(cells):
        devices = {device for cell in group for device in cell.devices}
        left_s = len(devices) * budget_s - sum(_seconds(cell, min_blocks) for cell in group)
        if left_s < 0:
            least_s = sum(_seconds(cell, min_blocks) for cell in group) / len(devices)
            raise UsageError(
                f"a budget of {budget_s / 60:.1f} min is too short: the first look of {len(group)} cells on "
                f"{', '.join(sorted(devices))} takes {least_s / 60:.1f} min; give more, or fewer cells (--cell)"
            )
        left_s = _grant_what_decides(group, blocks, left_s, min_blocks, error_rate)
        _grant_the_rest(group, blocks, left_s, min_blocks, error_rate)
    return tuple(_planned(cell, blocks[cell.cell], min_blocks, error_rate) for cell in cells)


def _grant_what_decides(
    group: Sequence[CellNoise], blocks: dict[str, int], left_s: float, min_blocks: int, error_rate: float
) -> float:
    """Let as many cells as possible have what decides them, the cheapest first; return what is left of the time."""
    wishes = []
    for cell in group:
        if cell.margin is None:
            continue
        needed = blocks_to_decide(cell.spread, _distance(cell), min_blocks=min_blocks, error_rate=error_rate)
        if needed is not None:
            wishes.append(((needed - min_blocks) * cell.seconds_per_block, cell.cell, needed))
    for price_s, name, needed in sorted(wishes):
        if price_s <= left_s:
            blocks[name], left_s = needed, left_s - price_s
    return left_s


def _grant_the_rest(
    group: Sequence[CellNoise], blocks: dict[str, int], left_s: float, min_blocks: int, error_rate: float
) -> None:
    """Give one block after another to the judged cell whose smallest effect is the largest part of its margin."""

    def lag(cell: CellNoise) -> float:
        effect = smallest_effect(cell.spread, blocks[cell.cell], min_blocks=min_blocks, error_rate=error_rate)
        return math.inf if effect is None else effect / max(_distance(cell), _LEAST_DISTANCE)

    judged = [cell for cell in group if cell.margin is not None]
    queue = [(-lag(cell), place) for place, cell in enumerate(judged)]
    heapq.heapify(queue)
    while queue:
        _, place = heapq.heappop(queue)
        cell = judged[place]
        if cell.seconds_per_block > left_s or blocks[cell.cell] >= MOST_BLOCKS:
            continue
        blocks[cell.cell] += 1
        left_s -= cell.seconds_per_block
        heapq.heappush(queue, (-lag(cell), place))


def _planned(cell: CellNoise, blocks: int, min_blocks: int, error_rate: float) -> PlannedBlocks:
    effect = smallest_effect(cell.spread, blocks, min_blocks=min_blocks, error_rate=error_rate)
    return PlannedBlocks(
        cell=cell.cell,
        device=" or ".join(cell.devices),
        blocks=blocks,
        seconds=_seconds(cell, blocks),
        spread=cell.spread,
        effect=None if effect is None else math.expm1(min(effect, 700.0)),
        margin=cell.margin,
        is_enough=cell.margin is None or (effect is not None and effect <= _distance(cell)),
        source=cell.source,
    )


def _distance(cell: CellNoise) -> float:
    """Return how far an unchanged candidate lies from the margin, as a log ratio."""
    return abs(math.log1p(cell.margin)) if cell.margin is not None else 0.0


def _seconds(cell: CellNoise, blocks: int) -> float:
    return cell.setup_s + blocks * cell.seconds_per_block


def _groups(cells: Sequence[CellNoise]) -> list[list[CellNoise]]:
    """Return the cells in groups that share devices, directly or through others."""
    group_of: dict[str, int] = {}
    members: dict[int, list[CellNoise]] = {}
    for number, cell in enumerate(cells):
        joined = {group_of[device] for device in cell.devices if device in group_of}
        merged = [one for group in sorted(joined) for one in members.pop(group)]
        members[number] = [*merged, cell]
        for one in members[number]:
            group_of.update(dict.fromkeys(one.devices, number))
    return list(members.values())


def blocks_by_cell(planned: Sequence[PlannedBlocks]) -> Mapping[str, int]:
    """Return cell → its most blocks, as a policy has them."""
    return {one.cell: one.blocks for one in planned}
