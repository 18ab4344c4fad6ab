"""What the runtime executed of a .mnn file, in the names of the model that it was made from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from edgedeploy.backends.mnn.contents import Contents
from edgedeploy.backends.mnn.rewrites import Prepared
from edgedeploy.records.artifact import LayerReport

# The converter copies what an ONNX file says beside its graph, and nobody else keeps the names of weights and nodes.
ORIGINS = "edgedeploy.origins"
# How the runtime marks what it executes on integers.
_INTEGERS = re.compile(r"\s*\[\s*DT_INT8\s*\]\s*$")
# What only moves or converts values, or counts sizes: it neither is quantized nor an island.
MOVES = frozenset({
    "Raster", "ConvertTensor", "FloatToInt8", "Int8ToFloat", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "Transpose", "Permute", "Const", "Shape", "Size", "Rank", "Input", "Slice", "SliceTf", "StridedSlice", "Gather",
    "GatherV2", "GatherND", "Unpack", "Pack", "Tile", "BroadcastTo", "ExpandDims", "Range", "Fill", "Identity", "While",
    "ArgMax", "ArgMin", "OneHot", "Select", "TopKV2", "Concat", "Padding", "Reverse",
})  # fmt: skip


def note_origins(prepared: Prepared) -> None:
    """Write into the graph's metadata where its operators come from, and which weights the form stores small."""
    operators = {
        name: [product.node, product.weights, _name_of(prepared, product.source), _name_of(prepared, product.result)]
        for name, product in prepared.products.items()
    }
    origins = {"operators": operators, "small": sorted(prepared.small)}
    entry = prepared.graph.metadata_props.add()
    entry.key, entry.value = ORIGINS, json.dumps(origins, sort_keys=True, ensure_ascii=False)


def _name_of(prepared: Prepared, tensor: str) -> str:
    """Return the model's own name of a tensor that only moves another's values."""
    return prepared.tensors.get(tensor, tensor)


def layer_report(contents: Contents, executed: Sequence[tuple[str, str]]) -> LayerReport:
    """Return what was executed, and with which numbers.

    Args:
        contents: the file.
        executed: name and type of each operator, as the runtime called them.
    """
    origins, small = origins_of(contents)
    counts = Counter(_INTEGERS.sub("", kind).strip() for _, kind in executed)
    quantized: list[str] = []
    floats: list[str] = []
    for name, kind in executed:
        plain = _INTEGERS.sub("", kind).strip()
        if plain not in MOVES:
            label = f"{plain} {origins[name][0] if name in origins else name}"
            (quantized if plain != kind.strip() else floats).append(label)
    has_integers = bool(quantized) or any(
        item.weights and item.weights.codes is not None for item in contents.operators
    )
    return LayerReport(
        operators=dict(sorted(counts.items())),
        quantized=tuple(dict.fromkeys(quantized)),
        float_islands=tuple(dict.fromkeys(floats)) if has_integers else (),
        scales=_scales(contents, origins),
        expanded=_expanded(contents, origins, small),
    )


# Name of an operator → ONNX node, its weights, the tensor that it reads and the one that it makes.
Origins = dict[str, tuple[str, str, str, str]]


class _Noted(msgspec.Struct, frozen=True):
    operators: Origins = {}
    small: list[str] = []


def origins_of(contents: Contents) -> tuple[Origins, list[str]]:
    """Return what `note_origins` wrote; nothing of a file that another program made."""
    try:
        found = msgspec.json.decode(contents.metadata.get(ORIGINS, "{}"), type=_Noted)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return {}, []
    return found.operators, found.small


def _scales(contents: Contents, origins: Origins) -> dict[str, tuple[float, ...]]:
    """Return the scales that the file holds, by tensor and by weights; those of parts in the order of the parts."""
    found: dict[str, tuple[float, ...]] = {}
    for operator in contents.operators:
        if operator.weights is None or operator.weights.codes is None or operator.name not in origins:
            continue
        _, weights, source, result = origins[operator.name]
        scales = operator.weights.scales[1::2] if operator.weights.is_asymmetric else operator.weights.scales
        found[weights] = found.get(weights, ()) + tuple(float(scale) for scale in scales)
        if operator.input_scale:
            found[source], found[result] = (operator.input_scale,), (operator.output_scale,)
    return dict(sorted(found.items()))


def _expanded(contents: Contents, origins: Origins, small: Sequence[str]) -> tuple[str, ...]:
    """Return weights that are small in the form, or the file, and float32 when the runtime computes with them."""
    integers = {item.name for item in contents.operators if item.input_scale}
    short = {item.name for item in contents.operators if item.weights and item.weights.storage != "float32"} - integers
    widened = {origins[name][1] if name in origins else name for name in short}
    return tuple(sorted(widened | (set(small) - {origins[name][1] for name in integers if name in origins})))
