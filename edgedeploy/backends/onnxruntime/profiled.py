"""What ONNX Runtime timed, in the names of the model: its layers traced back through what fusing renamed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgedeploy.records.explanation import LayerRole, ProfiledLayer

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})
_CONVERSIONS = frozenset({*_ROUNDING, "DynamicQuantizeLinear", "Cast"})
# What the runtime adds where a kernel wants another order of values; a model's own nodes of these kinds compute.
_LAYOUTS = frozenset({"ReorderInput", "ReorderOutput", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"})
_REORDERS = frozenset({"ReorderInput", "ReorderOutput"})
# What it appends to the name of a node, or of a tensor, that it replaces (graph transformers of ONNX Runtime 1.16 on).
_RENAMED = re.compile(r"(_nhwc|_nchwc|_token_\d+|/\w*Fusion\w*/?)+$")
# What an emitted form appends to the name of a tensor that it rounds.
_FORM = re.compile(r"/(float|stored|dequantized)$")
# What may stand between a product and the integers that it is rounded to, and how many of them.
_TAILS, _LONGEST_TAIL = frozenset({"Relu", "Clip", "QuantizeLinear"}), 3
_BLOCKED_DOMAIN = "com.microsoft.nchwc"


@dataclass(slots=True)
class _Source:
    """The graph of the artifact.

    Attributes:
        made_by: tensor → the node that makes it; readers: tensor → the nodes that read it.
        by_name: name → node.
    """

    made_by: dict[str, NodeProto] = field(default_factory=dict)
    readers: dict[str, list[NodeProto]] = field(default_factory=dict)
    by_name: dict[str, NodeProto] = field(default_factory=dict)


def profiled_layers(
    source: GraphProto,
    optimized: GraphProto,
    executed: Sequence[tuple[str, str]],
    *,
    integers: frozenset[str],
    floats: Iterable[NodeProto],
) -> tuple[ProfiledLayer, ...]:
    """Return the layers that were timed, with the nodes of the artifact's graph that each computes.

    A device may fuse other nodes than this machine does. What has no counterpart in the graph that this machine's
    runtime makes is found by its name alone.

    Args:
        source: the artifact's graph.
        optimized: what ONNX Runtime makes of it.
        executed: name and operator of each layer, as the device's runtime called them.
        integers: operators that compute on integers.
        floats: nodes of `optimized` that compute in float.
    """
    known = _read(source)
    regions, moved = _regions(known, optimized, integers)
    in_float = {(node.name, node.op_type) for node in floats}
    found = []
    for name, kind in executed:
        nodes = regions.get((name, kind))
        if nodes is None:
            nodes = _by_name(known, name)
        own = tuple(node for node in nodes if node.op_type not in _ROUNDING)
        role = _role(kind, own)
        shown = own if role == "compute" else tuple(nodes)
        tensors = [tensor for node in own for tensor in node.output if tensor]
        if role == "layout" and (name, kind) in moved:
            tensors.append(moved[name, kind])
        found.append(
            ProfiledLayer(
                name=name,
                kind=kind,
                role=role,
                precision="int8" if kind in integers else "fp32" if (name, kind) in in_float else "",
                nodes=tuple(dict.fromkeys(node.name or node.output[0] for node in shown)),
                tensors=tuple(dict.fromkeys(_FORM.sub("", tensor) for tensor in tensors)),
                passes_s=(),
            )
        )
    return tuple(found)


def _read(graph: GraphProto) -> _Source:
    found = _Source()
    for node in graph.node:
        if node.name:
            found.by_name[node.name] = node
        for tensor in node.output:
            found.made_by[tensor] = node
        for tensor in node.input:
            found.readers.setdefault(tensor, []).append(node)
    return found


def _role(kind: str, nodes: Sequence[NodeProto]) -> LayerRole:
    """Return what a layer is for; what computes a node of the model computes, whatever it is called."""
    if kind in _ROUNDING:
        return "convert"
    if nodes:
        return "compute"
    if kind in _CONVERSIONS:
        return "convert"
    return "layout" if kind in _LAYOUTS else "compute"


def _by_name(known: _Source, name: str) -> list[NodeProto]:
    """Return the node that a layer was named after, or the one that makes the tensor that it was named after."""
    plain = _RENAMED.sub("", name)
    for candidate in (name, plain):
        if candidate in known.by_name:
            return [known.by_name[candidate]]
        if candidate in known.made_by:
            return [known.made_by[candidate]]
    return []


_Key = tuple[str, str]


def _regions(
    known: _Source, optimized: GraphProto, integers: frozenset[str]
) -> tuple[dict[_Key, list[NodeProto]], dict[_Key, str]]:
    """Return what each optimised node computes: everything between what it makes and what earlier nodes made.

    Each node of the source is given to one optimised node at most, so that a wrong guess joins no more than two. The
    second result is the tensor whose values a node reads first: for those that only move them.
    """
    meant: dict[str, str] = {}  # tensor of the optimised graph → tensor of the source that has the same values
    made: set[str] = set()
    taken: set[int] = set()
    regions: dict[_Key, list[NodeProto]] = {}
    moved: dict[_Key, str] = {}
    for node in optimized.node:
        if node.input:
            moved[node.name, node.op_type] = meant.get(node.input[0], node.input[0])
        if node.op_type in _REORDERS:
            meant[node.output[0]] = meant.get(node.input[0], node.input[0])
            if node.output[0] in known.made_by:
                meant[node.output[0]] = node.output[0]
            regions.setdefault((node.name, node.op_type), [])
            continue
        results = [_result(known, node, place, integers) for place in range(len(node.output))]
        region: list[NodeProto] = []
        stops = made | {meant.get(tensor, tensor) for tensor in node.input}
        for result in filter(None, results):
            region += _behind(known, result, stops, taken)
        if not region:
            region = [one for one in _by_name(known, node.name) if id(one) not in taken]
            taken.update(id(one) for one in region)
        for tensor, result in zip(node.output, results, strict=True):
            if result:
                meant[tensor] = result
                made.add(result)
        made.update(tensor for one in region for tensor in one.output)
        regions.setdefault((node.name, node.op_type), []).extend(reversed(region))
    return regions, moved


def _result(known: _Source, node: NodeProto, place: int, integers: frozenset[str]) -> str:
    """Return the tensor of the source that an optimised node makes; "" where nothing says which."""
    tensor: str = node.output[place]
    if tensor in known.made_by:
        return tensor
    if place:
        return ""
    plain = _RENAMED.sub("", node.name)
    if node.domain == _BLOCKED_DOMAIN and plain in known.made_by:
        found = plain
    elif plain in known.by_name:
        found = known.by_name[plain].output[0]
    else:
        return ""
    if node.op_type in integers:
        return _behind_rounding(known, found)
    return _behind_activation(known, found, node)


def _behind_rounding(known: _Source, tensor: str) -> str:
    """Return the integers that a tensor is rounded to, behind its clamp: a product on integers makes these."""
    found = tensor
    for _ in range(_LONGEST_TAIL):
        readers = known.readers.get(found, [])
        if len(readers) != 1 or readers[0].op_type not in _TAILS:
            break
        found = str(readers[0].output[0])
        if readers[0].op_type == "QuantizeLinear":
            return found
    return tensor


def _behind_activation(known: _Source, tensor: str, node: NodeProto) -> str:
    """Return the tensor behind the activation that was fused into a node after that had been named."""
    wanted = next((one.s.decode() for one in node.attribute if one.name == "activation"), "")
    maker = known.made_by.get(tensor)
    if not wanted or maker is None or maker.op_type == wanted:
        return tensor
    following = [one for one in known.readers.get(tensor, []) if one.op_type == wanted]
    return str(following[0].output[0]) if len(following) == 1 else tensor


def _behind(known: _Source, tensor: str, stops: set[str], taken: set[int]) -> list[NodeProto]:
    """Return the nodes that a tensor is computed by, back to where something else begins; last first."""
    found: list[NodeProto] = []
    waiting = [tensor]
    while waiting:
        node = known.made_by.get(waiting.pop())
        if node is None or id(node) in taken:
            continue
        taken.add(id(node))
        found.append(node)
        waiting += [name for name in node.input if name and name not in stops]
    return found
