"""What a model does on calibration samples: extremes of its tensors and mean errors of its rounded weights.

Both are reduced inside the graph, so that ONNX Runtime hands out a few numbers per batch and frees each large tensor as
soon as it is used: memory does not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import ModelError
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.graph import Runner, read_graph, reduce_axes
from edgedeploy.records.model import Model

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Progress = Callable[[str], None]

# Images of 224 x 224 through EfficientNet-Lite0, 8 at a time, took 580 MB beyond the images themselves.
_ROWS = 2


@dataclass(frozen=True, slots=True)
class Extremes:
    """The smallest and largest value of a tensor over all samples, widened to contain zero, and its size.

    Attributes:
        values: how many values the tensor has for one sample.
    """

    low: float
    high: float
    values: int


def small_batches(samples: Samples, model: Model) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield all samples, few at a time: ONNX Runtime keeps the memory of all tensors that a batch ever needed at once.

    Args:
        samples: real inputs.
        model: one with a fixed batch gets whole ones.
    """
    is_fixed = any(spec.shape and isinstance(spec.shape[0], int) for spec in model.inputs)
    for batch in samples.batches(model.inputs):
        rows = len(next(iter(batch.values())))
        size = rows if is_fixed else _ROWS
        for start in range(0, rows, size):
            yield {name: values[start : start + size] for name, values in batch.items()}


def extremes(
    model: Model, samples: Samples, tensors: Sequence[str], *, progress: Progress | None = None
) -> dict[str, Extremes]:
    """Return the extremes of each tensor.

    Args:
        model: fp32.
        samples: real inputs.
        tensors: names of float tensors in the graph, its inputs included.

    Raises:
        ModelError: a tensor becomes NaN or infinite.
    """
    graph = bare(model)
    for tensor in tensors:
        for operator, type_number in (("ReduceMin", 1), ("ReduceMax", 1), ("Size", 7)):
            _add_reduction(graph.graph, operator, tensor, type_number)
    runner = Runner(graph.SerializeToString())
    seen: dict[str, Extremes] = {}
    done = 0
    for batch in small_batches(samples, model):
        rows = len(next(iter(batch.values())))
        answer = runner(batch)
        for tensor in tensors:
            low, high, size = (float(answer[f"{tensor}/{key}"]) for key in ("ReduceMin", "ReduceMax", "Size"))
            if not (np.isfinite(low) and np.isfinite(high)):
                raise ModelError(
                    f"tensor {tensor!r} becomes NaN or infinite on samples {done} to {done + rows - 1} of "
                    f"{samples.name}; repair the model or the samples"
                )
            before = seen.get(tensor, Extremes(0.0, 0.0, int(size) // rows))
            seen[tensor] = Extremes(min(before.low, low), max(before.high, high), before.values)
        done += rows
        if progress:
            progress(f"calibrating: {done} of {samples.count} samples")
    return seen


def mean_errors(
    model: Model, samples: Samples, errors: Mapping[str, NDArray[Any]], *, progress: Progress | None = None
) -> dict[str, NDArray[np.float64]]:
    """Return what each node's output loses on average, per output channel, when its weights are rounded.

    The error (W - Wq) is put in the place of the weights of a second copy of the node, whose mean output over samples
    and positions is E[(W - Wq) x]: exact also at padded borders, where (W - Wq) E[x] is not.

    Args:
        model: fp32.
        samples: real inputs.
        errors: name of a Conv, Gemm or MatMul node → W - Wq.
    """
    if not errors:  # attention: products whose sums are nodes of their own have no bias to correct
        return {}
    graph = bare(model)
    for node in list(graph.graph.node):
        if node.name in errors:
            _add_twin(graph, node, errors[node.name])
    runner = Runner(graph.SerializeToString())
    totals: dict[str, NDArray[np.float64]] = {}
    done = 0
    for batch in small_batches(samples, model):
        rows = len(next(iter(batch.values())))
        for output, mean in runner(batch).items():
            name = output.removesuffix(_MEAN_LOST)
            totals[name] = totals.get(name, 0.0) + rows * mean.astype(np.float64)
        done += rows
        if progress:
            progress(f"measuring rounding errors: {done} of {samples.count} samples")
    return {name: total / done for name, total in totals.items()}


_MEAN_LOST = "/mean_lost"


def _add_twin(model: ModelProto, node: NodeProto, error: NDArray[Any]) -> None:
    """Add a copy of a node with other weights and no bias, and the mean of its output over all axes but channels."""
    from onnx import helper, numpy_helper

    graph = model.graph
    lost = f"{node.name}/lost"
    if node.op_type == "Conv":  # (N, C, positions)
        shape, axes = [0, 0, -1], [0, 2]
    else:  # (everything else, C)
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        shape, axes = [-1, error.shape[0 if transposed else 1]], [0]
    constants = {"weight": error.astype(np.float32), "shape": np.asarray(shape)}
    graph.initializer.extend(numpy_helper.from_array(value, f"{lost}/{key}") for key, value in constants.items())
    twin = helper.make_node(node.op_type, [node.input[0], f"{lost}/weight"], [lost], name=lost)
    twin.attribute.extend(node.attribute)
    graph.node.append(twin)
    graph.node.append(helper.make_node("Reshape", [lost, f"{lost}/shape"], [f"{lost}/flat"]))
    mean = node.name + _MEAN_LOST
    reduce_axes(model, "ReduceMean", f"{lost}/flat", axes, mean)
    graph.output.append(helper.make_tensor_value_info(mean, 1, None))


def bare(model: Model) -> ModelProto:
    """Return the graph without outputs, ready to be given others; what only they needed is not computed."""
    graph = read_graph(Path(model.path))
    del graph.graph.output[:]
    return graph


def _add_reduction(graph: GraphProto, operator: str, tensor: str, type_number: int) -> None:
    from onnx import helper

    output = f"{tensor}/{operator}"
    node = helper.make_node(operator, [tensor], [output])
    if operator != "Size":
        node.attribute.append(helper.make_attribute("keepdims", 0))
    graph.node.append(node)
    graph.output.append(helper.make_tensor_value_info(output, type_number, None))
