"""Writes the explicit Q/DQ form of a model: the float graph, a QuantizationTable and a target's rules, in one .onnx.

Each quantized activation is a QuantizeLinear and DequantizeLinear pair behind the node that makes it, after a Relu or
Clip that the integers make superfluous; weights are int8 constants behind a DequantizeLinear, biases int32. Computed as
it is written, in float, such a graph gives the numbers that an integer runtime should give up to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import FidelityError, InternalError, ModelError
from edgedeploy.prepare.compression import compression_report
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.export import FIDELITY_SAMPLES
from edgedeploy.prepare.fidelity import compare
from edgedeploy.prepare.graph import Runner, View, drop_unused_constants, read_graph, view, write_graph
from edgedeploy.prepare.grid import activation_grid, bias_integers, integers
from edgedeploy.prepare.quantize import bias_of
from edgedeploy.records.model import Fidelity, Model
from edgedeploy.records.quantization import QuantizationTable, WeightQuantization
from edgedeploy.records.target import QuantizationRules
from edgedeploy.storage import sha256_file

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


# How much worse, in dB, the integer form may be than the same graph computed in float. Requantization by fixed-point
# factors differs by one step of a tensor's grid here and there, which moved no network seen by more than 0.3 dB; a
# miscompiled graph loses 20 dB and more.
_MAX_LOSS_DB = 3.0
# Stands for an exact answer, which has no finite ratio; float32 itself ends near 140 dB.
_EXACT_DB = 140.0


def emit(model: Model, table: QuantizationTable, rules: QuantizationRules, samples: Samples, out: Path) -> Model:
    """Write the Q/DQ form and compare it with fp32.

    Args:
        model: the fp32 model that `table` refers to.
        table: what is quantized and how.
        rules: the target's storage of activations.
        samples: inputs to compare with fp32 on, and to check that ONNX Runtime's optimiser keeps the meaning.
        out: the .onnx to write.

    Returns:
        The int8 model with two more fidelity records: as written (float arithmetic), and on integer kernels here.

    Raises:
        ModelError: the table belongs to another model.
        FidelityError: the optimiser changes what the graph computes by more than integer rounding can.
    """
    if table.model_sha256 != model.sha256:
        raise ModelError(f"the quantization table was made for another model than {model.path}; quantize it again")
    graph = read_graph(Path(model.path))
    _rewrite(graph, table, rules)
    write_graph(graph, out)
    written, run = (_compare(model, out, samples, is_optimized=is_optimized) for is_optimized in (False, True))
    _demand_kept_meaning(model, written, run)
    return msgspec.structs.replace(
        model,
        path=str(out),
        sha256=sha256_file(out),
        compression=compression_report(out),
        fidelity=(*model.fidelity, written, run),
    )


def _rewrite(model: ModelProto, table: QuantizationTable, rules: QuantizationRules) -> None:
    graph = model.graph
    seen = view(graph)
    unknown = [name for name in table.nodes if name not in {node.name for node in graph.node}]
    if unknown:
        raise InternalError(f"the quantization table names nodes that the model does not have: {', '.join(unknown)}")
    quantized = set(table.nodes)
    nodes: list[NodeProto] = []
    renamed: dict[str, str] = {}
    for value in graph.input:
        if value.name in table.activations:
            renamed[value.name] = f"{value.name}/dequantized"
            nodes += _activation_pair(model, value.name, value.name, renamed[value.name], table, rules)
    rounded_weights: set[str] = set()
    for node in list(graph.node):
        if node.name in quantized and len(node.input) > 1 and node.input[1] in table.weights:
            nodes += _integer_constants(model, node, seen, table, rules, rounded_weights)
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in table.activations:
                # The pair takes over the name, so that everything that read the tensor reads what was stored.
                node.output[index] = f"{name}/float"
                nodes += _activation_pair(model, name, f"{name}/float", name, table, rules)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused_constants(model)


def _activation_pair(
    model: ModelProto, tensor: str, source: str, result: str, table: QuantizationTable, rules: QuantizationRules
) -> list[NodeProto]:
    from onnx import helper

    grid = activation_grid(table.activations[tensor], rules)
    scale = _constant(model, f"{tensor}/scale", np.float32(grid.scale))
    zero_point = _constant(model, f"{tensor}/zero_point", np.asarray(grid.zero_point, grid.dtype))
    stored = f"{tensor}/stored"
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero_point], [stored], name=f"{tensor}/quantize"),
        helper.make_node("DequantizeLinear", [stored, scale, zero_point], [result], name=f"{tensor}/dequantize"),
    ]


def _integer_constants(
    model: ModelProto,
    node: NodeProto,
    seen: View,
    table: QuantizationTable,
    rules: QuantizationRules,
    written: set[str],
) -> list[NodeProto]:
    """Give a node its weights as int8 and its bias as int32; weights that nodes share are stored once."""
    name = node.input[1]
    grid = table.weights[name]
    added: list[NodeProto] = []
    node.input[1] = f"{name}/rounded"
    if name not in written:
        written.add(name)
        values = integers(seen.constants[name], grid)
        added.append(_dequantized(model, name, f"{name}/rounded", values, np.asarray(grid.scales, np.float32), grid))
    bias = bias_of(node, seen)
    if bias:
        corrected = seen.constants[bias] + np.asarray(table.bias_deltas.get(bias, 0.0), np.float32)
        input_scale = activation_grid(table.activations[node.input[0]], rules).scale
        scales = (np.float32(input_scale) * np.asarray(grid.scales, np.float32)).astype(np.float32)
        own = msgspec.structs.replace(grid, axis=None if grid.axis is None else 0)
        stored = bias_integers(corrected, input_scale, grid)
        added.append(_dequantized(model, bias, f"{bias}/rounded", stored, scales, own))
        node.input[2] = f"{bias}/rounded"
    return added


def _dequantized(
    model: ModelProto,
    name: str,
    result: str,
    values: NDArray[np.integer[Any]],
    scales: NDArray[np.float32],
    grid: WeightQuantization,
) -> NodeProto:
    from onnx import helper

    shape = () if grid.axis is None else (-1,)
    inputs = [
        _constant(model, f"{name}/integers", values),
        _constant(model, f"{name}/scale", scales.reshape(shape)),
        _constant(model, f"{name}/zero_point", np.zeros(scales.shape, values.dtype).reshape(shape)),
    ]
    node = helper.make_node("DequantizeLinear", inputs, [result], name=f"{name}/dequantize")
    if grid.axis is not None:
        node.attribute.append(helper.make_attribute("axis", grid.axis))
    return node


def _constant(model: ModelProto, name: str, value: Any) -> str:
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _compare(model: Model, quantized: Path, samples: Samples, *, is_optimized: bool) -> Fidelity:
    return compare(
        Runner(Path(model.path)),
        Runner(quantized, is_optimized=is_optimized),
        samples.batches(model.inputs, FIDELITY_SAMPLES),
        names=("fp32 ONNX", "int8 on integer kernels" if is_optimized else "int8 as written"),
        sample_source=samples.name,
    )


def _demand_kept_meaning(model: Model, written: Fidelity, run: Fidelity) -> None:
    for meant, got in zip(written.outputs, run.outputs, strict=True):
        meant_db, got_db = (_EXACT_DB if item.sqnr_db is None else item.sqnr_db for item in (meant, got))
        if got_db < meant_db - _MAX_LOSS_DB:
            raise FidelityError(
                f"ONNX Runtime's optimiser breaks the int8 form of {model.source}: output {meant.output!r} has "
                f"{meant_db:.1f} dB as written and {got_db:.1f} dB when optimised; build fp32, and report the model"
            )
