"""What a compression report says to a reader: facts, statements and rows of layers. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from edgedeploy.records.artifact import Artifact
from edgedeploy.records.compression import CompressionReport, KindStatement, LayerCompression, Numbers
from edgedeploy.records.survival import Fate, SurvivalReport
from edgedeploy.render.figures import NOT_AVAILABLE, count
from edgedeploy.units import format_bytes

Facts = list[tuple[str, str]]

# Of nodes that are named in one line.
_MOST_NAMED = 4
# Where nobody asked for all layers, this many are shown: the table then ends on the screen that it began on.
_MOST_ROWS = 20
# A module path of this length stays on one line; a longer one may take two.
_LAYER_WIDTH = 28
_NOTEWORTHY_PERCENTAGE = 5
# What a narrow screen leaves out, in this order.
_DISPENSABLE = ("zipped", "operator", "MACs", "size")
TEXT_COLUMNS = frozenset({"layer", "operator", "weights", "reads"})
# Zeros without a pattern are the common case and need no word.
_PATTERNS = {"": "", "unstructured": "", "2:4": " 2:4", "channels": " channels"}
_SCALES = {
    "": "",
    "tensor": "one scale per tensor",
    "channel": "one scale per channel",
    "block": "one scale per block",
    "token": "one scale per token",
}


def compression_facts(report: CompressionReport) -> Facts:
    """Return a report's totals as labels and texts."""
    operators = ", ".join(f"{number} {name}" for name, number in report.operators.items())
    facts = [("parameters", _parameters(report)), ("MACs", _macs(report))]
    if report.reference_parameters:
        facts.append(("reference", _beside(report, report.reference_parameters)))
    facts += [("constants", _size(report)), ("operators", operators or "none")]
    products = [layer for layer in report.layers if layer.weight_count]
    patterns = Counter(layer.pattern for layer in products if layer.pattern and layer.zero_weights)
    if patterns:
        texts = [f"{pattern} in {number} of {count(len(products), 'layer')}" for pattern, number in patterns.items()]
        facts.append(("sparsity", ", ".join(texts)))
    if any(_is_quantized(layer) for layer in products):
        facts.append(("weights", _schemes([layer.weights for layer in products])))
        facts.append(("activations", _schemes([layer.activations for layer in products])))
    return facts


def precision_facts(artifact: Artifact) -> Facts:
    """Return what an artifact's runtime computes on integers and what in float, and what became of trained scales."""
    layers = artifact.layers
    operators = Counter(label.partition(" ")[0] for label in layers.quantized)
    kinds = ", ".join(f"{number} {operator}" for operator, number in operators.items())
    integers = f"{count(len(layers.quantized), 'node')}: {kinds}" if layers.quantized else "nothing"
    floats = "nothing" if layers.quantized else "everything"
    if layers.float_islands:
        floats = f"{count(len(layers.float_islands), 'node')}: {_first(layers.float_islands)}"
    facts: Facts = [("on integers", integers), ("in float", floats)]
    if layers.expanded:
        facts.append(("widened", f"{count(len(layers.expanded), 'weight tensor')} by the runtime to float32"))
    if artifact.survival is not None and artifact.survival.entries:
        facts.append(("scales", survival_text(artifact.survival)))
    return facts


def lost_facts(artifact: Artifact) -> Facts:
    """Return which kinds of compression are gone; nothing where none is."""
    lost = [one.kind for one in artifact.compression.statements if one.artifact == "lost"]
    return [("lost", f"{', '.join(lost)} (accepted with --allow-loss)")] if lost else []


def remaining_notes(artifact: Artifact) -> list[str]:
    """Return an artifact's notes that its statements do not make, each sentence once however many names it is about."""
    said = {note for one in artifact.compression.statements for note in one.notes}
    about: dict[tuple[str, str], list[str]] = {}
    for note in artifact.notes:
        if note not in said:
            before, quote, rest = note.partition("'")
            name, closing, after = rest.partition("'")
            parts = (before, after) if quote and closing else (note, "")
            about.setdefault(parts, []).append(f"'{name}'" if quote and closing else "")
    return [f"{before}{_first(names) if names[0] else ''}{after}" for (before, after), names in about.items()]


def survival_text(report: SurvivalReport) -> str:
    """Return what became of the scales that a source came with: each one's worst fate over all stages."""
    order: tuple[Fate, ...] = ("kept", "folded", "re-scaled", "dropped")
    worst = Counter(max(entry.stages.values(), key=order.index, default="kept") for entry in report.entries)
    fates = ", ".join(f"{worst[fate]} {fate}" for fate in order if worst[fate])
    largest = f" (by {report.largest_relative_change:.2g} at most)" if report.largest_relative_change else ""
    return f"{fates}{largest}, of {len(report.entries)} that the source came with"


def _first(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _MOST_NAMED} more" if len(labels) > _MOST_NAMED else ""
    return f"{', '.join(labels[:_MOST_NAMED])}{more}"


def statement_heading(one: KindStatement) -> str:
    """Return which kind a statement is about."""
    return f"{one.kind} in {count(one.layers, 'layer')}"


def statement_rows(one: KindStatement) -> list[tuple[str, str, str]]:
    """Return (stage, fate, what was counted), and the notes, of one kind."""
    rows = [("source", "", one.detail)] if one.detail else []
    rows.append(("ONNX", str(one.onnx), one.onnx_reason))
    if one.artifact is not None:
        rows.append(("artifact", one.artifact, one.artifact_reason))
    return [*rows, *(("note", "", note) for note in one.notes)]


def shown_layers(report: CompressionReport, *, is_all: bool) -> list[LayerCompression]:
    """Return the layers to show, in graph order: all, or the largest where there are many."""
    layers = list(report.layers)
    if is_all or len(layers) <= _MOST_ROWS:
        return layers
    order = sorted(range(len(layers)), key=lambda index: (-layers[index].parameters, index))
    return [layers[index] for index in sorted(order[:_MOST_ROWS])]


def fitting_columns(layers: Sequence[LayerCompression], width: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the columns that a screen has room for, and those left out, least important first."""
    chosen = [name for name, is_needed in _columns(layers).items() if is_needed]
    cells = [_cells(layer) for layer in layers]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in chosen}
    widths["layer"] = min(widths["layer"], _LAYER_WIDTH)
    dropped: list[str] = []
    for name in _DISPENSABLE:
        # One space on either side of the table and between columns.
        if sum(widths[kept] + 1 for kept in chosen) + 1 <= width:
            break
        if name in chosen:
            chosen.remove(name)
            dropped.append(name)
    return tuple(chosen), tuple(dropped)


def layer_rows(layers: Sequence[LayerCompression], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return one row a layer, with a text for each column."""
    return [tuple(cells[name] for name in columns) for cells in map(_cells, layers)]


def layer_notes(report: CompressionReport, layers: Sequence[LayerCompression], dropped: Sequence[str]) -> list[str]:
    """Return what a table of layers does not show."""
    notes = []
    if hidden := len(report.layers) - len(layers):
        notes.append(f"… and {count(hidden, 'smaller layer')}; --layers shows all")
    if dropped:
        notes.append(f"no room for: {', '.join(dropped)}; a wider terminal or --json shows them")
    return notes


def _columns(layers: Sequence[LayerCompression]) -> dict[str, bool]:
    """Return every column, and whether it says something about these layers."""
    return {
        "layer": True,
        "operator": True,
        "params": True,
        # Rounding to integers leaves a few zeros everywhere.
        "zeros": any(_zero_percentage(layer) >= _NOTEWORTHY_PERCENTAGE for layer in layers),
        "removed": any(layer.removed_channels is not None for layer in layers),
        "rank": any(layer.rank is not None for layer in layers),
        "weights": any(layer.weights.storage != "float32" or layer.weights.bits < 32 for layer in layers),
        "reads": any(layer.activations.bits < 32 for layer in layers),
        "MACs": any(layer.macs for layer in layers),
        "size": True,
        "zipped": True,
    }


def _cells(layer: LayerCompression) -> dict[str, str]:
    is_product = bool(layer.weight_count)
    return {
        "layer": _label(layer),
        "operator": layer.operator,
        "params": "shared" if layer.shares_with else f"{layer.parameters:,}",
        "zeros": _zeros(layer) if is_product else "",
        "removed": _removed(layer),
        "rank": "" if layer.rank is None else str(layer.rank),
        "weights": _short(layer.weights) if layer.weight else "",
        "reads": _short(layer.activations) if is_product else "",
        "MACs": _compact(layer.macs) if layer.macs != 0 else "",
        "size": format_bytes(layer.stored_bytes) if layer.stored_bytes else "",
        "zipped": format_bytes(layer.zipped_bytes) if layer.zipped_bytes else "",
    }


def _label(layer: LayerCompression) -> str:
    """Return the module path that the weights are named after, else the node's name."""
    path, dot, _ = layer.weight.split("/")[0].rpartition(".")
    return path if dot else layer.name


def _removed(layer: LayerCompression) -> str:
    if layer.removed_channels is None:
        return ""
    return f"{layer.removed_channels} of {layer.removed_channels + layer.output_channels}"


def _zero_percentage(layer: LayerCompression) -> int:
    return round(100 * layer.zero_weights / layer.weight_count) if layer.weight_count else 0


def _zeros(layer: LayerCompression) -> str:
    # Channels that are gone leave no zeros behind; they have a column of their own.
    return f"{_zero_percentage(layer)} %{_PATTERNS[layer.pattern] if layer.zero_weights else ''}"


def _is_quantized(layer: LayerCompression) -> bool:
    return layer.weights != Numbers() or layer.activations != Numbers()


def _short(numbers: Numbers) -> str:
    """Return a storage in a word or two: "int8", "int8 (7 bits)", "uint8 dynamic"."""
    bits = "" if numbers.storage.endswith(str(numbers.bits)) or "float8" in numbers.storage else numbers.bits
    return f"{numbers.storage}{f' ({bits} bits)' if bits else ''}{' dynamic' if numbers.is_dynamic else ''}"


def _schemes(all_numbers: Sequence[Numbers]) -> str:
    counted = Counter(map(_scheme, all_numbers)).most_common()
    return "; ".join(f"{scheme}: {count(number, 'layer')}" for scheme, number in counted)


def _scheme(numbers: Numbers) -> str:
    symmetry = {True: "symmetric", False: "asymmetric", None: ""}[numbers.is_symmetric]
    parts = [_short(numbers), symmetry, _SCALES[numbers.scales]]
    return ", ".join(part for part in parts if part)


def _parameters(report: CompressionReport) -> str:
    zeros = report.parameters - report.nonzero_parameters
    if not zeros:
        return f"{report.parameters:,}, none of them zero"
    return f"{report.parameters:,}, of which {zeros:,} are zero ({100 * zeros / report.parameters:.1f} %)"


def _macs(report: CompressionReport) -> str:
    if report.macs is None:
        return f"{NOT_AVAILABLE}: a shape is not known before it runs"
    if report.effective_macs in (None, report.macs):
        return f"{report.macs:,}"
    return f"{report.macs:,}, of which {report.effective_macs:,} with a weight that is not zero"


def _size(report: CompressionReport) -> str:
    zipped = "" if report.zipped_bytes is None else f", {format_bytes(report.zipped_bytes)} zipped"
    return f"{format_bytes(report.initializer_bytes)}{zipped}"


def _beside(report: CompressionReport, dense: int) -> str:
    text = f"{100 * report.parameters / dense:.1f} % of {dense:,} parameters"
    if report.macs is not None and report.reference_macs:
        text += f", {100 * report.macs / report.reference_macs:.1f} % of {report.reference_macs:,} MACs"
    removed = sum(layer.removed_channels or 0 for layer in report.layers)
    return f"{text}; {count(removed, 'output channel')} removed"


def _compact(number: int | None) -> str:
    """Return a count in three digits: 1,234,567 as "1.23 M"."""
    if number is None:
        return "?"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.9995 * size:  # what three digits round up
            return f"{number / size:.3g} {unit}"
    return str(number)
