"""Takes the bodies of `with torch.no_grad()` and `with torch.autocast(...)` in a forward out of their subgraphs.

torch.export keeps such a body as a graph of its own behind a higher-order operator, where no other part of this folder
would look, and the ONNX exporter turns an autocast body into short floats that ONNX Runtime's CPU refuses.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from edgedeploy.prepare.lower.program_constants import replace

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node


def has_regions(graph_module: GraphModule) -> bool:
    """Return whether a program has bodies in subgraphs."""
    return any(_body(node) for node in graph_module.graph.nodes)


def inline_regions(program: ExportedProgram) -> dict[Node, torch.dtype | None]:
    """Replace each region by what it holds, in place; what was in an autocast region computes in its inputs' types.

    Types noted in the graph are left as they were; the caller computes them anew.

    Returns:
        each node that was in a region → the type that autocast computed it in, None without autocast.
    """
    import torch

    moved: dict[Node, torch.dtype | None] = {}
    graph = program.graph_module.graph
    # Regions may hold regions: until there are none.
    while regions := [node for node in graph.nodes if _body(node)]:
        for node in regions:
            dtype = moved.pop(node, None)
            if node.target is torch.ops.higher_order.wrap_with_autocast:
                device, short, is_enabled, *_ = node.args
                dtype = (short or torch.get_autocast_dtype(device)) if is_enabled else None
            moved |= dict.fromkeys(_inline(program, node), dtype)
    program.graph_module.delete_all_unused_submodules()
    return moved


def _body(node: Node) -> Any:
    """Return the argument of a region that names its body; None for a node that is no region."""
    import torch

    operators = torch.ops.higher_order
    if node.op != "call_function":
        return None
    if node.target is operators.wrap_with_autocast:
        return node.args[4]
    return node.args[1] if node.target is operators.wrap_with_set_grad_enabled else None


def _inline(program: ExportedProgram, region: Node) -> list[Node]:
    graph_module = program.graph_module
    graph = graph_module.graph
    body: Any = _body(region)
    inner: Any = graph_module.get_submodule(str(body.target))
    given = iter(region.args[region.args.index(body) + 1 :])
    copies: dict[Node, Any] = {}
    moved: list[Node] = []
    results: Any = ()
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(given)
        elif node.op == "output":
            results = tuple(copies[item] for item in node.args[0])
        else:
            with graph.inserting_before(region):
                copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                name = f"{region.name}_{node.target}".replace(".", "_")
                graph_module.add_submodule(name, inner.get_submodule(str(node.target)))
                copies[node].target = name
            else:
                moved.append(copies[node])
    for reader in list(region.users):
        assert reader.target is operator.getitem, "a region's results are read one at a time"
        replace(program, reader, results[reader.args[1]])
        graph.erase_node(reader)
    graph.erase_node(region)
    if not body.users:
        graph.erase_node(body)
    return moved
