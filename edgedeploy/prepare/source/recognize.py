"""What compression can be seen in a canonical ONNX and its quantization, whatever it came from."""

from __future__ import annotations

from collections.abc import Mapping

from edgedeploy.records.model import CompressionKind, FoundCompression
from edgedeploy.records.quantization import DynamicActivation, SourceQuantization, WeightQuantization


def found_in_onnx(quantization: SourceQuantization | None) -> tuple[FoundCompression, ...]:
    """Name the kinds of quantization that an ONNX file carried.

    Whether ranges were trained or calibrated cannot be seen in a file, so trained ones are called static int8 too.
    """
    if quantization is None:
        return ()
    found = []
    dynamic = {name: quantization.weights[name] for name in quantization.dynamic if name in quantization.weights}
    others = {name: grid for name, grid in quantization.weights.items() if name not in dynamic}
    if quantization.activations:
        grids = [item.grid for item in quantization.activations.values() if item.grid]
        symmetric = all(
            grid.low_code + grid.high_code + 1 in (2 * grid.zero_point, 2 * grid.zero_point + 1) for grid in grids
        )
        detail = f"{'symmetric' if symmetric else 'asymmetric'} activations, {_weights(others)}"
        found.append(FoundCompression(kind="static int8", layers=tuple(others), detail=detail))
    elif others:
        found += _by_storage(others)
    if dynamic:
        kind: CompressionKind = "dynamic int8"
        if all(grid.bits <= 4 for grid in dynamic.values()):
            kind = "int8 activations, int4 weights"
        found.append(FoundCompression(kind=kind, layers=tuple(dynamic), detail=_dynamic(quantization.dynamic, dynamic)))
    return tuple(found)


def _by_storage(weights: Mapping[str, WeightQuantization]) -> list[FoundCompression]:
    kinds: dict[CompressionKind, list[str]] = {}
    for name, grid in weights.items():
        kind: CompressionKind = "weight-only int8" if grid.bits > 4 else "weight-only int4"
        if grid.storage != "integer":
            kind = "float8" if grid.storage == "float8e4m3fn" else grid.storage
        kinds.setdefault(kind, []).append(name)
    return [
        FoundCompression(kind=kind, layers=tuple(names), detail=_weights({name: weights[name] for name in names}))
        for kind, names in kinds.items()
    ]


def _weights(weights: Mapping[str, WeightQuantization]) -> str:
    if not weights:
        return "no weights"
    per_channel = sum(grid.axis is not None for grid in weights.values())
    how = "per-channel" if per_channel == len(weights) else "per-tensor" if not per_channel else "partly per-channel"
    return f"{how} weights"


def _dynamic(dynamic: Mapping[str, DynamicActivation], weights: Mapping[str, WeightQuantization]) -> str:
    per_token = any(how.per_token for how in dynamic.values())
    return f"activations {'per token' if per_token else 'per tensor'}, {_weights(weights)}"
