"""What a quantized source computes, as plain float ONNX: each trained grid and dynamic grid is a few float nodes.

The canonical fp32 graph alone computes something else than its quantized source, so the proof that nothing was lost in
conversion compares the source with this form. It works for any width of codes, which Q/DQ nodes do not, and no runtime
recognises anything in it that could be fused. It is never shipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgedeploy.records.quantization import DynamicActivation, Grid, SourceQuantization

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def replay(graph: ModelProto, source: SourceQuantization) -> ModelProto:
    """Return a copy of a canonical graph that quantizes its activations in float.

    Args:
        graph: canonical fp32; its weights hold what the source's integers stand for already.
        source: in the graph's names.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    nodes: list[NodeProto] = []
    renamed: dict[str, str] = {}
    for value in model.graph.input:
        if value.name in source.activations:
            renamed[value.name] = f"{value.name}/on_grid"
            nodes += _on_grid(model, value.name, renamed[value.name], source.activations[value.name].grid)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        # A recurrent node has two matrices and one input from outside; what it feeds back to itself stays float here.
        if dynamic := [source.dynamic[name] for name in node.input if name in source.dynamic]:
            nodes += _dynamic(model, node, dynamic[0])
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in source.activations:
                # The quantized form takes over the name, so that everything that read the tensor reads it.
                node.output[index] = f"{name}/off_grid"
                nodes += _on_grid(model, f"{name}/off_grid", name, source.activations[name].grid)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _on_grid(model: ModelProto, tensor: str, result: str, grid: Grid | None) -> list[NodeProto]:
    assert grid is not None, f"{tensor} came with the source, so it has a grid"
    low, high = grid.low_code - grid.zero_point, grid.high_code - grid.zero_point
    return _round(model, tensor, result, _constant(model, f"{result}/scale", grid.scale), low, high)


def _round(
    model: ModelProto, tensor: str, result: str, scale: str, low: float, high: float, zero: str = ""
) -> list[NodeProto]:
    """Divide, round half to even, add the zero-point if it is not in the bounds already, clamp, and undo it all."""
    from onnx import helper

    make = helper.make_node
    bounds = [_constant(model, f"{result}/{end}", value) for end, value in (("low", low), ("high", high))]
    nodes = [
        make("Div", [tensor, scale], [f"{result}/steps"]),
        make("Round", [f"{result}/steps"], [f"{result}/rounded"]),
    ]
    inner = f"{result}/rounded"
    if zero:
        nodes.append(make("Add", [inner, zero], [f"{result}/shifted"]))
        inner = f"{result}/shifted"
    nodes.append(make("Clip", [inner, *bounds], [f"{result}/codes"]))
    inner = f"{result}/codes"
    if zero:
        nodes.append(make("Sub", [inner, zero], [f"{result}/unshifted"]))
        inner = f"{result}/unshifted"
    return [*nodes, make("Mul", [inner, scale], [result])]


def _dynamic(model: ModelProto, node: NodeProto, how: DynamicActivation) -> list[NodeProto]:
    """Quantize the data input of a node from its own values; the node then reads the result."""
    from onnx import helper

    make, tensor = helper.make_node, node.input[0]
    result = f"{node.name}/{tensor}/dynamic"
    node.input[0] = result
    zero = _constant(model, f"{result}/0", 0.0)
    smallest = _constant(model, f"{result}/smallest", float(np.finfo(np.float32).tiny))
    steps = 2 ** (how.bits - 1) - 1 if how.symmetric else 2**how.bits - 1
    wide = "Max" if how.symmetric else "Add"
    reduced = [tensor, _constant(model, f"{result}/axes", -1, np.int64, (1,))] if how.per_token else [tensor]
    nodes = [
        make("ReduceMin", reduced, [f"{result}/min"], keepdims=int(how.per_token)),
        make("ReduceMax", reduced, [f"{result}/max"], keepdims=int(how.per_token)),
        make("Min", [f"{result}/min", zero], [f"{result}/lowest"]),
        make("Max", [f"{result}/max", zero], [f"{result}/highest"]),
        make("Neg", [f"{result}/lowest"], [f"{result}/depth"]),
        make(wide, [f"{result}/depth", f"{result}/highest"], [f"{result}/span"]),
        make("Div", [f"{result}/span", _constant(model, f"{result}/steps_in_all", steps)], [f"{result}/exact_scale"]),
        make("Max", [f"{result}/exact_scale", smallest], [f"{result}/scale"]),
    ]
    if how.symmetric:
        return nodes + _round(model, tensor, result, f"{result}/scale", -steps, steps)
    nodes += [
        make("Div", [f"{result}/depth", f"{result}/scale"], [f"{result}/exact_zero"]),
        make("Round", [f"{result}/exact_zero"], [f"{result}/zero"]),
    ]
    return nodes + _round(model, tensor, result, f"{result}/scale", 0, steps, f"{result}/zero")


def _constant(model: ModelProto, name: str, value: float, dtype: type = np.float32, shape: tuple[int, ...] = ()) -> str:
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.full(shape, value, dtype), name))
    return name
