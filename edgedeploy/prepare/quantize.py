"""Decides what is quantized and how: an fp32 model and calibration samples become a QuantizationTable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgedeploy.errors import ModelError
from edgedeploy.prepare.calibrate import calibrate, mean_errors
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.graph import View, attributes, read_graph, view
from edgedeploy.prepare.grid import activation_grid, rounded, weight_scales
from edgedeploy.records.model import Model
from edgedeploy.records.quantization import ActivationRange, QuantizationTable, WeightQuantization
from edgedeploy.records.target import QuantizationRules

if TYPE_CHECKING:
    from onnx import NodeProto

Progress = Callable[[str], None]

# Operators that only move values, or pick some of them: input and output share one grid, and nothing is lost.
MOVES = ("MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
# Operators that compute on integers when all that they read is quantized anyway.
_FOLLOWERS = ("Add", "Concat", "AveragePool", "GlobalAveragePool")


def quantize(
    model: Model, samples: Samples, rules: QuantizationRules, *, progress: Progress | None = None
) -> QuantizationTable:
    """Calibrate a model and correct its biases for what rounding its weights loses on average.

    Args:
        model: simplified fp32 (`simplify`).
        samples: real inputs, unlike those that the result will be judged on.
        rules: the target's; bits and axes of weights, and the activations' storage, which limits biases.
        progress: called with a sentence, now and then.

    Raises:
        ModelError: nothing in the model can be quantized, or a tensor becomes NaN or infinite on the samples.
    """
    graph = read_graph(Path(model.path))
    plan = _plan(view(graph.graph))
    if not plan.weighted:
        raise ModelError(
            f"{model.source} has no convolution or matrix product with constant float32 weights, so nothing can be "
            f"quantized; build it as fp32"
        )
    origins = list(dict.fromkeys(plan.origin(tensor) for tensor in plan.tensors))
    ranges = calibrate(model, samples, origins, progress=progress)
    activations = {tensor: ranges[plan.origin(tensor)] for tensor in plan.tensors}
    weights = _weight_grids(plan, activations, rules)
    errors = {
        node.name: plan.seen.constants[node.input[1]]
        - rounded(plan.seen.constants[node.input[1]], weights[node.input[1]])
        for node in plan.weighted
        if bias_of(node, plan.seen)
    }
    lost = mean_errors(model, samples, errors, progress=progress)
    return QuantizationTable(
        model_sha256=model.sha256,
        calibration=samples.name,
        calibration_sha256=samples.sha256,
        samples=samples.count,
        method="min-max activations, max-abs weights, mean-error bias correction",
        nodes=tuple(plan.nodes),
        activations=activations,
        weights=weights,
        bias_deltas={
            bias_of(node, plan.seen): tuple(float(value) for value in lost[node.name])
            for node in plan.weighted
            if node.name in lost
        },
    )


def weight_axis(node: NodeProto) -> int:
    """Return the output-channel axis of a node's weights."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attributes(node).get("transB")):
        return 0
    return 1


def bias_of(node: NodeProto, seen: View) -> str:
    """Return the name of a node's own constant bias, or "" where it has none or shares it."""
    name = node.input[2] if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 else ""
    return name if name in seen.constants and len(seen.consumers[name]) == 1 else ""


@dataclass(slots=True)
class _Plan:
    """What is quantized.

    Attributes:
        nodes: names of quantized nodes, in graph order.
        weighted: those of them that have weights.
        tensors: activations that are stored as integers, in graph order.
        moved: tensor → the tensor that it is a rearrangement of.
    """

    seen: View
    nodes: list[str] = field(default_factory=list)
    weighted: list[NodeProto] = field(default_factory=list)
    tensors: dict[str, None] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)

    def origin(self, tensor: str) -> str:
        """Return the tensor whose values a rearranged tensor holds."""
        while tensor in self.moved:
            tensor = self.moved[tensor]
        return tensor


def _plan(seen: View) -> _Plan:
    plan = _Plan(seen)
    axes: dict[str, int] = {}
    for node in seen.graph.node:
        if _has_integer_weights(node, seen) and axes.setdefault(node.input[1], weight_axis(node)) == weight_axis(node):
            plan.nodes.append(node.name)
            plan.weighted.append(node)
            plan.tensors[node.input[0]] = None
            # A product that nothing quantized reads stays float: the integer kernels of Gemm and MatMul can answer so.
            if node.op_type == "Conv":
                plan.tensors[_after_activation(node, seen)] = None
        elif node.op_type in _FOLLOWERS and _reads_integers(node, plan):
            plan.nodes.append(node.name)
            plan.tensors.update(dict.fromkeys(node.input))
            plan.tensors[_after_activation(node, seen)] = None
        elif node.op_type in MOVES and node.input[0] in plan.tensors and len(node.output) == 1:
            plan.nodes.append(node.name)
            plan.moved[node.output[0]] = node.input[0]
            plan.tensors[node.output[0]] = None
    return plan


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


def _reads_integers(node: NodeProto, plan: _Plan) -> bool:
    """Whether all inputs are activations and one of them is quantized already, so that joining in costs nothing new."""
    is_live = all(name and name not in plan.seen.constants for name in node.input)
    return is_live and any(name in plan.tensors for name in node.input)


def _after_activation(node: NodeProto, seen: View) -> str:
    """Return the tensor to quantize after a node: its own output, or that of a Relu or Clip that alone reads it.

    Runtimes drop a clamp when the integers that follow cannot leave its range.
    """
    output = node.output[0]
    reader = seen.sole_consumer(output)
    return str(reader.output[0] if reader is not None and reader.op_type in ("Relu", "Clip") else output)


def _weight_grids(
    plan: _Plan, activations: dict[str, ActivationRange], rules: QuantizationRules
) -> dict[str, WeightQuantization]:
    grids: dict[str, WeightQuantization] = {}
    for node in plan.weighted:
        name = node.input[1]
        weight = plan.seen.constants[name]
        axis = weight_axis(node) if rules.weight_per_channel else None
        bias = bias_of(node, plan.seen)
        scales = weight_scales(
            weight,
            axis=axis,
            bits=rules.weight_bits,
            bias=plan.seen.constants[bias] if bias else None,
            input_scale=activation_grid(activations[node.input[0]], rules).scale,
        )
        if name in grids:  # shared weights: one grid that suits all of their nodes
            scales = np.maximum(scales, np.asarray(grids[name].scales, np.float32))
        grids[name] = WeightQuantization(
            bits=rules.weight_bits, axis=axis, scales=tuple(float(scale) for scale in scales), origin="max-abs"
        )
    return grids
