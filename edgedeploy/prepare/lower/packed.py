"""Stored weights and activation grids of torch.ao models, as modules that write markers, and what follows a grid.

It is imported only where a quantized module was met: it loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from edgedeploy.errors import ModelError
from edgedeploy.prepare.markers import operators

# Lowest and highest code of torch's 8-bit activation types. A range that an observer reduced to 7 bits shows in the
# scale only: the kernels of a converted model saturate at the type's own limits.
_CODES = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}
# Functions whose results lie on the grid of their quantized input, and for which back ends have a form that reads and
# writes one grid. What else moves or selects values (relu, slices, concatenated halves) is put on the same grid again,
# which changes nothing and lets the layer behind it see where its input lies.
# fmt: off
_MOVING = frozenset({
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "t", "__get__",
    "swapaxes", "swapdims", "moveaxis", "movedim", "contiguous", "clone", "detach", "squeeze", "unsqueeze", "dropout",
    "max_pool1d", "max_pool2d", "max_pool3d", "_max_pool1d", "_max_pool2d", "_max_pool3d",
})
# fmt: on
# Functions that PyTorch's quantized kernels give a grid of their own: scale and zero-point as quint8, and as qint8.
# Source: aten/src/ATen/native/quantized/cpu/qsigmoid.cpp, qtanh.cpp, qhardsigmoid.cpp.
_OWN_GRIDS = {"sigmoid": (1 / 256, 0), "hardsigmoid": (1 / 256, 0), "tanh": (2 / 256, 128)}


class Weight(nn.Module):
    """Constant integer (or float16) weights; called, it is the float tensor that they stand for."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.axis = -1
        if not weight.is_quantized:
            codes, scale, zero_point = weight.detach().to(torch.float16), torch.ones(1), torch.zeros(1)
        elif weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            self.axis = weight.q_per_channel_axis()
            codes, scale = weight.int_repr(), weight.q_per_channel_scales()
            zero_point = weight.q_per_channel_zero_points()
        elif weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            codes, scale = weight.int_repr(), torch.tensor([weight.q_scale()])
            zero_point = torch.tensor([weight.q_zero_point()])
        else:
            raise ModelError(
                f"weights of {weight.dtype} with {weight.qscheme()} have zero-points that are no integers; leave this "
                f"layer in float (qconfig = None) and quantize the others"
            )
        if codes.dtype not in (torch.int8, torch.uint8, torch.float16):
            raise ModelError(
                f"weights are stored as {weight.dtype}; only 8-bit integers and float16 are kept: quantize with qint8 "
                f"weights or leave this layer in float (qconfig = None)"
            )
        self.bits = 16 if codes.dtype == torch.float16 else 8
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("zero_point", zero_point.to(torch.int32))

    def forward(self) -> Tensor:
        """Return the float32 tensor, in the shape of the codes."""
        made = operators().dequantize_weight(self.codes, self.scale, self.zero_point, self.axis, 0, self.bits)
        return cast(Tensor, made)


class Grid(nn.Module):
    """Puts a float tensor on an activation grid, and remembers that it lies there.

    Args:
        scale: real distance of two codes.
        zero_point: the code of 0.
        dtype: torch.quint8 or torch.qint8.
    """

    def __init__(self, scale: float, zero_point: int, dtype: torch.dtype) -> None:
        super().__init__()
        if dtype not in _CODES:
            raise ModelError(
                f"activations are quantized to {dtype}; only quint8 and qint8 are kept: choose one of them in the "
                f"qconfig and quantize again"
            )
        self.dtype = dtype
        self.low_code, self.high_code = _CODES[dtype]
        # Plain numbers for arithmetic during the export, buffers for the graph, which must not read a tensor's value.
        self.step, self.zero = float(scale), int(zero_point)
        self.register_buffer("scale", torch.tensor([self.step], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([self.zero], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to the grid."""
        with _unwatched():
            y = operators().fake_quantize(x, self.scale, self.zero_point, -1, self.low_code, self.high_code)
        return on_grid(y, self)


class OnGrid(nn.Module):
    """A float function whose result is put on a grid."""

    def __init__(self, function: Callable[..., Tensor], grid: Grid) -> None:
        super().__init__()
        self.function = function
        self.grid = grid

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the function's result, rounded to the grid."""
        with _unwatched():
            y = self.function(*args, **kwargs)
        return cast(Tensor, self.grid(y))


class GridTracking(TorchFunctionMode):
    """Follows tensors on a grid through functions that PyTorch runs on quantized tensors natively.

    Such a function (pooling, mean, interpolation, clamp ...) takes no scale: it returns its input's grid. What only
    moves values stays on the grid by itself; everything else is rounded to it again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grids: Any = WeakIdKeyDictionary()
        self.watching = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        grid = self._first_grid((args, kwargs)) if self.watching else None
        name = getattr(func, "__name__", "")
        if self.watching and str(func).startswith("quantized."):
            raise ModelError(
                f"forward calls torch.ops.{func} itself, outside of a quantized module; use the module (or "
                f"torch.ao.nn.quantized.FloatFunctional before conversion) in its place"
            )
        if grid is None:
            return func(*args, **kwargs)
        if name == "dequantize":
            # A new tensor for the same values: what follows is float arithmetic, and rounds no more.
            return args[0].clone()
        answer = func(*args, **kwargs)
        if name in _OWN_GRIDS:
            scale, zero_point = _OWN_GRIDS[name]
            grid = Grid(scale, zero_point if grid.dtype == torch.quint8 else zero_point - 128, grid.dtype)
        follow = on_grid if name in _MOVING else _rounded
        return pytree.tree_map(lambda leaf: follow(leaf, grid) if _is_float(leaf) else leaf, answer)

    def _first_grid(self, arguments: Any) -> Grid | None:
        for leaf in pytree.tree_leaves(arguments):
            if isinstance(leaf, Tensor) and leaf in self.grids:
                return cast(Grid, self.grids[leaf])
        return None


# The modes of the forward passes that are running, innermost last.
_running: list[GridTracking] = []


def track_grids(module: nn.Module) -> None:
    """Follow grids through every forward pass of a module, from its first line to its last."""
    if _enter not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)


def on_grid(y: Tensor, grid: Grid) -> Tensor:
    """Note that a tensor's values lie on a grid."""
    if _running:
        _running[-1].grids[y] = grid
    return y


def grid_of(x: Tensor) -> Grid:
    """Return the grid that a tensor's values lie on.

    Raises:
        ModelError: the tensor is float, so a quantized operator would have refused it.
    """
    grid = _running[-1].grids.get(x) if _running else None
    if grid is None:
        raise ModelError(
            "a quantized operator is given a float tensor; put a QuantStub before it and run the model once in PyTorch"
        )
    return cast(Grid, grid)


def replace_parts(module: nn.Module, parts: dict[str, nn.Module], made: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put another module in the place of each of `parts` (path → module); a shared one is made once."""
    done: dict[int, nn.Module] = {}
    for path, part in parts.items():
        if id(part) not in done:
            try:
                done[id(part)] = made(part)
            except ModelError as error:
                raise ModelError(f"the layer {path!r} ({type(part).__name__}) cannot be kept: {error}") from error
        if not path:
            return done[id(part)]
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, done[id(part)])
    return module


def layer_names(parts: dict[str, nn.Module]) -> tuple[str, ...]:
    """Return module paths for a report; a model that is one layer is called "(model)"."""
    return tuple(path or "(model)" for path in parts)


def _enter(module: nn.Module, args: Any) -> None:
    mode = GridTracking()
    mode.__enter__()  # type: ignore[no-untyped-call]  # torch has no types there
    _running.append(mode)


def _leave(module: nn.Module, args: Any, answer: Any) -> None:
    _running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch has no types there


@contextmanager
def _unwatched() -> Iterator[None]:
    """Run our own float arithmetic without taking it for a function on quantized tensors."""
    if not _running:
        yield
        return
    mode = _running[-1]
    before, mode.watching = mode.watching, False
    try:
        yield
    finally:
        mode.watching = before


def _rounded(y: Tensor, grid: Grid) -> Tensor:
    return cast(Tensor, grid(y))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
