"""Keeps weights that several layers share in one place in the file.

The exporter stores a parameter once, but transposes it where a linear layer reads more than two axes: below its folding
limits the transposed weight of an embedding that is tied to an output layer is stored beside it, above them transposed
in each inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgedeploy.prepare.lower.program_constants import (
    call_like,
    finished,
    is_operator,
    private_program,
    replace,
)
from edgedeploy.records.model import FoundCompression

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram
    from torch.fx import Node


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Return the module as it is, and for each weight that is used in several places, where.

    A layer that is registered in several places shares its weights too. One that has one place and is called several
    times in forward cannot be told from here, and nothing could lose that.
    """
    places: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for parameter in part._parameters.values():
            # Shared biases come with shared weights, and are nothing that could be lost.
            if parameter is not None and parameter.ndim > 1:
                places.setdefault(id(parameter), []).append(path or "(model)")
                sizes[id(parameter)] = parameter.numel()
    return module, tuple(
        FoundCompression(
            kind="shared weights",
            layers=tuple(paths),
            detail=f"one tensor used in {len(paths)} places, {sizes[key] * (len(paths) - 1)} weights saved",
        )
        for key, paths in places.items()
        if len(paths) > 1
    )


def lower_program(program: ExportedProgram) -> tuple[ExportedProgram, tuple[FoundCompression, ...]]:
    """Let linear layers read their input as a matrix where something else reads their weight as it is stored."""
    if not _transposing(program):
        return program, ()
    program = private_program(program)
    for node in _transposing(program):
        _flatten(program, node)
    return finished(program), ()


def _transposing(program: ExportedProgram) -> list[Node]:
    """Return linear layers whose weight the exporter would transpose, and another reader needs as it is."""
    found = []
    parameters = program.graph_signature.inputs_to_parameters
    for weight in program.graph.nodes:
        if weight.op != "placeholder" or weight.name not in parameters:
            continue
        turned = [reader for reader in weight.users if _reads_more_than_a_matrix(reader, weight)]
        if turned and len(turned) < len(weight.users):
            found += turned
    return found


def _reads_more_than_a_matrix(node: Any, weight: Node) -> bool:
    return is_operator(node, ("linear",)) and node.args[1] is weight and node.args[0].meta["val"].ndim > 2


def _flatten(program: ExportedProgram, node: Any) -> None:
    import torch

    value = node.args[0].meta["val"]
    reshape = torch.ops.aten.reshape.default
    with program.graph.inserting_before(node):
        sizes: list[Any] = [
            size
            if isinstance(size, int)
            else call_like(program, node, torch.ops.aten.sym_size.int, (node.args[0], axis))
            for axis, size in enumerate(value.shape[:-1])
        ]
        matrix = call_like(program, node, reshape, (node.args[0], [-1, value.shape[-1]]))
        product = call_like(program, node, node.target, (matrix, *node.args[1:]))
        whole = call_like(program, node, reshape, (product, [*sizes, node.meta["val"].shape[-1]]))
    replace(program, node, whole)
    program.graph.erase_node(node)
