"""Decides what is quantized and how: an fp32 model and calibration samples become a QuantizationTable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from edgedeploy.documents import closest
from edgedeploy.errors import ModelError, UsageError
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.graph import View, read_graph, view
from edgedeploy.prepare.grid import activation_grid, rounded, smallest_scales, weight_scales
from edgedeploy.prepare.ptq.calibrate import mean_errors
from edgedeploy.prepare.ptq.calibration_check import check_calibration
from edgedeploy.prepare.ptq.quantized_set import MOVES, QuantizedSet, bias_of, quantized_set, weight_axis
from edgedeploy.prepare.ptq.ranges import activation_range
from edgedeploy.prepare.ptq.rounding import choose, input_moments, row_places
from edgedeploy.prepare.ptq.sensitivity import plan, without
from edgedeploy.prepare.ptq.statistics import statistics
from edgedeploy.records.model import Model
from edgedeploy.records.quantization import (
    ActivationRange,
    QuantizationPolicy,
    QuantizationTable,
    WeightQuantization,
)
from edgedeploy.records.sensitivity import PrecisionPlan
from edgedeploy.records.target import QuantizationRules

Progress = Callable[[str], None]
Grids = dict[str, WeightQuantization]

# Whoever writes a graph by a table asks the same questions of it.
__all__ = ["MOVES", "bias_of", "quantize", "weight_axis"]

_DEFAULT = QuantizationPolicy()


def quantize(
    model: Model,
    samples: Samples,
    rules: QuantizationRules,
    policy: QuantizationPolicy = _DEFAULT,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> QuantizationTable:
    """Calibrate a float model and choose the grid of every tensor and weight.

    Args:
        model: simplified fp32; already equalized where `policy.equalize` asks for it, since that makes another model.
        samples: real inputs, unlike those that the result will be judged on.
        rules: the target's; bits and axes of weights, and the activations' storage, which limits biases.
        policy: how ranges, roundings and layers that stay float are chosen.
        cache: folder where statistics of the same model and samples are looked for and kept.
        progress: called with a sentence, now and then; what looks wrong about the samples, and which layers the budget
            leaves in float, comes with "note: ".

    Raises:
        ModelError: nothing in the model can be quantized, a tensor becomes NaN or infinite on the samples, or the
            policy's budget is not met.
        DocumentError: the samples cannot be right.
        UsageError: the policy names a layer that the model does not have.
    """
    for note in check_calibration(samples, model.inputs):
        if progress:
            progress(f"note: {note}")
    seen = view(read_graph(Path(model.path)).graph)
    rounds_products = rules.product_outputs == "integer"
    chosen = quantized_set(seen, _left_float(seen, rules, policy), rounds_products=rounds_products)
    if not chosen.weighted:
        raise ModelError(
            f"{model.source} has no convolution or matrix product with constant float32 weights, so nothing can be "
            f"quantized; build it as fp32"
        )
    activations = _ranges(model, samples, chosen, rules, policy, cache, progress)
    weights = _weight_grids(chosen, activations, rules)
    if policy.rounding == "adaround":
        weights = _chosen_roundings(model, samples, chosen, activations, weights, policy, rules, progress)
    table = QuantizationTable(
        model_sha256=model.sha256,
        calibration=samples.name,
        calibration_sha256=samples.sha256,
        samples=samples.count,
        method=_method(policy),
        nodes=tuple(chosen.nodes),
        activations=activations,
        weights=weights,
        bias_deltas=_bias_deltas(model, samples, chosen, weights, progress) if policy.bias_correction else {},
    )
    if policy.budget_db is None:
        return table
    found = plan(
        model,
        table,
        samples,
        rules,
        budget_db=policy.budget_db,
        most=policy.max_float_layers,
        progress=progress,
    )
    if progress and (note := _plan_note(found)):
        progress(f"note: {note}")
    return without(table, seen, found.chosen.float_nodes)


def _plan_note(found: PrecisionPlan) -> str:
    if not found.chosen.float_nodes:
        return ""
    return (
        f"{len(found.chosen.float_nodes)} layers stay float for {found.budget_db:g} dB on calibration samples "
        f"({found.curve[0].sqnr_db:.1f} dB without, {found.chosen.sqnr_db:.1f} dB with): "
        f"{', '.join(found.chosen.float_nodes)}"
    )


def _left_float(seen: View, rules: QuantizationRules, policy: QuantizationPolicy) -> set[str]:
    names = [node.name for node in seen.graph.node]
    for name in policy.float_layers:
        if name not in names:
            raise UsageError(f"float_layers names {name!r}, which the model does not have{closest(name, names)}")
    excluded = {node.name for node in seen.graph.node if node.op_type in rules.excluded_operators}
    return excluded | set(policy.float_layers)


def _ranges(
    model: Model,
    samples: Samples,
    chosen: QuantizedSet,
    rules: QuantizationRules,
    policy: QuantizationPolicy,
    cache: Path | None,
    progress: Progress | None,
) -> dict[str, ActivationRange]:
    # Of every tensor that any policy and rules could quantize, so that one calibration serves all of them.
    whole = quantized_set(chosen.seen, rounds_products=True)
    origins = list(dict.fromkeys(item.origin(tensor) for item in (whole, chosen) for tensor in item.tensors))
    found = statistics(model, samples, origins, cache=cache, progress=progress)
    return {tensor: activation_range(found[chosen.origin(tensor)], rules, policy) for tensor in chosen.tensors}


def _method(policy: QuantizationPolicy) -> str:
    ranges = f"{policy.ranges} {policy.percentile:g}" if policy.ranges == "percentile" else policy.ranges
    parts = [
        f"{ranges} activations",
        "weights rounded as reconstructs their layers" if policy.rounding == "adaround" else "max-abs weights",
        "mean-error bias correction" if policy.bias_correction else "",
        "" if policy.budget_db is None else f"layers in float for {policy.budget_db:g} dB",
    ]
    return ", ".join(part for part in parts if part)


def _weight_grids(chosen: QuantizedSet, activations: Mapping[str, ActivationRange], rules: QuantizationRules) -> Grids:
    grids: Grids = {}
    for node in chosen.weighted:
        name = node.input[1]
        bias = bias_of(node, chosen.seen)
        axis = weight_axis(node) if rules.weight_per_channel else None
        scales = weight_scales(
            chosen.seen.constants[name],
            axis=axis,
            bits=rules.weight_bits,
            bias=chosen.seen.constants[bias] if bias else None,
            input_scale=activation_grid(activations[node.input[0]], rules).scale,
        )
        if name in grids:  # shared weights: one grid that suits all of their nodes
            scales = np.maximum(scales, np.asarray(grids[name].scales, np.float32))
        grids[name] = WeightQuantization(
            bits=rules.weight_bits, axis=axis, scales=tuple(float(scale) for scale in scales), origin="max-abs"
        )
    return grids


def _chosen_roundings(
    model: Model,
    samples: Samples,
    chosen: QuantizedSet,
    activations: Mapping[str, ActivationRange],
    grids: Grids,
    policy: QuantizationPolicy,
    rules: QuantizationRules,
    progress: Progress | None,
) -> Grids:
    seen = chosen.seen
    moments = input_moments(model, samples, chosen.weighted, seen, progress=progress)
    rounded_grids: Grids = {}
    for number, (name, grid) in enumerate(grids.items()):
        readers = [node for node in chosen.weighted if node.input[1] == name]
        biases = [bias_of(node, seen) for node in readers]
        needed = [
            smallest_scales(seen.constants[bias], activation_grid(activations[node.input[0]], rules).scale)
            for node, bias in zip(readers, biases, strict=True)
            if bias
        ]
        rounded_grids[name] = choose(
            seen.constants[name],
            row_places(readers[0], seen.constants[name]),
            grid,
            [moments[node.name] for node in readers],
            smallest=np.max(needed, axis=0) if needed else None,
            has_bias=policy.bias_correction and all(biases),
        )
        if progress:
            progress(f"choosing roundings: {number + 1} of {len(grids)} layers")
    return rounded_grids


def _bias_deltas(
    model: Model, samples: Samples, chosen: QuantizedSet, grids: Grids, progress: Progress | None
) -> dict[str, tuple[float, ...]]:
    """Return what each bias must grow by, so that rounding its weights changes no channel's mean.

    All from the float model's inputs: measured behind layers that are corrected already, the corrections diverge.
    """
    seen = chosen.seen
    biases = {node.name: bias_of(node, seen) for node in chosen.weighted}
    errors = {
        node.name: seen.constants[node.input[1]] - rounded(seen.constants[node.input[1]], grids[node.input[1]])
        for node in chosen.weighted
        if biases[node.name]
    }
    lost = mean_errors(model, samples, errors, progress=progress)
    return {biases[name]: tuple(float(value) for value in lost[name]) for name in errors}
