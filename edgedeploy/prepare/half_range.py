"""Which tensors of a model grow too large for float16, as calibration sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgedeploy.errors import ModelError
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.graph import Runner, read_graph
from edgedeploy.prepare.ptq.calibrate import bare, small_batches
from edgedeploy.records.model import Model

if TYPE_CHECKING:
    from onnx import ModelProto

Progress = Callable[[str], None]

# IEEE 754 binary16.
LARGEST_HALF = 65504.0
# Samples are not all inputs: an input that nobody has seen may go three doublings beyond them. NVIDIA's AutoCast, which
# looks at one input that may even be random, leaves seven (data_max = 512).
HEADROOM = 8.0
_FLOAT = 1
_REDUCTIONS = ("ReduceMin", "ReduceMax", "ReduceL1")


def beyond_half(
    model: Model, samples: Samples, limit: float = LARGEST_HALF / HEADROOM, *, progress: Progress | None = None
) -> dict[str, float]:
    """Return the float32 tensors that grow beyond a limit → their largest finite magnitude on the samples.

    Three numbers of each tensor leave the graph for a few samples at a time, so memory does not grow with them.
    Infinite values are what a model wants where its constants hold them (attention masks); they are infinite in float16
    too, and do not count.

    Args:
        model: its inputs, and all that its nodes make, are looked at; those in branches and loop bodies are not.
        samples: real inputs.
        limit: 8188 unless told otherwise: the largest float16, 65504, with room for inputs that no sample shows.
        progress: called with a sentence, now and then.

    Raises:
        ModelError: a tensor becomes NaN, or infinite without an infinite constant.
    """
    graph = bare(model)
    tensors = _float_tensors(read_graph(Path(model.path)))
    may_be_infinite = _has_infinite_constant(graph)
    largest = _largest(graph, model, samples, tensors, may_be_infinite, progress)
    return {name: value for name, value in largest.items() if value > limit}


def _largest(
    graph: ModelProto,
    model: Model,
    samples: Samples,
    tensors: Sequence[str],
    may_be_infinite: bool,
    progress: Progress | None,
) -> dict[str, float]:
    """Return the largest magnitude of each tensor; of those that hold infinities, found by a second pass."""
    seen: dict[str, float] = dict.fromkeys(tensors, 0.0)
    infinite: dict[str, None] = {}
    _add_reductions(graph, tensors)
    runner, done = Runner(graph.SerializeToString()), 0
    for batch in small_batches(samples, model):
        rows, answer = len(next(iter(batch.values()))), runner(batch)
        for tensor in tensors:
            low, high, total = (float(answer[f"{tensor}/{name}"]) for name in _REDUCTIONS)
            where = f"on samples {done} to {done + rows - 1} of {samples.name}"
            # A sum passes NaN on for certain, which a maximum need not.
            if np.isnan(total):
                raise ModelError(f"tensor {tensor!r} becomes NaN {where}; repair the model or the samples")
            # ONNX Runtime reduces an empty tensor to -inf, or +inf for the minimum.
            magnitude = max(-low, high, 0.0)
            if np.isinf(magnitude) and not may_be_infinite:
                raise ModelError(f"tensor {tensor!r} becomes infinite {where}; repair the model or the samples")
            if np.isinf(magnitude):
                infinite[tensor] = None
            else:
                seen[tensor] = max(seen[tensor], magnitude)
        done += rows
        if progress:
            progress(f"looking for values beyond float16: {done} of {samples.count} samples")
    if infinite:
        seen |= _largest_finite(model, samples, list(infinite))
    return seen


def _largest_finite(model: Model, samples: Samples, tensors: Sequence[str]) -> dict[str, float]:
    from onnx import helper, numpy_helper

    graph = bare(model)
    nothing = "finite/nothing"
    graph.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), nothing))
    for tensor in tensors:
        plain, is_infinite, finite = (f"{tensor}/{step}" for step in ("magnitude", "is_infinite", "finite"))
        graph.graph.node.extend(
            [
                helper.make_node("Abs", [tensor], [plain]),
                helper.make_node("IsInf", [plain], [is_infinite]),
                helper.make_node("Where", [is_infinite, nothing, plain], [finite]),
                helper.make_node("ReduceMax", [finite], [f"{finite}/largest"], keepdims=0),
            ]
        )
        graph.graph.output.append(helper.make_tensor_value_info(f"{finite}/largest", _FLOAT, None))
    runner = Runner(graph.SerializeToString())
    seen = dict.fromkeys(tensors, 0.0)
    for batch in small_batches(samples, model):
        answer = runner(batch)
        for tensor in tensors:
            seen[tensor] = max(seen[tensor], float(answer[f"{tensor}/finite/largest"]))
    return seen


def _add_reductions(graph: ModelProto, tensors: Sequence[str]) -> None:
    from onnx import helper

    for tensor in tensors:
        for operator in _REDUCTIONS:
            name = f"{tensor}/{operator}"
            graph.graph.node.append(helper.make_node(operator, [tensor], [name], keepdims=0))
            graph.graph.output.append(helper.make_tensor_value_info(name, _FLOAT, None))


def _float_tensors(model: ModelProto) -> list[str]:
    """Return the float32 tensors that are not constants, and are not known to be empty."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    constants = {item.name for item in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output}
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    floats = {
        value.name: None
        for value in values
        if value.type.tensor_type.elem_type == _FLOAT
        and not any(size.HasField("dim_value") and size.dim_value == 0 for size in value.type.tensor_type.shape.dim)
    }
    inputs = {value.name for value in model.graph.input} - constants
    return [name for name in floats if name in made or name in inputs]


def _has_infinite_constant(model: ModelProto) -> bool:
    from onnx import numpy_helper

    tensors = [*model.graph.initializer]
    tensors += [item.t for node in model.graph.node for item in node.attribute if item.HasField("t")]
    return any(tensor.data_type == _FLOAT and bool(np.isinf(numpy_helper.to_array(tensor)).any()) for tensor in tensors)
