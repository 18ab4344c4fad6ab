"""The quantized model as a float graph: what a table does to the outputs, without a back end's integer form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.prepare.graph import view
from edgedeploy.prepare.grid import activation_grid, rounded
from edgedeploy.records.quantization import ActivationRange, WeightQuantization
from edgedeploy.records.target import QuantizationRules

if TYPE_CHECKING:
    from onnx import ModelProto


def simulate(
    graph: ModelProto,
    *,
    nodes: Collection[str],
    activations: Mapping[str, ActivationRange],
    weights: Mapping[str, WeightQuantization],
    bias_deltas: Mapping[str, NDArray[Any]],
    rules: QuantizationRules,
) -> ModelProto:
    """Return a copy of a float graph that computes with rounded weights and rounded activations.

    Biases stay float: at input scale times weight scale their rounding is a millionth of the signal.

    Args:
        graph: canonical fp32.
        nodes: names of the nodes that are quantized; weights that others read too stay as they are for those.
        activations: tensor → range; each is rounded where it is made.
        weights: initializer → grid.
        bias_deltas: initializer → what is added to it.
        rules: make ranges into grids.
    """
    from onnx import ModelProto, helper, numpy_helper

    copy = ModelProto()
    copy.CopyFrom(graph)
    seen = view(copy.graph)
    made: dict[str, str] = {}
    written: list[Any] = []
    renamed: dict[str, str] = {}

    def constant(name: str, value: Any) -> str:
        if name not in made:
            made[name] = name
            copy.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def pair(tensor: str, source: str, result: str) -> None:
        grid = activation_grid(activations[tensor], rules)
        constants = [
            constant(f"{tensor}/simulated_scale", np.float32(grid.scale)),
            constant(f"{tensor}/simulated_zero_point", np.asarray(grid.zero_point, grid.dtype)),
        ]
        codes = f"{tensor}/simulated_codes"
        written.append(helper.make_node("QuantizeLinear", [source, *constants], [codes]))
        written.append(helper.make_node("DequantizeLinear", [codes, *constants], [result]))

    for value in copy.graph.input:
        if value.name in activations:
            renamed[value.name] = f"{value.name}/simulated"
            pair(value.name, value.name, renamed[value.name])
    for node in list(copy.graph.node):
        if node.name in nodes and len(node.input) > 1:
            weight = node.input[1]
            if weight in weights:
                node.input[1] = constant(f"{weight}/simulated", rounded(seen.constants[weight], weights[weight]))
            if len(node.input) > 2 and node.input[2] in bias_deltas:
                bias = node.input[2]
                moved = (seen.constants[bias] + np.asarray(bias_deltas[bias])).astype(np.float32)
                node.input[2] = constant(f"{bias}/simulated", moved)
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        written.append(node)
        for index, name in enumerate(node.output):
            if name in activations:
                node.output[index] = f"{name}/before_rounding"
                pair(name, node.output[index], name)
    del copy.graph.node[:]
    copy.graph.node.extend(written)
    return copy
