"""What became of each number that a model was trained or calibrated with before it came here, stage by stage."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record

Stage = Literal["canonical", "emitted", "artifact"]
Fate = Literal["kept", "folded", "re-scaled", "dropped"]


class SurvivalEntry(Record, frozen=True, kw_only=True):
    """One quantized tensor of the source.

    Attributes:
        tensor: its name in the canonical graph.
        scales: the source's, one or one for each channel or block.
        stages: what became of them in the quantization table (canonical), in the explicit form that a back end is given
            (emitted), and in what its runtime executes (artifact; missing where no runtime has told).
            kept: every value that the source's codes stand for is represented exactly, on the same or a finer grid.
            folded: the tensor does not exist on its own any more: merged with a neighbour of the same grid, fused into
            the operator that reads it, or weights that are computed with as the floats that their codes stand for.
            re-scaled: another grid. dropped: computed in float, or with numbers of ours.
        relative_change: the largest |new scale - scale| / scale over all stages; 0 where kept or folded.
    """

    tensor: str
    role: Literal["activation", "weight"]
    scales: tuple[float, ...]
    stages: dict[Stage, Fate]
    relative_change: float = 0.0


class SurvivalReport(Record, frozen=True, kw_only=True):
    """All quantized tensors of a source, in the order of its graph; activations first."""

    entries: tuple[SurvivalEntry, ...]
    largest_relative_change: float
