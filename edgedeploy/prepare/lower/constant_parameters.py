"""Computes once what a forward computes from its weights alone: masks, weight standardisation, norms of weights.

The exporter folds such things only below 8,192 elements of input and 512 × 512 of output. Above, they stay as run-time
arithmetic, normalisation cannot be folded and the weight is not seen as one by anything that quantizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgedeploy.prepare.lower.program_constants import (
    Constants,
    add_parameter,
    finished,
    is_operator,
    operator_name,
    private_program,
    replace,
)
from edgedeploy.records.model import FoundCompression

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

# Nothing is computed: the same numbers in another shape, order or memory.
_VIEWS = {
    "alias", "clone", "contiguous", "detach", "detach_", "expand", "expand_as", "flatten", "lift_fresh_copy", "movedim",
    "mT", "numpy_T", "permute", "reshape", "squeeze", "t", "transpose", "unflatten", "unsqueeze", "view", "view_as",
    "_unsafe_view", "adjoint", "matrix_H",
}  # fmt: skip
_PARTS = {"chunk", "getitem", "narrow", "select", "slice", "split", "split_with_sizes", "tensor_split", "unbind"}
_CASTS = {"to", "_to_copy", "type_as"}
# Operator → which of its arguments are weights.
_WEIGHT_ARGUMENTS = {
    "addmm": (1, 2), "bmm": (0, 1), "conv1d": (1,), "conv2d": (1,), "conv3d": (1,), "conv_transpose1d": (1,),
    "conv_transpose2d": (1,), "conv_transpose3d": (1,), "convolution": (1,), "einsum": (1,), "embedding": (0,),
    "linear": (1,), "matmul": (0, 1), "mm": (0, 1),
}  # fmt: skip


def lower_program(program: ExportedProgram) -> tuple[ExportedProgram, tuple[FoundCompression, ...]]:
    """Replace each value that depends on weights only by one stored tensor, whatever its size.

    Quantization is left alone, and so is a weight that is only transposed or reshaped for one of several readers:
    folded, it would be stored once more.
    """
    if not _foldable(Constants(program)):
        return program, ()
    program = private_program(program)
    constants = Constants(program)
    found: list[FoundCompression] = []
    for node in _foldable(constants):
        found += _fold(program, constants, node)
    return finished(program), _merged(found)


def _foldable(constants: Constants) -> list[Node]:
    """Return the constant nodes to replace: those that a varying node reads, or what these are several views of."""
    chosen: dict[Node, None] = {}
    for node in constants.nodes:
        if node.op == "placeholder" or all(reader in constants.nodes for reader in _readers(node)):
            continue
        base, is_alone = node, True
        while base.op != "placeholder" and _is_view(base):
            is_alone = is_alone and not is_operator(base, ("expand", "expand_as"))
            base = base.all_input_nodes[0]
            is_alone = is_alone and len(_readers(base)) == 1
        if is_alone and (base.op != "placeholder" or _changes_layout(node)):
            chosen[node] = None
        elif base.op != "placeholder":
            chosen[base] = None
    # In the order of the graph, so that the same model always gives the same file.
    order = {node: place for place, node in enumerate(next(iter(chosen)).graph.nodes)} if chosen else {}
    return sorted(
        (node for node in chosen if _is_tensor(node)),
        key=lambda node: order[node],
    )


def _is_view(node: Node) -> bool:
    return operator_name(node) in _VIEWS and len(node.all_input_nodes) == 1


def _changes_layout(node: Node) -> bool:
    """Return whether anything but a copy happens on the way from a weight to a node."""
    while node.op != "placeholder":
        if operator_name(node) not in ("alias", "clone", "contiguous", "detach", "detach_", "lift_fresh_copy"):
            return True
        node = node.all_input_nodes[0]
    return False


def _is_tensor(node: Node) -> bool:
    import torch

    return isinstance(node.meta.get("val"), torch.Tensor)


def _readers(node: Node) -> list[Node]:
    return [reader for reader in node.users if operator_name(reader) != "_assert_tensor_metadata"]


def _fold(program: ExportedProgram, constants: Constants, node: Node) -> list[FoundCompression]:
    sources = constants.sources(node)
    stored = [source for source in sources if source.op == "placeholder"]
    value = constants.value(node)
    parameters = set(program.graph_signature.inputs_to_parameters)
    # The largest; of a weight and its mask the weight; by name, so that the same model always gives the same file.
    weight = max(stored, key=lambda item: (item.meta["val"].numel(), item.name in parameters, item.name))
    steps = sorted(
        {operator_name(step) or "getitem" for step in sources if step.op != "placeholder"} - _VIEWS - _PARTS - _CASTS
    )
    is_weight = bool(steps) and any(source.name in parameters for source in stored) and _is_read_as_weight(node)
    is_masked = is_weight and any(_is_mask(constants, step) for step in sources if is_operator(step, ("mul",)))
    before = sum(source.meta["val"].numel() * source.meta["val"].element_size() for source in stored)
    after = value.numel() * value.element_size()
    name = f"{constants.target(weight)}.computed"
    replace(program, node, add_parameter(program, name, value))
    if not is_weight:
        return []
    return [
        FoundCompression(
            kind="pruning masks" if is_masked else "parametrization",
            layers=(constants.target(weight),),
            detail="mask multiplied in forward" if is_masked else f"{', '.join(steps)} of weights in forward",
            lowering="computed once",
            is_kept=after <= before,
            note=f"stored as {after} bytes, where the source has {before}" if after > before else "",
        )
    ]


def _is_read_as_weight(node: Node) -> bool:
    for reader in node.users:
        places = _WEIGHT_ARGUMENTS.get(operator_name(reader), ())
        if any(place < len(reader.args) and _contains(reader.args[place], node) for place in places):
            return True
        if _is_view(reader) and _is_read_as_weight(reader):
            return True
    return False


def _contains(argument: object, node: Node) -> bool:
    return argument is node or (isinstance(argument, list | tuple) and node in argument)


def _is_mask(constants: Constants, product: Node) -> bool:
    for factor in product.all_input_nodes:
        value = constants.value(factor)
        if bool((value == 0).any()) and bool(((value == 0) | (value == 1)).all()):
            return True
    return False


def _merged(found: list[FoundCompression]) -> tuple[FoundCompression, ...]:
    """Return one record for all layers of which the same is to be said."""
    layers: dict[FoundCompression, list[str]] = {}
    for item in found:
        layers.setdefault(msgspec.structs.replace(item, layers=()), []).extend(item.layers)
    return tuple(msgspec.structs.replace(item, layers=tuple(names)) for item, names in layers.items())
