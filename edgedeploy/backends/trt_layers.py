"""What an engine really does, kernel by kernel, from what TensorRT says of it.

TensorRT 8 to 11 describe an engine as JSON (the engine inspector), TensorRT-RTX in its verbose log. Both are read into
the same records, and compared with what the form that was built asked for.

The JSON comes from a device: whatever it holds, it is read within limits, or refused with a sentence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edgedeploy.documents import Record, read_json, write_json
from edgedeploy.errors import CompileError, DocumentError
from edgedeploy.records.artifact import Layer, LayerReport
from edgedeploy.storage import sha256_file

# History of edgedeploy.layers:
#   1 (0.3.0)  first version
FORMAT = "edgedeploy.layers/1"
LAYERS = "layers.json"

Fate = Literal["kept", "folded", "dropped"]

# A ViT-L is described in 4 MB and 2,000 layers; what is larger is no description of a network.
_MOST_CHARACTERS = 64 * 2**20
_MOST_LAYERS = 100_000
_MOST_NODES = 20_000
_LONGEST_WORD = 2_000
# Pointwise nodes that are fused into each other; each costs one more look at the name.
_DEEPEST = 50
# How many nodes or scales a sentence names.
_NAMED = 5
# What a tensor's description calls its type: one word ("Half": Myelin's layers, 11.x, RTX), or within a sentence
# ("Thirty-two wide channel vectorized row major Int8 format": the layers of 8.x and 10.x).
_DATATYPE = re.compile(
    r"\b(?:(?P<int8>int8)|(?P<fp16>half|fp16|float16)|(?P<bf16>bf16|bfloat16)|(?P<fp32>float|fp32|float32)|"
    r"(?P<fp8>fp8|e4m3|fp8e4m3)|(?P<int4>int4)|(?P<fp4>fp4|e2m1)|(?P<uint8>uint8)|(?P<int32>int32)|(?P<int64>int64)|"
    r"(?P<bool>bool))\b",
    re.IGNORECASE,
)
# What a kernel's name says of its operands: "…_i8i8_i8i32_f32_…", "…_f16f16_f16f32_…", "…_f32f32_tf32f32_…".
_OPERANDS = re.compile(r"_(?P<first>i8|f16|bf16|f32|e4m3)(?:i8|f16|bf16|f32|e4m3)_")
_OPERAND_NAMES = {"i8": "int8", "f16": "fp16", "bf16": "bf16", "f32": "fp32", "e4m3": "fp8"}
# Narrow to wide: a kernel that reads several tensors computes in the widest.
_WIDTHS = ("fp4", "int4", "int8", "fp8", "fp16", "bf16", "fp32")
_FLOATS = frozenset({"fp16", "bf16", "fp32"})
# Kinds of layer that multiply and add; Myelin calls a convolution "correlation".
_PRODUCT = re.compile(r"conv|correlation|gemm|matmul|matrixmultiply|fullyconnected|dgrad|fusion", re.IGNORECASE)
# Layers that only lay values down in another order or type.
_MOVES = re.compile(r"reformat|noop|shuffle|copy|constant", re.IGNORECASE)
_ONNX_LAYER = "[ONNX Layer: "
# What stands between two nodes in a layer's metadata, by version.
_NODE_ENDS = ("]\x1e", "]\x1f", "][")
_POINTWISE = re.compile(r"^PWN\((?P<inner>.*)\)$")
# How our forms call the nodes and the integers of a pair.
_QUANTIZE, _DEQUANTIZE, _STORED = "/quantize", "/dequantize", "/stored"


class EngineLayers(Record, frozen=True, kw_only=True):
    """layers.json beside an engine: what its runtime cannot be asked for on another machine.

    Attributes:
        engine_sha256: digest of the engine that is described.
    """

    format: str = FORMAT
    engine_sha256: str
    report: LayerReport


def write_layers(engine: Path, report: LayerReport) -> None:
    """Write what is known of an engine beside it."""
    write_json(engine.with_name(LAYERS), EngineLayers(engine_sha256=sha256_file(engine), report=report))


def read_layers(engine: Path) -> LayerReport:
    """Read what `write_layers` wrote beside an engine.

    Raises:
        DocumentError: it is missing, damaged, or describes another engine.
    """
    path = engine.with_name(LAYERS)
    if not path.is_file():
        raise DocumentError(
            f"{path} is missing, and without a GPU nothing else says what is in {engine.name}; compile again"
        )
    if path.stat().st_size > _MOST_CHARACTERS:
        raise DocumentError(f"{path} holds {path.stat().st_size} bytes, too many for a list of layers; compile again")
    described = read_json(path, EngineLayers, FORMAT)
    if engine.is_file() and described.engine_sha256 != sha256_file(engine):
        raise DocumentError(f"{path} describes another engine than {engine}; compile again")
    return described.report


def layers_from_inspector(text: str) -> tuple[Layer, ...]:
    r"""Read what an engine inspector says, of TensorRT 8.4 to 11.

    An engine that was built with few words lists layers by name only. Nodes are those of the layer's metadata (8.6 and
    later), else those that its name joins by " + ", and the pairs whose integers it reads or writes.

    Args:
        text: EngineInspector.get_engine_information(LayerInformationFormat.JSON).

    Raises:
        DocumentError: it is too large, no JSON, or no description of an engine.

    >>> layers_from_inspector('{"Layers": ["conv + relu"], "Bindings": ["x", "y"]}')[0].nodes
    ('conv', 'relu')
    """
    what = "what the engine inspector says"
    if len(text) > _MOST_CHARACTERS:
        raise DocumentError(f"{what} has {len(text)} characters, and {_MOST_CHARACTERS} are read; build it again")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{what} is not valid JSON ({error}); build the engine again") from error
    entries = said.get("Layers") if isinstance(said, dict) else None
    if not isinstance(entries, list):
        raise DocumentError(f'{what} has no list "Layers"; build the engine again with detailed profiling verbosity')
    if len(entries) > _MOST_LAYERS:
        raise DocumentError(f"{what} has {len(entries)} layers, and {_MOST_LAYERS} are read; build the engine again")
    return tuple(_inspected(entry, index, what) for index, entry in enumerate(entries))


def layers_from_rtx_log(lines: Iterable[str]) -> tuple[Layer, ...]:
    """Read the table of layers that TensorRT-RTX prints at the end of a build; () where there is none.

    Args:
        lines: of the log, at severity VERBOSE and with detailed profiling verbosity; anything may precede "Layers:".

    Raises:
        DocumentError: a line of the table has another form.
    """
    table: list[Layer] = []
    is_inside = False
    for line in lines:
        if line.rstrip().endswith("Layers:") and "Name:" not in line:
            # A build that is tried again prints its table again; the last one is of the engine that was written.
            table, is_inside = [], True
        elif is_inside and line.startswith("Name: "):
            table.append(_printed(line.rstrip("\r\n")))
        elif is_inside:
            is_inside = False
    return tuple(table)


def not_on_integers(layers: Sequence[Layer], int8_nodes: Sequence[str]) -> dict[str, str]:
    """Return nodes that were meant to run on integers and do not, with what they run in; "" where nothing is said.

    A node may be spread over several kernels: one rounds its input, one multiplies, one adds the bias. Where one of
    them multiplies, that one decides. What is fused into a kernel that rounds to integers and reads them again does not
    show what it runs in.

    Args:
        layers: what the engine consists of.
        int8_nodes: Conv, ConvTranspose, Gemm and MatMul nodes of the form.
    """
    kernels: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.nodes:
            kernels.setdefault(node, []).append(layer)
    found: dict[str, str] = {}
    for node in int8_nodes:
        named = kernels.get(node, [])
        deciding = [layer for layer in named if _is_product(layer)] or named
        words = {layer.precision for layer in deciding}
        if "int8" not in words:
            is_hidden = any(not _is_product(layer) and _rounds_inside(layer) for layer in deciding)
            found[node] = "" if is_hidden else max(words, key=_width, default="")
    return found


def fates(layers: Sequence[Layer], pairs: Mapping[str, Sequence[float]]) -> dict[str, Fate]:
    """Return what became of each Q/DQ pair of a form.

    kept: a kernel reads or writes its integers. folded: its rounding, or the values that its integers stand for, are
    computed inside a kernel. dropped: no kernel knows it. A pair whose values are only laid down in another order, or
    rounded once more to the same grid, may be dropped without loss.

    Args:
        layers: what the engine consists of.
        pairs: tensor or weights → scales.

    Returns:
        Tensor or weights → fate; empty where the engine does not say which nodes its kernels were made of.
    """
    if not any(layer.nodes for layer in layers):
        return {}
    integers: set[str] = set()
    known: set[str] = set()
    for layer in layers:
        ends = [node for node in layer.nodes if node.endswith((_QUANTIZE, _DEQUANTIZE))]
        known.update(ends)
        # A quantizer writes integers, a dequantizer reads them; both in one kernel only round.
        inside = _rounds_inside(layer)
        alone = [node for node in ends if node.rpartition("/")[0] not in inside]
        integers.update(node for node in alone if node.endswith(_QUANTIZE) and layer.output == "int8")
        integers.update(node for node in alone if node.endswith(_DEQUANTIZE) and layer.precision == "int8")
    result: dict[str, Fate] = {}
    for tensor in pairs:
        ends_of_pair = {f"{tensor}{_QUANTIZE}", f"{tensor}{_DEQUANTIZE}"}
        result[tensor] = "kept" if ends_of_pair & integers else "folded" if ends_of_pair & known else "dropped"
    return result


def engine_report(
    layers: Sequence[Layer],
    int8_nodes: Sequence[str],
    pairs: Mapping[str, Sequence[float]],
    notes: Sequence[str] = (),
    *,
    is_refused: bool = False,
    backend: str = "tensorrt",
) -> LayerReport:
    """Compare what an engine consists of with what its form asked for.

    Args:
        layers: what the engine consists of.
        int8_nodes: nodes of the form that were meant to run on integers.
        pairs: quantized tensor or weights → its scale, or scales.
        notes: sentences about the form.
        is_refused: raise where a scale was lost, instead of noting it. That a kernel computes in float what was meant
            for integers is only noted: it still computes with the values that the integers stand for.
        backend: who built it, for the error.

    Raises:
        CompileError: `is_refused`, and a scale is not in the engine.
    """
    floats = not_on_integers(layers, int8_nodes)
    became = fates(layers, pairs)
    lost = [tensor for tensor, fate in became.items() if fate == "dropped" and not _is_carried(tensor, pairs, became)]
    if is_refused:
        _demand_scales(lost, backend)
    return LayerReport(
        operators=dict(sorted(Counter(layer.kind or "layer" for layer in layers).items())),
        quantized=_quantized(layers, [node for node in int8_nodes if node not in floats]),
        float_islands=_float_islands(layers, floats) if int8_nodes else (),
        scales={tensor: tuple(pairs[tensor]) for tensor, fate in became.items() if fate != "dropped"},
        notes=tuple(dict.fromkeys([*notes, *_sentences(layers, floats, lost)])),
        layers=tuple(layers),
    )


def kept_in_float32(float32_nodes: Mapping[str, str]) -> tuple[str, ...]:
    """Name all nodes that are kept out of half floats, by reason.

    >>> kept_in_float32({"/a": "Exp", "/b": "its output reaches 7.1e4", "/c": "Exp"})
    ('3 nodes are kept in float32: /a, /c (Exp); /b (its output reaches 7.1e4)',)
    """
    if not float32_nodes:
        return ()
    reasons: dict[str, list[str]] = {}
    for node, why in float32_nodes.items():
        reasons.setdefault(why, []).append(node)
    named = "; ".join(f"{', '.join(nodes)} ({why})" for why, nodes in reasons.items())
    count = len(float32_nodes)
    return (f"{count} node{' is' if count == 1 else 's are'} kept in float32: {named}",)


# ---------------------------------------------------------------- one layer


def _inspected(entry: Any, index: int, what: str) -> Layer:
    if isinstance(entry, str):
        return Layer(name=_word(entry), nodes=_nodes_of_name(entry))
    name = entry.get("Name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise DocumentError(
            f"layer {index} in {what} is no name and no object with a name; build the engine again with detailed "
            f"profiling verbosity"
        )
    reads, writes = _tensors(entry.get("Inputs")), _tensors(entry.get("Outputs"))
    kind = _word(entry.get("LayerType"))
    tactic = _word(entry.get("TacticName")) or _word(entry.get("TacticValue"))
    metadata = entry.get("Metadata")
    is_told = isinstance(metadata, str) and _ONNX_LAYER in metadata
    nodes = _nodes_of_metadata(metadata) if is_told else (*_nodes_of_name(name), *_pairs_at(reads, writes))
    return Layer(
        name=_word(name),
        kind=kind,
        precision=_precision(kind, [dtype for _, dtype, _ in reads]) or _weights_type(entry) or _operands(tactic),
        output=next((dtype for _, dtype, _ in writes if dtype), ""),
        format=next((layout for _, _, layout in reads if layout), ""),
        tactic=tactic,
        nodes=tuple(dict.fromkeys(nodes))[:_MOST_NODES],
    )


# (name, type, layout) of a tensor that a layer reads or writes.
_Tensor = tuple[str, str, str]


def _tensors(value: Any) -> list[_Tensor]:
    found: list[_Tensor] = []
    for entry in value if isinstance(value, list) else ():
        if not isinstance(entry, dict):
            continue
        # "Format/Datatype" up to 10.x; "Format" and "Datatype" or "DataType" from 11 on.
        words = {key.lower(): text for key, text in entry.items() if isinstance(text, str)}
        both = words.get("format/datatype", "")
        layout = words.get("format", both if " " in both else "")
        dtype = _datatype(words.get("datatype", both)) or _datatype(layout)
        found.append((_word(words.get("name")), dtype, _word(layout)))
    return found


def _datatype(text: str) -> str:
    found = _DATATYPE.search(text[:_LONGEST_WORD])
    return (found.lastgroup or "") if found else ""


def _precision(kind: str, dtypes: Sequence[str]) -> str:
    """Return what a layer computes in: a product in the type of its first operand, others in the widest they read."""
    numbers = [dtype for dtype in dtypes if dtype in _WIDTHS]
    if not numbers:
        return next((dtype for dtype in dtypes if dtype), "")
    return numbers[0] if _PRODUCT.search(kind) else max(numbers, key=_width)


def _width(dtype: str) -> int:
    return _WIDTHS.index(dtype) if dtype in _WIDTHS else -1


def _weights_type(entry: Mapping[str, Any]) -> str:
    """Return the type of a layer's weights; where sizes are open, tensors are "N/A due to dynamic shapes"."""
    for key in ("Weights", "ConvWeights"):
        weights = entry.get(key)
        if isinstance(weights, dict) and isinstance(weights.get("Type"), str):
            return _datatype(weights["Type"])
    return ""


def _operands(tactic: str) -> str:
    found = _OPERANDS.search(tactic)
    return _OPERAND_NAMES[found["first"]] if found else ""


def _nodes_of_metadata(metadata: str) -> tuple[str, ...]:
    r"""Return the nodes that a layer's metadata lists.

    >>> _nodes_of_metadata("[ONNX Layer: a[0]][ONNX Layer: b]\x1f[ONNX Layer: c]")
    ('a[0]', 'b', 'c')
    """
    names = []
    for piece in metadata.split(_ONNX_LAYER)[1:]:
        name = piece
        for end in _NODE_ENDS:
            name = name.partition(end)[0]
        names.append(name.rstrip().removesuffix("]"))
    return tuple(name for name in names if name)


def _nodes_of_name(name: str) -> tuple[str, ...]:
    """Return the nodes that a layer's name joins, as TensorRT 8.5 names what it fuses.

    >>> _nodes_of_name("w + w/quantize + Conv_34 + PWN(PWN(sigmoid), mul)")
    ('w', 'w/quantize', 'Conv_34', 'sigmoid', 'mul')
    """
    if name.startswith("Reformatting CopyNode"):
        return ()
    return tuple(node for part in name[: _LONGEST_WORD * 10].split(" + ") for node in _unwrapped(part))


def _unwrapped(part: str) -> Iterator[str]:
    """Yield the nodes of a fused pointwise expression, innermost first."""
    waiting = [(part.strip(), 0)]
    while waiting:
        word, depth = waiting.pop()
        if (found := _POINTWISE.match(word)) and depth < _DEEPEST:
            waiting += [(inner, depth + 1) for inner in reversed(_outer_commas(found["inner"]))]
        elif word:
            yield word


def _outer_commas(text: str) -> list[str]:
    """Split a text at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _pairs_at(reads: Sequence[_Tensor], writes: Sequence[_Tensor]) -> tuple[str, ...]:
    """Return the ends of pairs that were fused into a layer, seen by the integers that it reads and writes."""
    ends = [name.removesuffix(_STORED) + _QUANTIZE for name, _, _ in writes if name.endswith(_STORED)]
    ends += [name.removesuffix(_STORED) + _DEQUANTIZE for name, _, _ in reads if name.endswith(_STORED)]
    return tuple(ends)


def _printed(line: str) -> Layer:
    """Read one line of the table that TensorRT-RTX prints."""
    parts: list[str] = []
    rest = line
    for mark in ("Name: ", ", LayerType: ", ", Inputs: [", "], Outputs: [", "], TacticName: "):
        before, found, rest = rest.partition(mark)
        if not found:
            raise DocumentError(
                f"a layer in the build log is not written as TensorRT-RTX 1.7 writes it (no {mark.strip(', :[]')!r} in "
                f"{line[:120]!r}); install the version in constraints.txt"
            )
        parts.append(before)
    _, name, kind, reads, writes = parts
    tactic, _, metadata = rest.partition(", Metadata: ")
    tactic = tactic.partition(", StreamId: ")[0]
    inputs, outputs = _printed_tensors(reads.partition("], Constants: [")[0]), _printed_tensors(writes)
    return Layer(
        name=_word(name),
        kind=_word(kind),
        precision=_precision(kind, [dtype for dtype, _ in inputs]) or _operands(tactic),
        output=next((dtype for dtype, _ in outputs if dtype), ""),
        format=next((layout for _, layout in inputs if layout), ""),
        tactic=_word(tactic),
        nodes=tuple(dict.fromkeys(_nodes_of_metadata(metadata)))[:_MOST_NODES],
    )


def _printed_tensors(text: str) -> list[tuple[str, str]]:
    """Return type and layout of tensors: "{ Name: x, Dimensions: [1], …, Datatype: Float, Format: (NHWC) … }, {…}"."""
    found = []
    for part in text.split("{ Name: ")[1:]:
        _, _, typed = part.rpartition(", Datatype: ")
        dtype, _, layout = typed.partition(", Format: ")
        found.append((_datatype(dtype), _word(layout.rstrip(" ,}"))))
    return found


def _word(value: Any) -> str:
    return value[:_LONGEST_WORD] if isinstance(value, str) else ""


# ---------------------------------------------------------------- the whole engine


def _is_product(layer: Layer) -> bool:
    return bool(_PRODUCT.search(layer.kind))


def _rounds_inside(layer: Layer) -> set[str]:
    """Return the tensors that a kernel both rounds to integers and reads again."""
    quantized = {node.removesuffix(_QUANTIZE) for node in layer.nodes if node.endswith(_QUANTIZE)}
    return quantized & {node.removesuffix(_DEQUANTIZE) for node in layer.nodes if node.endswith(_DEQUANTIZE)}


def _is_carried(tensor: str, pairs: Mapping[str, Sequence[float]], became: Mapping[str, Fate]) -> bool:
    """Return whether a pair that no kernel names rounds to the grid of one that is there.

    Values that are only moved (reshaped, pooled by their maximum) have one pair before and one behind, of which one is
    enough.
    """
    scales = tuple(pairs[tensor])
    return any(fate != "dropped" and tuple(pairs[other]) == scales for other, fate in became.items())


def _quantized(layers: Sequence[Layer], nodes: Sequence[str]) -> tuple[str, ...]:
    """Return "kind node" of each node that runs on integers, and of products on integers beyond those."""
    kinds: dict[str, str] = {}
    for layer in layers:
        if layer.precision != "int8":
            continue
        for node in layer.nodes:
            if node not in kinds or _is_product(layer):
                kinds[node] = layer.kind
    return tuple(f"{kinds[node] or 'layer'} {node}" for node in nodes)


def _float_islands(layers: Sequence[Layer], floats: Mapping[str, str]) -> tuple[str, ...]:
    """Return what takes floats and hands floats on; what only rounds, or ends a product of integers, does not count."""
    on_integers = {node for layer in layers if layer.precision == "int8" for node in layer.nodes}
    found = []
    for layer in layers:
        own = [node for node in layer.nodes if not node.endswith((_QUANTIZE, _DEQUANTIZE))]
        is_float = layer.precision in _FLOATS and layer.output in _FLOATS and not _MOVES.search(layer.kind)
        if is_float and (any(node in floats for node in own) or not on_integers.intersection(own)):
            found.append(f"{layer.kind or 'layer'} {next(iter(own), layer.name)}")
    return tuple(dict.fromkeys(found))


def _demand_scales(lost: Sequence[str], backend: str) -> None:
    if lost:
        raise CompileError(
            f"{'these scales are' if len(lost) > 1 else 'this scale is'} not in the engine: {_first(lost)}",
            backend=backend,
            node=f"{lost[0]}{_QUANTIZE}",
            op="QuantizeLinear",
            hint="give -O lost_scales=note to accept it, or leave the layers around it in float (-Q)",
        )


def _sentences(layers: Sequence[Layer], floats: Mapping[str, str], lost: Sequence[str]) -> list[str]:
    said: list[str] = []
    for precision in sorted({word for word in floats.values() if word}):
        nodes = [node for node, word in floats.items() if word == precision]
        verb = (
            "was meant to run on integers and computes"
            if len(nodes) == 1
            else ("were meant to run on integers and compute")
        )
        said.append(f"{_first(nodes)} {verb} in float ({precision})")
    silent = [node for node, word in floats.items() if not word]
    named = {node for layer in layers for node in layer.nodes}
    reasons = {
        "its layers are described by name only": not any(layer.precision for layer in layers),
        "they are fused into kernels that round for themselves": any(node in named for node in silent),
        "no layer that it describes was made of them": True,
    }
    if silent:
        reason = next(text for text, holds in reasons.items() if holds)
        said.append(f"whether {_first(silent)} run on integers or in float is not known: {reason}")
    if lost:
        said.append(f"no kernel rounds {_first(lost)}: {'their scales are' if len(lost) > 1 else 'its scale is'} lost")
    return said


def _first(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_NAMED])}{_more(len(names))}"


def _more(count: int) -> str:
    return f" and {count - _NAMED} more" if count > _NAMED else ""
