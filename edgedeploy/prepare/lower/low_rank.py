"""Keeps a weight that is a product of two small factors as two layers, and recognises layers that are such a pair.

weight = U @ V with U (out, rank) and V (rank, in) costs rank * (in + out) weights. Exporters and runtimes multiply the
two as soon as both are constants, which makes them as large as the dense weight again; on the activation nobody can:
linear(x, U @ V, b) = linear(linear(x, V), U, b), and a kernel reshaped from U @ V is a convolution with rank output
channels followed by one of size 1 (Jaderberg et al., arXiv 1405.3866; Denton et al., arXiv 1404.0736).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, Any

from edgedeploy.prepare.lower.program_constants import (
    Constants,
    add_parameter,
    call_like,
    finished,
    is_operator,
    layer_of,
    operator_name,
    private_program,
    replace,
)
from edgedeploy.records.model import FoundCompression

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

_SAME = {"alias", "clone", "contiguous", "detach", "detach_", "lift_fresh_copy"}
_RESHAPES = {"view", "reshape", "_unsafe_view", "unflatten", "view_as"}
_TRANSPOSES = {"t", "numpy_T", "mT", "transpose", "permute"}
_PRODUCTS = {"mm", "matmul"}
_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "convolution": 0}


def lower_program(program: ExportedProgram) -> tuple[ExportedProgram, tuple[FoundCompression, ...]]:
    """Split layers whose weight is a low-rank product in two; layers that are already split are only reported."""
    found: list[FoundCompression] = []
    if pairs := _pairs(program):
        found.append(_found(pairs, lowering=""))
    constants = Constants(program)
    if any(_factored(constants, node) for node in program.graph.nodes):
        program = private_program(program)
        constants = Constants(program)
        split: dict[str, tuple[int, int, int]] = {}
        stored: dict[Any, tuple[Node, Node]] = {}
        for node in list(program.graph.nodes):
            if factors := _factored(constants, node):
                layer = layer_of(node)
                layer = layer if layer not in split else f"{layer} ({node.name})"
                split[layer] = (factors.rank, *factors.sizes)
                _split(program, node, factors, stored)
        program = finished(program)
        found.append(_found(split, lowering="two layers on the activation"))
    return program, tuple(found)


def _found(layers: dict[str, tuple[int, int, int]], *, lowering: str) -> FoundCompression:
    ranks = ", ".join(f"rank {rank} of {min(ins, outs)}" for rank, ins, outs in list(layers.values())[:4])
    few = sum(rank * (ins + outs) for rank, ins, outs in layers.values())
    many = sum(ins * outs for _, ins, outs in layers.values())
    return FoundCompression(
        kind="low rank",
        layers=tuple(layers),
        detail=f"{ranks}{', …' if len(layers) > 4 else ''}: {few} weights instead of {many}",
        lowering=lowering,
    )


@dataclass(frozen=True, slots=True)
class _Factors:
    """A weight of a layer as a product: (out, rank) @ (rank, in), with in counted over the whole kernel."""

    out: Tensor
    into: Tensor

    @property
    def rank(self) -> int:
        return int(self.into.shape[0])

    @property
    def sizes(self) -> tuple[int, int]:
        return int(self.into.shape[1]), int(self.out.shape[0])


def _factored(constants: Constants, node: Any) -> _Factors | None:
    """Return the factors of a node's weight where it is a product that pays."""
    name = operator_name(node)
    if name == "linear":
        return _factors(constants, node.args[1], is_transposed=False)
    if name in ("matmul", "mm"):
        return None if node in constants.nodes else _factors(constants, node.args[1], is_transposed=True)
    if name == "addmm" and not node.kwargs and node.args[0].meta["val"].ndim == 1:
        return _factors(constants, node.args[2], is_transposed=True)
    if name in _CONVOLUTIONS and _is_ordinary(node):
        return _factors(constants, node.args[1], is_transposed=False)
    return None


def _is_ordinary(node: Any) -> bool:
    """Return whether a convolution has one group and is not transposed."""
    if operator_name(node) == "convolution":
        return bool(node.args[6] is False and node.args[8] == 1)
    return bool(_argument(node, 6, "groups", 1) == 1)


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _factors(constants: Constants, weight: Any, *, is_transposed: bool) -> _Factors | None:
    """Follow a weight back to the product that it is, through what keeps it one.

    Args:
        is_transposed: whether the weight is (in, out), as in x @ weight.
    """
    if weight not in constants.nodes or (is_transposed and weight.meta["val"].ndim != 2):
        return None
    scales: list[Any] = []
    node = weight
    while not is_operator(node, _PRODUCTS):
        step = operator_name(node)
        if step in _TRANSPOSES and _swaps_two(node):
            is_transposed = not is_transposed
        elif step in ("mul", "div") and (scale := _scale(constants, node)):
            scales.append(scale)
        elif not (step in _SAME or (step in _RESHAPES and not is_transposed and _keeps_rows(node))):
            return None
        node = _path(node)
    parts = _product(node)
    if any(item not in constants.nodes or item.meta["val"].ndim != 2 for item in parts):
        return None
    shapes = [item.meta["val"].shape for item in parts]
    cut = min(range(1, len(parts)), key=lambda place: int(shapes[place][0]))
    rank, rows, columns = shapes[cut][0], shapes[0][0], shapes[-1][1]
    if rank * (rows + columns) >= rows * columns:
        return None
    left, right = (reduce(_multiplied, map(constants.value, some)) for some in (parts[:cut], parts[cut:]))
    for is_divisor, scale in scales:
        factor = constants.value(scale) if hasattr(scale, "meta") else scale
        left = left / factor if is_divisor else left * factor
    if is_transposed:
        left, right = right.T, left.T
    return _Factors(left.contiguous(), right.contiguous())


def _multiplied(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def _product(node: Node) -> list[Node]:
    """Return the factors of a product of any number of matrices, left to right."""
    if not is_operator(node, _PRODUCTS):
        return [node]
    return [factor for side in node.args for factor in _product(side)]  # type: ignore[arg-type]  # both are nodes


def _path(node: Node) -> Node:
    """Return the argument that a step passes on: of a scaling the one that is scaled, else the first."""
    first, *others = node.all_input_nodes
    if is_operator(node, ("mul",)) and others and first.meta["val"].numel() == 1:
        return others[0]
    return first


def _scale(constants: Constants, node: Node) -> tuple[bool, Any] | None:
    """Return whether a step divides, and the single number or constant of one element that it scales by."""
    is_divisor = is_operator(node, ("div",))
    if node.kwargs or len(node.args) != 2:
        return None
    path = _path(node)
    if is_divisor and node.args[0] is not path:
        return None
    other = node.args[1] if node.args[0] is path else node.args[0]
    if isinstance(other, int | float):
        return is_divisor, other
    is_single = other in constants.nodes and other is not path and other.meta["val"].numel() == 1  # type: ignore[union-attr]  # a node
    return (is_divisor, other) if is_single else None


def _swaps_two(node: Node) -> bool:
    """Return whether a step exchanges the axes of a matrix."""
    source = node.all_input_nodes[0].meta["val"]
    if source.ndim != 2:
        return False
    axes: Any = node.args[1] if operator_name(node) == "permute" else node.args[1:]
    if operator_name(node) == "permute":
        return [axis % 2 for axis in axes] == [1, 0]
    return operator_name(node) != "transpose" or axes[0] % 2 != axes[1] % 2


def _keeps_rows(node: Node) -> bool:
    before, after = node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape
    return len(before) >= 2 and len(after) >= 2 and before[0] == after[0]


def _split(program: ExportedProgram, node: Any, factors: _Factors, stored: dict[Any, tuple[Node, Node]]) -> None:
    """Put two layers in the place of one.

    Args:
        stored: a product and how it is read → what stands for its factors, so that layers that share it still do.
    """
    import torch

    layer = layer_of(node)
    name = operator_name(node)
    linear = torch.ops.aten.linear.default
    into, out = factors.into, factors.out
    if name in _CONVOLUTIONS:
        kernel = node.args[1].meta["val"].shape
        into = into.reshape(factors.rank, *kernel[1:])
        out = out.reshape(*out.shape, *(1 for _ in kernel[2:]))
    weight = node.args[2 if name == "addmm" else 1]
    key = (weight, tuple(into.shape))
    if key not in stored:
        stored[key] = (
            add_parameter(program, f"{layer}.factor_in", into),
            add_parameter(program, f"{layer}.factor_out", out),
        )
    first, second = stored[key]
    with program.graph.inserting_before(node):
        if name == "convolution":
            _, _, bias, *rest = node.args
            ones = [1] * (into.ndim - 2)
            inner = call_like(program, node, node.target, (node.args[0], first, None, *rest))
            zeros = [0] * len(ones)
            outer = call_like(program, node, node.target, (inner, second, bias, ones, zeros, ones, False, zeros, 1))
        elif name in _CONVOLUTIONS:
            bias = _argument(node, 2, "bias", None)
            others = {key: value for key, value in node.kwargs.items() if key != "bias"}
            inner = call_like(program, node, node.target, (node.args[0], first, None, *node.args[3:]), others)
            outer = call_like(program, node, getattr(torch.ops.aten, name).default, (inner, second, bias))
        else:
            bias = node.args[0] if name == "addmm" else _argument(node, 2, "bias", None) if name == "linear" else None
            inner = call_like(program, node, linear, (node.args[1] if name == "addmm" else node.args[0], first))
            outer = call_like(program, node, linear, (inner, second, bias))
    replace(program, node, outer)
    program.graph.erase_node(node)


def _pairs(program: ExportedProgram) -> dict[str, tuple[int, int, int]]:
    """Return pairs of layers with a bottleneck and nothing between: "first + second" → rank, inputs, outputs."""
    parameters = program.graph_signature.inputs_to_parameters
    found = {}
    for second in program.graph.nodes:
        outer = _plain_layer(second, parameters)
        first: Any = outer and _before(second.args[1 if operator_name(second) == "addmm" else 0])
        inner = first and _plain_layer(first, parameters)
        if (
            not outer
            or not inner
            or (operator_name(first) in _CONVOLUTIONS) != (operator_name(second) in _CONVOLUTIONS)
        ):
            continue
        rank = inner[0]
        into, out = prod(inner[1:]), outer[0] * prod(outer[2:])
        if rank == outer[1] and 1 in (prod(inner[2:]), prod(outer[2:])) and rank * (into + out) < into * out:
            found[f"{layer_of(first)} + {layer_of(second)}"] = (rank, into, out)
    return found


def _plain_layer(node: Any, parameters: Any) -> tuple[int, ...] | None:
    """Return (out, in, *kernel) of a layer whose weight is a parameter."""
    name = operator_name(node)
    if name == "linear" or (name in _CONVOLUTIONS and _is_ordinary(node)):
        weight = node.args[1]
        return tuple(weight.meta["val"].shape) if weight.name in parameters else None
    if name in ("addmm", "matmul", "mm"):
        weight, is_swapped = node.args[2 if name == "addmm" else 1], True
        if operator_name(weight) in _TRANSPOSES and _swaps_two(weight):
            weight, is_swapped = weight.args[0], False
        shape = tuple(weight.meta["val"].shape)
        return (shape[::-1] if is_swapped else shape) if weight.name in parameters and len(shape) == 2 else None
    return None


def _before(node: Any) -> Any:
    """Return what makes a node's value, past what does nothing in evaluation; None where others read it too."""
    while len(node.users) == 1:
        if operator_name(node) not in _SAME and not (operator_name(node) == "dropout" and node.args[2] is False):
            return node
        node = node.args[0]
    return None
