"""torchao's quantized weights (tensor subclasses) and its QAT layers, as layers that carry our markers.

Exported as they are, small weights are folded to float32 (four to eight times the size), large ones lose how they were
meant, and those with quantized inputs fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from edgedeploy.errors import ModelError
from edgedeploy.prepare.lower.affine_blocks import Stored, stored_weights
from edgedeploy.records.model import CompressionKind, FoundCompression

if TYPE_CHECKING:
    from torch import Tensor, nn

# Beginning of a class name → why its weights cannot be read, and what to do instead.
_UNREADABLE = {
    "Int4": (
        "are packed for a GPU's kernel",
        "use IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), which keeps plain integers",
    ),
    "IntxOpaque": (
        "are packed for this CPU's kernel",
        "leave intx_packing_format at IntxPackingFormat.UNPACKED_TO_INT8",
    ),
    "Sparse": (
        "are packed for a GPU's sparse kernel",
        "give the dense weights with their zeros in place; edgedeploy recognises 2:4",
    ),
    "NF4": ("are on no linear grid", "use IntxWeightOnlyConfig(weight_dtype=torch.int4)"),
    "NVFP4": ("need a GPU with 4-bit floats", "use IntxWeightOnlyConfig(weight_dtype=torch.int4)"),
    "MX": ("need a GPU with microscaled floats", "use Int8WeightOnlyConfig or Float8WeightOnlyConfig"),
}
_SYMMETRIC_NOTE = (
    "torchao spreads the largest value over 127.5 steps and runtimes over 127, so the steps differ by 0.4 %"
)


class _Input(NamedTuple):
    """How a layer quantizes its input: on a fixed grid (scale is a tensor), or anew in each inference."""

    bits: int
    is_symmetric: bool
    per_token: bool
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    factor: Tensor | None = None


class _Lowered(NamedTuple):
    """One layer that was rewritten."""

    kind: CompressionKind
    path: str
    detail: str
    note: str


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Rewrite the layers that hold torchao's quantized weights or fake-quantize them; torchao itself is not imported.

    Raises:
        ModelError: weights that are packed for a kernel of one machine, float8 inputs, or a QAT layer whose grid has no
            integers.
    """
    if not any(_is_torchao(part) for _, part in _parts(module)):
        return module, ()
    from edgedeploy.prepare.lower.private_copy import private_copy

    module = private_copy(module)
    _unwrap(module)
    lowered: list[_Lowered] = []
    stored: dict[int, nn.Module] = {}
    for path, part in list(module.named_modules()):
        lowered += _lower_tensors(path, part, stored)
        if _is_torchao(part):
            lowered += _lower_qat(path, part)
    return module, _reports(lowered)


def _parts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every submodule, parameter and buffer."""
    for path, part in module.named_modules():
        yield path, part
        for name, value in (*part._parameters.items(), *part._buffers.items()):
            if value is not None:
                yield f"{path}.{name}".lstrip("."), value


def _is_torchao(thing: Any) -> bool:
    home = type(thing).__module__
    # What PT2E leaves in a graph belongs to another part.
    return home.split(".", 1)[0] == "torchao" and not home.startswith("torchao.quantization.pt2e")


def _unwrap(module: nn.Module) -> None:
    """Undo torchao's unwrap_tensor_subclass, which spreads a weight over the originals of a parametrization."""
    from torch.nn.utils import parametrize

    for part in list(module.modules()):
        for name, steps in dict(getattr(part, "parametrizations", {})).items():
            if any(type(step).__name__ == "UnwrapTensorSubclass" for step in steps):
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)


def _lower_tensors(path: str, part: nn.Module, made: dict[int, nn.Module]) -> Iterator[_Lowered]:
    for name, value in [*part._parameters.items(), *part._buffers.items()]:
        if value is None or not _is_torchao(value):
            continue
        what = f"{path}.{name}".lstrip(".")
        read, quantizer, kind, detail = _read(value, what)
        if id(value) not in made:
            made[id(value)] = _stored_weight(read, value.dtype)
        _demand_linear(part, quantizer, what)
        _rewrite(part, type(part), name, made[id(value)], quantizer)
        is_coarse = quantizer is not None and quantizer.is_symmetric and quantizer.scale is None
        yield _Lowered(kind, path, detail, _SYMMETRIC_NOTE if is_coarse else "")


def _read(weight: Any, what: str) -> tuple[Stored, _Input | None, CompressionKind, str]:
    """Read a torchao tensor through its public attributes."""
    name = type(weight).__name__
    if name == "Int8Tensor":
        return _read_int8(weight, what)
    if name == "IntxUnpackedToInt8Tensor":
        return _read_intx(weight, what)
    if name == "Float8Tensor":
        return _read_float8(weight, what)
    why, instead = next(
        (reason for start, reason in _UNREADABLE.items() if name.startswith(start)),
        ("are in a form that edgedeploy does not know", "use a configuration that edgedeploy's documentation lists"),
    )
    raise ModelError(f"the weights {what} are a torchao {name}, which {why}; {instead}")


def _read_int8(weight: Any, what: str) -> tuple[Stored, _Input | None, CompressionKind, str]:
    stored = stored_weights(
        weight.qdata, weight.block_size, weight.scale, getattr(weight, "zero_point", None), bits=8, what=what
    )
    how = getattr(weight, "act_quant_kwargs", None)
    factor = getattr(weight, "act_pre_scale", None)
    detail = f"{_layout(stored)} weights"
    if how is None:
        if factor is not None:
            raise ModelError(
                f"the weights {what} scale their input (act_pre_scale) without quantizing it; fold the factors into "
                f"the weights before quantization"
            )
        return stored, None, "weight-only int8", detail
    is_symmetric = how.mapping_type.name.startswith("SYMMETRIC")
    bits = 7 if getattr(how, "reduce_range", False) else 8
    scale, zero = getattr(weight, "act_quant_scale", None), getattr(weight, "act_quant_zero_point", None)
    if scale is None:
        per_token = type(how.granularity).__name__ != "PerTensor"
        quantizer = _Input(bits, is_symmetric, per_token, factor=factor)
        return stored, quantizer, "dynamic int8", f"{detail}, {_shown(quantizer)}"
    if scale.numel() != 1:
        raise ModelError(
            f"the input of {what} has {scale.numel()} fixed scales, one for each row of a batch of that size; use "
            f"granularity=PerTensor() for activations"
        )
    quantizer = _Input(bits, is_symmetric, False, scale, zero, factor)
    return stored, quantizer, "static int8", f"{detail}, {_shown(quantizer)}"


def _read_intx(weight: Any, what: str) -> tuple[Stored, _Input | None, CompressionKind, str]:
    bits = _width(weight.target_dtype)
    stored = stored_weights(weight.qdata, weight.block_size, weight.scale, weight.zero_point, bits=bits, what=what)
    activation = weight.activation_quantization
    detail = f"{_layout(stored)} {bits}-bit weights"
    if activation is None:
        return stored, None, "weight-only int4" if stored.bits == 4 else "weight-only int8", detail
    if str(getattr(activation, "value", activation)) != "int8_asym_per_token":
        raise ModelError(
            f"the input of {what} is quantized as {activation}, which edgedeploy does not know; use "
            f"Int8DynamicActivationIntxWeightConfig with its default activations"
        )
    quantizer = _Input(8, is_symmetric=False, per_token=True)
    kind: CompressionKind = "int8 activations, int4 weights" if stored.bits == 4 else "dynamic int8"
    return stored, quantizer, kind, f"{detail}, {_shown(quantizer)}"


def _read_float8(weight: Any, what: str) -> tuple[Stored, _Input | None, CompressionKind, str]:
    import torch

    if getattr(weight, "act_quant_kwargs", None) is not None:
        raise ModelError(
            f"the layer of {what} computes with float8 inputs, which only some GPUs do; use Float8WeightOnlyConfig"
        )
    if weight.qdata.dtype != torch.float8_e4m3fn:
        raise ModelError(f"the weights {what} are {weight.qdata.dtype}; only torch.float8_e4m3fn is carried")
    stored = stored_weights(weight.qdata, weight.block_size or (), weight.scale, None, bits=8, what=what)
    if stored.block:
        raise ModelError(
            f"the float8 weights {what} have a scale for every {stored.block} elements; use one for each row or tensor"
        )
    return stored, None, "float8", f"{_layout(stored)} float8_e4m3fn weights"


def _lower_qat(path: str, part: Any) -> Iterator[_Lowered]:
    """Replace a layer that fake-quantizes its weight by one that stores the integers it was trained for."""
    from torch import nn

    bases: Mapping[str, type[nn.Module]] = {"FakeQuantizedLinear": nn.Linear, "FakeQuantizedEmbedding": nn.Embedding}
    lineage: dict[str, Any] = {kind.__name__: kind for kind in type(part).__mro__}
    base = next((name for name in bases if name in lineage), "")
    if not base:
        if isinstance(part, nn.Linear | nn.Embedding) or type(part).__name__.endswith("Linear"):
            raise ModelError(
                f"{path} is a torchao {type(part).__name__}, which edgedeploy does not know; use QATConfig with "
                f"Int8DynamicActivationIntxWeightConfig or IntxWeightOnlyConfig"
            )
        return
    if type(part).forward is not lineage[base].forward:
        raise ModelError(f"{path} is a {type(part).__name__} with a forward of its own; convert it by QATConfig first")
    weight_grid, input_grid = part.weight_fake_quantizer, getattr(part, "activation_fake_quantizer", None)
    quantizer = _trained_input(path, input_grid)
    if weight_grid is None or not weight_grid.enabled:
        if quantizer is not None:
            raise ModelError(
                f"{path} fake-quantizes its input but not its weights, which no runtime does; give QATConfig a weight "
                f"configuration too"
            )
        _strip(part)
        part.__class__ = bases[base]
        return
    stored, bits = _trained_weight(path, weight_grid, part.weight)
    kept = _stored_weight(stored, part.weight.dtype)
    _strip(part)
    _rewrite(part, bases[base], "weight", kept, quantizer)
    detail = f"{_layout(stored)} {bits}-bit weights" + (f", {_shown(quantizer)}" if quantizer else "")
    yield _Lowered("QAT int8", path, f"torchao QAT, not converted: {detail}", "")


def _strip(part: Any) -> None:
    for name in ("weight_fake_quantizer", "activation_fake_quantizer"):
        if hasattr(part, name):
            delattr(part, name)


def _trained_input(path: str, quantizer: Any) -> _Input | None:
    if quantizer is None or not quantizer.enabled:
        return None
    config = quantizer.config
    per_token = type(getattr(config, "granularity", None)).__name__ == "PerToken"
    if type(quantizer).__name__ != "IntxFakeQuantizer" or not per_token or not config.is_dynamic:
        raise ModelError(
            f"{path} was trained with inputs on {config}, which edgedeploy cannot carry; use 8-bit integers per token "
            f"with is_dynamic=True"
        )
    return _Input(_width(config.dtype), config.is_symmetric, per_token=True)


def _trained_weight(path: str, quantizer: Any, weight: Tensor) -> tuple[Stored, int]:
    """Return the integers that a fake quantizer gives a weight, shown to mean exactly what it returns."""
    import torch

    if type(quantizer).__name__ != "IntxFakeQuantizer":
        raise ModelError(
            f"{path} was trained for {quantizer.config}, which edgedeploy cannot carry; use IntxFakeQuantizeConfig"
        )
    with torch.no_grad():
        wanted = quantizer(weight).detach()
        scale, zero = quantizer.scale.detach(), quantizer.zero_point.detach()
        block = weight.shape[-1] // scale.reshape(weight.shape[0], -1).shape[-1]
        step, middle = (
            part.reshape(weight.shape[0], -1).float().repeat_interleave(block, dim=1) for part in (scale, zero)
        )
        codes = torch.round(wanted.float() / step + middle)
        bits = _width(quantizer.config.dtype)
        storage = torch.uint8 if codes.max() > 127 else torch.int8
        stored = stored_weights(codes.to(storage), (1, block), scale, zero, bits=bits, what=f"{path}.weight")
        again = (codes - middle) * step
    if not torch.allclose(again, wanted.float(), rtol=1e-6, atol=0.0):
        raise ModelError(
            f"the fake-quantized weights of {path} lie on no grid of {bits}-bit integers; use ZeroPointDomain.INT"
        )
    return stored, bits


def _demand_linear(part: nn.Module, quantizer: _Input | None, what: str) -> None:
    from torch import nn

    if quantizer is None or (isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward):
        return
    raise ModelError(
        f"the weights {what} quantize the input of a {type(part).__name__}, and edgedeploy knows that of nn.Linear "
        f"only; leave this layer out by quantize_'s filter_fn"
    )


def _rewrite(part: nn.Module, base: type[nn.Module], name: str, stored: nn.Module, quantizer: _Input | None) -> None:
    """Give a layer a class of its own, in which the weight is made from its integers whenever it is read."""
    part._parameters.pop(name, None)
    part._buffers.pop(name, None)
    # torchao binds a description to the layer that asks for the weight's class.
    part.__dict__.pop("extra_repr", None)
    place = f"{name}_stored"
    part.add_module(place, stored)
    members: dict[str, Any] = {
        "__module__": base.__module__,
        name: property(lambda self: getattr(self, place)()),
    }
    if quantizer is not None:
        part.add_module("input_grid", _input_grid(quantizer))
        members["forward"] = lambda self, given: base.forward(self, self.input_grid(given))
    part.__class__ = type(base.__name__, (base,), members)


@cache
def _classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """Return the classes of the parts that hold integer weights and input grids; made late, as they need torch."""
    import torch
    from torch import nn

    from edgedeploy.prepare.markers import operators

    markers = operators()

    class StoredWeight(nn.Module):
        def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
            super().__init__()
            self.register_buffer("codes", stored.codes)
            self.register_buffer("scale", stored.scale)
            self.register_buffer("zero_point", stored.zero_point)
            # Follows the model when that is cast to another float; scales stay float32.
            self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
            self.layout = (stored.axis, stored.block, stored.bits)

        def forward(self) -> torch.Tensor:
            made: torch.Tensor = markers.dequantize_weight(self.codes, self.scale, self.zero_point, *self.layout)
            like: Any = self.like
            return made if like.dtype == torch.float32 else made.to(like.dtype)

    class InputGrid(nn.Module):
        def __init__(self, how: _Input) -> None:
            super().__init__()
            self.how = how
            self.register_buffer("factor", None if how.factor is None else how.factor.detach())
            if how.scale is not None:
                zero = torch.zeros(1) if how.zero_point is None else how.zero_point.detach()
                self.register_buffer("scale", how.scale.detach().float().reshape(1))
                self.register_buffer("zero_point", zero.reshape(1).to(torch.int32))

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            factor: Any = self.factor
            given = given if factor is None else given * factor
            how = self.how
            if how.scale is None:
                result: torch.Tensor = markers.dynamic_quantize(given, how.bits, how.is_symmetric, how.per_token)
                return result
            low, high = -(2 ** (how.bits - 1)), 2 ** (how.bits - 1) - 1
            fixed: torch.Tensor = markers.fake_quantize(given, self.scale, self.zero_point, -1, low, high)
            return fixed

    return StoredWeight, InputGrid


def _stored_weight(stored: Stored, dtype: Any) -> nn.Module:
    return _classes()[0](stored, dtype)


def _input_grid(how: _Input) -> nn.Module:
    return _classes()[1](how)


def _width(dtype: Any) -> int:
    """Return the bits of an integer type: torch.int4, or TorchAODType.INT4 of older versions."""
    match = re.search(r"\d+$", str(dtype))
    assert match is not None
    return int(match[0])


def _layout(stored: Stored) -> str:
    symmetric = "symmetric" if not bool(stored.zero_point.any()) else "asymmetric"
    where = f"groups of {stored.block}" if stored.block else "per-channel" if stored.axis >= 0 else "per-tensor"
    return f"{where} {symmetric}"


def _shown(quantizer: _Input) -> str:
    symmetric = "symmetric" if quantizer.is_symmetric else "asymmetric"
    if quantizer.scale is not None:
        return f"{symmetric} {quantizer.bits}-bit activations on a fixed grid"
    each = "token" if quantizer.per_token else "tensor"
    return f"{symmetric} {quantizer.bits}-bit activations quantized anew in each inference, per {each}"


def _reports(lowered: list[_Lowered]) -> tuple[FoundCompression, ...]:
    groups: dict[tuple[CompressionKind, str, str], list[str]] = {}
    for item in lowered:
        groups.setdefault((item.kind, item.detail, item.note), []).append(item.path)
    return tuple(
        FoundCompression(
            kind=kind,
            layers=tuple(paths),
            detail=detail,
            lowering="weights read out of torchao's tensors and written as integers with their scales",
            note=note,
        )
        for (kind, detail, note), paths in groups.items()
    )
