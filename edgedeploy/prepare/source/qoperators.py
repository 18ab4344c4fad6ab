"""Operators that compute on integers, rewritten as DequantizeLinear, a float operator and QuantizeLinear.

What is read are the operators of ONNX and of `com.microsoft` that ONNX Runtime's quantizers write. Dynamic quantization
becomes the marker DynamicQuantize, and packed weights become DequantizeWeight (`markers.py`). Nothing is computed here
but scales of biases; `absorb` reads the result. The form computes what the integers stand for: integer kernels differ
from it by a step of a tensor's grid where they round sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.prepare.graph import FIRST_OPSET_WITH_REDUCED_AXES_AS_INPUT, View, attributes, opset_of, view
from edgedeploy.prepare.markers import DOMAIN
from edgedeploy.prepare.source.clean_graph import refusal

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]

_MICROSOFT = "com.microsoft"
# QLinear operators of one quantized input, and the float operator that they stand for.
_UNARY = {
    "QLinearAveragePool": "AveragePool",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearSigmoid": "Sigmoid",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearSoftmax": "Softmax",
    "QLinearReduceMean": "ReduceMean",
}
_BINARY = {"QLinearAdd": "Add", "QLinearMul": "Mul"}
# Attributes that only the quantized operator has, with the value that the float operator implies.
_IMPLIED = {"channels_last": 0}
_FIRST_OPSET_WITH_SOFTMAX_OVER_ONE_AXIS = 13


def to_qdq(model: ModelProto) -> ModelProto:
    """Rewrite a model's integer operators, in place.

    Args:
        model: valid ONNX; changed.

    Returns:
        The same model: no QLinear, Integer or packed-weight operator is left that is listed in this file.

    Raises:
        ModelError: an integer operator is used in a way that has no float form: an accumulator that is not scaled back,
            a scale that is not constant, packed weights in an order of their own.
    """
    rewriting = _Rewriting(model, view(model.graph))
    for node in list(model.graph.node):
        rewrite = _REWRITES.get(node.op_type)
        if rewrite is None or node.domain not in ("", "ai.onnx", _MICROSOFT):
            rewriting.nodes.append(node)
        else:
            rewrite(rewriting, node)
    kept = [node for node in rewriting.nodes if not set(node.output) <= rewriting.superseded]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


@dataclass(slots=True)
class _Rewriting:
    """A graph that is being rewritten.

    Attributes:
        seen: the graph as it was.
        nodes: the graph as it becomes.
        superseded: outputs of nodes that were read together with another one and are not wanted any more.
    """

    model: ModelProto
    seen: View
    nodes: list[NodeProto] = field(default_factory=list)
    superseded: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.taken = {*self.seen.constants, *self.seen.producers, *(value.name for value in self.model.graph.input)}

    def fresh(self, wanted: str) -> str:
        """Return a name that no tensor has yet."""
        name = wanted
        count = 1
        while name in self.taken:
            count += 1
            name = f"{wanted}/{count}"
        self.taken.add(name)
        return name

    def add(self, kind: str, inputs: Sequence[str], output: str, *, domain: str = "", **settings: Any) -> str:
        """Add a node of one output and return that."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", domain=domain, **settings))
        return output

    def constant(self, wanted: str, value: Array) -> str:
        """Add an initializer and return its name."""
        from onnx import numpy_helper

        name = self.fresh(wanted)
        self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def value(self, node: NodeProto, index: int, what: str) -> Array:
        """Return the constant that a node reads."""
        name = _input(node, index)
        if name not in self.seen.constants:
            raise refusal(node, f"its {what} ({name or 'missing'}) is not a constant; quantize the model again")
        return self.seen.constants[name]

    def dequantized(self, inputs: Sequence[str], axis: int | None = None) -> str:
        """Add a DequantizeLinear of (integers, scale, zero-point)."""
        given = list(inputs) if inputs[-1] else list(inputs[:-1])
        settings: dict[str, Any] = {} if axis is None else {"axis": axis}
        return self.add("DequantizeLinear", given, self.fresh(f"{inputs[0]}/real"), **settings)

    def quantize(self, source: str, node: NodeProto, scale: int, output: str) -> None:
        """Add a QuantizeLinear whose scale and zero-point are inputs `scale` and `scale + 1` of a node."""
        zero_point = _input(node, scale + 1)
        self.add("QuantizeLinear", [source, node.input[scale], *([zero_point] if zero_point else [])], output)

    def float_name(self, output: str) -> str:
        """Return the name of the float tensor behind an integer one: that of the source, where it can be told."""
        return self.fresh(output.removesuffix("_quantized") if output.endswith("_quantized") else f"{output}/real")


def _input(node: NodeProto, index: int) -> str:
    return str(node.input[index]) if index < len(node.input) else ""


def _settings(node: NodeProto, *dropped: str) -> dict[str, Any]:
    """Return the attributes that the float operator shares with the quantized one."""
    settings = attributes(node)
    for name, implied in _IMPLIED.items():
        if settings.pop(name, implied) != implied:
            raise refusal(node, f"{name} has no float form; export the model in the order of channels N, C, H, W")
    return {name: value for name, value in settings.items() if name not in dropped}


def _convolution(work: _Rewriting, node: NodeProto) -> None:
    inputs = [work.dequantized(node.input[0:3]), work.dequantized(node.input[3:6], axis=0)]
    if bias := _input(node, 8):
        inputs.append(_bias(work, node, bias, 1.0))
    work.quantize(work.add("Conv", inputs, work.float_name(node.output[0]), **_settings(node)), node, 6, node.output[0])


def _bias(work: _Rewriting, node: NodeProto, bias: str, alpha: float) -> str:
    """Add a DequantizeLinear of a node's int32 bias, which is stored at input scale times weight scale."""
    input_scale, weight_scale = work.value(node, 1, "input scale"), work.value(node, 4, "weight scale")
    scale = (np.float32(alpha) * input_scale.astype(np.float32) * weight_scale.astype(np.float32)).astype(np.float32)
    scale = scale.reshape(()) if scale.size == 1 else scale.reshape(-1)
    return work.dequantized([bias, work.constant(f"{bias}/scale", scale), ""], axis=0 if scale.ndim else None)


def _last_axis(work: _Rewriting, node: NodeProto, weight: str, scale: str) -> int | None:
    """Return the axis of a matrix's scales in the operators that keep one for each of its columns."""
    is_single = scale in work.seen.constants and work.seen.constants[scale].size == 1
    return None if is_single or weight not in work.seen.constants else work.seen.constants[weight].ndim - 1


def _product(work: _Rewriting, node: NodeProto) -> None:
    axis = _last_axis(work, node, node.input[3], node.input[4])
    inputs = [work.dequantized(node.input[0:3]), work.dequantized(node.input[3:6], axis=axis)]
    work.quantize(work.add("MatMul", inputs, work.float_name(node.output[0])), node, 6, node.output[0])


def _gemm(work: _Rewriting, node: NodeProto) -> None:
    settings = attributes(node)
    channels = 0 if settings.get("transB", 0) else 1
    is_single = work.value(node, 4, "weight scale").size == 1
    axis = None if is_single else channels
    inputs = [work.dequantized(node.input[0:3]), work.dequantized(node.input[3:6], axis=axis)]
    if bias := _input(node, 6):
        inputs.append(_bias(work, node, bias, settings.get("alpha", 1.0)))
    is_float = not _input(node, 7)
    output = node.output[0] if is_float else work.float_name(node.output[0])
    work.add("Gemm", inputs, output, **settings)
    if not is_float:
        work.quantize(output, node, 7, node.output[0])


def _binary(work: _Rewriting, node: NodeProto) -> None:
    inputs = [work.dequantized(node.input[0:3]), work.dequantized(node.input[3:6])]
    output = work.add(_BINARY[node.op_type], inputs, work.float_name(node.output[0]))
    work.quantize(output, node, 6, node.output[0])


def _unary(work: _Rewriting, node: NodeProto) -> None:
    kind = _UNARY[node.op_type]
    settings = _settings(node, "opset", "axes")
    inputs = [work.dequantized(node.input[0:3])]
    if kind == "Softmax":
        is_old = attributes(node).get("opset", opset_of(work.model)) < _FIRST_OPSET_WITH_SOFTMAX_OVER_ONE_AXIS
        if is_old and settings.get("axis", 1) != -1:
            raise refusal(node, "before opset 13 it runs over several axes at once; export the model again")
    axes = attributes(node).get("axes")
    if axes is not None and opset_of(work.model) < FIRST_OPSET_WITH_REDUCED_AXES_AS_INPUT:
        settings["axes"] = axes
    elif axes is not None:
        inputs.append(work.constant(f"{node.output[0]}/axes", np.asarray(axes, np.int64)))
    work.quantize(work.add(kind, inputs, work.float_name(node.output[0]), **settings), node, 3, node.output[0])


def _concatenation(work: _Rewriting, node: NodeProto) -> None:
    inputs = [work.dequantized(node.input[index : index + 3]) for index in range(2, len(node.input), 3)]
    work.quantize(
        work.add("Concat", inputs, work.float_name(node.output[0]), **_settings(node)), node, 0, node.output[0]
    )


def _choice(work: _Rewriting, node: NodeProto) -> None:
    inputs = [node.input[0], work.dequantized(node.input[1:4]), work.dequantized(node.input[4:7])]
    work.quantize(work.add("Where", inputs, work.float_name(node.output[0])), node, 7, node.output[0])


def _integer_sum(work: _Rewriting, node: NodeProto) -> None:
    """Rewrite MatMulInteger or ConvInteger together with the Cast and the Mul that scale its sums back."""
    dynamic = _dynamic_source(work, node, node.input[0], _input(node, 2))
    last, scale = _scaled_back(work, node, dynamic)
    weight = work.value(node, 1, "second factor")
    kind = "Conv" if node.op_type == "ConvInteger" else "MatMul"
    channels = 0 if kind == "Conv" else weight.ndim - 1
    if scale.size not in (1, weight.shape[channels]):
        raise refusal(node, f"its sums are scaled by {scale.size} factors for {weight.shape[channels]} channels")
    axis = None if scale.size == 1 else channels
    shape = () if axis is None else (-1,)
    stored = [
        node.input[1],
        work.constant(f"{node.input[1]}/scale", scale.astype(np.float32).reshape(shape)),
        _like_scale(work, node, scale.size),
    ]
    source = _marked_dynamic(work, dynamic.input[0])
    work.add(kind, [source, work.dequantized(stored, axis)], last, **attributes(node))


def _like_scale(work: _Rewriting, node: NodeProto, count: int) -> str:
    """Return a node's weight zero-point, repeated where the scales are one for each channel and it is one."""
    name = _input(node, 3)
    if not name:
        return ""
    value = work.value(node, 3, "weight zero-point")
    if value.size == count and (value.ndim == 1) == (count > 1):
        return name
    spread = np.full(count, value.reshape(-1)[0], value.dtype) if value.size == 1 else value.reshape(-1)
    return work.constant(f"{name}/spread", spread.reshape(()) if count == 1 else spread)


def _dynamic_source(work: _Rewriting, node: NodeProto, integers: str, zero_point: str) -> NodeProto:
    made = work.seen.producers.get(integers)
    if made is None or made.op_type != "DynamicQuantizeLinear" or zero_point != made.output[2]:
        raise refusal(node, "its first factor does not come from DynamicQuantizeLinear; quantize the model again")
    return made


def _marked_dynamic(work: _Rewriting, source: str) -> str:
    output = work.fresh(f"{source}/dynamic")
    return work.add("DynamicQuantize", [source], output, domain=DOMAIN, bits=8, symmetric=0, per_token=0)


def _scaled_back(work: _Rewriting, node: NodeProto, dynamic: NodeProto) -> tuple[str, Array]:
    """Follow integer sums to the float tensor that they become: its name, and the constant part of its scale.

    The factors are the input's own scale, once, and constants; they stand in one Mul or in several.
    """
    reader = work.seen.sole_consumer(node.output[0])
    if reader is None or reader.op_type != "Cast" or attributes(reader)["to"] != 1:
        raise refusal(node, "its sums are not turned into float32 by a Cast alone; quantize the model again")
    output = str(reader.output[0])
    work.superseded.add(output)
    is_scaled = False
    factors: list[Array] = []
    while not is_scaled or not factors:
        product = work.seen.sole_consumer(output)
        if product is None or product.op_type != "Mul":
            raise refusal(node, "its sums are not multiplied with the input's scale and constants")
        other = product.input[1] if product.input[0] == output else product.input[0]
        for leaf in _factors(work.seen, other):
            if leaf == dynamic.output[1] and not is_scaled:
                is_scaled = True
            elif leaf in work.seen.constants:
                factors.append(work.seen.constants[leaf])
            else:
                raise refusal(node, f"its sums are multiplied with {leaf!r}, which is neither constant nor its scale")
        output = str(product.output[0])
        work.superseded.add(output)
    # The last of them is what the rest of the graph reads: the float operator makes it now.
    work.superseded.discard(output)
    _forget(work, output)
    scale = np.ones((), np.float32)
    for factor in factors:
        scale = scale * factor.astype(np.float32)
    return output, scale.reshape(-1)


def _forget(work: _Rewriting, output: str) -> None:
    """Leave out a node that comes later in the graph, and whose output another one makes now."""
    work.seen.producers[output].op_type = "edgedeploy/forgotten"


def _factors(seen: View, name: str) -> list[str]:
    made = seen.producers.get(name)
    if made is None or made.op_type != "Mul":
        return [name]
    return [leaf for part in made.input for leaf in _factors(seen, part)]


def _dynamic_product(work: _Rewriting, node: NodeProto) -> None:
    """Rewrite DynamicQuantizeMatMul(A, B, b_scale, b_zero_point, bias)."""
    axis = _last_axis(work, node, node.input[1], node.input[2])
    weight = work.dequantized([node.input[1], node.input[2], _input(node, 3)], axis)
    _product_and_bias(work, node, [_marked_dynamic(work, node.input[0]), weight], _input(node, 4))


def _product_to_float(work: _Rewriting, node: NodeProto) -> None:
    """Rewrite MatMulIntegerToFloat(A, B, a_scale, b_scale, a_zero_point, b_zero_point, bias)."""
    axis = _last_axis(work, node, node.input[1], node.input[3])
    weight = work.dequantized([node.input[1], node.input[3], _input(node, 5)], axis)
    made = work.seen.producers.get(node.input[0])
    if made is not None and made.op_type == "DynamicQuantizeLinear":
        source = _marked_dynamic(work, _dynamic_source(work, node, node.input[0], _input(node, 4)).input[0])
    else:
        source = work.dequantized([node.input[0], node.input[2], _input(node, 4)])
    _product_and_bias(work, node, [source, weight], _input(node, 6))


def _product_and_bias(work: _Rewriting, node: NodeProto, inputs: Sequence[str], bias: str) -> None:
    if not bias:
        work.add("MatMul", inputs, node.output[0])
        return
    product = work.add("MatMul", inputs, work.fresh(f"{node.output[0]}/product"))
    work.add("Add", [product, bias], node.output[0])


def _packed_product(work: _Rewriting, node: NodeProto) -> None:
    """Rewrite MatMulNBits: weights (N, K) in blocks along K, several codes in a byte, the lowest bits first.

    Source: the operator's description in ONNX Runtime's ContribOperators.md.
    """
    settings = attributes(node)
    bits, block = int(settings.get("bits", 4)), int(settings["block_size"])
    rows, columns = int(settings["N"]), int(settings["K"])
    blocks = -(-columns // block)
    if _input(node, 4):
        raise refusal(node, "it reads its rows in an order of their own (g_idx); quantize the model without it")
    packed = work.value(node, 1, "packed weights")
    codes = _unpacked(packed.reshape(rows, -1), bits, blocks * block)[:, :columns]
    scales = work.value(node, 2, "scales").astype(np.float32).reshape(rows, blocks)
    zero_points = np.full((rows, blocks), 2 ** (bits - 1), np.int32)
    if _input(node, 3):
        stored = work.value(node, 3, "zero-points")
        if stored.dtype != np.uint8:
            raise refusal(node, "its zero-points are floats, which no grid of integers has; quantize the model again")
        zero_points = _unpacked(stored.reshape(rows, -1), bits, blocks).astype(np.int32)
    inputs = [
        work.constant(f"{node.input[1]}/codes", codes.T),
        work.constant(f"{node.input[2]}/blocks", scales),
        work.constant(f"{node.input[1]}/zero_points", zero_points),
    ]
    weight = work.add(
        "DequantizeWeight", inputs, work.fresh(f"{node.input[1]}/real"), domain=DOMAIN, axis=1, block=block, bits=bits
    )
    _product_and_bias(work, node, [node.input[0], weight], _input(node, 5))


def _unpacked(packed: Array, bits: int, count: int) -> Array:
    """Return rows of codes of `bits` bits, which lie in bytes from the lowest bits up."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return np.ascontiguousarray(spread.reshape(packed.shape[0], -1)[:, :count])


def _recurrent(work: _Rewriting, node: NodeProto) -> None:
    """Rewrite DynamicQuantizeLSTM, whose weights lie transposed: (directions, inputs, 4 * hidden)."""
    given = list(node.input) + [""] * (12 - len(node.input))
    matrices = []
    for weight, scale, zero_point in ((1, 8, 9), (2, 10, 11)):
        stored = work.value(node, weight, "weights").transpose(0, 2, 1)
        scales = work.value(node, scale, "weight scale").astype(np.float32)
        axis = 1 if scales.ndim == 2 and scales.shape[1] > 1 else 0
        if axis == 1 and scales.shape[0] > 1:
            raise refusal(node, "two directions with scales per channel are not supported; quantize per tensor")
        zeros = work.value(node, zero_point, "weight zero-point").reshape(-1)
        flat = scales.reshape(-1)
        inputs = [
            work.constant(f"{given[weight]}/codes", stored),
            work.constant(f"{given[scale]}/flat", flat if flat.size > 1 else flat.reshape(())),
            work.constant(f"{given[zero_point]}/flat", zeros if flat.size > 1 else zeros.reshape(())),
        ]
        matrices.append(work.dequantized(inputs, axis if flat.size > 1 else None))
    from onnx import helper

    inputs = [_marked_dynamic(work, given[0]), *matrices, *given[3:8]]
    while inputs and not inputs[-1]:
        inputs.pop()
    work.nodes.append(helper.make_node("LSTM", inputs, list(node.output), name=node.name, **attributes(node)))


def _dequantized_again(work: _Rewriting, node: NodeProto) -> None:
    """Rewrite a DequantizeLinear of what DynamicQuantizeLinear made; any other stays."""
    made = work.seen.producers.get(node.input[0])
    if made is None or made.op_type != "DynamicQuantizeLinear":
        work.nodes.append(node)
        return
    if list(node.input) != list(made.output):
        raise refusal(node, "it does not read the scale and zero-point of the DynamicQuantizeLinear before it")
    work.add("DynamicQuantize", [made.input[0]], node.output[0], domain=DOMAIN, bits=8, symmetric=0, per_token=0)


def _look_up(work: _Rewriting, node: NodeProto) -> None:
    """Rewrite a Gather from a quantized table: the table is dequantized instead of what was picked from it."""
    table = work.seen.constants.get(node.input[0])
    readers = work.seen.consumers.get(node.output[0], ())
    is_quantized = table is not None and readers and all(item.op_type == "DequantizeLinear" for item in readers)
    if not is_quantized or len({tuple(item.input[1:]) for item in readers}) > 1:
        work.nodes.append(node)
        return
    if work.value(readers[0], 1, "scale").size > 1:
        raise refusal(node, "what it picks has several scales; quantize the table with one")
    real = work.dequantized([node.input[0], readers[0].input[1], _input(readers[0], 2)])
    for reader in readers:
        work.add("Gather", [real, node.input[1]], reader.output[0], **attributes(node))
        _forget(work, reader.output[0])


def _leave_out(work: _Rewriting, node: NodeProto) -> None:
    """Leave a node out that the rewriting of another one has made superfluous."""


_REWRITES: Mapping[str, Callable[[_Rewriting, NodeProto], None]] = {
    "QLinearConv": _convolution,
    "QLinearMatMul": _product,
    "QGemm": _gemm,
    "QLinearConcat": _concatenation,
    "QLinearWhere": _choice,
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_UNARY, _unary),
    "MatMulInteger": _integer_sum,
    "ConvInteger": _integer_sum,
    "DynamicQuantizeMatMul": _dynamic_product,
    "MatMulIntegerToFloat": _product_to_float,
    "MatMulNBits": _packed_product,
    "DynamicQuantizeLSTM": _recurrent,
    "DequantizeLinear": _dequantized_again,
    "Gather": _look_up,
    "DynamicQuantizeLinear": _leave_out,
    "edgedeploy/forgotten": _leave_out,
}
