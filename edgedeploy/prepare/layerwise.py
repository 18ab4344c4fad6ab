"""Where along a graph the error of another form of it grows: tensors of the same name, compared in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import FidelityError, ModelError
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.fidelity import sqnr_db
from edgedeploy.prepare.graph import Runner
from edgedeploy.records.model import TensorSpec
from edgedeploy.records.verification import LayerComparison, LayerError

if TYPE_CHECKING:
    from onnx import ModelProto

Tensors = Mapping[str, NDArray[Any]]

# What rounding one tensor to 8 bits costs at the least: 6.02 · 8 + 1.76 dB for a sine that fills the grid (W. R.
# Bennett, Bell System Technical Journal 27, 1948). Less noise than that is no event in a quantized network.
CEILING_DB = 50.0
# Noise of twice the power: the layer adds as much as all before it together.
JUMP_DB = 3.0
# Sums over all elements of a tensor hardly move after these; each sample costs two unoptimised inferences.
SAMPLES = 32


@dataclass(slots=True)
class _Sums:
    max_abs: float = 0.0
    reference_squares: float = 0.0
    error_squares: float = 0.0


@dataclass(slots=True)
class _Channels:
    """Sums over the elements of each channel of a tensor."""

    reference_squares: NDArray[np.float64]
    products: NDArray[np.float64]
    candidate_squares: NDArray[np.float64]

    def error_squares(self) -> float:
        """Return the sum of squared errors that is left when each channel is multiplied by its best factor."""
        squares = self.candidate_squares
        explained = np.divide(self.products**2, squares, out=np.zeros_like(squares), where=squares > 0)
        return max(0.0, float(np.sum(self.reference_squares - explained)))


def compare_layers(
    reference: ModelProto,
    candidate: ModelProto,
    samples: Samples,
    inputs: Sequence[TensorSpec],
    *,
    names: tuple[str, str],
    limit: int = SAMPLES,
    is_scale_free: bool = False,
) -> LayerComparison:
    """Compare every float tensor that exists in both graphs, each graph computed as it is written.

    Without the runtime's optimiser, because that replaces the very nodes that are asked about. One sample, or one fixed
    batch, is held at a time, with all its inner tensors.

    Args:
        reference: the graph that is right by definition; its order of nodes is the order of the result.
        candidate: another form of it, with the same inputs.
        samples: real inputs.
        inputs: of both graphs.
        names: what to call reference and candidate.
        limit: look at no more than so many samples.
        is_scale_free: compare up to one factor for each channel, by which equalization rescales inner tensors on
            purpose; the largest error is still that of the values as they are.

    Raises:
        ModelError: the graphs share no float tensor.
        FidelityError: a tensor has another shape, or is NaN or infinite in one graph only.
    """
    made = {name for node in candidate.graph.node for name in node.output if name}
    operators = {name: node.op_type for node in reference.graph.node for name in node.output if name}
    shared = [name for name, operator in operators.items() if name in made and operator != "Constant"]
    nothing = f"{names[1]} has no inner float tensor of a name that {names[0]} has, so no layer can be compared"
    if not shared:
        raise ModelError(nothing)
    runners = [_with_outputs(graph, shared) for graph in (reference, candidate)]
    sums: dict[str, _Sums] = {}
    channels: dict[str, _Channels] = {}
    seen = 0
    for batch in _pieces(samples, inputs, limit):
        expected, actual = (runner(batch) for runner in runners)
        for name in shared:
            if np.issubdtype(expected[name].dtype, np.floating):
                _add(sums.setdefault(name, _Sums()), name, expected[name], actual[name], names)
                if is_scale_free:
                    _add_channels(channels, name, expected[name], actual[name])
        seen += len(next(iter(batch.values())))
    if not sums:
        raise ModelError(nothing)
    for name, known in channels.items():
        sums[name].error_squares = known.error_squares()
    layers = _layers(reference, operators, sums)
    worst = max(layers, key=lambda layer: layer.drop_db)  # the first of equals
    return LayerComparison(
        reference=names[0],
        candidate=names[1],
        samples=seen,
        layers=layers,
        not_compared=len([name for name, kind in operators.items() if kind != "Constant"]) - len(shared),
        jump=worst.tensor if worst.drop_db >= JUMP_DB else "",
    )


def _pieces(samples: Samples, inputs: Sequence[TensorSpec], limit: int) -> Iterable[Tensors]:
    """Return single samples where the batch is free: inner tensors of several would not fit into memory."""
    if any(spec.shape and isinstance(spec.shape[0], int) for spec in inputs):
        return samples.batches(inputs, max(limit, *(int(spec.shape[0]) for spec in inputs if _is_fixed(spec))))
    return (samples.batch(index, index + 1) for index in range(min(limit, samples.count)))


def _is_fixed(spec: TensorSpec) -> bool:
    return bool(spec.shape) and isinstance(spec.shape[0], int)


def _with_outputs(graph: ModelProto, tensors: Sequence[str]) -> Runner:
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    del model.graph.output[:]
    # Without a type: the runtime infers it.
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return Runner(model.SerializeToString(), is_optimized=False)


def _add(total: _Sums, name: str, expected: NDArray[Any], actual: NDArray[Any], names: tuple[str, str]) -> None:
    if expected.shape != actual.shape:
        raise FidelityError(
            f"tensor {name!r} has shape {actual.shape} in {names[1]} and {expected.shape} in {names[0]}; they are not "
            f"two forms of one model"
        )
    before, after = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    finite = np.isfinite(before)
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    if not (finite | same).all() or not np.isfinite(after[finite]).all():
        raise FidelityError(f"tensor {name!r} is NaN or infinite in only one of {names[0]} and {names[1]}")
    before, after = before[finite], after[finite]
    error = after - before
    total.max_abs = max(total.max_abs, float(np.abs(error).max(initial=0.0)))
    total.reference_squares += float(before @ before)
    total.error_squares += float(error @ error)


def _add_channels(channels: dict[str, _Channels], name: str, expected: NDArray[Any], actual: NDArray[Any]) -> None:
    """Add one batch; channels are the second axis of images, the last of sequences."""
    axis = -1 if expected.ndim == 3 else min(1, expected.ndim - 1)
    pair = [np.moveaxis(np.atleast_1d(values), axis, 0) for values in (expected, actual)]
    before, after = (np.nan_to_num(one.astype(np.float64), posinf=0.0, neginf=0.0) for one in pair)
    before, after = before.reshape(len(before), -1), after.reshape(len(after), -1)
    made = [(first * second).sum(axis=1) for first, second in ((before, before), (before, after), (after, after))]
    known = channels.setdefault(name, _Channels(*(np.zeros_like(part) for part in made)))
    if known.products.shape != made[0].shape:  # an axis of another length in each batch is no axis of channels
        raise ModelError(f"tensor {name!r} has another number of channels in each batch, so no factor can be told")
    known.reference_squares += made[0]
    known.products += made[1]
    known.candidate_squares += made[2]


def _layers(reference: ModelProto, operators: Mapping[str, str], sums: Mapping[str, _Sums]) -> tuple[LayerError, ...]:
    nearest: dict[str, frozenset[str]] = {}
    layers = []
    for node in reference.graph.node:
        before = frozenset[str]().union(*(nearest.get(name, frozenset()) for name in node.input))
        for name in node.output:
            nearest[name] = frozenset([name]) if name in sums else before
            if name in sums:
                inherited = min((_bounded(sums[one]) for one in before), default=CEILING_DB)
                layers.append(
                    LayerError(
                        tensor=name,
                        operator=operators[name],
                        max_abs=sums[name].max_abs,
                        sqnr_db=sqnr_db(sums[name].reference_squares, sums[name].error_squares),
                        drop_db=inherited - _bounded(sums[name]),
                    )
                )
    return tuple(layers)


def _bounded(total: _Sums) -> float:
    ratio = sqnr_db(total.reference_squares, total.error_squares)
    return CEILING_DB if ratio is None else min(ratio, CEILING_DB)
