"""Which values of an exported program depend on its weights only, what they are, and how new weights are put in."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

# What carries quantization: folding it would undo the compression.
_QUANTIZATION = ("edgedeploy", "quantized_decomposed", "quantized", "torchao", "_quantized")


def private_program(program: ExportedProgram) -> ExportedProgram:
    """Copy a program's graph and signature so that they can be edited; the tensors are shared."""
    from torch.export.graph_signature import ExportGraphSignature

    signature = program.graph_signature
    graph_module = copy.deepcopy(program.graph_module)
    for old, new in zip(program.graph.nodes, graph_module.graph.nodes, strict=True):
        # A copy renames what is called like something of Python: "input" becomes "input_1".
        new.name = old.name
    return program._update(
        graph_module,
        ExportGraphSignature(
            input_specs=[copy.copy(spec) for spec in signature.input_specs],
            output_specs=[copy.copy(spec) for spec in signature.output_specs],
        ),
        state_dict=dict(program.state_dict),
        constants=dict(program.constants),
    )


class Constants:
    """What is constant in one program: a snapshot of its graph, whose values are computed when asked for.

    Attributes:
        nodes: every node that depends on parameters, buffers and lifted constants only, these included.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._stored = _stored(program)
        self.nodes: set[Node] = set()
        changed = _written(program)
        for node in program.graph.nodes:
            is_given = node.op == "placeholder" and node.name in self._stored
            is_computed = node.op == "call_function" and _is_pure(node) and bool(node.all_input_nodes)
            if node not in changed and (
                is_given or (is_computed and all(source in self.nodes for source in node.all_input_nodes))
            ):
                self.nodes.add(node)

    def target(self, node: Node) -> str:
        """Return the name by which a placeholder's tensor is stored: "head.weight"."""
        return self._stored[node.name][0]

    def sources(self, node: Node) -> set[Node]:
        """Return a constant node and everything that it is computed from."""
        seen = {node}
        waiting = [node]
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)
        return seen

    def value(self, node: Node) -> Tensor:
        """Compute a constant node in PyTorch."""
        import torch
        from torch.fx import map_arg

        needed = self.sources(node)
        values: dict[Node, Any] = {}
        with torch.no_grad():
            for step in self._program.graph.nodes:
                if step not in needed:
                    continue
                if step.op == "placeholder":
                    values[step] = self._stored[step.name][1].detach()
                else:
                    given = map_arg((step.args, step.kwargs), lambda item: values[item])
                    values[step] = step.target(*given[0], **given[1])
        result: Tensor = values[node]
        # A copy: the result may be a view of a stored tensor, and stored tensors own what they hold.
        return result.detach().clone(memory_format=torch.contiguous_format)


def add_parameter(program: ExportedProgram, name: str, value: Tensor) -> Node:
    """Store a tensor in a program and return the placeholder that stands for it.

    Args:
        program: edited in place.
        name: by which it is stored; a number is appended where it is taken.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

    taken = {*program.state_dict, *program.constants}
    target = next(trial for trial in (name, *(f"{name}_{n}" for n in range(1, len(taken) + 2))) if trial not in taken)
    graph = program.graph
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        node: Node = graph.placeholder("p_" + target.replace(".", "_"))
    vals = [item.meta.get("val") for item in graph.nodes]
    mode = next((val.fake_mode for val in vals if hasattr(val, "fake_mode")), None) or FakeTensorMode()
    stored = torch.nn.Parameter(value, requires_grad=False)
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    program.graph_signature.input_specs.insert(
        0, InputSpec(kind=InputKind.PARAMETER, arg=TensorArgument(name=node.name), target=target)
    )
    program.state_dict[target] = stored
    return node


def call_like(program: ExportedProgram, like: Node, target: Any, args: Any, kwargs: Any = None) -> Node:
    """Insert a call at the graph's insertion point; what it returns is found by running it on fake tensors.

    Args:
        like: a node with the same fake tensors, whose layer the new one belongs to.
    """
    from torch.fx import map_arg

    node: Node = program.graph.call_function(target, args, kwargs or {})
    node.meta = {key: value for key, value in like.meta.items() if key in ("nn_module_stack", "stack_trace")}
    fakes = map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
    with like.meta["val"].fake_mode:
        node.meta["val"] = target(*fakes[0], **fakes[1])
    return node


def replace(program: ExportedProgram, node: Node, other: Node) -> None:
    """Let everything read another node's value, the program's outputs included, whose names the signature repeats."""
    node.replace_all_uses_with(other, propagate_meta=False)
    for spec in program.graph_signature.output_specs:
        if getattr(spec.arg, "name", None) == node.name:
            spec.arg = dataclasses.replace(spec.arg, name=other.name)


def finished(program: ExportedProgram) -> ExportedProgram:
    """Remove what no longer has a reader, stored tensors included, and check the program.

    Raises:
        torch._export.verifier.SpecViolationError: the edit was wrong.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if _is_metadata_check(node) and not any(
            reader is not node and not _is_metadata_check(reader) for reader in node.all_input_nodes[0].users
        ):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    signature = program.graph_signature
    stored = _stored(program)
    dead = {node.name for node in graph.nodes if node.op == "placeholder" and not node.users and node.name in stored}
    for node in list(graph.nodes):
        if node.name in dead:
            graph.erase_node(node)
    kept = [spec for spec in signature.input_specs if getattr(spec.arg, "name", "") not in dead]
    targets = {spec.target for spec in kept}
    for spec in signature.input_specs:
        if spec not in kept and spec.target not in targets:
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
    signature.input_specs[:] = kept
    graph.lint()
    program.graph_module.recompile()
    # A new object: programs look their own parts up once and keep what they found.
    checked = program._update(
        program.graph_module, signature, state_dict=program.state_dict, constants=program.constants
    )
    checked.validate()  # type: ignore[no-untyped-call]  # torch has no types there
    return checked


def layer_of(node: Node) -> str:
    """Return the path of the module whose forward made a node: "features.3.conv"."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()] if isinstance(stack, dict) else []
    return str(paths[-1]) if paths and paths[-1] else node.name


def is_operator(node: Any, names: Iterable[str]) -> bool:
    """Return whether a node calls one of aten's operators, whatever the overload: "linear", "mul"."""
    return operator_name(node) in set(names)


def operator_name(node: Any) -> str:
    """Return the operator of aten that a node calls, without overload: "linear"; "" for anything else."""
    import torch

    target = getattr(node, "target", None)
    if getattr(node, "op", "") != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ""
    return target._schema.name.removeprefix("aten::") if target.namespace == "aten" else ""


def _is_metadata_check(node: Node) -> bool:
    return operator_name(node) == "_assert_tensor_metadata"


def _stored(program: ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """Return placeholder → the name of the tensor that is stored for it, and the tensor."""
    import torch

    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
            continue
        value = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if isinstance(value, torch.Tensor):
            found[spec.arg.name] = (spec.target, value)
    return found


def _written(program: ExportedProgram) -> set[Node]:
    """Return the nodes whose value an operator changes in place, and what these may be views of."""
    outputs = set(program.graph_signature.buffers_to_mutate.values())
    buffers = program.graph_signature.inputs_to_buffers
    changed = {node for node in program.graph.nodes if buffers.get(node.name) in outputs}
    for node in reversed(list(program.graph.nodes)):
        changed.update(_written_by(node))
        if node in changed and _may_be_view(node):
            changed.update(node.all_input_nodes)
    return changed


def _written_by(node: Node) -> list[Node]:
    import torch

    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    given = dict(zip((item.name for item in node.target._schema.arguments), node.args, strict=False)) | dict(
        node.kwargs
    )
    written: list[Any] = []
    for item in node.target._schema.arguments:
        if item.alias_info is not None and item.alias_info.is_write:
            value = given.get(item.name)
            written += value if isinstance(value, list | tuple) else [value]
    return [value for value in written if isinstance(value, torch.fx.Node)]


def _may_be_view(node: Node) -> bool:
    import torch

    if node.target is operator.getitem or is_operator(node, ("reshape", "contiguous", "to", "flatten", "einsum")):
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        item.alias_info is not None for item in target._schema.returns
    )


def _is_pure(node: Node) -> bool:
    import torch

    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if target.namespace in _QUANTIZATION or "quantize" in target._schema.name:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor | tuple | list)
