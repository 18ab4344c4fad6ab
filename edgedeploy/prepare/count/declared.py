"""Is a model what its label says: what the release file declares of its compression, against what was counted. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgedeploy.documents import closest
from edgedeploy.errors import ModelError
from edgedeploy.prepare.count.statements import module_of
from edgedeploy.records.compression import CompressionReport, LayerCompression
from edgedeploy.records.model import FoundCompression
from edgedeploy.records.release import Declared

# A share that is rounded to whole weights, layer by layer, comes out a little below what was asked for.
_SHARE_TOLERANCE = 0.01


def demand_declared(
    declared: Declared, report: CompressionReport, found: Sequence[FoundCompression], *, name: str = "the model"
) -> None:
    """Compare a declaration with a model.

    Args:
        declared: what the release file says.
        report: counted in the canonical ONNX, with the source's quantization as `table`.
        found: what the source carried.
        name: how the model is called in the error.

    Raises:
        ModelError: with a line for each key that is not what was found.
    """
    layers = _spoken_of(declared, report, name)
    checks: Sequence[tuple[str, object, Callable[[], str]]] = (
        ("sparsity", declared.sparsity, lambda: _sparsity(declared.sparsity or 0.0, layers)),
        ("pattern", declared.pattern, lambda: _pattern(declared.pattern or "", layers)),
        ("qat", declared.qat, lambda: _qat(bool(declared.qat), found)),
        ("rank", declared.rank, lambda: _rank(declared.rank or 0, layers)),
        ("weight_bits", declared.weight_bits, lambda: _bits(declared.weight_bits or 0, layers, "weights")),
        (
            "activation_bits",
            declared.activation_bits,
            lambda: _bits(declared.activation_bits or 0, layers, "activations"),
        ),
        (
            "max_parameters",
            declared.max_parameters,
            lambda: _at_most(declared.max_parameters or 0, report.parameters, "parameters"),
        ),
        ("max_macs", declared.max_macs, lambda: _at_most(declared.max_macs or 0, report.macs, "multiply-adds")),
    )
    wrong = [
        f"{key} = {_toml(value)} is declared, but {complaint}"
        for key, value, check in checks
        if value is not None and (complaint := check())
    ]
    if wrong:
        raise ModelError(
            f"{name} is not what its label says: {'; '.join(wrong)}. Compress it again, or correct "
            f"[models.NAME.declared] in the release file; edgedeploy inspect shows every layer"
        )


def _spoken_of(declared: Declared, report: CompressionReport, name: str) -> list[LayerCompression]:
    """Return the layers that multiply with weights, without those that the declaration leaves out."""
    layers = [layer for layer in report.layers if layer.output_channels]
    known = {one for layer in layers for one in (layer.name, module_of(layer)) if one}
    for exempt in declared.except_layers:
        if exempt not in known:
            raise ModelError(
                f'{name} has no layer "{exempt}", which except_layers in its declaration names'
                f"{closest(exempt, known)}; edgedeploy inspect --layers lists them"
            )
    exempted = set(declared.except_layers)
    return [layer for layer in layers if not exempted & {layer.name, module_of(layer)}]


def _sparsity(wanted: float, layers: Sequence[LayerCompression]) -> str:
    zeros, size = sum(layer.zero_weights for layer in layers), sum(layer.weight_count for layer in layers)
    share = zeros / size if size else 0.0
    if share >= wanted - _SHARE_TOLERANCE:
        return ""
    return f"{zeros:,} of {size:,} weights are zero ({share:.3f})"


def _pattern(wanted: str, layers: Sequence[LayerCompression]) -> str:
    if wanted == "2:4":
        # Grouped and first convolutions with fewer than four input channels cannot have it.
        able = [layer for layer in layers if _inputs(layer) % 4 == 0]
        without = [layer for layer in able if layer.pattern != "2:4"]
        if able and not without:
            return ""
        return f"{len(without)} of {len(able)} layers that could have it do not{_such_as(without)}"
    having = [layer for layer in layers if layer.pattern == wanted]
    return "" if having else f"no layer has it{_such_as(layers)}"


def _qat(wanted: bool, found: Sequence[FoundCompression]) -> str:
    if wanted == any(one.kind == "QAT int8" and one.is_kept for one in found):
        return ""
    kinds = ", ".join(dict.fromkeys(one.kind for one in found)) or "no compression"
    return f"the source carries {kinds}"


def _rank(wanted: int, layers: Sequence[LayerCompression]) -> str:
    ranks = {layer.name: layer.rank for layer in layers if layer.rank is not None}
    if not ranks:
        return "no layer is a pair of low-rank factors"
    name, rank = max(ranks.items(), key=lambda item: item[1])
    return "" if rank <= wanted else f"the pair of {name} has rank {rank}"


def _bits(wanted: int, layers: Sequence[LayerCompression], of: str) -> str:
    wide = [layer for layer in layers if _bits_of(layer, of) > wanted]
    if not wide:
        return ""
    widest = max(_bits_of(layer, of) for layer in wide)
    return f"{len(wide)} of {len(layers)} layers have {of} of up to {widest} bits{_such_as(wide)}"


def _bits_of(layer: LayerCompression, of: str) -> int:
    return layer.weights.bits if of == "weights" else layer.activations.bits


def _at_most(wanted: int, counted: int | None, what: str) -> str:
    if counted is None:
        return f"its {what} cannot be counted, because a shape is not known before it runs; give fixed input shapes"
    return "" if counted <= wanted else f"it has {counted:,} {what}"


def _inputs(layer: LayerCompression) -> int:
    """Return how many input channels one output channel of a layer sees."""
    rest = math.prod(layer.weight_shape[2:]) if "Conv" in layer.operator else 1
    return math.prod(layer.weight_shape) // layer.output_channels // rest or 1


def _such_as(layers: Sequence[LayerCompression]) -> str:
    names = [module_of(layer) or layer.name for layer in layers[:3]]
    return f" ({', '.join(names)}{' …' if len(layers) > len(names) else ''})" if names else ""


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
