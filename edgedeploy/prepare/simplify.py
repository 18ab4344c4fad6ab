"""The canonical form: a smaller graph that computes the same, in the shapes that back ends recognise.

Each pass is checked on samples. A pass that fails its check is left out and logged, because the graph before it is
right and a smaller one is only a convenience; a wrong graph is never passed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgedeploy.errors import FidelityError, ModelError
from edgedeploy.prepare.count.compression import compression_report
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.export import FIDELITY_SAMPLES
from edgedeploy.prepare.fidelity import compare
from edgedeploy.prepare.graph import Runner, attributes, drop_unused_constants, read_graph, specs_of, view, write_graph
from edgedeploy.prepare.silence import silenced
from edgedeploy.prepare.source.protect import protect, release
from edgedeploy.records.model import Fidelity, Model
from edgedeploy.storage import sha256_file

if TYPE_CHECKING:
    from onnx import ModelProto

_log = logging.getLogger(__name__)

# Folding constants and normalisations reorders float32 arithmetic: at most 8e-6 was seen on EfficientNet-Lite0.
_MAX_RELATIVE = 1e-4
Pass = Callable[["ModelProto"], "ModelProto"]


def simplify(model: Model, samples: Samples, out: Path) -> Model:
    """Simplify a model and compare it with what it was.

    Args:
        model: exported fp32.
        samples: inputs for the checks.
        out: the .onnx to write.

    Returns:
        The model with one more fidelity record. Every Conv and Gemm has a bias of its own.
    """
    graph = read_graph(Path(model.path))
    quantization = model.quantization
    if quantization:
        graph = protect(graph, quantization)
    for step in (_slim, _name_means_as_pools, _count_no_padding, _give_biases):
        graph = _checked(step, graph, model, samples)
    if quantization:
        graph, quantization = release(graph, quantization, read_graph(Path(model.path)))
    write_graph(graph, out)
    fidelity = _compare(model, Path(model.path), out, samples)
    return msgspec.structs.replace(
        model,
        path=str(out),
        sha256=sha256_file(out),
        compression=compression_report(out, table=quantization),
        fidelity=(*model.fidelity, fidelity),
        quantization=quantization,
    )


def _checked(step: Pass, graph: ModelProto, model: Model, samples: Samples) -> ModelProto:
    import onnx

    trial = onnx.ModelProto()
    trial.CopyFrom(graph)
    name = step.__name__.strip("_")
    try:
        with silenced(name):
            trial = step(trial)
    except Exception as error:  # noqa: BLE001  # onnxslim raises whatever it meets in a graph that it does not expect
        _log.warning("simplification %s failed and is left out: %s: %s", name, type(error).__name__, error)
        return graph
    try:
        if specs_of(trial.graph.input) != specs_of(graph.graph.input):
            raise ModelError("it changed the inputs")
        if specs_of(trial.graph.output) != specs_of(graph.graph.output):
            raise ModelError("it changed the outputs")
        onnx.checker.check_model(trial)
        _compare(model, graph.SerializeToString(), trial.SerializeToString(), samples)
    except (ModelError, onnx.checker.ValidationError) as error:
        _log.warning("simplification %s is wrong for this model and is left out: %s", name, error)
        return graph
    return trial


def _compare(model: Model, before: Path | bytes, after: Path | bytes, samples: Samples) -> Fidelity:
    fidelity = compare(
        Runner(before),
        Runner(after),
        samples.batches(model.inputs, FIDELITY_SAMPLES),
        names=("fp32 ONNX", "simplified ONNX"),
        sample_source=samples.name,
    )
    for output in fidelity.outputs:
        if output.max_relative > _MAX_RELATIVE:
            raise FidelityError(
                f"simplifying changed output {output.output!r} by {output.max_abs:.3g} ({output.max_relative:.2g} of "
                f"its largest value, {_MAX_RELATIVE:g} is allowed)"
            )
    return fidelity


def _slim(graph: ModelProto) -> ModelProto:
    import onnxslim

    slimmed: Any = onnxslim.slim(graph)
    return slimmed  # type: ignore[no-any-return]  # onnxslim has no types


def _name_means_as_pools(graph: ModelProto) -> ModelProto:
    """Write the mean over height and width as GlobalAveragePool, for which runtimes have an integer form."""
    import onnx

    seen = view(graph.graph)
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in [*inferred.value_info, *inferred.input]}
    for node in graph.graph.node:
        if node.op_type != "ReduceMean" or not attributes(node).get("keepdims", 1):
            continue
        axes = seen.constants.get(node.input[1]) if len(node.input) > 1 else attributes(node).get("axes")
        rank = ranks.get(node.input[0], 0)
        if axes is not None and rank == 4 and sorted(int(axis) % rank for axis in axes) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    return graph


def _count_no_padding(graph: ModelProto) -> ModelProto:
    """Drop count_include_pad, which torch sets, where there is no padding to count.

    What then hangs over the border by ceil_mode is not counted either, but onnxruntime 1.31.1 counts it on integers.
    """
    for node in graph.graph.node:
        settings = attributes(node)
        is_padded = any(settings.get("pads", ())) or settings.get("auto_pad", b"NOTSET") != b"NOTSET"
        if node.op_type != "AveragePool" or is_padded:
            continue
        kept = [item for item in node.attribute if item.name != "count_include_pad"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return graph


def _give_biases(graph: ModelProto) -> ModelProto:
    """Give each Conv and Gemm with constant weights a bias of its own, which int8 forms correct and requantize."""
    from onnx import numpy_helper

    seen = view(graph.graph)
    for node in graph.graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.input[1] not in seen.constants:
            continue
        weight = seen.constants[node.input[1]]
        settings = attributes(node)
        if node.op_type == "Gemm" and (settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0):
            continue
        channels = weight.shape[0 if node.op_type == "Conv" or settings.get("transB") else 1]
        given = node.input[2] if len(node.input) > 2 else ""
        if given and given not in seen.constants:
            continue
        bias = seen.constants[given] if given else np.zeros(channels, weight.dtype)
        if given and bias.shape == (channels,) and len(seen.consumers[given]) == 1:
            continue
        if bias.size not in (1, channels):
            continue
        name = f"{node.name}/bias"
        bias = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (channels,)))
        graph.graph.initializer.append(numpy_helper.from_array(bias, name))
        del node.input[2:]
        node.input.append(name)
    drop_unused_constants(graph)
    return graph
