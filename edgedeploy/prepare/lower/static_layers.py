"""The float layer, with weights and grids as markers, for each statically quantized module and function of torch.ao.

It is imported only where such a module was met: it loads torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgedeploy.errors import ModelError
from edgedeploy.prepare.lower.packed import Grid, OnGrid, Weight, grid_of, replace_parts

_HOMES = ("torch.ao.nn.quantized.modules", "torch.ao.nn.intrinsic.quantized.modules", "torch.ao.nn.quantized.reference")
# Parts of those packages that compute nothing, or what any float module computes; grids are followed through them.
_PLAIN = (
    "LinearPackedParams",
    "EmbeddingPackedParams",
    "DeQuantize",
    "Dropout",
    "FloatFunctional",
    "FXFloatFunctional",
)


class Layer(nn.Module):
    """weights ⊛ input + bias, then an activation, then a grid."""

    def __init__(
        self,
        apply: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        packed: tuple[Tensor, Tensor | None],
        grid: Grid,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.weight = Weight(packed[0])
        self.register_buffer("bias", None if packed[1] is None else packed[1].detach().float())
        self.compute = OnGrid(partial(_affine, apply, after), grid)

    def forward(self, x: Tensor, *added: Tensor) -> Tensor:
        """Return the layer's result on its grid; `added` is summed before the activation."""
        y: Tensor = self.compute(x, self.weight(), self.bias, *added)
        return y


class Functional(nn.Module):
    """Takes the place of QFunctional: arithmetic on tensors, each result on one grid."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        for name in ("add", "mul", "cat", "add_relu", "matmul"):
            setattr(self, name, OnGrid(FUNCTIONS[name], grid))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """Add a number; the result's grid follows from the tensor's."""
        return scalar_add(x, y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """Multiply with a number; the result's grid follows from the tensor's."""
        return scalar_mul(x, y)


class Scalar(nn.Module):
    """A quantized operator on a tensor and a number."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.apply_to: Callable[..., Tensor] = scalar_add if name.startswith("add") else scalar_mul
        self.has_relu = name.endswith("relu")

    def forward(self, x: Tensor, number: float) -> Tensor:
        """Return the sum or product on the grid that follows from the tensor's."""
        return self.apply_to(x, number, has_relu=self.has_relu)


def scalar_mul(x: Tensor, number: float, has_relu: bool = False) -> Tensor:
    """Return x * number: the codes stay, or are mirrored, and the scale changes.

    Source: aten/src/ATen/native/quantized/cpu/qmul.cpp, _mul_scalar_out.
    """
    grid = grid_of(x)
    zero = grid.zero if number > 0 else grid.low_code + grid.high_code - grid.zero
    made = Grid(grid.step * abs(number), zero, grid.dtype) if number else Grid(1.0, 0, grid.dtype)
    y: Tensor = OnGrid(lambda: functional.relu(x * number) if has_relu else x * number, made)()
    return y


def scalar_add(x: Tensor, number: float, has_relu: bool = False) -> Tensor:
    """Return x + number, with the number rounded to the grid, and the grid shifted, or widened where it must be.

    Source: aten/src/ATen/native/quantized/cpu/qadd.cpp, _add_scalar_out.
    """
    grid = grid_of(x)
    low, high = grid.low_code, grid.high_code
    shift = round(number / grid.step)
    zero, step = grid.zero - shift, grid.step
    if zero < low:
        step, zero = (high - zero) / (high - low) * step, low
    elif zero > high:
        step, zero = (zero - low) / (high - low) * step, high
    moved = shift * grid.step
    made = Grid(step, zero, grid.dtype)
    y: Tensor = OnGrid(lambda: functional.relu(x + moved) if has_relu else x + moved, made)()
    return y


def static_parts(module: nn.Module, *, into_graphs: bool) -> dict[str, nn.Module]:
    """Return path → module of what is statically quantized; a shared module under each of its paths.

    Args:
        into_graphs: also look inside of torch.fx graph modules.
    """
    found: dict[str, nn.Module] = {}

    def walk(part: nn.Module, path: str) -> None:
        if not into_graphs and isinstance(part, torch.fx.GraphModule):
            return
        kind = type(part)
        if kind.__module__.startswith(_HOMES) and kind.__name__ not in _PLAIN:
            found[path] = part
            return
        for name, child in part._modules.items():
            if child is not None:
                walk(child, f"{path}.{name}" if path else name)

    walk(module, "")
    return found


def lower_static(module: nn.Module, parts: dict[str, nn.Module], dtype: torch.dtype) -> nn.Module:
    """Replace statically quantized modules by float layers with markers.

    Args:
        parts: from `static_parts`.
        dtype: of the activations' codes.
    """
    unknown = sorted({type(part).__name__ for part in parts.values() if type(part) not in _builders()})
    if unknown:
        names = ", ".join(path for path, part in parts.items() if type(part).__name__ in unknown)
        raise ModelError(
            f"{', '.join(unknown)} of torch.ao ({names}) has no form that ONNX can keep; leave it in float (qconfig = "
            f"None) and convert again"
        )
    return replace_parts(module, parts, lambda part: _builders()[type(part)](part, dtype))


def activation_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    """Return the one type that a model's activations are quantized to; quint8, torch's default, where none is said."""
    if len(dtypes) > 1:
        raise ModelError(
            f"activations are quantized to {' and '.join(sorted(str(each) for each in dtypes))} in one model; choose "
            f"one of them in the qconfigs and quantize again"
        )
    return next(iter(dtypes), torch.quint8)


def details_of(parts: dict[str, nn.Module]) -> str:
    """Say in a phrase how weights are quantized and what is fused."""
    schemes, fused = set(), set()
    for part in parts.values():
        if type(part).__module__.startswith(_HOMES[1]):
            fused.add(type(part).__name__)
        weight = getattr(part, "weight", None)
        if callable(weight):
            per_channel = weight().qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
            schemes.add("per-channel weights" if per_channel else "per-tensor weights")
    return ", ".join([*sorted(schemes), *(f"fused {name}" for name in sorted(fused))])


def conv_function(name: str, packed: Any, **instead: Any) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return the float convolution that a packed one computes.

    Args:
        name: "conv1d" ... "conv_transpose3d".
        packed: has stride, padding, dilation, groups and, transposed, output_padding: as attributes, or as methods of
            torch's packed parameters.
        instead: settings that take the place of the packed one's.
    """

    def setting(key: str) -> Any:
        value = getattr(packed, key)
        value = value() if callable(value) else value
        # Packed parameters of a 1-d convolution are those of a 2-d one of height 1.
        return tuple(value)[-int(name[-2]) :] if isinstance(value, (list, tuple)) else value

    settings = {key: setting(key) for key in ("stride", "padding", "dilation", "groups")}
    if "transpose" in name:
        settings["output_padding"] = setting("output_padding")
    return partial(getattr(functional, name), **{**settings, **instead})


def _affine(
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    after: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *added: Tensor,
) -> Tensor:
    y = apply(x, weight, bias)
    for other in added:
        y = y + other
    return after(y) if after else y


def _conv(name: str, part: Any, dtype: torch.dtype, after: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    apply = conv_function(name, part)
    if part.padding_mode != "zeros":
        # functional.pad counts axes from the last, with a size for each end.
        sides = [size for size in reversed(tuple(part.padding)[: int(name[-2])]) for _ in range(2)]
        apply = partial(_padded, conv_function(name, part, padding=0), sides, part.padding_mode)
    return Layer(apply, (part.weight(), part.bias()), _grid(part, dtype), after)


def _padded(
    apply: Callable[..., Tensor], sides: list[int], mode: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return apply(functional.pad(x, sides, mode=mode), weight, bias)


def _linear(part: Any, dtype: torch.dtype, after: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    return Layer(functional.linear, (part.weight(), part.bias()), _grid(part, dtype), after)


def _grid(part: Any, dtype: torch.dtype, prefix: str = "") -> Grid:
    return Grid(float(getattr(part, f"{prefix}scale")), int(getattr(part, f"{prefix}zero_point")), dtype)


def _float_module(float_class: type[nn.Module], part: Any, dtype: torch.dtype) -> OnGrid:
    """Return what the quantized module is derived from, with the same parameters, followed by a grid."""
    grid = _grid(part, dtype, "output_" if hasattr(part, "output_scale") else "")
    plain = float_class.__new__(float_class)
    plain.__dict__.update(part.__dict__)
    plain._buffers = {name: held for name, held in part._buffers.items() if name not in ("scale", "zero_point")}
    return OnGrid(plain.eval(), grid)


def _batch_norm(float_class: type[nn.Module], part: Any, dtype: torch.dtype, has_relu: bool) -> nn.Module:
    made = _float_module(float_class, part, dtype)
    return OnGrid(nn.Sequential(cast(nn.Module, made.function), nn.ReLU()), made.grid) if has_relu else made


class _Prelu(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().dequantize())

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(x, cast(Tensor, self.weight))


def _quantize(part: Any, dtype: torch.dtype) -> nn.Module:
    return Grid(float(part.scale), int(part.zero_point), part.dtype)


def _relu6(part: Any, dtype: torch.dtype) -> nn.Module:
    # The kernel clamps at the code of 6 and keeps its input's grid; grid tracking does the same.
    return nn.ReLU6()


def _relu(y: Tensor) -> Tensor:
    return functional.relu(y)


@cache
def _builders() -> dict[type[nn.Module], Callable[[Any, torch.dtype], nn.Module]]:
    """Return quantized module class → function that makes its float layer."""
    import torch.ao.nn.intrinsic.quantized as fused
    import torch.ao.nn.quantized as plain

    known: dict[type[nn.Module], Callable[[Any, torch.dtype], nn.Module]] = {
        plain.Quantize: _quantize,
        plain.QFunctional: lambda part, dtype: Functional(_grid(part, dtype)),
        plain.Linear: _linear,
        fused.LinearReLU: partial(_linear, after=_relu),
        fused.LinearTanh: partial(_linear, after=torch.tanh),
        fused.LinearLeakyReLU: lambda part, dtype: _linear(
            part, dtype, partial(functional.leaky_relu, negative_slope=part.negative_slope)
        ),
        fused.ConvAdd2d: partial(_conv, "conv2d"),
        fused.ConvAddReLU2d: partial(_conv, "conv2d", after=_relu),
        plain.ReLU6: _relu6,
        plain.PReLU: lambda part, dtype: OnGrid(_Prelu(part.weight), _grid(part, dtype)),
    }
    for size in "123":
        known[getattr(plain, f"Conv{size}d")] = partial(_conv, f"conv{size}d")
        known[getattr(plain, f"ConvTranspose{size}d")] = partial(_conv, f"conv_transpose{size}d")
        known[getattr(fused, f"ConvReLU{size}d")] = partial(_conv, f"conv{size}d", after=_relu)
    for name in ("Hardswish", "ELU", "LeakyReLU", "Sigmoid", "Softmax", "LayerNorm", "GroupNorm", "InstanceNorm1d"):
        known[getattr(plain, name)] = partial(_float_module, getattr(nn, name))
    for size in "23":
        norm: type[nn.Module] = getattr(nn, f"BatchNorm{size}d")
        known[getattr(plain, f"InstanceNorm{size}d")] = partial(_float_module, getattr(nn, f"InstanceNorm{size}d"))
        known[getattr(plain, f"BatchNorm{size}d")] = partial(_batch_norm, norm, has_relu=False)
        known[getattr(fused, f"BNReLU{size}d")] = partial(_batch_norm, norm, has_relu=True)
    return known


# torch.ops.quantized function → float function; arguments in the quantized schema's order, less scale and zero-point.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b: a + b,
    "add_relu": lambda a, b: functional.relu(a + b),
    "mul": lambda a, b: a * b,
    "mul_relu": lambda a, b: functional.relu(a * b),
    "cat": lambda parts, dim=0: torch.cat(parts, dim),
    "cat_relu": lambda parts, dim=0: functional.relu(torch.cat(parts, dim)),
    "matmul": torch.matmul,
    "sigmoid": torch.sigmoid,
    "softmax": functional.softmax,
    "hardswish": functional.hardswish,
    "leaky_relu": lambda x, slope, is_inplace=False: functional.leaky_relu(x, slope),
    "elu": functional.elu,
    "prelu": torch.prelu,
    "layer_norm": functional.layer_norm,
    "group_norm": functional.group_norm,
    "instance_norm": lambda x, weight, bias, eps: functional.instance_norm(x, None, None, weight, bias, eps=eps),
}
