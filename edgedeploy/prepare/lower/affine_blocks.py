"""Turns torchao's way of saying which elements share a scale (a block's shape) into the marker's axis and block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from edgedeploy.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


class Stored(NamedTuple):
    """Integer weights in the layout of `operators().dequantize_weight`; see there."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    block: int
    bits: int


def stored_weights(
    codes: Tensor, block_size: Sequence[int], scale: Tensor, zero_point: Tensor | None, *, bits: int, what: str
) -> Stored:
    """Bring weights with one scale for each block of elements into the marker's layout.

    Args:
        codes: integers, or float8, in the weight's own shape.
        block_size: how many neighbours along each axis share a scale; empty: all elements do.
        scale: one for each block, in any shape that has them in row-major order.
        zero_point: likewise; None: all 0.
        bits: what a code needs; 4 or 8 are stored.
        what: the weight's name, for the error.

    Raises:
        ModelError: the blocks of something that is no matrix (an axis or all elements may share a scale there), which
            no runtime stores, or zero-points that are no integers.
    """
    import torch

    sizes = [min(block, size) for block, size in zip(block_size, codes.shape, strict=True)] if block_size else []
    counts = [-(-size // block) for size, block in zip(codes.shape, sizes, strict=True)]
    several = [axis for axis, count in enumerate(counts) if count > 1]
    zeros = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    if not bool(torch.equal(zeros.float(), zeros.float().round())):
        raise ModelError(
            f"the zero-points of {what} are no integers, which no runtime takes; quantize it with ZeroPointDomain.INT"
        )
    grids = [scale.detach().float(), zeros.detach().to(torch.int32)]
    stored_bits = 4 if bits <= 4 else 8
    plain = codes.detach().contiguous()
    if not several:
        return Stored(plain, grids[0].reshape(-1)[:1], grids[1].reshape(-1)[:1], -1, 0, stored_bits)
    if len(several) == 1 and sizes[several[0]] == 1:
        return Stored(plain, grids[0].reshape(-1), grids[1].reshape(-1), several[0], 0, stored_bits)
    if codes.ndim != 2:
        raise ModelError(
            f"{what} has the shape {'x'.join(map(str, codes.shape))} and one scale for every {_shown(sizes)} elements, "
            f"which no runtime stores for other layers than Linear; quantize it with one scale per output channel "
            f"(PT2E does that for convolutions)"
        )
    # One scale for several rows is the same as equal scales for each of them.
    rows, block = sizes
    wide = [part.reshape(counts).repeat_interleave(rows, dim=0)[: codes.shape[0]].contiguous() for part in grids]
    if counts[1] == 1:
        return Stored(plain, wide[0].reshape(-1), wide[1].reshape(-1), 0, 0, stored_bits)
    return Stored(plain, wide[0], wide[1], 0, block, stored_bits)


def _shown(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
