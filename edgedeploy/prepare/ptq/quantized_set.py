"""Which nodes of a model are quantized, and which of its tensors are stored as integers for them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgedeploy.errors import ModelError
from edgedeploy.prepare.graph import View, attributes

if TYPE_CHECKING:
    from onnx import NodeProto

# Operators that only move values, or pick some of them: input and output share one grid, and nothing is lost.
MOVES = ("MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
# Operators that compute on integers when all that they read is quantized anyway.
_FOLLOWERS = ("Add", "Concat", "AveragePool", "GlobalAveragePool")


@dataclass(slots=True)
class QuantizedSet:
    """What is quantized.

    Attributes:
        nodes: names of quantized nodes, in graph order.
        weighted: those of them that have weights.
        tensors: activations that are stored as integers, in graph order.
        moved: tensor → the tensor that it is a rearrangement of.
        rounds_products: whether a product that nothing quantized reads is stored as integers too.
    """

    seen: View
    rounds_products: bool = False
    nodes: list[str] = field(default_factory=list)
    weighted: list[NodeProto] = field(default_factory=list)
    tensors: dict[str, None] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)

    def origin(self, tensor: str) -> str:
        """Return the tensor whose values a rearranged tensor holds."""
        while tensor in self.moved:
            tensor = self.moved[tensor]
        return tensor


def quantized_set(seen: View, left_float: Collection[str] = (), *, rounds_products: bool) -> QuantizedSet:
    """Return what is quantized when some nodes stay float.

    A convolution whose output only such nodes read stays float with them: storing that output as integers would lose
    accuracy, and nothing would compute on the integers.

    Args:
        left_float: names of nodes that stay float.
        rounds_products: whether a Gemm or MatMul that nothing quantized reads is stored as integers too.

    Raises:
        ModelError: weights hold NaN or infinity.
    """
    floats = set(left_float)
    while True:
        chosen = _without(QuantizedSet(seen, rounds_products), floats)
        stranded = {node.name for node in chosen.weighted if _is_stranded(node, chosen, floats)}
        if not stranded:
            return chosen
        floats |= stranded


def weight_axis(node: NodeProto) -> int:
    """Return the output-channel axis of a node's weights."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attributes(node).get("transB")):
        return 0
    return 1


def bias_of(node: NodeProto, seen: View) -> str:
    """Return the name of a node's own constant bias, or "" where it has none or shares it."""
    name = node.input[2] if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 else ""
    return name if name in seen.constants and len(seen.consumers[name]) == 1 else ""


def _without(chosen: QuantizedSet, floats: set[str]) -> QuantizedSet:
    """Fill a set that is empty with everything but what stays float."""
    seen = chosen.seen
    axes: dict[str, int] = {}
    for node in seen.graph.node:
        if node.name in floats:
            continue
        if _has_integer_weights(node, seen) and axes.setdefault(node.input[1], weight_axis(node)) == weight_axis(node):
            chosen.nodes.append(node.name)
            chosen.weighted.append(node)
            chosen.tensors[node.input[0]] = None
            # A product that nothing quantized reads may stay float: some integer kernels of Gemm and MatMul answer so.
            if node.op_type == "Conv" or chosen.rounds_products:
                chosen.tensors[_after_activation(node, seen)] = None
        elif node.op_type in _FOLLOWERS and _reads_integers(node, chosen):
            chosen.nodes.append(node.name)
            chosen.tensors.update(dict.fromkeys(node.input))
            chosen.tensors[_after_activation(node, seen)] = None
        elif node.op_type in MOVES and node.input[0] in chosen.tensors and len(node.output) == 1:
            chosen.nodes.append(node.name)
            chosen.moved[node.output[0]] = node.input[0]
            chosen.tensors[node.output[0]] = None
    return chosen


def _is_stranded(node: NodeProto, chosen: QuantizedSet, floats: set[str]) -> bool:
    tensor = _after_activation(node, chosen.seen)
    readers = [reader.name for reader in chosen.seen.consumers.get(tensor, ())]
    return node.op_type == "Conv" and bool(readers) and tensor not in chosen.seen.outputs and floats.issuperset(readers)


def _has_integer_weights(node: NodeProto, seen: View) -> bool:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain:
        return False
    weight = seen.constants.get(node.input[1])
    if weight is None or weight.dtype != np.float32 or node.input[0] in seen.constants:
        return False
    if not np.isfinite(weight).all():
        raise ModelError(f"the weights of node {node.name!r} hold NaN or infinity; train the model again")
    if node.op_type == "Conv":
        return True
    settings = attributes(node)
    is_plain = settings.get("alpha", 1.0) == 1.0 and settings.get("beta", 1.0) == 1.0 and not settings.get("transA")
    has_bias_of_ours = node.op_type == "MatMul" or len(node.input) < 3 or bool(bias_of(node, seen))
    return weight.ndim == 2 and is_plain and has_bias_of_ours


def _reads_integers(node: NodeProto, chosen: QuantizedSet) -> bool:
    """Whether all inputs are activations and one of them is quantized already, so that joining in costs nothing new."""
    is_live = all(name and name not in chosen.seen.constants for name in node.input)
    return is_live and any(name in chosen.tensors for name in node.input)


def _after_activation(node: NodeProto, seen: View) -> str:
    """Return the tensor to quantize after a node: its own output, or that of a Relu or Clip that alone reads it.

    Runtimes drop a clamp when the integers that follow cannot leave its range.
    """
    output = node.output[0]
    reader = seen.sole_consumer(output)
    return str(reader.output[0] if reader is not None and reader.op_type in ("Relu", "Clip") else output)
