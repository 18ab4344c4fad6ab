"""What became of each kind of compression, PyTorch to ONNX to artifact: decided by counting in the graphs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from edgedeploy.records.compression import CompressionReport, Fate, KindStatement, LayerCompression
from edgedeploy.records.model import CompressionKind, FoundCompression

# Training leaves hardly a weight exactly zero, so a share of this size has been put there.
_SOME_ZEROS = 0.01


@dataclass(frozen=True, slots=True)
class _Evidence:
    """How a kind shows in a graph.

    Attributes:
        holds: whether a layer has it.
        phrase: what such a layer has, for a sentence: "zeros among the weights in 3 of 3 layers".
    """

    holds: Callable[[LayerCompression], bool]
    phrase: str


def _has_integer_weights(layer: LayerCompression, *, at_most: int = 8, more_than: int = 0) -> bool:
    return "int" in layer.weights.storage and more_than < layer.weights.bits <= at_most


def _reads_static(layer: LayerCompression) -> bool:
    return layer.activations.bits < 32 and not layer.activations.is_dynamic


_ZEROS = _Evidence(lambda layer: layer.zero_weights >= _SOME_ZEROS * layer.weight_count, "zeros among the weights")
_STATIC = _Evidence(
    lambda layer: _has_integer_weights(layer) and _reads_static(layer), "integer weights and activations"
)
_EVIDENCE: Mapping[CompressionKind, _Evidence] = {
    "pruning masks": _ZEROS,
    "unstructured sparsity": _ZEROS,
    "2:4 sparsity": _Evidence(lambda layer: layer.pattern == "2:4", "two zeros in each four weights"),
    "channel pruning": _Evidence(
        lambda layer: bool(layer.removed_channels) or layer.pattern == "channels", "fewer channels"
    ),
    "low rank": _Evidence(lambda layer: layer.rank is not None, "two factors"),
    "shared weights": _Evidence(lambda layer: bool(layer.shares_with), "weights of an earlier layer"),
    "static int8": _STATIC,
    "QAT int8": _STATIC,
    "dynamic int8": _Evidence(
        lambda layer: _has_integer_weights(layer) and layer.activations.is_dynamic,
        "integer weights and dynamic activations",
    ),
    "int8 activations, int4 weights": _Evidence(
        lambda layer: _has_integer_weights(layer, at_most=4) and layer.activations.is_dynamic,
        "4-bit weights and dynamic activations",
    ),
    "weight-only int8": _Evidence(lambda layer: _has_integer_weights(layer, more_than=4), "8-bit weights"),
    "weight-only int4": _Evidence(lambda layer: _has_integer_weights(layer, at_most=4), "4-bit weights"),
    "float8": _Evidence(lambda layer: layer.weights.storage.startswith("float8"), "float8 weights"),
    "float16": _Evidence(lambda layer: layer.weights.storage == "float16", "float16 weights"),
    "bfloat16": _Evidence(lambda layer: layer.weights.storage == "bfloat16", "bfloat16 weights"),
}
_ZERO_KINDS = frozenset({"pruning masks", "unstructured sparsity", "2:4 sparsity"})
_STORED_SMALL = frozenset({"weight-only int8", "weight-only int4", "float8", "float16", "bfloat16"})
_COMPUTED_SMALL = frozenset({"static int8", "QAT int8", "dynamic int8", "int8 activations, int4 weights"})
_WITH_SCALES = frozenset({
    "static int8", "QAT int8", "dynamic int8", "weight-only int8", "weight-only int4", "int8 activations, int4 weights",
    "float8",
})  # fmt: skip


def statements(
    found: Sequence[FoundCompression],
    canonical: CompressionReport,
    artifact: CompressionReport | None,
    survival_notes: Sequence[str] = (),
    expanded: Collection[str] = (),
) -> tuple[KindStatement, ...]:
    """Say of each kind of compression whether it was kept, changed or lost.

    Args:
        found: what the source carried.
        canonical: counted in the fp32 ONNX, with the source's quantization as `table`, and beside the dense reference
            where there is one.
        artifact: counted in what is deployed; None: nothing was built yet.
        survival_notes: sentences on trained scales that did not come through as they were; each of them makes a kind
            with scales "changed" in the artifact.
        expanded: names of weights that the runtime widens to float32 before it multiplies.

    Returns:
        One statement for each kind, in the order of `found`; channel pruning is added where the reference shows it.
    """
    made = []
    for kind in dict.fromkeys(one.kind for one in found):
        own = [one for one in found if one.kind == kind]
        made.append(
            _statement(kind, own, canonical, artifact, survival_notes if kind in _WITH_SCALES else (), expanded)
        )
    narrowed = [layer.name for layer in canonical.layers if layer.removed_channels]
    if narrowed and not any(one.kind == "channel pruning" for one in found):
        removed = sum(layer.removed_channels or 0 for layer in canonical.layers)
        detail = f"{removed:,} output channels fewer than the dense reference"
        own = [FoundCompression(kind="channel pruning", layers=tuple(narrowed), detail=detail)]
        made.append(_statement("channel pruning", own, canonical, artifact, (), ()))
    return tuple(made)


def _statement(
    kind: CompressionKind,
    found: Sequence[FoundCompression],
    canonical: CompressionReport,
    artifact: CompressionReport | None,
    survival_notes: Sequence[str],
    expanded: Collection[str],
) -> KindStatement:
    names = tuple(dict.fromkeys(name for one in found for name in one.layers))
    details = dict.fromkeys(text for one in found for text in (one.detail, one.lowering) if text)
    shown: CompressionKind = kind
    if kind == "QAT int8" and not _holding(kind, canonical):
        # torchao trains for activations that are quantized anew in each inference, torch.ao for fixed grids.
        shown = "dynamic int8"
    onnx, onnx_reason = _in_canonical(shown, names, all(one.is_kept for one in found), canonical, len(found))
    fate: Fate | None = None
    reason = ""
    if artifact is not None:
        fate, reason = "lost", "not in the ONNX either"
        if onnx != "lost":
            fate, reason = _kept(shown, names, canonical, artifact, expanded)
        if fate == "kept" and survival_notes:
            fate, reason = "changed", f"{reason}, but not every trained scale came through as it was"
    notes = [*(one.note for one in found if one.note), *(survival_notes if artifact is not None else ())]
    return KindStatement(
        kind=kind,
        layers=len(names),
        detail="; ".join(details),
        onnx=onnx,
        onnx_reason=onnx_reason,
        artifact=fate,
        artifact_reason=reason,
        notes=tuple(dict.fromkeys(notes)),
    )


def _in_canonical(
    kind: CompressionKind, names: Sequence[str], is_kept: bool, canonical: CompressionReport, groups: int
) -> tuple[Fate, str]:
    if not is_kept:
        return "lost", "it could not be carried over"
    if kind == "autocast":
        return "changed", "the graph computes in float32"
    if kind not in _EVIDENCE:
        return "kept", "computed once and stored as plain weights"
    evidence = _EVIDENCE[kind]
    asked = _layers_named(names, canonical) if kind != "shared weights" else ()
    if asked:
        # ONNX names recurrent weights anew: layers that show the kind stand for names that are not found.
        renamed = [layer for layer in _holding(kind, canonical) if layer not in asked][: len(names) - len(asked)]
        holding, expected = sum(map(evidence.holds, asked)) + len(renamed), len(asked) + len(renamed)
    elif kind == "shared weights":  # of each group of layers, the first one owns the weights
        holding = len(_holding(kind, canonical))
        expected = len(names) - groups
    else:  # names that ONNX does not have: as many layers must show it as carried it
        holding = len(_holding(kind, canonical))
        expected = min(len(names), len(_products(canonical))) or 1
    reason = f"{evidence.phrase} in {min(holding, expected)} of {_count(expected, 'layer')}"
    return ("kept" if holding >= expected else "changed" if holding else "lost"), reason


def _kept(
    kind: CompressionKind,
    names: Sequence[str],
    canonical: CompressionReport,
    artifact: CompressionReport,
    expanded: Collection[str],
) -> tuple[Fate, str]:
    """Compare an artifact with the canonical pair."""
    if kind not in _EVIDENCE:
        fate: Fate = "kept" if artifact.parameters <= canonical.parameters else "changed"
        return fate, f"{artifact.parameters:,} parameters, {canonical.parameters:,} in the ONNX"
    before = _holding(kind, canonical)
    asked = {layer.name for layer in _layers_named(names, canonical)}
    if len(asked) >= len(names):  # else ONNX has renamed some, and any layer that shows the kind may be one of them
        before = [layer for layer in before if layer.name in asked] or before
    after, total = _counterparts(before, artifact), len(before)
    if len(after) < total:  # a back end that names everything anew
        after = _products(artifact)
    if kind == "channel pruning":
        return _channels_kept(before, after)
    evidence = _EVIDENCE[kind]
    holding = [layer for layer in after if evidence.holds(layer)]
    reason = f"{evidence.phrase} in {min(len(holding), total)} of {_count(total, 'layer')}"
    if len(holding) < total:
        remains = f"{reason}; weights are stored as {_storages(after)}"
        # Integers that are computed with differently are still the source's integers.
        is_partial = bool(holding) or (kind in _WITH_SCALES and any(map(_has_integer_weights, after)))
        return ("changed" if is_partial else "lost"), remains
    if kind in _ZERO_KINDS:
        return _zeros_kept(before, after, reason)
    if kind in _COMPUTED_SMALL and (widened := [layer for layer in holding if _is_one_of(layer, expanded)]):
        return "changed", (
            f"{reason} of the file, but the runtime has no integer kernel for {len(widened)} of them as they stand "
            f"(first: {widened[0].name}), and widens their weights to float32 in memory"
        )
    widened = [layer for layer in holding if kind in _STORED_SMALL and not _stays_small(layer)]
    if widened:
        bits = max(layer.weights.bits for layer in widened)
        return "changed", (
            f"{bits} bits in the file, but expanded to float32 in memory in {_count(len(widened), 'layer')}, because "
            f"the graph widens them before it multiplies"
        )
    return "kept", reason


def _counterparts(before: Sequence[LayerCompression], artifact: CompressionReport) -> list[LayerCompression]:
    """Return the layers of an artifact that stand for canonical ones, by node name or by the name of their weights."""
    by_name = {layer.name: layer for layer in _products(artifact)}
    by_weight: dict[str, list[LayerCompression]] = {}
    for layer in _products(artifact):
        # What a form stores for a weight is named after it: "head.weight/integers".
        for name in {layer.weight, layer.weight.rpartition("/")[0]}:
            by_weight.setdefault(name, []).append(layer)
    after = []
    for layer in before:
        readers = [one for one in by_weight.get(layer.weight, []) if bool(one.shares_with) == bool(layer.shares_with)]
        found = by_name.get(layer.name) or next(iter(readers), None)
        if found is not None:
            after.append(found)
    return after


def _zeros_kept(before: Sequence[LayerCompression], after: Sequence[LayerCompression], reason: str) -> tuple[Fate, str]:
    old, new = (sum(layer.zero_weights for layer in layers) for layers in (before, after))
    if new < old:
        return "changed", f"{old - new:,} of {old:,} zeros became other numbers"
    return "kept", f"{reason}, none fewer than in the ONNX"


def _channels_kept(before: Sequence[LayerCompression], after: Sequence[LayerCompression]) -> tuple[Fate, str]:
    old, new = (sum(layer.output_channels for layer in layers) for layers in (before, after))
    return ("kept" if new <= old else "lost"), f"{new:,} output channels, {old:,} in the ONNX"


def _stays_small(layer: LayerCompression) -> bool:
    """Whether a runtime multiplies with what is stored; constants behind a DequantizeLinear or Cast are unpacked."""
    return layer.operator == "MatMulNBits" or layer.activations.bits < 32


def _is_one_of(layer: LayerCompression, weights: Collection[str]) -> bool:
    return layer.weight in weights or layer.weight.rpartition("/")[0] in weights


def _holding(kind: CompressionKind, report: CompressionReport) -> list[LayerCompression]:
    return [layer for layer in _products(report) if _EVIDENCE[kind].holds(layer)]


def _products(report: CompressionReport) -> list[LayerCompression]:
    return [layer for layer in report.layers if layer.weight_count]


def _layers_named(names: Sequence[str], report: CompressionReport) -> list[LayerCompression]:
    """Return the layers that module paths or node names stand for, as far as ONNX kept the names."""
    wanted = set(names)
    return [layer for layer in _products(report) if wanted & {layer.name, layer.weight, module_of(layer)}]


def module_of(layer: LayerCompression) -> str:
    """Return the module path that a layer's weights are named after, "" where they have no such name."""
    path, dot, _ = layer.weight.split("/")[0].rpartition(".")
    return path if dot else ""


def _storages(layers: Sequence[LayerCompression]) -> str:
    counted = Counter(layer.weights.storage for layer in layers).most_common()
    if len(counted) == 1:
        return counted[0][0]
    return ", ".join(f"{storage} in {number}" for storage, number in counted)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
