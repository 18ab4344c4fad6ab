"""A node's learnt constants in whatever form a file stores them: floats, Q/DQ pairs, codes of integer operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgedeploy.prepare.graph import View, attributes
from edgedeploy.prepare.ptq.quantized_set import MOVES
from edgedeploy.records.compression import Numbers, Scales
from edgedeploy.records.quantization import (
    ActivationRange,
    QuantizationTable,
    SourceQuantization,
    WeightQuantization,
)

if TYPE_CHECKING:
    from onnx import NodeProto

Array = NDArray[Any]

# Which inputs of an operator are learnt, weights first. Shapes, axes, clip limits, scales and zero-points are not.
_LEARNT_INPUTS: Mapping[str, Sequence[int]] = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 0, 2), "MatMul": (1, 0), "Gather": (0,), "Add": (0, 1),
    "Mul": (0, 1), "PRelu": (1,), "BatchNormalization": (1, 2, 3, 4), "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2), "LSTM": (1, 2, 3), "GRU": (1, 2, 3),
    "RNN": (1, 2, 3), "FusedConv": (1, 2), "FusedMatMul": (1, 0), "FusedGemm": (1, 0, 2),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _IntegerForm:
    """Where an operator on integers has its weights: (codes, scale, zero-point) by input index, -1 where it has none.

    Attributes:
        activation: index of the zero-point of what it reads; -1: it quantizes its input itself.
    """

    weights: tuple[tuple[int, int, int], ...]
    bias: int = -1
    activation: int = -1


_INTEGER_FORMS: Mapping[str, _IntegerForm] = {
    "QLinearConv": _IntegerForm(((3, 4, 5),), bias=8, activation=2),
    "QLinearMatMul": _IntegerForm(((3, 4, 5),), activation=2),
    "QGemm": _IntegerForm(((3, 4, 5),), bias=6, activation=2),
    "ConvInteger": _IntegerForm(((1, -1, 3),), activation=2),
    "MatMulInteger": _IntegerForm(((1, -1, 3),), activation=2),
    "MatMulIntegerToFloat": _IntegerForm(((1, 3, 5),), bias=6, activation=4),
    "DynamicQuantizeMatMul": _IntegerForm(((1, 2, 3),), bias=4),
    "DynamicQuantizeLSTM": _IntegerForm(((1, 8, 9), (2, 10, 11)), bias=3),
}
# Operators that multiply weights with activations; the other learnt constants are added, scaled by or looked up.
PRODUCTS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "FusedConv", "FusedMatMul", "FusedGemm"}
    | {"MatMulNBits", *_INTEGER_FORMS}
)
# Between a tensor and the same values in another arrangement.
_MOVES = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Identity"})


@dataclass(frozen=True, slots=True)
class Stored:
    """One learnt constant.

    Attributes:
        name: of the constant that holds its values, or their codes.
        is_set: which of its values are not zero, in the shape that the operator reads.
        numbers: how it is stored.
        constants: everything in the file that makes it up, scales and zero-points included.
    """

    name: str
    is_set: NDArray[np.bool_]
    numbers: Numbers
    constants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a node has learnt: matrices and filters that it multiplies with, and the rest."""

    weights: tuple[Stored, ...] = ()
    others: tuple[Stored, ...] = ()


def learnt_by(node: NodeProto, seen: View) -> Learnt:
    """Return a node's learnt constants; empty for a node that has none."""
    if node.op_type == "MatMulNBits":
        bias = _constant(node, 5, seen)
        return Learnt((_packed(node, seen),), (bias,) if bias else ())
    if form := _INTEGER_FORMS.get(node.op_type):
        codes = [_codes_of(node, place, seen) for place in form.weights]
        bias = _constant(node, form.bias, seen)
        return Learnt(tuple(one for one in codes if one), (bias,) if bias else ())
    found = [(index, _constant(node, index, seen)) for index in _LEARNT_INPUTS.get(node.op_type, ())]
    constants = [(index, one) for index, one in found if one is not None]
    if node.op_type in ("Add", "Mul") and not _is_learnt(node, [one for _, one in constants], seen):
        return Learnt()
    if node.op_type not in PRODUCTS:
        return Learnt(others=tuple(one for _, one in constants))
    last_weight = 2 if node.op_type in ("LSTM", "GRU", "RNN") else 1
    return Learnt(
        tuple(one for index, one in constants if index <= last_weight),
        tuple(one for index, one in constants if index > last_weight),
    )


def activations_of(node: NodeProto, seen: View) -> Numbers:
    """Return how a node's activation is stored while it computes, as far as the graph says."""
    if node.op_type == "MatMulNBits":
        # Level 4 lets the kernel round its input to int8, block by block; the others compute in float.
        is_rounded = attributes(node).get("accuracy_level", 0) == 4
        return _with_scales(_dynamic("int8", is_symmetric=True), "block") if is_rounded else Numbers()
    if form := _INTEGER_FORMS.get(node.op_type):
        name = node.input[form.activation] if 0 <= form.activation < len(node.input) else ""
        return _grid(seen.constants[name]) if name in seen.constants else _dynamic("uint8", is_symmetric=False)
    maker = _maker(node.input[0], seen) if node.input else None
    if maker is None or maker.op_type != "DequantizeLinear":
        return Numbers()
    name = maker.input[2] if len(maker.input) > 2 else ""
    quantizer = seen.producers.get(maker.input[0])
    if quantizer is not None and quantizer.op_type == "DynamicQuantizeLinear":
        return _dynamic("uint8", is_symmetric=False)
    return _grid(seen.constants[name]) if name in seen.constants else _grid(np.zeros((), np.uint8))


def weights_in_table(grid: WeightQuantization) -> Numbers:
    """Return how a table has weights stored."""
    if grid.storage != "integer":
        bits = {"float16": 16, "bfloat16": 16, "float8e4m3fn": 8}[grid.storage]
        return Numbers(storage=grid.storage, bits=bits)
    return Numbers(
        storage="int4" if grid.bits <= 4 else "int8" if grid.bits <= 8 else "int16",
        bits=grid.bits,
        is_symmetric=not any(grid.zero_points),
        scales="block" if grid.block else "tensor" if grid.axis is None else "channel",
    )


def activations_in_table(
    node: NodeProto, weight: str, table: QuantizationTable | SourceQuantization, seen: View
) -> Numbers:
    """Return how a table has what a node reads stored; what only moves values keeps their grid."""
    if weight in table.dynamic:
        rule = table.dynamic[weight]
        storage = "int8" if rule.symmetric else "uint8"
        made = Numbers(storage=storage, bits=rule.bits, is_symmetric=rule.symmetric, is_dynamic=True)
        return _with_scales(made, "token" if rule.per_token else "tensor")
    is_left_out = isinstance(table, QuantizationTable) and node.name not in table.nodes
    tensor = node.input[0]
    maker = seen.producers.get(tensor)
    while tensor not in table.activations and maker is not None and maker.op_type in MOVES:
        tensor = maker.input[0]
        maker = seen.producers.get(tensor)
    values = table.activations.get(tensor)
    return Numbers() if is_left_out or values is None else _range_numbers(values)


def _with_scales(numbers: Numbers, scales: Scales) -> Numbers:
    return msgspec.structs.replace(numbers, scales=scales)


def _range_numbers(values: ActivationRange) -> Numbers:
    grid = values.grid
    if grid is None:  # a target's rules decide the rest
        return Numbers(storage="int8", bits=8, scales="tensor")
    bits = max(1, (grid.high_code - grid.low_code).bit_length())
    width = 8 if bits <= 8 else 16
    return Numbers(
        storage=f"int{width}" if grid.low_code < 0 else f"uint{width}",
        bits=bits,
        is_symmetric=abs(2 * grid.zero_point - grid.low_code - grid.high_code) <= 1,
        scales="tensor",
    )


def _dynamic(storage: str, *, is_symmetric: bool) -> Numbers:
    return Numbers(storage=storage, bits=8, is_symmetric=is_symmetric, scales="tensor", is_dynamic=True)


def _is_learnt(node: NodeProto, constants: Sequence[Stored], seen: View) -> bool:
    """Whether what is added or multiplied is a parameter: no single number, and no scale of integers.

    Two constants make one that another node reads, and that counts it.
    """
    if len(constants) != 1 or constants[0].is_set.size <= 1:
        return False
    makers = [seen.producers.get(name) for name in node.input]
    return not any(maker is not None and maker.op_type == "DynamicQuantizeLinear" for maker in makers)


def _maker(tensor: str, seen: View) -> NodeProto | None:
    """Return the node that made a tensor's values, before they were moved."""
    maker = seen.producers.get(tensor)
    while maker is not None and maker.op_type in _MOVES:
        maker = seen.producers.get(maker.input[0])
    return maker


def _constant(node: NodeProto, index: int, seen: View) -> Stored | None:
    if not 0 <= index < len(node.input) or not node.input[index]:
        return None
    return _stored(node.input[index], seen)


def _stored(tensor: str, seen: View) -> Stored | None:
    """Return the constant behind a tensor: itself, or what arranges, widens or dequantizes it when it is loaded."""
    if tensor in seen.constants:
        value = seen.constants[tensor]
        return Stored(tensor, _is_set(value), _plain_numbers(value), (tensor,))
    maker = seen.producers.get(tensor)
    if maker is None:
        return None
    if maker.op_type == "DequantizeLinear":
        return _dequantized(maker, seen)
    if maker.op_type == "Mul":  # a mask that is still multiplied in, or the scales of short floats
        left, right = (_stored(name, seen) for name in maker.input)
        if left is None or right is None:
            return None
        main, factor = (left, right) if left.is_set.size >= right.is_set.size else (right, left)
        constants = (*main.constants, *factor.constants)
        return replace(main, is_set=main.is_set & factor.is_set, constants=constants)
    if maker.op_type not in ("Cast", "Identity", "Transpose", "Reshape", "Slice"):
        return None
    inner = _stored(maker.input[0], seen)
    if inner is None:
        return None
    if maker.op_type == "Transpose":
        return replace(inner, is_set=inner.is_set.transpose(attributes(maker).get("perm")))
    if maker.op_type == "Reshape":
        shape = seen.constants.get(maker.input[1])
        return None if shape is None else _reshaped(inner, [int(size) for size in shape])
    if maker.op_type == "Slice":
        return _cut(inner, maker, seen)
    return inner


def _reshaped(inner: Stored, shape: Sequence[int]) -> Stored:
    made = inner.is_set.reshape(shape)
    # Rows that are put together again each had a scale: what an axis per block looks like before opset 21.
    is_block = inner.numbers.scales == "channel" and made.shape[0] != inner.is_set.shape[0]
    numbers = _with_scales(inner.numbers, "block") if is_block else inner.numbers
    return replace(inner, is_set=made, numbers=numbers)


def _cut(inner: Stored, node: NodeProto, seen: View) -> Stored | None:
    """Return a constant without the padding that a Slice takes off."""
    bounds = [seen.constants.get(name) for name in node.input[1:]]
    if len(bounds) < 3 or any(bound is None for bound in bounds):
        return None
    starts, ends, axes = ([int(one) for one in bound] for bound in bounds[:3] if bound is not None)
    places = [slice(None)] * inner.is_set.ndim
    for start, end, axis in zip(starts, ends, axes, strict=True):
        places[axis] = slice(start, end)
    return replace(inner, is_set=inner.is_set[tuple(places)])


def _dequantized(node: NodeProto, seen: View) -> Stored | None:
    """Return what a DequantizeLinear makes of constant integers, or of floats that a QuantizeLinear rounds first."""
    constants = [name for name in node.input if name]
    if any(name not in seen.constants for name in constants[1:]):
        return None
    settings = attributes(node)
    axis, block = int(settings.get("axis", 1)), int(settings.get("block_size", 0))
    scale = seen.constants[constants[1]]
    source, codes = constants[0], seen.constants.get(constants[0])
    is_rounded = codes is None
    if codes is None:
        rounder = seen.producers.get(source)
        if rounder is None or rounder.op_type != "QuantizeLinear" or rounder.input[0] not in seen.constants:
            return None
        source = rounder.input[0]
        zero = seen.constants[constants[2]] if len(constants) > 2 else np.zeros((), np.uint8)
        values = seen.constants[source].astype(np.float64)
        codes = np.rint(values / _spread(scale.astype(np.float64), values.shape, axis, block))
        codes = codes + _spread(zero.astype(np.float64), values.shape, axis, block)
    else:
        zero = seen.constants[constants[2]] if len(constants) > 2 else np.zeros((), codes.dtype)
    if zero.dtype.kind == "f" or _storage(zero).startswith("float"):  # a short float times a scale
        return Stored(source, _is_set(codes), _plain_numbers(codes), (source, *constants[1:]))
    numbers = _with_scales(_grid(zero), "block" if block else "channel" if scale.size > 1 else "tensor")
    if is_rounded:
        # Eight bits when it computes, but whole floats in the file.
        numbers = msgspec.structs.replace(numbers, storage=_storage(seen.constants[source]))
    is_set = codes.astype(np.int32) != _spread(zero.astype(np.int32), codes.shape, axis, block)
    return Stored(source, is_set, numbers, (source, *constants[1:]))


def _codes_of(node: NodeProto, place: tuple[int, int, int], seen: View) -> Stored | None:
    names = [node.input[index] if 0 <= index < len(node.input) else "" for index in place]
    codes = seen.constants.get(names[0])
    if codes is None:
        return None
    zero = seen.constants.get(names[2], np.zeros((), codes.dtype))
    scale = seen.constants.get(names[1]) if names[1] else _scale_behind(node, seen)
    per_channel = max(zero.size, 1 if scale is None else scale.size) > 1
    numbers = _with_scales(_grid(zero), "channel" if per_channel else "tensor")
    axis = 0 if node.op_type in ("QLinearConv", "ConvInteger") else codes.ndim - 1
    if node.op_type == "QGemm" and attributes(node).get("transB"):
        axis = 0
    if node.op_type == "DynamicQuantizeLSTM":  # (directions,) or (directions, 4 * hidden)
        wide = zero.reshape(codes.shape[0], 1, -1) if zero.size > 1 else zero.reshape(())
    else:
        wide = _spread(zero.reshape(-1), codes.shape, axis, 0)
    is_set = codes.astype(np.int32) != wide.astype(np.int32)
    return Stored(names[0], is_set, numbers, tuple(name for name in names if name in seen.constants))


def _scale_behind(node: NodeProto, seen: View) -> Array | None:
    """Return the weight scales that an integer product is multiplied with: Cast, then Mul by (input scale × scales)."""
    tensor = node.output[0]
    for _ in range(2):
        reader = seen.sole_consumer(tensor)
        if reader is None:
            return None
        if reader.op_type == "Mul":
            other = reader.input[1] if reader.input[0] == tensor else reader.input[0]
            maker = seen.producers.get(other)
            names = [other, *(maker.input if maker is not None and maker.op_type == "Mul" else ())]
            return next((seen.constants[name] for name in names if name in seen.constants), None)
        tensor = reader.output[0]
    return None


def _packed(node: NodeProto, seen: View) -> Stored:
    """Return the weights of MatMulNBits, shape (N, K): codes of 2, 4 or 8 bits in bytes, lowest bits first.

    Source: ONNX Runtime, ContribOperators.md, com.microsoft.MatMulNBits.
    """
    settings = attributes(node)
    bits, block = int(settings.get("bits", 4)), int(settings["block_size"])
    rows, columns = int(settings["N"]), int(settings["K"])
    codes = _unpacked(seen.constants[node.input[1]], bits).reshape(rows, -1)[:, :columns].astype(np.int32)
    middle = 2 ** (bits - 1)
    name = node.input[3] if len(node.input) > 3 else ""
    zero = np.full((rows, -(-columns // block)), middle, np.int32)
    if name in seen.constants and seen.constants[name].dtype == np.uint8:
        zero = _unpacked(seen.constants[name], bits).reshape(rows, -1)[:, : zero.shape[1]].astype(np.int32)
    numbers = Numbers(storage=f"int{bits}", bits=bits, is_symmetric=bool((zero == middle).all()), scales="block")
    if columns <= block or _is_constant_over_blocks(seen.constants[node.input[2]], rows):
        numbers = _with_scales(numbers, "channel")
    is_set = codes != np.repeat(zero, block, axis=1)[:, :columns]
    kept = tuple(name for name in node.input[1:4] if name in seen.constants)
    return Stored(node.input[1], is_set, numbers, kept)


def _unpacked(packed: Array, bits: int) -> Array:
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: Array = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def _is_constant_over_blocks(scales: Array, rows: int) -> bool:
    each = scales.reshape(rows, -1)
    return bool((each == each[:, :1]).all())


def _spread(values: Array, shape: Sequence[int], axis: int, block: int) -> Array:
    """Return one value for each element of `shape`, or something that broadcasts to that."""
    if block:
        whole: Array = np.take(np.repeat(values, block, axis=axis), np.arange(shape[axis]), axis=axis)
        return whole
    if values.size == 1:
        return values.reshape(())
    axis %= len(shape)
    return values.reshape([-1 if index == axis else 1 for index in range(len(shape))])


def _is_set(value: Array) -> NDArray[np.bool_]:
    # Short floats are types of ml_dtypes, whose comparison is not numpy's own.
    wide = value if value.dtype.kind in "fiub" else value.astype(np.float32)
    return np.asarray(wide != 0)


def _storage(value: Array) -> str:
    name = str(value.dtype)
    return "float8e4m3fn" if name == "float8_e4m3fn" else name


def _bits(value: Array) -> int:
    name = str(value.dtype)
    return int(name[-1]) if name in ("int4", "uint4", "int2", "uint2") else value.dtype.itemsize * 8


def _plain_numbers(value: Array) -> Numbers:
    return Numbers(storage=_storage(value), bits=_bits(value))


def _grid(zero: Array) -> Numbers:
    """Return what a zero-point says of a grid: its type, and whether it lies in the middle."""
    storage, bits = _storage(zero), _bits(zero)
    middle = 2 ** (bits - 1) if storage.startswith("u") else 0
    is_symmetric = bool((zero.astype(np.int32) == middle).all())
    return Numbers(storage=storage, bits=bits, is_symmetric=is_symmetric, scales="tensor")
