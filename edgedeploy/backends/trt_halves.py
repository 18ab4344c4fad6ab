"""Gives every tensor of a graph one float type: float16, and float32 where it must be.

Strongly typed networks compute each node in the types that its tensors have.

A tensor has the type of the node that makes it; a Cast stands in front of a reader that wants the other one. So two
float32 neighbours pass a value on unharmed. The converter in onnxruntime.transformers casts each float32 node's result
to float16 and back, where 1e5 becomes infinite, and gives two readers of one tensor a Cast of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedeploy.backends.trt_graph import FLOAT, FLOAT16, Draft, attributes, bodies, names_read, rename_read
from edgedeploy.backends.trt_opset import OPSET
from edgedeploy.backends.trt_pairs import PAIRS, PRODUCTS, Pairs

if TYPE_CHECKING:
    from onnx import NodeProto

# IEEE 754 binary16: the largest number, and the smallest that has all eleven bits.
LARGEST_HALF, SMALLEST_NORMAL_HALF = 65504.0, 2.0**-14

# Operators whose ONNX forms stay in float32 whatever their values are.
#   "CUDA Ops that can autocast to float32" of PyTorch (docs.pytorch.org/docs/stable/amp.html): what models trained in
#   mixed precision have always computed so. Softmax is left out: it subtracts its maximum first, NVIDIA's AutoCast
#   converts it, and TensorRT's attention kernels want float16 there. LayerNormalization is left out: TensorRT computes
#   INormalizationLayer in float32 unless told otherwise (setComputePrecision).
_AS_IN_TRAINING = frozenset({
    "Acos", "Asin", "Cosh", "CumSum", "Exp", "InstanceNormalization", "Log", "LogSoftmax", "LpNormalization", "Pow",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Sinh", "Softplus", "Tan",
})  # fmt: skip
#   TensorRT's own warning: "Running layernorm ... with FP16 Reduce or Pow may cause overflow. Forcing Reduce or Pow
#   Layers in FP32 precision ... can help preserving accuracy"; a normalization that is spelt out is made of these.
_IN_NORMALIZATIONS = frozenset({"LRN", "MeanVarianceNormalization", "ReduceMean"})
#   Not converted by NVIDIA's AutoCast (modelopt/onnx/autocast, OP_TYPES_NOT_SUPPORTED_IN_LOW_PRECISION); GRU and RNN
#   are the same kernels as LSTM. Resize is in that list too, for the sake of its scales, which stay float32 here.
_NOT_CONVERTED = frozenset({"Celu", "GRU", "If", "LSTM", "Loop", "NonMaxSuppression", "RNN", "Scan", "Upsample"})
#   Their inputs are coordinates: float16 has steps of half a pixel from 512 on.
_COORDINATES = frozenset({"GridSample", "RoiAlign"})
#   Their output has the type that an attribute names.
_TYPED_BY_ATTRIBUTE = frozenset({"EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})
_RECURRENT = ("GRU", "LSTM", "RNN")
_STAY_FLOAT32 = _AS_IN_TRAINING | _IN_NORMALIZATIONS | _NOT_CONVERTED | _COORDINATES | _TYPED_BY_ATTRIBUTE
# They take any type, and what they make does not depend on it.
_TAKE_ANY = frozenset({"Cast", "IsInf", "IsNaN", "Shape", "Size"})
# They hand values on as they are.
_HAND_ON = frozenset({"Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# What kernels on integers compute beside their product, or pass through, without leaving them.
_BETWEEN_PAIRS = frozenset({
    "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "Identity", "LeakyRelu", "MaxPool", "Relu",
    "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip


def float32_nodes(draft: Draft, beyond_half: Mapping[str, float], pairs: Pairs) -> dict[str, str]:
    """Return the nodes that stay float32 → why.

    Args:
        draft: with its pairs settled.
        beyond_half: tensor of the canonical model → its largest magnitude, where that is too large for float16.
        pairs: of the same graph; what they compute on integers has no float type worth naming.
    """
    beyond = _beyond(draft, beyond_half, pairs)
    integer = between_pairs(draft, pairs)
    reasons: dict[str, str] = {}
    for node in draft.graph.node:
        # What reads no float makes float32 anyway, as its attributes say.
        reads_float = any(draft.kinds.get(name) == FLOAT for name in node.input)
        if not reads_float or node.op_type in (*PAIRS, *_TAKE_ANY) or node.name in integer:
            continue
        if reason := _reason(draft, node, beyond):
            reasons[node.name] = reason
    reasons = _before_recurrent(draft, integer) | reasons
    return reasons | _between(draft, reasons, integer)


def _beyond(draft: Draft, beyond_half: Mapping[str, float], pairs: Pairs) -> dict[str, float]:
    """Return the tensors of this graph that are too large, a rounded one by what its grid can hold at most."""
    found = dict(beyond_half)
    for node in draft.graph.node:
        if node.op_type == "QuantizeLinear":
            # Emission gives the tensor's name to its rounded form.
            name = node.input[0].removesuffix("/float")
            if name in beyond_half:
                found[node.input[0]] = beyond_half[name]
    for name, scale in pairs.grids.items():
        if 128 * scale <= LARGEST_HALF:
            found.pop(name, None)
        else:
            found[name] = 128 * scale
    return found


def _reason(draft: Draft, node: NodeProto, beyond: Mapping[str, float]) -> str:
    if bodies(node):
        return f"{node.op_type} has a branch or a loop body"
    if node.op_type in _STAY_FLOAT32:
        return node.op_type
    floats = [place for place, name in enumerate(node.input) if draft.kinds.get(name) == FLOAT]
    if not any(_takes_half(node, place) for place in floats):
        return f"ONNX has no float16 form of {node.op_type}"
    for name in node.output:
        if name in beyond:
            return f"its output reaches {beyond[name]:.2g}"
    for name in node.input:
        if name in beyond:
            return f"its input {name!r} reaches {beyond[name]:.2g}"
    return next((why for name in node.input if (why := _misfit(draft, name))), "")


def _misfit(draft: Draft, name: str) -> str:
    """Say why a constant is not the same in float16; "" where it is no float or near enough."""
    if not draft.has_constant(name) or draft.constant(name).data_type != FLOAT:
        return ""
    value = draft.value(name)
    assert value is not None
    magnitudes = np.abs(value[np.isfinite(value)])
    largest = float(magnitudes.max(initial=0.0))
    if largest > LARGEST_HALF:
        return f"its constant {name!r} reaches {largest:.2g}"
    if 0.0 < largest < SMALLEST_NORMAL_HALF:
        return f"its constant {name!r} is at most {largest:.2g}, too small for float16"
    return ""


def _takes_half(node: NodeProto, place: int) -> bool:
    """Whether ONNX lets an input be float16 (a last formal argument may stand for several)."""
    formals = _schema(node).inputs
    return "tensor(float16)" in formals[min(place, len(formals) - 1)].types


def _makes_half(node: NodeProto, place: int) -> bool:
    formals = _schema(node).outputs
    return "tensor(float16)" in formals[min(place, len(formals) - 1)].types


def _schema(node: NodeProto) -> Any:
    import onnx

    return onnx.defs.get_schema(node.op_type, OPSET, "")


def _before_recurrent(draft: Draft, integer: frozenset[str]) -> dict[str, str]:
    """Return what makes the sequence that an LSTM, GRU or RNN reads from its beginning, and all that hands it on.

    TensorRT-RTX 1.7.1 mistakes its shape ("Mismatched number of elements in reshape op") where a Cast from float16
    stands in front of one, also with Transpose or MaxPool between. With a product, a sum or Relu between it does not,
    nor in front of one that reads from the end or from both sides.
    """
    makers = draft.makers()
    found: dict[str, str] = {}
    for node in draft.graph.node:
        if node.op_type not in _RECURRENT or attributes(node).get("direction", b"forward") != b"forward":
            continue
        maker = makers.get(node.input[0])
        while (
            maker is not None and maker.op_type not in (*PAIRS, *_TAKE_ANY, *_RECURRENT) and maker.name not in integer
        ):
            found[maker.name] = f"it makes what {node.op_type} reads"
            maker = makers.get(maker.input[0]) if maker.op_type in _HAND_ON else None
    return found


def _between(draft: Draft, reasons: Mapping[str, str], integer: frozenset[str]) -> dict[str, str]:
    """Return cheap nodes that have float32 ones on all sides: in float16 they would cost two casts and precision."""
    makers, readers, outputs = draft.makers(), draft.readers(), {value.name for value in draft.graph.output}
    found: dict[str, str] = {}
    for node in draft.graph.node:
        data = [name for name in node.input if draft.kinds.get(name) == FLOAT and not draft.has_constant(name)]
        made = [name for name in node.output if draft.kinds.get(name) == FLOAT]
        if node.name in reasons or node.name in integer or node.op_type in (*PRODUCTS, *PAIRS, *_TAKE_ANY):
            continue
        if not data or not made or any(name in outputs for name in made):
            continue
        before = [makers.get(name) for name in data]
        after = [reader for name in made for reader in readers.get(name, [])]
        is_within = all(maker is not None and (maker.name in reasons or maker.name in found) for maker in before)
        if is_within and after and all(reader.name in reasons for reader in after):
            found[node.name] = "it stands between float32 nodes"
    return found


def between_pairs(draft: Draft, pairs: Pairs) -> frozenset[str]:
    """Return products on integers, and what lies between their pairs and can be fused with them.

    They stay as they are in the float32 form, without a Cast on either side: a DequantizeLinear and the product that
    reads it are one kernel on integers, and a Cast between them may keep an engine from seeing it. NVIDIA's ModelOpt
    removes such casts for the same reason (fold_dq_fp32_to_fp16_casts). A Cast follows where the result leaves. What a
    product hands on to a rounding by way of a pool is float32 there for the sake of builders that round before they
    pool; TensorRT-RTX 1.7.1 makes float32 of every product of integers, so that a Cast would spare nothing.
    """
    makers, readers, outputs = draft.makers(), draft.readers(), {value.name for value in draft.graph.output}
    products = set(pairs.integers)

    def is_inside(node: NodeProto, inside: set[str]) -> bool:
        data = [name for name in node.input if draft.kinds.get(name) == FLOAT and not draft.has_constant(name)]
        made = [name for name in node.output if name]
        before = [makers.get(name) for name in data]
        after = [reader for name in made for reader in readers.get(name, [])]
        if not data or not after or any(name in outputs for name in made):
            return False
        comes_from = all(
            maker is not None and (maker.op_type == "DequantizeLinear" or maker.name in inside) for maker in before
        )
        return comes_from and all(reader.op_type == "QuantizeLinear" or reader.name in inside for reader in after)

    candidates = [node for node in draft.graph.node if node.op_type in _BETWEEN_PAIRS]
    inside = products | {node.name for node in candidates}
    while gone := {node.name for node in candidates if node.name in inside and not is_inside(node, inside)}:
        inside -= gone
    return frozenset(inside)


def with_halves(draft: Draft, float32: Mapping[str, str], pairs: Pairs) -> None:
    """Rewrite a float32 graph so that all nodes but those named compute in float16; inputs and outputs stay float32.

    Args:
        draft: its pairs settled; changed in place.
        float32: what `float32_nodes` returned.
        pairs: of the same graph. QuantizeLinear and DequantizeLinear stay float32, scales included.
    """
    writer = _Typist(draft, frozenset(float32) | between_pairs(draft, pairs))
    draft.replace_nodes(writer.nodes())
    draft.drop_unread_constants()
    draft.look()


class _Typist:
    """Writes the nodes of a graph anew, in their order, with casts where types meet."""

    def __init__(self, draft: Draft, single: frozenset[str]) -> None:
        self._draft, self._single = draft, single
        self._outputs = {value.name for value in draft.graph.output}
        self._nodes: list[NodeProto] = []
        # Tensors that are float16, what they are called so, and what both kinds are called after a cast.
        self._halves: set[str] = set()
        self._as_half: dict[str, str] = {}
        self._as_single: dict[str, str] = {}

    def nodes(self) -> list[NodeProto]:
        """Return the new nodes."""
        for node in list(self._draft.graph.node):
            is_half = self._is_half(node)
            if node.op_type not in _TAKE_ANY:
                for place, name in enumerate(node.input):
                    if self._draft.kinds.get(name) == FLOAT:
                        wants_half = is_half and _takes_half(node, place)
                        node.input[place] = self._half(name) if wants_half else self._float32(name)
                self._widen_for_bodies(node)
            else:
                name = node.input[0]
                node.input[0] = self._as_half[name] if name in self._halves else name
            self._nodes.append(node)
            if is_half:
                for place, name in enumerate(node.output):
                    if self._draft.kinds.get(name) == FLOAT and _makes_half(node, place):
                        self._made_half(node, place, name)
        return self._nodes

    def _is_half(self, node: NodeProto) -> bool:
        if node.op_type in (*PAIRS, *_TAKE_ANY) or node.name in self._single:
            return False
        # What reads no float makes float32, as its attributes say.
        return any(self._draft.kinds.get(name) == FLOAT for name in node.input)

    def _made_half(self, node: NodeProto, place: int, name: str) -> None:
        self._halves.add(name)
        if name in self._outputs:
            node.output[place] = self._as_half[name] = self._draft.fresh(f"{name}/half")
            self._cast(node.output[place], name, FLOAT)
            self._as_single[name] = name
        else:
            self._as_half[name] = name

    def _half(self, name: str) -> str:
        if name not in self._as_half:
            if self._draft.has_constant(name):
                value = self._draft.value(name)
                assert value is not None
                self._as_half[name] = self._draft.add(f"{name}/half", value.astype(np.float16))
            else:
                self._as_half[name] = self._cast(name, self._draft.fresh(f"{name}/half"), FLOAT16)
        return self._as_half[name]

    def _float32(self, name: str) -> str:
        if name not in self._halves:
            return name
        if name not in self._as_single:
            self._as_single[name] = self._cast(name, self._draft.fresh(f"{name}/float32"), FLOAT)
        return self._as_single[name]

    def _cast(self, source: str, result: str, kind: int) -> str:
        from onnx import helper

        # Emission calls the node of a pair after its tensor; a cast is told from it by the type.
        name = self._draft.fresh(f"{source}/to_{'half' if kind == FLOAT16 else 'float32'}")
        self._nodes.append(helper.make_node("Cast", [source], [result], name=name, to=kind))
        return result

    def _widen_for_bodies(self, node: NodeProto) -> None:
        """Let bodies, which stay float32, read float32 tensors from outside."""
        if bodies(node):
            taken = names_read(node) - set(node.input)
            rename_read(node, {name: self._float32(name) for name in sorted(taken) if name in self._halves})
