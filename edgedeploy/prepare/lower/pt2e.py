"""PT2E and other programs with (fake) quantization operators: their grids are written as our three markers.

Covered: `quantized_decomposed` and `torchao` quantize and dequantize operators (convert_pt2e, or tensor subclasses that
were exported), their dynamic forms, and the fake quantization operators of `aten`. Exporters keep some, fold others
to float32 by size and fail on the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from edgedeploy.errors import ModelError
from edgedeploy.prepare.lower.affine_blocks import Stored, stored_weights
from edgedeploy.prepare.lower.program_constants import Constants, add_parameter, finished, layer_of, private_program
from edgedeploy.prepare.markers import operators
from edgedeploy.records.model import CompressionKind, FoundCompression

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

_QUANTIZE = {
    *(f"quantized_decomposed::quantize_per_{way}" for way in ("tensor", "channel", "channel_group", "token")),
    "torchao::quantize_affine",
}
_DEQUANTIZE = {name.replace("::quantize", "::dequantize") for name in _QUANTIZE}
# operator → (is symmetric, is per token); None: its arguments say so.
_CHOOSE: dict[str, tuple[bool, bool] | None] = {
    "quantized_decomposed::choose_qparams": (False, False),
    "quantized_decomposed::choose_qparams_symmetric": (True, False),
    "quantized_decomposed::choose_qparams_per_token": (True, True),
    "quantized_decomposed::choose_qparams_per_token_asymmetric": (False, True),
    "quantized_decomposed::_choose_qparams_per_token_asymmetric_impl": (False, True),
    "torchao::choose_qparams_affine": None,
}
# What aten's fake quantization is made of: each returns values, and which of them were not clipped.
_CACHEMASK = {
    "aten::fake_quantize_per_tensor_affine_cachemask",
    "aten::fake_quantize_per_channel_affine_cachemask",
    "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
}
_FAKE = {
    *_CACHEMASK,
    "aten::fake_quantize_per_tensor_affine",
    "aten::fake_quantize_per_channel_affine",
    "aten::fused_moving_avg_obs_fake_quant",
    "aten::_fused_moving_avg_obs_fq_helper",
    "aten::_fused_moving_avg_obs_fq_helper_functional",
    "quantized_decomposed::fake_quant_per_channel",
}
_NAMESPACES = ("quantized_decomposed", "torchao")
# How torch.export reads the integers of a tensor subclass.
_INNER = "export::access_subclass_inner_tensor"
# Marks the nodes of a graph that we convert, so that what it was trained for is still known after torch.export.
_TRAINED = "edgedeploy: trained with fake quantization"
# A dynamic step that is no finer than this is no change that anybody could see.
_VISIBLE_STEP = 1e-6


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Convert graphs that were prepared by PT2E (and calibrated or trained) but not converted yet, in place.

    What they carry is reported by `lower_program`, which sees it. Torch is told the shapes of aten's fake quantization,
    without which torch.export fails on a dynamic batch.

    Raises:
        ModelError: an observer has seen nothing, or torchao cannot convert the graph.
    """
    from torch.fx import GraphModule

    _tell_shapes()
    prepared = [path for path, part in module.named_modules() if isinstance(part, GraphModule) and _observers(part)]
    for path in prepared:
        # Not a copy: torchao's notes in the graph name its nodes by identity, and convert_pt2e fails on copied ones.
        part = module.get_submodule(path)
        assert isinstance(part, GraphModule)
        converted = _converted(path, part)
        if not path:
            return converted, ()
        module.set_submodule(path, converted)
    return module, ()


def lower_program(program: ExportedProgram) -> tuple[ExportedProgram, tuple[FoundCompression, ...]]:
    """Write every quantization operator of a program as a marker; weights become integers with their scales.

    The program that is given is not changed. Integer scalars and vectors (a bias in int32) become the float32 constant
    that they stand for.

    Raises:
        ModelError: an operator whose meaning no marker has: integers that are computed with, a scale that is computed
            from the input in an unknown way, an observer that still observes.
    """
    known = _QUANTIZE | _DEQUANTIZE | _FAKE | set(_CHOOSE) | {_INNER}
    if not any(_name(node) in known or _is_quantizing(node) for node in program.graph.nodes):
        return program, ()
    lowering = _Lowering(private_program(program))
    for node in list(lowering.program.graph.nodes):
        name = _name(node)
        if name in _DEQUANTIZE:
            lowering.dequantize(node)
        elif name in _FAKE:
            lowering.fake_quantize(node)
    done = finished(lowering.program)
    for node in done.graph.nodes:
        if _is_quantizing(node) or _name(node) in _FAKE:
            raise ModelError(_refusal(node, "what reads its result is no dequantize operator that edgedeploy knows"))
        if _name(node) == _INNER:
            raise ModelError(
                "the exported program holds weights of a torchao tensor class and computes with their integers; name "
                "the Python factory of the quantized model instead of the .pt2"
            )
    return done, lowering.found()


@dataclass(frozen=True, slots=True)
class _Grid:
    """Integers of one tensor: `block_size` says which elements share an entry of `scale`; None: see `axis`."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    axis: int = -1
    block_size: tuple[int, ...] | None = None

    def is_same(self, other: _Grid) -> bool:
        import torch

        return (
            (self.low, self.high, self.axis) == (other.low, other.high, other.axis)
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )


@dataclass(frozen=True, slots=True)
class _Weight:
    """One weight that was written as a marker."""

    node: Node
    bits: int
    per_channel: bool
    block: int
    is_symmetric: bool
    is_trained: bool


@dataclass
class _Lowering:
    """One program while its quantization operators are replaced.

    Attributes:
        made: node of the old graph → the marker that stands for it, as one tensor may be read through several nodes.
        coarse_steps: the smallest step of dynamic quantizers, where it is one that can be seen.
    """

    program: ExportedProgram
    constants: Constants = field(init=False)
    made: dict[Node, Node] = field(default_factory=dict)
    weights: list[_Weight] = field(default_factory=list)
    activations: list[_Grid] = field(default_factory=list)
    dynamic: list[tuple[int, bool, bool]] = field(default_factory=list)
    coarse_steps: list[float] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    is_trained: bool = False

    def __post_init__(self) -> None:
        self.constants = Constants(self.program)
        self.is_trained = any(_TRAINED in (node.meta.get("custom") or {}) for node in self.program.graph.nodes)

    def dequantize(self, node: Node) -> None:
        """Replace a dequantize node, and with it the quantize node that it reads."""
        given = _arguments(node)
        source = given["input"]
        codes = self.value(source)
        if codes is not None:
            self._constant(node, codes, self._grid(node), is_trained=False)
        elif source in self.made:
            self._demand_same(node, source)
            self._replace(node, self.made[source])
        elif _name(source) in _QUANTIZE:
            self.made[source] = self._activation(source)
            self._demand_same(node, source)
            self._replace(node, self.made[source])
        else:
            raise ModelError(_refusal(node, f"its integers come from {source.name}, which computes with integers"))

    def fake_quantize(self, node: Node) -> None:
        """Replace a fake quantization: of a weight by its integers, of an activation by its grid."""
        import torch

        given = _arguments(node)
        switch = given.get("fake_quant_on", given.get("fake_quant_enabled"))
        observes = given.get("observer_on")
        if observes is not None and (flag := self.value(observes)) is not None and bool(flag.item()):
            raise ModelError(
                _refusal(node, "its observer is still on; call disable_observer on the model, or convert it")
            )
        if switch is not None and (flag := self.value(switch)) is not None and not bool(flag.item()):
            self._replace_first(node, _input(node))
            return
        grid = self._grid(node)
        source = _input(node)
        values = self.value(source)
        if values is None:
            self.activations.append(grid)
            self._replace_first(node, self._grid_marker(node, source, grid))
            return
        self.is_trained = True
        step, zero = (_spread(part, values.ndim, grid.axis).double() for part in (grid.scale, grid.zero_point))
        codes = torch.clamp(torch.round(values.float() / step.float()) + zero, grid.low, grid.high)
        self._constant(node, codes.to(_storage(grid)), grid, is_trained=True)

    def value(self, node: Any) -> Tensor | None:
        """Return what a node or argument always is, quantized constants included; None when it depends on an input."""
        import torch
        from torch.fx import Node, map_arg

        if isinstance(node, torch.Tensor):
            return node
        if isinstance(node, bool | int | float):
            return torch.tensor(node)
        if not isinstance(node, Node):
            return None
        if node in self.constants.nodes:
            return self.constants.value(node)
        if _name(node) not in _QUANTIZE:
            return None
        parts = {source: self.value(source) for source in node.all_input_nodes}
        if any(part is None for part in parts.values()):
            return None
        arguments, keywords = map_arg((node.args, node.kwargs), lambda item: parts[item])
        assert callable(node.target)
        codes: Tensor = node.target(*arguments, **keywords)
        return codes

    def found(self) -> tuple[FoundCompression, ...]:
        """Say what was found: one entry for each kind, with the layers that read such weights."""
        groups: dict[CompressionKind, list[_Weight]] = {}
        for weight in self.weights:
            groups.setdefault(self._kind(weight), []).append(weight)
        if self.activations and not groups:
            groups["QAT int8" if self.is_trained else "static int8"] = []
        return tuple(self._describe(kind, weights) for kind, weights in groups.items())

    def _kind(self, weight: _Weight) -> CompressionKind:
        markers = operators()
        beside = {source.target for reader in weight.node.users for source in reader.all_input_nodes}
        if markers.dynamic_quantize.default in beside:
            return "int8 activations, int4 weights" if weight.bits <= 4 else "dynamic int8"
        if self.is_trained or weight.is_trained:
            return "QAT int8"
        if self.activations:
            return "static int8"
        return "weight-only int4" if weight.bits <= 4 else "weight-only int8"

    def _describe(self, kind: CompressionKind, weights: Sequence[_Weight]) -> FoundCompression:
        parts = []
        if weights:
            blocks = sorted({weight.block for weight in weights if weight.block})
            how = "per-channel" if all(weight.per_channel for weight in weights) else "per-tensor"
            how = f"groups of {', '.join(map(str, blocks))}" if blocks else how
            symmetric = "symmetric" if all(weight.is_symmetric for weight in weights) else "asymmetric"
            parts.append(f"{how} {symmetric} {max(weight.bits for weight in weights)}-bit weights")
        if kind in {"dynamic int8", "int8 activations, int4 weights"}:
            per_token = any(token for _, _, token in self.dynamic)
            parts.append(f"activations quantized anew in each inference, per {'token' if per_token else 'tensor'}")
        elif self.activations:
            centred = all(_is_symmetric(grid.zero_point, grid.low, grid.high) for grid in self.activations)
            parts.append(f"{len(self.activations)} {'symmetric' if centred else 'asymmetric'} activation grids")
        notes = []
        if self.coarse_steps and kind in {"dynamic int8", "int8 activations, int4 weights"}:
            notes.append(
                f"the source lets no step of an activation be finer than {max(self.coarse_steps):g}; runtimes do, so "
                f"very small activations come out more exactly"
            )
        if self.folded:
            notes.append(f"constants of more than 8 bits are kept in float32: {', '.join(self.folded)}")
        return FoundCompression(
            kind=kind,
            layers=tuple(dict.fromkeys(_layer(weight.node) for weight in weights)),
            detail=", ".join(parts),
            lowering="quantization operators of the exported program written as grids, weights as integers",
            note="; ".join(notes),
        )

    def _grid(self, node: Node) -> _Grid:
        """Return the grid that a quantize, dequantize or fake quantize node names, whose scale must be constant."""
        import torch

        given = _arguments(node)
        scale, zero = (
            self.value(next((given[key] for key in keys if given.get(key) is not None), 0))
            for keys in (("scale", "scales"), ("zero_point", "zero_points"))
        )
        if scale is None or zero is None:
            raise ModelError(
                _refusal(node, "its scale is computed from the input in a way that edgedeploy does not know")
            )
        axis = given.get("axis", given.get("ch_axis", -1))
        axis = -1 if given.get("per_row_fake_quant") is False or scale.numel() == 1 else int(axis)
        block_size = _block_size(node, given)
        low, high = _bounds(given)
        if block_size is not None:
            axis = _axis_of_blocks(node, given["input"], block_size)
        return _Grid(
            scale.detach().float(),
            zero.detach().reshape(-1).to(torch.int32).reshape(zero.shape),
            low,
            high,
            axis,
            block_size,
        )

    def _activation(self, quantize: Node) -> Node:
        given = _arguments(quantize)
        scale: Any = given.get("scale", given.get("scales"))
        chooser: Any = scale.args[0] if getattr(scale, "target", None) is operator.getitem else None
        if _name(chooser) in _CHOOSE:
            return self._dynamic_marker(quantize, given["input"], chooser)
        grid = self._grid(quantize)
        if grid.block_size is not None and grid.scale.numel() > 1 and grid.axis < 0:
            raise ModelError(_refusal(quantize, "an activation has one scale for each block of elements"))
        self.activations.append(grid)
        return self._grid_marker(quantize, given["input"], grid)

    def _dynamic_marker(self, quantize: Node, source: Node, chooser: Node) -> Node:
        given = _arguments(chooser)
        way = _CHOOSE[_name(chooser)]
        if given["input"] is not source:
            raise ModelError(_refusal(quantize, "its scale is chosen from another tensor than the one it quantizes"))
        if way is None:
            block = list(given["block_size"])
            per_token = all(size == 1 for size in block[:-1]) and len(block) > 1
            if not per_token and not _covers(source, block):
                raise ModelError(
                    _refusal(quantize, f"it chooses one scale for every {block} elements of an activation")
                )
            way = (str(given["mapping_type"]) != "ASYMMETRIC", per_token)
        low, high = _bounds(_arguments(quantize))
        bits = (high - low).bit_length()
        step = given.get("eps")
        if isinstance(step, float) and step > _VISIBLE_STEP:
            self.coarse_steps.append(step)
        self.dynamic.append((bits, *way))
        return self._call(quantize, operators().dynamic_quantize.default, (source, bits, *way), source)

    def _grid_marker(self, node: Node, source: Node, grid: _Grid) -> Node:
        zero = grid.zero_point.reshape(-1)
        scale = grid.scale.reshape(-1)
        if zero.numel() < scale.numel():
            zero = zero.expand(scale.numel()).contiguous()
        parts = [
            add_parameter(self.program, f"{node.name}.{key}", part)
            for key, part in (("scale", scale), ("zero_point", zero))
        ]
        marker = operators().fake_quantize.default
        return self._call(node, marker, (source, *parts, grid.axis, grid.low, grid.high), source)

    def _constant(self, node: Node, codes: Tensor, grid: _Grid, *, is_trained: bool) -> None:
        """Replace a node whose value is constant by stored integers, or by the float32 that they stand for.

        Scalars and vectors (a bias, a factor) become float32: nothing is won by storing them in 8 bits, a runtime's
        integer bias has the scale of input times weight, and rounds these values to the same codes.
        """
        import torch

        key = _input(node)
        if (marker := self.made.get(key)) is not None and not is_trained:
            self._replace_first(node, marker)
            return
        layer = _layer(node)
        if codes.ndim < 2 or codes.dtype not in {torch.int8, torch.uint8}:
            step, zero = (_spread(part, codes.ndim, grid.axis) for part in (grid.scale, grid.zero_point))
            exact = ((codes.double() - zero.double()) * step.double()).float()
            if codes.ndim > 1:
                self.folded.append(layer)
            self._replace_first(node, add_parameter(self.program, f"{layer}.constant", exact))
            return
        stored = _in_marker_layout(codes, grid, layer)
        names = ("weight_codes", "weight_scale", "weight_zero_point")
        parts = [
            add_parameter(self.program, f"{layer}.{name}", value) for name, value in zip(names, stored[:3], strict=True)
        ]
        arguments = (*parts, stored.axis, stored.block, stored.bits)
        marker = self._call(node, operators().dequantize_weight.default, arguments, node)
        self.weights.append(
            _Weight(
                node=marker,
                bits=stored.bits,
                per_channel=stored.axis >= 0,
                block=stored.block,
                is_symmetric=_is_symmetric(stored.zero_point, grid.low, grid.high),
                is_trained=is_trained,
            )
        )
        if not is_trained:
            self.made[key] = marker
        self._replace_first(node, marker)

    def _demand_same(self, node: Node, quantize: Node) -> None:
        """Refuse to read integers on another grid than the one they were written on."""
        first, second = _arguments(quantize), _arguments(node)
        keys = [("scale", "scales"), ("zero_point", "zero_points")]
        same_nodes = all(first.get(one, first.get(many)) == second.get(one, second.get(many)) for one, many in keys)
        if not same_nodes and not self._grid(quantize).is_same(self._grid(node)):
            raise ModelError(_refusal(node, f"it reads {quantize.name} on another grid than that was written on"))

    def _call(self, node: Node, target: Any, arguments: tuple[Any, ...], like: Node) -> Node:
        """Insert a marker before a node and give it that node's place in the source and the shape of `like`."""
        import torch

        graph = self.program.graph
        with graph.inserting_before(node):
            made: Node = graph.call_function(target, arguments)
        made.meta = dict(node.meta)
        val = like.meta["val"]
        val = val[0] if isinstance(val, tuple | list) else val
        wanted = torch.float32 if target is operators().dequantize_weight.default else val.dtype
        made.meta["val"] = val.to(wanted)
        made.meta.pop("tensor_meta", None)
        if val.dtype == wanted:
            return made
        with graph.inserting_before(node):
            cast: Node = graph.call_function(torch.ops.aten.to.dtype, (made, val.dtype))
        cast.meta = dict(made.meta, val=val)
        return cast

    def _replace(self, node: Node, by: Node) -> None:
        from torch.export.graph_signature import TensorArgument

        node.replace_all_uses_with(by)
        for spec in self.program.graph_signature.output_specs:
            if getattr(spec.arg, "name", "") == node.name:
                spec.arg = TensorArgument(name=by.name)
        self.program.graph.erase_node(node)

    def _replace_first(self, node: Node, by: Node) -> None:
        """Replace a node, or the first result of one that returns several."""
        if not isinstance(node.meta.get("val"), tuple | list):
            self._replace(node, by)
            return
        for reader in list(node.users):
            if reader.target is operator.getitem and reader.args[1] == 0:
                self._replace(reader, by)
        if not node.users:
            self.program.graph.erase_node(node)


@cache
def _tell_shapes() -> list[Any]:
    """Register shapes of aten's fake quantization, which torch 2.13 leaves out; the result keeps them registered."""
    import torch

    def shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)

    library: Any = torch.library.Library("aten", "IMPL", "Meta")  # type: ignore[no-untyped-call]  # no types in torch
    for name in _CACHEMASK:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
            library.impl(name.removeprefix("aten::"), shapes)
    return [library]


def _in_marker_layout(codes: Tensor, grid: _Grid, layer: str) -> Stored:
    bits = (grid.high - grid.low).bit_length()
    block_size = grid.block_size
    if block_size is None:
        block_size = tuple(1 if axis == grid.axis else size for axis, size in enumerate(codes.shape))
    zero = grid.zero_point
    if zero.numel() < grid.scale.numel():
        zero = zero.reshape(-1)[:1].expand(grid.scale.numel())
    return stored_weights(codes, block_size, grid.scale, zero, bits=bits, what=f"the weight of {layer}")


def _observers(part: GraphModule) -> list[str]:
    """Return the names of the observers and fake quantizers that PT2E put into a graph."""
    return [
        name
        for name, child in part.named_children()
        if type(child).__module__.startswith("torchao.quantization.pt2e") and hasattr(child, "calculate_qparams")
    ]


def _converted(path: str, part: GraphModule) -> GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e  # type: ignore[import-untyped]  # has no types

    shown = path or type(part).__name__
    observed = {node.target: node for node in part.graph.nodes if node.op == "call_module"}
    names = _observers(part)
    for name in names:
        observer = getattr(part, name)
        smallest = getattr(getattr(observer, "activation_post_process", observer), "min_val", None)
        is_weight = name in observed and observed[name].args[0].op == "get_attr"
        if smallest is not None and not is_weight and (not smallest.numel() or bool(smallest.isinf().any())):
            raise ModelError(
                f"{shown} was prepared for PT2E quantization and its observer {name} has seen no sample; run "
                f"calibration samples through it and call convert_pt2e"
            )
    is_trained = any("FakeQuantize" in type(getattr(part, name)).__name__ for name in names)
    try:
        converted: GraphModule = convert_pt2e(part)
    except Exception as error:  # torchao raises whatever its graph passes meet
        raise ModelError(
            f"{shown} was prepared for PT2E quantization but not converted, and convert_pt2e fails on it "
            f"({type(error).__name__}: {error}); call convert_pt2e on the trained model yourself"
        ) from error
    if is_trained:
        for node in converted.graph.nodes:
            node.meta["custom"] = {**(node.meta.get("custom") or {}), _TRAINED: True}
    return converted


def _name(node: Any) -> str:
    """Return "namespace::operator" of a node without its overload; "" for anything else."""
    import torch

    target = getattr(node, "target", None)
    return str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else ""


def _is_quantizing(node: Any) -> bool:
    return _name(node).partition("::")[0] in _NAMESPACES


def _arguments(node: Node) -> dict[str, Any]:
    """Return a node's arguments by the names of its operator's schema, defaults filled in."""
    import torch

    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = {item.name: item.default_value for item in schema if item.has_default_value()}
    given |= dict(zip((item.name for item in schema), node.args, strict=False))
    return given | dict(node.kwargs)


def _input(node: Node) -> Node:
    given = _arguments(node)
    source: Node = given["self"] if "self" in given else given["input"]
    return source


def _bounds(given: dict[str, Any]) -> tuple[int, int]:
    """Return the lowest and the highest code; torchao leaves out what its integer type says."""
    import torch

    low, high = given.get("quant_min"), given.get("quant_max")
    if low is None or high is None:
        kind = next(given[key] for key in ("input_dtype", "output_dtype", "dtype") if given.get(key) is not None)
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
    return int(low), int(high)


def _block_size(node: Node, given: dict[str, Any]) -> tuple[int, ...] | None:
    if _name(node).endswith("per_channel_group"):
        return 1, int(given["group_size"])
    if "block_size" not in given:
        return None
    # A symbolic size is the whole of its axis.
    whole = given["input"].meta["val"].shape
    return tuple(
        int(size) if isinstance(size, int) else max(2, _hint(whole[axis]))
        for axis, size in enumerate(given["block_size"])
    )


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else 2**31


def _axis_of_blocks(node: Node, source: Node, block_size: Sequence[int]) -> int:
    """Return the only axis along which each index has a scale of its own, or -1."""
    shape = [_hint(size) for size in source.meta["val"].shape]
    own = [axis for axis, block in enumerate(block_size) if block == 1 and shape[axis] > 1]
    parted = [axis for axis, block in enumerate(block_size) if block < shape[axis]]
    return own[0] if own == parted and len(own) == 1 else -1


def _covers(source: Node, block: Sequence[Any]) -> bool:
    """Return whether one block is the whole tensor."""
    sizes = source.meta["val"].shape
    return all(not isinstance(part, int) or part == size for part, size in zip(block, sizes, strict=True))


def _spread(part: Tensor, rank: int, axis: int) -> Tensor:
    if part.numel() == 1:
        return part.reshape(())
    return part.reshape([-1 if index == axis else 1 for index in range(rank)])


def _storage(grid: _Grid) -> Any:
    import torch

    fitting = [kind for kind in (torch.int8, torch.uint8, torch.int32) if _fits(grid, torch.iinfo(kind))]
    return fitting[0]


def _fits(grid: _Grid, kind: Any) -> bool:
    return int(kind.min) <= grid.low and grid.high <= int(kind.max)


def _is_symmetric(zero_point: Tensor, low: int, high: int) -> bool:
    """Return whether every zero-point is the middle code: 0 of int8, 128 (or 127) of uint8."""
    middle = 0 if low < 0 else (low + high + 1) // 2
    return bool((zero_point == middle).all())


def _layer(node: Node) -> str:
    """Return the module path of the layer that reads a value, or its name in the graph."""
    reader = next(iter(node.users), node)
    return layer_of(reader)


def _refusal(node: Node, why: str) -> str:
    return (
        f"the quantization operator {_name(node)} ({node.name}) of the exported program cannot be written as ONNX: "
        f"{why}; quantize with convert_pt2e's default representation, or let edgedeploy quantize the float model"
    )
