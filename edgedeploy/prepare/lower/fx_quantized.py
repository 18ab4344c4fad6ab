"""FX graph-mode quantization (prepare_fx, convert_fx), PTQ and QAT, becomes float layers with markers."""

from __future__ import annotations

import operator
import sys
import warnings
from typing import TYPE_CHECKING, Any

from edgedeploy.errors import ModelError
from edgedeploy.records.model import CompressionKind, FoundCompression

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import GraphModule, Node

_CONVOLUTIONS = tuple(f"conv{kind}{size}d" for kind in ("", "_transpose") for size in "123")


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Replace what FX quantization left in graph modules, wherever they are; prepared ones are converted first.

    Raises:
        ModelError: prepared without having seen data, or with an operator that has no quantized or no ONNX form.
    """
    # convert_fx and its modules come from there; without it nothing here can be FX-quantized.
    if "torch.ao.nn.quantized" not in sys.modules:
        return module, ()
    from torch.fx import GraphModule

    from edgedeploy.prepare.lower import packed

    graphs = {
        path: part for path, part in module.named_modules(remove_duplicate=False) if isinstance(part, GraphModule)
    }
    found: list[FoundCompression] = []
    for path, graph in graphs.items():
        made, more = _lower_graph(graph, path)
        if made is not graph:
            module = packed.replace_parts(module, {path: graph}, lambda _, made=made: made)  # type: ignore[misc]
        found += more
    if found:
        packed.track_grids(module)
    return module, tuple(found)


def _lower_graph(module: GraphModule, path: str) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    from torch._ops import OpOverload
    from torch.ao.quantization import FakeQuantizeBase

    from edgedeploy.prepare.lower import eager_quantized, static_layers

    # A graph of aten operators came from PT2E, which leaves the same marks.
    if any(isinstance(node.target, OpOverload) for node in module.graph.nodes):
        return module, ()
    was_prepared = "_observed_graph_module_attrs" in module.meta
    was_trained = any(isinstance(part, FakeQuantizeBase) for part in module.modules())
    if was_prepared:
        eager_quantized.demand_calibrated(module, _weight_observers(module))
        module = _converted(module)
    parts = static_layers.static_parts(module, into_graphs=True)
    calls = {node: name for node in module.graph.nodes if (name := _quantized_name(node))}
    if not parts and not calls:
        return module, ()
    dtype = static_layers.activation_dtype(
        {node.args[3] for node, name in calls.items() if name == "quantize_per_tensor"}
    )
    detail = ", ".join(
        filter(
            None, ["FX graph mode", "converted by us" if was_prepared else "converted", static_layers.details_of(parts)]
        )
    )
    static_layers.lower_static(module, parts, dtype)
    for node in calls:
        _replace_call(module, node, dtype)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    _drop_unused_attributes(module)
    module.recompile()
    layers: dict[CompressionKind, list[str]] = {}
    for layer, name in [*((part, "") for part in parts), *((node.name, name) for node, name in calls.items())]:
        if name != "quantize_per_tensor":
            layers.setdefault(_kind(name, was_trained), []).append(f"{path}.{layer}" if path else layer)
    return _plain(module), tuple(
        FoundCompression(
            kind=kind,
            layers=tuple(chosen),
            detail=detail,
            lowering="packed parameters became stored weights"
            + (" and trained grids" if "static" in kind or "QAT" in kind else ""),
            note=eager_quantized.CONVERTED_NOTE if kind == "static int8" and not was_prepared else "",
        )
        for kind, chosen in layers.items()
    )


def _weight_observers(module: GraphModule) -> frozenset[str]:
    """Return the paths of observers that are called on a parameter."""
    from torch.fx import Node

    calls = [node for node in module.graph.nodes if node.op == "call_module" and node.args]
    return frozenset(
        str(node.target) for node in calls if isinstance(node.args[0], Node) and node.args[0].op == "get_attr"
    )


def _kind(function: str, was_trained: bool) -> CompressionKind:
    """Return the kind of compression that a call of torch.ops.quantized shows; "" is a quantized module."""
    if "dynamic" in function:
        return "float16" if "fp16" in function else "dynamic int8"
    return "QAT int8" if was_trained else "static int8"


def _plain(module: GraphModule) -> nn.Module:
    """Return an ordinary module with the graph's code: torch.export interprets a graph module and skips its hooks."""
    from torch import nn

    made = type(type(module).__name__, (nn.Module,), {"forward": type(module).forward})()
    made.__dict__.update({key: value for key, value in vars(module).items() if key not in ("_graph", "_code")})
    assert isinstance(made, nn.Module)
    return made


def _converted(module: GraphModule) -> GraphModule:
    from torch.ao.quantization.quantize_fx import convert_fx

    from edgedeploy.prepare.lower import eager_quantized

    eager_quantized.keep_trained_scales(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: GraphModule = convert_fx(module.eval())
    except Exception as error:  # conversion asserts and raises whatever its patterns meet
        raise ModelError(
            f"the model is prepared for FX quantization and convert_fx fails on it: {type(error).__name__}: "
            f"{eager_quantized.first_line(error)}; convert it in PyTorch, or leave "
            f"the layer at fault in float (qconfig = None)"
        ) from error
    return made


def _quantized_name(node: Node) -> str:
    """Return "conv2d" for a call of torch.ops.quantized.conv2d, "quantize_per_tensor" for that, "" for others."""
    import torch

    if node.op != "call_function":
        return ""
    if node.target is torch.quantize_per_tensor:
        return "quantize_per_tensor"
    text = str(node.target)
    return text.removeprefix("quantized.").split(".")[0] if text.startswith("quantized.") else ""


def _replace_call(module: GraphModule, node: Node, dtype: Any) -> None:
    """Replace a call on quantized tensors by a call of a module that does the same in float, with markers."""
    made, args = _float_call(module, node, dtype)
    name = f"{node.name.lstrip('_')}_float"
    module.add_submodule(name, made)
    with module.graph.inserting_before(node):
        call = module.graph.call_module(name, args)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)


def _float_call(module: GraphModule, node: Node, dtype: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the module that takes a call's place, and the arguments that are left for it."""
    import torch
    from torch import nn
    from torch.nn import functional

    from edgedeploy.prepare.lower import dynamic_layers
    from edgedeploy.prepare.lower.packed import Grid, OnGrid
    from edgedeploy.prepare.lower.static_layers import FUNCTIONS, Layer, Scalar, conv_function

    name = _quantized_name(node)
    if name == "quantize_per_tensor":
        kind: Any
        x, scale, zero_point, kind = node.args
        return Grid(float(_constant(module, scale)), int(_constant(module, zero_point)), kind), (x,)
    bare = name.removesuffix("_relu")
    after = functional.relu if bare != name else None
    if bare.startswith("linear") and "dynamic" in bare:
        weights = _constant(module, node.args[1])
        relu = nn.ReLU() if "relu" in bare else nn.Identity()
        layer = dynamic_layers.linear_from_packed(weights, is_half="fp16" in bare)
        return nn.Sequential(layer, relu), node.args[:1]
    if bare in _CONVOLUTIONS or bare == "linear":
        x, packed, scale, zero_point = node.args
        weights = _constant(module, packed)
        unpacked = weights.unpack() if bare != "linear" else torch.ops.quantized.linear_unpack(weights)
        apply = functional.linear if bare == "linear" else conv_function(bare, weights)
        grid = Grid(float(_constant(module, scale)), int(_constant(module, zero_point)), dtype)
        return Layer(apply, unpacked, grid, after), (x,)
    is_number = bare in ("add", "mul") and len(node.args) == 2 and not isinstance(node.args[1], torch.fx.Node)
    if is_number or bare in ("add_scalar", "mul_scalar"):
        return Scalar(name), node.args
    if name not in FUNCTIONS:
        raise ModelError(
            f"torch.ops.quantized.{name} (node {node.name!r}) has no form that ONNX can keep; leave it in float and "
            f"convert again"
        )
    given = dict(zip([each.name for each in _schema(node)], node.args, strict=False)) | dict(node.kwargs)
    # elu's "scale" is a factor of its formula; where both are there, the output's comes under its full name.
    prefix = "output_" if "output_scale" in given else ""
    scale, zero_point = (_constant(module, given.pop(f"{prefix}{key}")) for key in ("scale", "zero_point"))
    rest = tuple(given[each.name] for each in _schema(node) if each.name in given)
    return OnGrid(FUNCTIONS[name], Grid(float(scale), int(zero_point), dtype)), rest


def _schema(node: Node) -> Any:
    """Return the arguments of a quantized operator's first overload, which is the one on tensors."""
    target: Any = node.target
    overload = target if hasattr(target, "_schema") else getattr(target, target.overloads()[0])
    return overload._schema.arguments


def _constant(module: GraphModule, value: Any) -> Any:
    """Return what a node that reads an attribute stands for, or the value itself."""
    from torch.fx import Node

    if not isinstance(value, Node):
        return value
    if value.op != "get_attr":
        raise ModelError(
            f"the quantized graph computes a scale, zero-point or weight at run time (node {value.name!r}); convert "
            f"the model with convert_fx and leave its graph as it is"
        )
    return operator.attrgetter(str(value.target))(module)


def _drop_unused_attributes(module: GraphModule) -> None:
    """Remove packed parameters, scales and zero-points that no node reads any more; packed ones cannot be exported."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in list(vars(module)):
        if "_packed_weight_" in name and name not in read:
            delattr(module, name)
    for name in list(module._buffers):
        if ("scale" in name or "zero_point" in name) and name not in read:
            delattr(module, name)
