"""The graph that `absorb` writes while it reads another one: nodes, constants, and which tensor has which grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import ModelError
from edgedeploy.prepare.graph import View, attributes, drop_unused_constants
from edgedeploy.records.quantization import (
    ActivationRange,
    DynamicActivation,
    Grid,
    SourceQuantization,
    WeightQuantization,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]

# From this version on, onnx's reference implementation knows QuantizeLinear and DequantizeLinear. What 10 to 18 say of
# them is contained in it (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html, differences of versions).
_OLDEST_EVALUATED = {"QuantizeLinear": 19, "DequantizeLinear": 19}
# Operators that only move values: what they read and write has one grid.
MOVES = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Slice", "Gather", "Identity", "Expand",
    "Tile", "DepthToSpace", "SpaceToDepth", "Split", "Concat", "Pad", "Resize",
}  # fmt: skip
# Operators whose output is never negative, whatever they read.
_NEVER_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Sqrt", "Softplus"}
# Operators that keep a sign: with inputs that are never negative, their output is not either.
_KEEPS_SIGN = MOVES - {"Pad", "Resize"} | {
    "Add",
    "Mul",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "ReduceMean",
}


def refusal(node: NodeProto, why: str) -> ModelError:
    """Return the error for a quantized node that cannot be read."""
    return ModelError(f"the quantized node {node.name or node.output[0]!r} ({node.op_type}) cannot be read: {why}")


def inner(node: NodeProto) -> list[NodeProto]:
    """Return the nodes of a node's branches and loop bodies."""
    return [child for item in node.attribute for graph in (item.g, *item.graphs) for child in graph.node]


def reads(node: NodeProto) -> list[str]:
    """Return what a node reads, what its branches and loop bodies take from outside included."""
    return [name for name in node.input if name] + [name for child in inner(node) for name in reads(child)]


def rename_inside(node: NodeProto, names: Mapping[str, str]) -> None:
    """Rename what branches and loop bodies of a node read from outside."""
    for child in inner(node):
        for index, name in enumerate(child.input):
            child.input[index] = names.get(name, name)
        rename_inside(child, names)


@dataclass(frozen=True, slots=True)
class Codes:
    """An integer tensor of the source: the float tensor that it stands for, and its grid."""

    tensor: str
    grid: Grid
    dtype: np.dtype[Any]


@dataclass(slots=True)
class CleanGraph:
    """A graph that is read (`seen`) and what is written of it.

    Attributes:
        names: tensor of the source → tensor of the result, where they differ.
        codes: integer tensor of the source → what it stands for.
        dynamic: tensor of the source that is quantized anew in each inference → how.
        activations: tensor of the result → grid.
        branches: (tensor, grid) → the tensor that has this grid where the tensor itself does not.
        made: new initializers.
        varying: tensors of the source that depend on its inputs, or that no constant is computed from.
    """

    seen: View
    opset: int
    nodes: list[NodeProto] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    dynamic: dict[str, DynamicActivation] = field(default_factory=dict)
    activations: dict[str, Grid] = field(default_factory=dict)
    branches: dict[tuple[str, Grid], str] = field(default_factory=dict)
    weights: dict[str, WeightQuantization] = field(default_factory=dict)
    dynamic_weights: dict[str, DynamicActivation] = field(default_factory=dict)
    bias_codes: dict[str, None] = field(default_factory=dict)
    made: dict[str, Array] = field(default_factory=dict)
    stored: dict[Any, str] = field(default_factory=dict)
    evaluated: dict[str, Array | None] = field(default_factory=dict)
    producers: dict[str, NodeProto] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    varying: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        inputs = {value.name for value in self.seen.graph.input} - set(self.seen.constants)
        self.taken = {*self.seen.constants, *self.seen.producers, *inputs}
        self.varying = inputs
        for node in self.seen.graph.node:
            given = reads(node)
            if not given or node.domain or inner(node) or not self.varying.isdisjoint(given):
                self.varying.update(node.output)

    def clips_negatives(self, node: NodeProto) -> bool:
        """Whether a node is a Clip that lets nothing negative pass."""
        if node.op_type != "Clip":
            return False
        low = attributes(node).get("min")
        if len(node.input) > 1 and node.input[1]:
            value = self.value(node.input[1])
            low = None if value is None else float(value.astype(np.float32))
        return low is not None and low >= 0

    def never_negative(self, tensor: str) -> bool:
        """Whether a tensor of the result cannot be negative, as far as the operators before it tell."""
        grid = self.activations.get(tensor)
        if grid is not None and grid.low_code >= grid.zero_point:
            return True
        if tensor in self.made or tensor in self.seen.constants:
            value = self.made[tensor] if tensor in self.made else self.seen.constants[tensor]
            return value.dtype.kind == "f" and bool((value.astype(np.float32) >= 0).all())
        node = self.producers.get(tensor)
        if node is None:
            return False
        if node.op_type in _NEVER_NEGATIVE or self.clips_negatives(node):
            return True
        joins = node.op_type in ("Add", "Mul", "Concat")
        return node.op_type in _KEEPS_SIGN and all(
            self.never_negative(name) for name in (node.input if joins else node.input[:1])
        )

    def add_clamp(self, clamp: tuple[str, float], source: str, result: str) -> None:
        """Add a clamp (operator, upper end of a Clip), or an Identity."""
        from onnx import helper

        inputs = [source]
        if clamp[0] == "Clip":
            for end, value in (("low", 0.0), ("high", clamp[1])):
                name = self.fresh(f"{result}/{end}")
                self.made[name] = np.asarray(value, np.float32)
                inputs.append(name)
        self.emit(helper.make_node(clamp[0], inputs, [result], name=f"{result}/{clamp[0]}"))

    def weight_behind(self, tensor: str) -> str | None:
        """Return the quantized initializer that a tensor is a rearrangement of."""
        while tensor not in self.weights:
            node = self.producers.get(tensor)
            if node is None or node.op_type not in ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze"):
                return None
            tensor = node.input[0]
        return tensor

    def finish(self, model: ModelProto) -> tuple[ModelProto, SourceQuantization]:
        """Write the result into a model and return it with the record."""
        for name in [value.name for value in model.graph.output]:
            self._give_output(name)
        self._drop_dead(model)
        self._drop_grids_before_clamps(model)
        written = {name for node in self.nodes for name in node.output} | {value.name for value in model.graph.input}
        self._write(model)
        constants = {item.name for item in model.graph.initializer}
        for node in model.graph.node:
            if missing := [name for name in node.input if name and name not in written and name not in constants]:
                raise refusal(node, f"it reads {missing[0]!r}, which only has a meaning on integers")
        record = SourceQuantization(
            activations={name: self._range(name, grid) for name, grid in self.activations.items() if name in written},
            weights={name: grid for name, grid in self.weights.items() if name in constants},
            dynamic={name: how for name, how in self.dynamic_weights.items() if name in constants},
            bias_codes=tuple(name for name in self.bias_codes if name in constants),
        )
        return model, record

    def _range(self, name: str, grid: Grid) -> ActivationRange:
        step = float(np.float32(grid.scale))
        low, high = (step * (code - grid.zero_point) for code in (grid.low_code, grid.high_code))
        # Codes for values that never occur are room that an asymmetric grid can use.
        lowest = 0.0 if self.never_negative(name) else low
        return ActivationRange(low=min(max(low, lowest), 0.0), high=max(high, 0.0), origin="trained", grid=grid)

    def _give_output(self, name: str) -> None:
        """Make a graph output of the name that it had."""
        from onnx import helper

        if name in self.codes:
            self._quantize_output(name)
            return
        tensor = self.now(name)
        if tensor == name:
            return
        is_free = tensor in self.producers and tensor not in self.seen.outputs and name not in self.producers
        if not is_free:
            self.emit(helper.make_node("Identity", [tensor], [name], name=f"{name}/Identity"))
            return
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if item == tensor else item for item in names]
            rename_inside(node, {tensor: name})
        self.producers[name] = self.producers.pop(tensor)
        self.names = {key: name if item == tensor else item for key, item in self.names.items()} | {tensor: name}
        if tensor in self.activations:
            self.activations[name] = self.activations.pop(tensor)
        self.codes = {
            key: Codes(name if item.tensor == tensor else item.tensor, item.grid, item.dtype)
            for key, item in self.codes.items()
        }

    def _quantize_output(self, name: str) -> None:
        """Write the integers that the graph hands out as float arithmetic."""
        from onnx import helper

        codes = self.codes[name]
        parts = {"step": codes.grid.scale, "zero": codes.grid.zero_point, "low": codes.grid.low_code}
        parts["high"] = codes.grid.high_code
        constant = {part: self.fresh(f"{name}/{part}") for part in parts}
        self.made.update({constant[part]: np.asarray(value, np.float32) for part, value in parts.items()})
        tensor = codes.tensor
        for kind, more in (
            ("Div", ["step"]),
            ("Round", []),
            ("Add", ["zero"]),
            ("Clip", ["low", "high"]),
        ):
            result = self.fresh(f"{name}/{kind}")
            self.emit(helper.make_node(kind, [tensor, *(constant[part] for part in more)], [result], name=result))
            tensor = result
        to = helper.np_dtype_to_tensor_dtype(codes.dtype)
        self.emit(helper.make_node("Cast", [tensor], [name], name=f"{name}/Cast", to=to))

    def _drop_dead(self, model: ModelProto) -> None:
        wanted = {value.name for value in model.graph.output}
        kept = []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted.update(reads(node))
        self.nodes = kept[::-1]

    def _drop_grids_before_clamps(self, model: ModelProto) -> None:
        """Leave out the grid of a tensor that one clamp alone reads, whose output has the same grid.

        Not where the clamp cuts off codes that are used: integers cannot take its place there, and without a grid of
        its own the node before it would compute in float.
        """
        readers: dict[str, list[NodeProto]] = {value.name: [] for value in model.graph.output}
        outputs = set(readers)
        for node in self.nodes:
            for name in reads(node):
                readers.setdefault(name, []).append(node)
        for tensor, grid in list(self.activations.items()):
            own = readers.get(tensor, [])
            is_only_clamped = len(own) == 1 and tensor not in outputs and own[0].op_type in ("Relu", "Clip")
            if is_only_clamped and self.activations.get(own[0].output[0]) == grid and self._ends_above(own[0], grid):
                del self.activations[tensor]

    def _ends_above(self, clamp: NodeProto, grid: Grid) -> bool:
        """Whether a clamp lets the highest value of a grid pass, as far as rounding to the grid tells."""
        if clamp.op_type == "Relu":
            return True
        high = attributes(clamp).get("max", np.inf)
        if len(clamp.input) > 2 and clamp.input[2]:
            name = clamp.input[2]
            value = self.made[name] if name in self.made else self.value(name)
            high = -np.inf if value is None else float(value.astype(np.float32))
        return bool(np.rint(high / np.float32(grid.scale)) >= grid.high_code - grid.zero_point)

    def _write(self, model: ModelProto) -> None:
        from onnx import numpy_helper

        graph = model.graph
        kept = [item for item in graph.initializer if item.name not in self.made]
        del graph.initializer[:], graph.node[:], graph.value_info[:], graph.quantization_annotation[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(kept)
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in self.made.items())
        drop_unused_constants(model)
        domains = {node.domain for node in graph.node} | {"", "ai.onnx"}
        opsets = [item for item in model.opset_import if item.domain in domains]
        del model.opset_import[:]
        model.opset_import.extend(opsets)

    def emit(self, node: NodeProto) -> None:
        """Write a node."""
        self.nodes.append(node)
        self.producers.update(dict.fromkeys(node.output, node))

    def now(self, name: str) -> str:
        """Return what a tensor of the source is called in the result."""
        return self.names.get(name, name)

    def fresh(self, wanted: str) -> str:
        """Return a name that no tensor has yet, and take it."""
        name, count = wanted, 1
        while name in self.taken:
            count += 1
            name = f"{wanted}/{count}"
        self.taken.add(name)
        return name

    def grid_of(self, node: NodeProto) -> tuple[Array, Array, int, int]:
        """Return scale, zero-point, axis (-1: one scale for all) and block of a QuantizeLinear or DequantizeLinear."""
        settings = attributes(node)
        scale = self.constant(node, 1).astype(np.float32)
        if len(node.input) > 2 and node.input[2]:
            zero_point = self.constant(node, 2)
        else:
            zero_point = np.zeros(scale.shape, self._storage(node, settings))
        block = int(settings.get("block_size", 0))
        axis = int(settings.get("axis", 1))
        if scale.size == 1 and not block:
            return scale, zero_point, -1, 0
        shape = self.value(node.input[0])
        if axis < 0 and shape is not None:
            axis += shape.ndim
        return scale, zero_point, axis, block

    def _storage(self, node: NodeProto, settings: Mapping[str, Any]) -> np.dtype[Any]:
        """Return the type of a node's integers where no zero-point tells it."""
        if node.op_type == "DequantizeLinear":
            if node.input[0] in self.codes:
                return self.codes[node.input[0]].dtype
            value = self.value(node.input[0])
            if value is not None:
                return value.dtype
        if settings.get("output_dtype"):
            from onnx import helper

            stored: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(settings["output_dtype"])
            return stored
        return np.dtype(np.uint8)

    def constant(self, node: NodeProto, index: int) -> Array:
        """Return the constant that a node reads, or raise ModelError."""
        value = self.value(node.input[index])
        if value is None:
            raise refusal(node, f"its input {node.input[index]!r} is not a constant; export the model in eval mode")
        return value

    def value(self, name: str) -> Array | None:
        """Return the value of a tensor of the source that does not depend on the graph's inputs, or None."""
        if name in self.seen.constants:
            return self.seen.constants[name]
        if name not in self.evaluated:
            self.evaluated[name] = None
            node = self.seen.producers.get(name)
            if node is not None and name not in self.varying:
                inputs = {item: self.value(item) for item in node.input if item}
                if all(value is not None for value in inputs.values()):
                    self._evaluate(node, inputs)
        return self.evaluated[name]

    def _evaluate(self, node: NodeProto, inputs: Mapping[str, Array | None]) -> None:
        """Compute a node of constants."""
        from onnx import TensorProto, helper
        from onnx.reference import ReferenceEvaluator

        names = [name for name in node.output if name]
        nothing = TensorProto.UNDEFINED
        graph = helper.make_graph(
            [node],
            "constants",
            [helper.make_tensor_value_info(name, nothing, None) for name in inputs],
            [helper.make_tensor_value_info(name, nothing, None) for name in names],
        )
        opset = max(self.opset, _OLDEST_EVALUATED.get(node.op_type, 0))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        values: Any = ReferenceEvaluator(model).run(None, dict(inputs))
        self.evaluated.update(zip(names, values, strict=True))
