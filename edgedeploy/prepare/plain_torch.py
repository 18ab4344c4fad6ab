"""PyTorch without two of its short cuts, which fail on compressed models or compute something else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.overrides import TorchFunctionMode

_CLAMPS = ("clamp", "hardtanh", "relu6")


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off torch's fused kernel for transformer layers.

    It reads weights as plain tensors, past the forward of the layers that hold them: it fails where they are quantized
    (the weights of torch.ao's layers are methods), and passes over hooks.
    """
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """As `plain_attention`; besides, quantized tensors are clamped in row-major order.

    QNNPACK's kernel for channels-last tensors writes its result in another order than it says (torch 2.13: ReLU6 of
    quantized random numbers is off by 6.0, and by 0 in row-major order).
    """
    with plain_attention(), _row_major_clamps():
        yield


def _row_major_clamps() -> TorchFunctionMode:
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    class RowMajorClamps(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if getattr(func, "__name__", "") in _CLAMPS and args:
                first = args[0]
                if isinstance(first, Tensor) and first.is_quantized:
                    args = (first.contiguous(), *args[1:])
            return func(*args, **(kwargs or {}))

    return RowMajorClamps()
