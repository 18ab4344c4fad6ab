"""How much each layer costs when it is quantized, and the layers to leave in float for a budget.

Everything is measured on calibration samples, in the arithmetic that the quantized graph is written in. A layer's noise
is that of quantizing it alone, its inputs included. Layers are left in float in the order of their noise for each byte
that float weights take more, until the budget is met: the classifier of a mobile network may be the noisiest layer
after the first few, and in float alone be larger than the rest of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgedeploy.errors import ModelError
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.fidelity import Remembering, compare
from edgedeploy.prepare.graph import Runner, View, read_graph, view
from edgedeploy.prepare.ptq.quantized_set import bias_of, quantized_set
from edgedeploy.prepare.ptq.simulate import simulate
from edgedeploy.prepare.ptq.statistics import thinned
from edgedeploy.records.model import Model
from edgedeploy.records.quantization import QuantizationTable
from edgedeploy.records.sensitivity import LayerSensitivity, PlanPoint, PrecisionPlan, SensitivityCurve
from edgedeploy.records.target import QuantizationRules

if TYPE_CHECKING:
    from onnx import ModelProto

Progress = Callable[[str], None]

# The order of layers needs fewer samples than the figure that is compared with the budget.
_SAMPLES_TO_RANK = 16
_SAMPLES_TO_DECIDE = 64
# A layer in float costs time however small its weights are: as much as this part of the model's bytes. Without it,
# dozens of depthwise layers that take a few hundred bytes each would come before one that matters.
_BYTES_OF_ANY_LAYER = 0.01
# Stands for an exact answer, which has no finite ratio; float32 itself ends near 140 dB.
_EXACT_DB = 140.0


def plan(
    model: Model,
    table: QuantizationTable,
    samples: Samples,
    rules: QuantizationRules,
    *,
    budget_db: float,
    most: int,
    progress: Progress | None = None,
) -> PrecisionPlan:
    """Return the first layers, by noise for each byte, that left in float bring the outputs to a budget.

    Args:
        model: the fp32 model that `table` quantizes.
        table: with every layer quantized.
        samples: the calibration samples.
        rules: the target's.
        budget_db: ratio of signal to quantization noise that the worst output must reach.
        most: layers that may be left in float.
        progress: called with a sentence, now and then.

    Raises:
        ModelError: the budget is not met with `most` layers in float.
    """
    found = curve(model, table, samples, rules, until_db=budget_db, most=most, progress=progress)
    if found.points[-1].sqnr_db < budget_db:
        raise ModelError(_unmet(model, found.points, budget_db, most))
    return PrecisionPlan(budget_db=budget_db, layers=found.layers, curve=found.points, chosen=found.points[-1])


def curve(
    model: Model,
    table: QuantizationTable,
    samples: Samples,
    rules: QuantizationRules,
    *,
    until_db: float | None,
    most: int,
    progress: Progress | None = None,
) -> SensitivityCurve:
    """Return what leaving more and more layers in float gives: none, the noisiest for its bytes, two, and so on.

    Args:
        model: the fp32 model that `table` quantizes.
        table: with every layer quantized.
        samples: the calibration samples; 64 of them are used.
        rules: the target's.
        until_db: the first point that reaches it ends the curve; None: only `most` does.
        most: layers that may be left in float.
        progress: called with a sentence, now and then.
    """
    graph = read_graph(Path(model.path))
    seen = view(graph.graph)
    layers = sensitivities(model, table, samples, rules, progress=progress)
    deciding = thinned(samples, _SAMPLES_TO_DECIDE)
    reference = Remembering(Runner(Path(model.path)))

    def measured(floats: Collection[str]) -> PlanPoint:
        kept = without(table, seen, floats)
        sqnr_db = _sqnr_db(model, reference, _simulated(graph, kept, rules), deciding)
        point = PlanPoint(float_nodes=_floats(seen, kept), sqnr_db=sqnr_db, size_bytes=stored_bytes(seen, kept))
        if progress:
            progress(f"{len(point.float_nodes)} layers in float: {sqnr_db:.1f} dB, {point.size_bytes} bytes")
        return point

    points = [measured(())]
    floats: list[str] = []
    for layer in _by_noise_per_byte(layers, points[0].size_bytes):
        if until_db is not None and points[-1].sqnr_db >= until_db:
            break
        if layer.node in points[-1].float_nodes:
            continue
        floats.append(layer.node)
        if len(_floats(seen, without(table, seen, floats))) > most:
            break
        points.append(measured(floats))
    return SensitivityCurve(layers=layers, points=tuple(points))


def sensitivities(
    model: Model,
    table: QuantizationTable,
    samples: Samples,
    rules: QuantizationRules,
    *,
    progress: Progress | None = None,
) -> tuple[LayerSensitivity, ...]:
    """Return what quantizing each node with weights costs alone, most expensive first.

    Args:
        model: the fp32 model that `table` quantizes.
        table: with every layer quantized.
        samples: the calibration samples; 16 of them are used.
        rules: the target's.
        progress: called with a sentence, now and then.
    """
    graph = read_graph(Path(model.path))
    seen = view(graph.graph)
    some = thinned(samples, _SAMPLES_TO_RANK)
    reference = Remembering(Runner(Path(model.path)))
    quantized_bytes = stored_bytes(seen, table)
    found = []
    nodes = [node for node in graph.graph.node if node.name in table.nodes and _has_weights(node.input, table)]
    for index, node in enumerate(nodes):
        alone = msgspec.structs.replace(
            table,
            nodes=(node.name,),
            activations={name: item for name, item in table.activations.items() if name == node.input[0]},
        )
        found.append(
            LayerSensitivity(
                node=node.name,
                sqnr_db=_sqnr_db(model, reference, _simulated(graph, alone, rules), some),
                float_bytes=stored_bytes(seen, without(table, seen, (node.name,))) - quantized_bytes,
            )
        )
        if progress:
            progress(f"quantizing one layer at a time: {index + 1} of {len(nodes)} layers")
    return tuple(sorted(found, key=lambda item: item.sqnr_db))


def without(table: QuantizationTable, seen: View, floats: Collection[str]) -> QuantizationTable:
    """Return a table that leaves some nodes in float, each with its original bias.

    Args:
        table: with these nodes quantized.
        seen: the graph that it quantizes.
        floats: names of nodes.
    """
    # The widest set: what the table's rules leave out of it is not in the table either.
    was_float = set(quantized_set(seen, rounds_products=True).nodes) - set(table.nodes)
    chosen = quantized_set(seen, was_float | set(floats), rounds_products=True)
    weights = {node.input[1] for node in chosen.weighted}
    biases = {bias_of(node, seen) for node in chosen.weighted}
    return msgspec.structs.replace(
        table,
        nodes=tuple(chosen.nodes),
        activations={name: item for name, item in table.activations.items() if name in chosen.tensors},
        weights={name: item for name, item in table.weights.items() if name in weights},
        bias_deltas={name: item for name, item in table.bias_deltas.items() if name in biases},
    )


def stored_bytes(seen: View, table: QuantizationTable) -> int:
    """Return how many bytes a model's constants take when a table's weights are stored as integers."""
    size = 0
    biases = {bias_of(node, seen) for node in seen.graph.node if node.name in table.nodes}
    for name, value in seen.constants.items():
        grid = table.weights.get(name)
        # An integer bias has a scale of its own for each element, and so have the weights of each channel.
        per_value = value.size if grid is not None else value.nbytes * (2 if name in biases else 1)
        size += per_value + (0 if grid is None else 4 * len(grid.scales))
    return size


def _by_noise_per_byte(layers: Collection[LayerSensitivity], quantized_bytes: int) -> list[LayerSensitivity]:
    fixed = _BYTES_OF_ANY_LAYER * quantized_bytes

    def noise_per_byte(layer: LayerSensitivity) -> float:
        return float(10 ** (-layer.sqnr_db / 10) / (layer.float_bytes + fixed))

    return sorted(layers, key=noise_per_byte, reverse=True)


def _unmet(model: Model, points: Collection[PlanPoint], budget_db: float, most: int) -> str:
    steps = ", ".join(f"{len(point.float_nodes)}: {point.sqnr_db:.1f} dB" for point in points)
    return (
        f"{model.source} does not reach {budget_db:g} dB on calibration samples with {most} layers in float (layers in "
        f"float: {steps}); allow more by -Q max_float_layers=..., or lower the budget"
    )


def _has_weights(inputs: Collection[str], table: QuantizationTable) -> bool:
    return any(name in table.weights for name in list(inputs)[1:2])


def _floats(seen: View, table: QuantizationTable) -> tuple[str, ...]:
    everything = quantized_set(seen, rounds_products=True)
    return tuple(node.name for node in everything.weighted if node.name not in table.nodes)


def _simulated(graph: ModelProto, table: QuantizationTable, rules: QuantizationRules) -> ModelProto:
    return simulate(
        graph,
        nodes=table.nodes,
        activations=table.activations,
        weights=table.weights,
        bias_deltas={name: np.asarray(delta) for name, delta in table.bias_deltas.items()},
        rules=rules,
    )


def _sqnr_db(model: Model, reference: Remembering, simulated: ModelProto, samples: Samples) -> float:
    """Return the ratio of the worst output."""
    fidelity = compare(
        reference.over(),
        # As written: ONNX Runtime's optimiser rounds float weights of its own accord where activations are rounded.
        Runner(simulated.SerializeToString(), is_optimized=False),
        samples.batches(model.inputs),
        names=("fp32 ONNX", "quantized"),
        sample_source=samples.name,
    )
    return min(_EXACT_DB if item.sqnr_db is None else item.sqnr_db for item in fidelity.outputs)
