"""Turns an ONNX graph that carries quantization into the canonical pair: clean fp32 ONNX, and what it was quantized to.

The graph is read once, in order, and written anew. A QuantizeLinear names a grid for the float tensor that it reads; a
DequantizeLinear is another name for that tensor; weights become the float32 values that their integers stand for.
Operators on integers and markers are brought to that form first (`qoperators.py`, `markers.py`).

Three things would be lost by just leaving the pairs out, and are put back:

- A Relu or Clip that the quantizer left out because integers cannot leave its range. Rule: a grid without negative
  values, on a tensor that can become negative, gets a Relu; where the grid ends at 6 or below, a Clip to its range,
  since a ReLU6 may have been left out. Not where the network's own clamp follows at once. A clamp to a range with
  negative values (Hardtanh) cannot be told from an ordinary range and is left to the grid.
- A tensor that is read both quantized and as float, or with several grids: each grid gets a tensor of its own, behind
  an Identity (or the clamp).
- Saturation itself stays in the record: a grid's lowest and highest code.

One grid is left out: that of a tensor read by one Relu or Clip alone whose output has the same grid. Rounding to a grid
and clamping are both monotone and idempotent, so Q(clamp(Q(x))) = Q(clamp(x)): nothing changes, and the grid stands
behind the clamp, where engines fuse it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import ModelError
from edgedeploy.prepare.graph import attributes, opset_of, view
from edgedeploy.prepare.markers import DOMAIN
from edgedeploy.prepare.source.clean_graph import MOVES, CleanGraph, Codes, inner, refusal, rename_inside
from edgedeploy.prepare.source.moved_weights import settle_moves
from edgedeploy.prepare.source.qoperators import to_qdq
from edgedeploy.prepare.source.widen import widened
from edgedeploy.records.quantization import (
    DynamicActivation,
    Grid,
    SourceQuantization,
    WeightQuantization,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]

_SHORT_FLOATS = {"float16": "float16", "bfloat16": "bfloat16", "float8_e4m3fn": "float8e4m3fn"}
# What forms of ours and of ONNX Runtime's quantizers append to the name of weights that they store.
_STORED = re.compile(r"(_quantized|/integers|/packed/codes|/float16|/bfloat16|/float8e4m3fn)$")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
_QUANTIZED_BEGINNINGS = ("QLinear", "QGemm", "QMoE", "QAttention", "QEmbed", "QOrdered", "DynamicQuantize")
_QUANTIZED_ENDINGS = ("Integer", "IntegerToFloat", "NBits", "Bnb4", "BlockQuantized", "BFP", "FpQ4", "QuantizeLinear")
_HIGHEST_OF_RELU6 = 6.0


def absorb(graph: ModelProto) -> tuple[ModelProto, SourceQuantization | None]:
    """Return a graph without quantization, and the quantization that it carried.

    Args:
        graph: valid ONNX, weights inside; not changed.

    Returns:
        The graph itself and None where it carries none. Else a float32 graph with the same inputs and outputs, whose
        quantized weights are float32 initializers that hold exactly what the source's integers stand for, and the
        source's grids in the names of that graph.

    Raises:
        ModelError: a quantized node that cannot be read, named, with what to do.
    """
    is_quantized = _is_quantized(graph.graph.node) or any(_is_quantized(item.node) for item in graph.functions)
    if not is_quantized and not _widens_weights(graph):
        return graph, None
    from onnx import ModelProto, inliner

    copy = ModelProto()
    copy.CopyFrom(graph)
    if copy.functions:
        copy = inliner.inline_local_functions(copy)
    _demand_flat(copy.graph.node)
    _constants_as_initializers(copy)
    reader = _Reader(view(settle_moves(to_qdq(widened(copy))).graph), opset_of(copy))
    for node in copy.graph.node:
        reader.read(node)
    return reader.finish(copy)


def short_float_weights(graph: ModelProto, storage: str) -> dict[str, WeightQuantization]:
    """Return the weights that a short float holds exactly: initializer name → how it is stored.

    Args:
        graph: canonical fp32.
        storage: "float16" or "bfloat16".

    Returns:
        Each float32 initializer of two or more axes whose every value survives being stored so.
    """
    from onnx import numpy_helper

    found = {}
    for item in graph.graph.initializer:
        value = numpy_helper.to_array(item)
        if value.dtype == np.float32 and value.ndim >= 2 and _fits(value, storage):
            found[item.name] = WeightQuantization(bits=16, axis=None, scales=(), storage=storage, origin="trained")  # type: ignore[arg-type]  # the caller's Literal
    return found


def _fits(value: Array, storage: str) -> bool:
    if storage == "bfloat16":  # the upper half of a float32
        return not (np.ascontiguousarray(value).view(np.uint32) & np.uint32(0xFFFF)).any()
    with np.errstate(over="ignore"):
        return bool((value.astype(np.float16).astype(np.float32) == value).all())


def _is_quantized(nodes: Iterable[NodeProto]) -> bool:
    return any(_quantizes(node) or _is_quantized(inner(node)) for node in nodes)


def _widens_weights(graph: ModelProto) -> bool:
    """Whether weights are stored in 16-bit floats and widened to float32, as `emit.shorten` stores them."""
    short = {item.name for item in graph.graph.initializer if item.data_type in (10, 16) and len(item.dims) > 1}
    return any(_is_widening(node) and node.input[0] in short for node in graph.graph.node)


def _is_widening(node: NodeProto) -> bool:
    return node.op_type == "Cast" and not node.domain and attributes(node)["to"] == 1


def _quantizes(node: NodeProto) -> bool:
    return (
        node.domain == DOMAIN
        or node.op_type.startswith(_QUANTIZED_BEGINNINGS)
        or node.op_type.endswith(("DequantizeLinear", *_QUANTIZED_ENDINGS))
    )


def _demand_flat(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        if inside := next((child for child in inner(node) if _is_quantized([child])), None):
            raise ModelError(
                f"node {inside.name or inside.output[0]!r} ({inside.op_type}) quantizes inside a branch or loop "
                f"({node.name or node.op_type}), which cannot be read; export the model without control flow"
            )


def _constants_as_initializers(model: ModelProto) -> None:
    from onnx import helper, numpy_helper

    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name in ("value", "value_float", "value_int"):
            value = helper.get_attribute_value(node.attribute[0])
            if not isinstance(value, int | float):
                value = numpy_helper.to_array(value)
            elif isinstance(value, float):
                value = np.float32(value)
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), node.output[0]))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


class _Reader(CleanGraph):
    """Reads the source node by node."""

    def read(self, node: NodeProto) -> None:
        """Read the next node of the source."""
        if node.op_type == "QuantizeLinear":
            self._quantize(node)
        elif node.op_type == "DequantizeLinear":
            self._dequantize(node)
        elif node.domain == DOMAIN and node.op_type == "FakeQuantize":
            self._fake_quantize(node)
        elif node.domain == DOMAIN and node.op_type == "DequantizeWeight":
            self._dequantize_weight(node)
        elif node.domain == DOMAIN and node.op_type == "DynamicQuantize":
            settings = attributes(node)
            self.names[node.output[0]] = self.now(node.input[0])
            self.dynamic[node.output[0]] = DynamicActivation(
                bits=settings["bits"], symmetric=bool(settings["symmetric"]), per_token=bool(settings["per_token"])
            )
        elif _is_widening(node) and (codes := self._short_weights(node.input[0])) is not None:
            self._store_float(node, codes, np.ones((), np.float32), -1)
        elif _quantizes(node):
            raise refusal(node, "it is an operator that is not known here; export the model in Q/DQ form")
        else:
            self._copy(node)

    def _quantize(self, node: NodeProto) -> None:
        value = self.value(node.input[0])
        scale, zero_point, axis, block = self.grid_of(node)
        if value is not None and value.dtype.kind == "f":
            low, high = _limits(zero_point.dtype)
            wide = [_spread(part, value.shape, axis, block) for part in (scale, zero_point.astype(np.int32))]
            codes = np.clip(np.rint(value.astype(np.float32) / wide[0]) + wide[1], low, high)
            self.evaluated[node.output[0]] = codes.astype(zero_point.dtype)
            return
        grid = self._one_grid(node, scale, zero_point)
        self.codes[node.output[0]] = Codes(self._quantized(node, grid), grid, zero_point.dtype)

    def _fake_quantize(self, node: NodeProto) -> None:
        settings = attributes(node)
        low, high, axis = int(settings["low_code"]), int(settings["high_code"]), int(settings["axis"])
        value = self.value(node.input[0])
        scale, zero_point = self.constant(node, 1).astype(np.float32), self.constant(node, 2).astype(np.int64)
        if value is None:
            if scale.size > 1:
                raise refusal(node, "an activation with one scale per channel has no form on any back end")
            grid = Grid(
                scale=float(scale.reshape(())), zero_point=int(zero_point.reshape(())), low_code=low, high_code=high
            )
            self.names[node.output[0]] = self._quantized(node, grid)
            return
        axis = axis if axis >= 0 and scale.size > 1 else -1
        wide = [_spread(part, value.shape, axis, 0) for part in (scale, zero_point)]
        codes = np.clip(np.rint(value.astype(np.float32) / wide[0]) + wide[1], low, high).astype(np.int64)
        bits = int(np.ceil(np.log2(high - low + 1)))
        self._store(node, node.input[0], codes, scale, zero_point, axis=axis, block=0, bits=bits, is_signed=low < 0)

    def _one_grid(self, node: NodeProto, scale: Array, zero_point: Array) -> Grid:
        if scale.size > 1:
            raise refusal(
                node, "an activation with several scales has no form on any back end; quantize activations per tensor"
            )
        low, high = _limits(zero_point.dtype)
        zero = int(zero_point.reshape(-1)[0])
        return Grid(scale=float(scale.reshape(-1)[0]), zero_point=zero, low_code=low, high_code=high)

    def _quantized(self, node: NodeProto, grid: Grid) -> str:
        """Return a tensor of the result that has a grid and the values that a quantizing node reads."""
        read = node.input[0]
        tensor = self.now(read)
        if self.activations.get(tensor) == grid:
            return tensor
        if (tensor, grid) in self.branches:
            return self.branches[tensor, grid]
        clamp = self._clamp(read, tensor, grid)
        if tensor not in self.activations and tensor == read and self._is_read_only_with(read, grid):
            if clamp:
                made = self.producers.pop(tensor)
                free = self.fresh(f"{tensor}/unclamped")
                made.output[:] = [free if name == tensor else name for name in made.output]
                self.producers[free] = made
                self.add_clamp(clamp, free, tensor)
            self.activations[tensor] = grid
            return tensor
        branch = self.fresh(f"{tensor}/quantized")
        self.add_clamp(clamp or ("Identity", 0.0), tensor, branch)
        self.branches[tensor, grid] = branch
        self.activations[branch] = grid
        return branch

    def _is_read_only_with(self, tensor: str, grid: Grid) -> bool:
        """Whether everything that reads a tensor of the source quantizes it to one grid."""
        if tensor in self.seen.outputs:
            return False
        for reader in self.seen.consumers[tensor]:
            if reader.op_type == "QuantizeLinear" and list(reader.input).count(tensor) == 1:
                scale, zero_point, _, _ = self.grid_of(reader)
                if scale.size != 1 or self._one_grid(reader, scale, zero_point) != grid:
                    return False
            elif reader.domain == DOMAIN and reader.op_type == "FakeQuantize":
                settings = attributes(reader)
                own = (self.constant(reader, 1), self.constant(reader, 2))
                if any(part.size != 1 for part in own) or grid != Grid(
                    scale=float(own[0].astype(np.float32).reshape(())),
                    zero_point=int(own[1].reshape(())),
                    low_code=settings["low_code"],
                    high_code=settings["high_code"],
                ):
                    return False
            else:
                return False
        return True

    def _clamp(self, read: str, tensor: str, grid: Grid) -> tuple[str, float] | None:
        """Return the clamp that a grid stands for, by the rule of this file: (operator, upper end), or None."""
        if grid.low_code < grid.zero_point or tensor not in self.producers or self.never_negative(tensor):
            return None
        if self._is_clamped_next(read):
            return None
        high = float(np.float32(grid.scale)) * (grid.high_code - grid.zero_point)
        return ("Clip", high) if high <= _HIGHEST_OF_RELU6 + grid.scale / 2 else ("Relu", 0.0)

    def _is_clamped_next(self, read: str) -> bool:
        """Whether all that reads a tensor, quantized or not, is a clamp that lets nothing negative pass."""
        readers = list(self._beyond_quantizers(read))
        return bool(readers) and all(
            reader is not None and (reader.op_type == "Relu" or self.clips_negatives(reader)) for reader in readers
        )

    def _beyond_quantizers(self, name: str) -> Iterable[NodeProto | None]:
        if name in self.seen.outputs:
            yield None
        for reader in self.seen.consumers.get(name, ()):
            if reader.op_type in ("QuantizeLinear", "DequantizeLinear", "FakeQuantize"):
                yield from self._beyond_quantizers(reader.output[0])
            else:
                yield reader

    def _dequantize(self, node: NodeProto) -> None:
        scale, zero_point, axis, block = self.grid_of(node)
        known = self.codes.get(node.input[0])
        if known is not None:
            if known.grid.scale != float(scale.reshape(-1)[0]) or known.grid.zero_point != int(
                zero_point.reshape(-1)[0]
            ):
                raise refusal(node, "its scale or zero-point differs from those that its integers were made with")
            self.names[node.output[0]] = known.tensor
            return
        codes = self.value(node.input[0])
        if codes is None:
            self._dequantize_integers(node, self._one_grid(node, scale, zero_point))
            return
        bits = 32 if codes.dtype == np.int32 else int(np.log2(_limits(codes.dtype)[1] - _limits(codes.dtype)[0] + 1))
        is_signed = _limits(codes.dtype)[0] < 0
        self._store(
            node,
            node.input[0],
            codes.astype(np.int64),
            scale,
            zero_point.astype(np.int64),
            axis=axis,
            block=block,
            bits=bits,
            is_signed=is_signed,
        )

    def _dequantize_weight(self, node: NodeProto) -> None:
        settings = attributes(node)
        axis, block, bits = (int(settings[name]) for name in ("axis", "block", "bits"))
        codes = self.constant(node, 0)
        scale, zero_point = self.constant(node, 1).astype(np.float32), self.constant(node, 2).astype(np.int64)
        if codes.dtype.name in _SHORT_FLOATS:
            self._store_float(node, codes, scale, axis)
            return
        is_signed = codes.dtype.kind == "i" or codes.dtype.name == "int4"
        if block:  # ONNX counts blocks along the input axis; the marker names the other one
            self._store(
                node, node.input[0], codes.astype(np.int64), scale if axis == 0 else scale.T,
                zero_point if axis == 0 else zero_point.T, axis=1 - axis, block=block, bits=bits, is_signed=is_signed,
            )  # fmt: skip
            return
        axis = axis if scale.size > 1 else -1
        self._store(
            node, node.input[0], codes.astype(np.int64), scale, zero_point, axis=axis, block=0, bits=bits,
            is_signed=is_signed,
        )  # fmt: skip

    def _short_weights(self, name: str) -> Array | None:
        """Return weights that are stored in 16-bit floats, None for anything else."""
        value = self.seen.constants.get(name)
        return value if value is not None and value.ndim > 1 and value.dtype.name in ("float16", "bfloat16") else None

    def _store_float(self, node: NodeProto, codes: Array, scale: Array, axis: int) -> None:
        """Store weights that were short floats."""
        axis = axis if scale.size > 1 else -1
        value = (codes.astype(np.float32) * _spread(scale, codes.shape, axis, 0)).astype(np.float32)
        has_scale = bool((scale != 1).any())
        name = self._keep(node, node.input[0], value, (scale.tobytes(), axis))
        self.weights[name] = WeightQuantization(
            bits=8 * codes.dtype.itemsize,
            axis=axis if has_scale and axis >= 0 else None,
            scales=tuple(float(item) for item in scale.reshape(-1)) if has_scale else (),
            storage=_SHORT_FLOATS[codes.dtype.name],  # type: ignore[arg-type]  # the table's values are the Literal's
            origin="trained",
        )

    def _store(
        self, node: NodeProto, read: str, codes: Array, scale: Array, zero_point: Array, *, axis: int, block: int,
        bits: int, is_signed: bool,
    ) -> None:  # fmt: skip
        """Store weights, or a bias of 32 bits: `axis` is that of the scales, along which `block` codes share one."""
        scale = scale.astype(np.float32)
        wide = [_spread(part, codes.shape, axis, block) for part in (scale, zero_point)]
        value = ((codes - wide[1]).astype(np.float32) * wide[0]).astype(np.float32)
        key = (scale.tobytes(), zero_point.tobytes(), axis, block, bits)
        name = self._keep(node, read, value, key)
        if bits > 16:
            if codes.ndim > 1:
                raise refusal(node, f"weights of {bits} bits are not supported; quantize them to 8")
            self.bias_codes[name] = None
            return
        zeros = zero_point if is_signed else zero_point - 2 ** (bits - 1)
        if block:
            if codes.ndim != 2:
                raise refusal(node, "scales in blocks are supported for matrices only; quantize it per channel")
            axis = 1 - axis
            scale, zeros = (part if axis == 0 else part.T for part in (scale, zeros))
        if not block and scale.size == 1:
            axis = -1
        zeros = np.broadcast_to(zeros, scale.shape) if zeros.size != scale.size else zeros
        self.weights[name] = WeightQuantization(
            bits=bits,
            axis=None if axis < 0 else axis,
            block=block,
            scales=tuple(float(item) for item in scale.reshape(-1)),
            zero_points=tuple(int(item) for item in zeros.reshape(-1)) if zeros.any() else (),
            origin="trained",
        )

    def _keep(self, node: NodeProto, read: str, value: Array, key: tuple[Any, ...]) -> str:
        """Make an initializer of the values that a node gives, once for all nodes that give the same."""
        if (read, key) not in self.stored:
            # What a node of the source computes from constants keeps its name until nothing reads it.
            is_sole = len(self.seen.consumers.get(read, ())) == 1 and not {read} & {*self.names, *self.seen.producers}
            base = _STORED.sub("", read) if is_sole else node.output[0]
            free = base == node.output[0] or (base == read and is_sole) or base not in self.taken
            name = base if free and base not in self.made else str(node.output[0])
            self.taken.add(name)
            self.made[name] = np.ascontiguousarray(value)
            self.stored[read, key] = name
        name = self.stored[read, key]
        self.names[node.output[0]] = name
        return name

    def _dequantize_integers(self, node: NodeProto, grid: Grid) -> None:
        """Write a DequantizeLinear of an input that is integers as float arithmetic."""
        from onnx import TensorProto, helper

        real = node.output[0]
        cast, moved = self.fresh(f"{real}/cast"), self.fresh(f"{real}/moved")
        zero, scale = self.fresh(f"{real}/zero"), self.fresh(f"{real}/step")
        self.made[zero] = np.asarray(grid.zero_point, np.float32)
        self.made[scale] = np.asarray(grid.scale, np.float32)
        self.emit(helper.make_node("Cast", [self.now(node.input[0])], [cast], name=cast, to=TensorProto.FLOAT))
        self.emit(helper.make_node("Sub", [cast, zero], [moved], name=moved))
        self.emit(helper.make_node("Mul", [moved, scale], [real], name=f"{real}/Mul"))
        self.activations[real] = grid

    def _copy(self, node: NodeProto) -> None:
        from onnx import NodeProto

        integers = [self.codes[name] for name in node.input if name in self.codes]
        copy = NodeProto()
        copy.CopyFrom(node)
        if integers:
            self._move_codes(node, copy, integers)
            return
        flagged = [name for name in node.input if name in self.dynamic]
        for index, name in enumerate(node.input):
            copy.input[index] = self.now(name)
        rename_inside(copy, self.names)
        if flagged:
            self._follow_dynamic(node, copy, self.dynamic[flagged[0]])
        self.emit(copy)

    def _move_codes(self, node: NodeProto, copy: NodeProto, integers: Sequence[Codes]) -> None:
        """Write a node that moves integers as one that moves what they stand for."""
        first = integers[0]
        if node.op_type == "Clip":
            self._narrow(node, first)
            return
        joins = node.op_type == "Concat"
        one_grid = all(item.grid == first.grid for item in integers)
        if node.op_type not in MOVES or not one_grid or len(integers) != (len(node.input) if joins else 1):
            raise refusal(node, "it computes on integers; export the model with its quantization in Q/DQ form")
        if node.op_type == "Resize" and attributes(node).get("mode", b"nearest") != b"nearest":
            raise refusal(node, "it interpolates between integers; export the model in Q/DQ form")
        for index, name in enumerate(node.input):
            copy.input[index] = self.codes[name].tensor if name in self.codes else self.now(name)
        if node.op_type == "Pad":
            self._pad_with_real(node, copy, first)
        for index, name in enumerate(node.output):
            tensor = self.fresh(f"{name}/real") if name in self.seen.outputs else name
            copy.output[index] = tensor
            self.codes[name] = Codes(tensor, first.grid, first.dtype)
            self.activations[tensor] = first.grid
        self.emit(copy)

    def _pad_with_real(self, node: NodeProto, copy: NodeProto, codes: Codes) -> None:
        filling = node.input[2] if len(node.input) > 2 else ""
        value = self.value(filling) if filling else np.zeros((), codes.dtype)
        if value is None:
            raise refusal(node, "the value that it pads with is not constant")
        name = self.fresh(f"{node.output[0]}/filling")
        real = np.float32(codes.grid.scale) * np.float32(int(value.reshape(())) - codes.grid.zero_point)
        self.made[name] = np.asarray(real, np.float32)
        given = list(copy.input) + [""] * (3 - len(copy.input))
        given[2] = name
        del copy.input[:]
        copy.input.extend(given)

    def _narrow(self, node: NodeProto, codes: Codes) -> None:
        """Read a Clip of integers as a grid with fewer codes."""
        ends = [self.value(name) if name else None for name in list(node.input)[1:3]]
        low, high = (
            default if end is None else int(end.reshape(()))
            for end, default in zip([*ends, None, None][:2], (codes.grid.low_code, codes.grid.high_code), strict=True)
        )
        grid = msgspec.structs.replace(
            codes.grid, low_code=max(low, codes.grid.low_code), high_code=min(high, codes.grid.high_code)
        )
        if grid != codes.grid and len(self.seen.consumers[node.input[0]]) > 1:
            raise refusal(node, "its integers are read both narrowed and not; export the model in Q/DQ form")
        self.activations[codes.tensor] = grid
        self.codes[node.output[0]] = Codes(codes.tensor, grid, codes.dtype)

    def _follow_dynamic(self, node: NodeProto, copy: NodeProto, how: DynamicActivation) -> None:
        """Note for whose weights an input is quantized anew in each inference."""
        if node.op_type in MOVES and node.input[0] in self.dynamic:
            self.dynamic.update(dict.fromkeys(node.output, how))
            return
        matrices = (1, 2) if node.op_type in ("LSTM", "GRU", "RNN") else (1,)
        weights = [self.weight_behind(copy.input[index]) for index in matrices if index < len(copy.input)]
        if node.op_type not in _WEIGHTED or node.input[0] not in self.dynamic or None in weights:
            raise ModelError(
                f"node {node.name or node.output[0]!r} ({node.op_type}) reads an activation that is quantized in each "
                f"inference and has no quantized weights; quantize dynamically only what linear layers read"
            )
        self.dynamic_weights.update({weight: how for weight in weights if weight})


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the lowest and the highest integer of a type, those of four bits included."""
    if dtype.name in ("int4", "uint4"):
        return (-8, 7) if dtype.name == "int4" else (0, 15)
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def _spread(values: Array, shape: Sequence[int], axis: int, block: int) -> Array:
    """Return one value for each element of a shape, or something that broadcasts to that.

    Args:
        axis: the axis that `values` run along, or with `block` the axis along which that many elements share one; -1:
            there is one value.
    """
    if block:
        return np.repeat(values, block, axis=axis).take(range(shape[axis]), axis=axis)
    if axis < 0 or values.size == 1:
        return values.reshape(-1)[:1].reshape(())
    return values.reshape([-1 if index == axis else 1 for index in range(len(shape))])
