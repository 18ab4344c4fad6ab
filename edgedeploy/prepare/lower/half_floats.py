"""Makes float16, bfloat16 and autocast models float32, with weights that are exactly the short floats' values.

ONNX Runtime's CPU refuses bfloat16 convolutions and casts float16 to float32 and back around each node. The canonical
form computes in float32; a back end that wants short floats makes them again from weights that are already theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgedeploy.errors import ModelError
from edgedeploy.prepare.lower.private_copy import private_copy
from edgedeploy.prepare.lower.program_constants import (
    finished,
    layer_of,
    operator_name,
    private_program,
    replace,
)
from edgedeploy.prepare.lower.regions import has_regions, inline_regions
from edgedeploy.prepare.lower.replaced_calls import Call, replace_calls
from edgedeploy.records.model import CompressionKind, FoundCompression

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import Node

# Modules of this package hold codes of quantized weights, some of which are short floats.
_OWN = __name__.rpartition(".")[0]
_MULTIPLYING = {
    "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "einsum", "gru", "linear", "lstm", "matmul", "mm", "scaled_dot_product_attention",
}  # fmt: skip
_NOTE = "intermediate results are no longer rounded to the short float, so outputs differ from the source's by that"


def float_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the short float in which a module wants its floating inputs.

    Returns:
        torch.float16 or torch.bfloat16 where every matrix and kernel is of that type; None for float32, and for a
        mixture, whose forward casts by itself.
    """
    floats = [tensor for tensor in module.parameters() if tensor.is_floating_point()]
    types = {tensor.dtype for tensor in floats if tensor.ndim >= 2} or {tensor.dtype for tensor in floats}
    return next(iter(types)) if len(types) == 1 and _is_short(next(iter(types))) else None


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Return a float32 copy of a module that has short floats; its forward takes float32 and casts to nothing shorter.

    Raises:
        ModelError: the module cannot be copied.
    """
    layers: dict[torch.dtype, list[str]] = {}
    for path, part in module.named_modules():
        for dtype in dict.fromkeys(tensor.dtype for tensor in _short_tensors(part).values()):
            layers.setdefault(dtype, []).append(path or type(module).__name__)
    if not layers:
        return module, ()
    module = private_copy(module)
    _widen_module(module)
    return module, tuple(_found(dtype, paths, is_autocast=False) for dtype, paths in layers.items())


def lower_program(program: ExportedProgram) -> tuple[ExportedProgram, tuple[FoundCompression, ...]]:
    """Make a program compute in float32: stored short floats, inputs, casts in forward, and autocast.

    Bodies of `torch.no_grad()` and `torch.autocast()` are taken out of their subgraphs. Short floats that a marker of
    quantization reads are codes, and stay.

    Raises:
        ModelError: an operator of the program does not take float32.
    """
    graph = program.graph_module
    if not has_regions(graph) and not any(_has_short(node) for node in graph.graph.nodes):
        return program, ()
    program = private_program(program)
    regions = inline_regions(program)
    stored = _widen_inputs(program)
    casts = {node: dtype for node in program.graph.nodes if (dtype := _widen_arguments(node))}
    _propagate(program, {*regions, *casts})
    layers: dict[tuple[torch.dtype, bool], dict[str, None]] = {}
    for target, dtype in stored.items():
        layers.setdefault((dtype, False), {})[target.rpartition(".")[0] or target] = None
    # Where weights are short, casts are a part of that; else somebody, or autocast, wrote them for speed.
    for layer, dtype in _computed_in(program, regions, {} if stored else casts).items():
        layers.setdefault((dtype, True), {})[layer] = None
    _drop_idle_casts(program)
    return finished(program), tuple(
        _found(dtype, list(names), is_autocast=is_autocast) for (dtype, is_autocast), names in layers.items()
    )


def _found(dtype: torch.dtype, layers: list[str], *, is_autocast: bool) -> FoundCompression:
    name = str(dtype).removeprefix("torch.")
    kind: CompressionKind = "autocast" if is_autocast else "float16" if name == "float16" else "bfloat16"
    count = f"{len(layers)} {'layer' if len(layers) == 1 else 'layers'}"
    return FoundCompression(
        kind=kind,
        layers=tuple(layers),
        detail=f"{name} computation in {count}" if is_autocast else f"weights of {count}",
        lowering="computed in float32" if is_autocast else "computed in float32 with the same weights",
        note=_NOTE,
    )


def _computed_in(
    program: ExportedProgram, regions: Mapping[Node, torch.dtype | None], casts: Mapping[Node, torch.dtype]
) -> dict[str, torch.dtype]:
    """Return the layers that multiply in a short float → which: in an autocast region, or on something cast."""
    found: dict[str, torch.dtype] = {}
    for node in program.graph.nodes:
        if operator_name(node) in _MULTIPLYING:
            given = [casts[source] for source in node.all_input_nodes if source in casts]
            if dtype := regions.get(node) or next(iter(given), None):
                found[layer_of(node)] = dtype
    return found


def _is_short(dtype: Any) -> bool:
    import torch

    return dtype in (torch.float16, torch.bfloat16)


def _short_tensors(part: nn.Module) -> dict[str, Tensor]:
    """Return a module's own short floats: parameters, buffers and plain attributes."""
    import torch

    if type(part).__module__.startswith(_OWN):
        return {}
    own = {**vars(part), **part._parameters, **part._buffers}
    return {name: item for name, item in own.items() if isinstance(item, torch.Tensor) and _is_short(item.dtype)}


def _widen_module(module: nn.Module) -> None:
    import torch

    for part in module.modules():
        for name, tensor in _short_tensors(part).items():
            if isinstance(tensor, torch.nn.Parameter):
                # In place, so that a shared parameter stays shared.
                tensor.data = tensor.data.float()
            else:
                setattr(part, name, tensor.float())
    replace_calls(module, _without_short_floats)


def _without_short_floats(call: Call) -> Call:
    """Return a call that makes float32 where a forward asks for a short float."""
    import torch

    function, args, kwargs = call
    if function in (torch.Tensor.half, torch.Tensor.bfloat16):
        function = torch.Tensor.float
    elif "autocast" in getattr(function, "__name__", ""):
        return call
    return function, tuple(map(_widened, args)), {name: _widened(item) for name, item in kwargs.items()}


def _widened(argument: Any) -> Any:
    import torch

    return torch.float32 if isinstance(argument, torch.dtype) and _is_short(argument) else argument


def _has_short(node: Node) -> bool:
    val = node.meta.get("val")
    return _is_short(getattr(val, "dtype", None)) and not _is_code(node)


def _is_code(node: Node) -> bool:
    """Return whether a stored tensor is read by a marker of quantization."""
    return node.op == "placeholder" and any(
        getattr(reader.target, "namespace", "") == "edgedeploy" for reader in node.users
    )


def _widen_inputs(program: ExportedProgram) -> dict[str, torch.dtype]:
    """Make stored tensors and inputs float32 and return what each stored one was."""
    import torch

    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target}
    was: dict[str, torch.dtype] = {}
    wide: dict[int, Tensor] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder" or not _has_short(node):
            continue
        node.meta["val"] = _as_fake_float(node.meta["val"])
        if (target := targets.get(node.name)) is None:
            continue
        store: Any = program.state_dict if target in program.state_dict else program.constants
        value = store[target]
        was[target] = value.dtype
        if id(value) not in wide:
            floats = value.detach().float()
            is_parameter = isinstance(value, torch.nn.Parameter)
            wide[id(value)] = torch.nn.Parameter(floats, requires_grad=False) if is_parameter else floats
        store[target] = wide[id(value)]
    return was


def _as_fake_float(fake: Any) -> Any:
    with fake.fake_mode:
        return fake.detach().float()


def _widen_arguments(node: Node) -> torch.dtype | None:
    """Let a node make float32 where it made a short float, and return that."""
    import torch

    if node.op != "call_function":
        return None
    given = [item for item in (*node.args, *node.kwargs.values()) if isinstance(item, torch.dtype)]
    short = next((item for item in given if _is_short(item)), None)
    if short is not None:
        node.args = tuple(map(_widened, node.args))
        node.kwargs = {name: _widened(item) for name, item in node.kwargs.items()}
    return short


def _propagate(program: ExportedProgram, edited: set[Node]) -> None:
    """Compute anew what type each value has that depends on something edited."""
    from torch.fx import map_arg

    changed = {node for node in program.graph.nodes if node.op == "placeholder"}
    for node in program.graph.nodes:
        if node.op != "call_function" or not (node in edited or changed.intersection(node.all_input_nodes)):
            continue
        before = node.meta.get("val")
        args, kwargs = map_arg((node.args, node.kwargs), lambda item: item.meta.get("val"))
        mode = next((item.fake_mode for item in _tensors((args, kwargs, before))), None)
        if mode is None:
            continue
        try:
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)
        except Exception as error:  # torch raises what its operators raise
            raise ModelError(
                f"{operator_name(node) or node.target} in {layer_of(node)} cannot be computed in float32 instead of a "
                f"short float: {type(error).__name__}: {error}; export the model in float32"
            ) from error
        if _types(before) != _types(node.meta["val"]) or node in edited:
            changed.add(node)


def _tensors(values: Any) -> list[Any]:
    from torch.utils import _pytree as pytree

    return [item for item in pytree.tree_leaves(values) if hasattr(item, "fake_mode")]


def _types(values: Any) -> list[Any]:
    return [item.dtype for item in _tensors(values)]


def _drop_idle_casts(program: ExportedProgram) -> None:
    for node in list(program.graph.nodes):
        if operator_name(node) not in ("to", "_to_copy"):
            continue
        before, after = node.args[0].meta["val"], node.meta["val"]
        if (before.dtype, before.device, before.stride()) == (after.dtype, after.device, after.stride()):
            replace(program, node, node.args[0])
            program.graph.erase_node(node)
