"""An ONNX graph while it is rewritten for TensorRT: constants, types, sizes, new names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import CompileError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

# Element types of ONNX (onnx.proto, TensorProto.DataType).
FLOAT, UINT8, INT8, INT32, FLOAT16 = 1, 2, 3, 6, 10
OWN_DOMAINS = ("", "ai.onnx")
# Larger constants are not shown to type inference, which copies the whole model; shapes and axes are far smaller.
_LARGEST_SHOWN = 1024


@dataclass(slots=True)
class Draft:
    """A model that is being rewritten, and what is known of it.

    Attributes:
        model: changed in place; Constant nodes of its main graph have become initializers.
        backend: who compiles, for the text of errors.
        kinds: tensor → its ONNX element type; missing where it cannot be inferred.
        shapes: tensor → its sizes, None for an axis that stays open; missing where its rank is unknown.
    """

    model: ModelProto
    backend: str
    kinds: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    _constants: dict[str, TensorProto] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.model.graph

    def look(self) -> None:
        """Look constants, types and sizes up anew, after the graph was changed."""
        self._constants = {item.name: item for item in self.graph.initializer}
        self._taken = set(self._constants) | {value.name for value in self.graph.input}
        for node in nodes_within(self.graph):
            self._taken |= {node.name, *node.input, *node.output}
        self.kinds, self.shapes = _inferred(self.model)

    def has_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer."""
        return name in self._constants

    def constant(self, name: str) -> TensorProto:
        """Return an initializer as it is stored."""
        return self._constants[name]

    def value(self, name: str) -> NDArray[Any] | None:
        """Return the value of an initializer, None for any other tensor."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def add(self, name: str, value: Any) -> str:
        """Add an initializer under this name, or one like it that is free, and return its name."""
        from onnx import numpy_helper

        name, array = self.fresh(name), np.ascontiguousarray(value)
        self.graph.initializer.append(numpy_helper.from_array(array.reshape(np.shape(value)), name))
        self._constants[name] = self.graph.initializer[-1]
        self.kinds[name], self.shapes[name] = self._constants[name].data_type, array.shape
        return name

    def fresh(self, name: str) -> str:
        """Return a name that no tensor and no node has yet, and keep it."""
        free, number = name, 1
        while free in self._taken:
            free, number = f"{name}_{number}", number + 1
        self._taken.add(free)
        return free

    def readers(self) -> dict[str, list[NodeProto]]:
        """Return which nodes of the main graph read each tensor, in their bodies too."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in names_read(node):
                found.setdefault(name, []).append(node)
        return found

    def makers(self) -> dict[str, NodeProto]:
        """Return the node of the main graph that makes each tensor."""
        return {name: node for node in self.graph.node for name in node.output if name}

    def replace_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Put nodes in the place of those of the main graph."""
        # A node of a repeated field dies with it, so what is kept is copied first.
        copies = [_copied(node) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)

    def drop_unread_constants(self) -> None:
        """Remove initializers that nothing reads."""
        read = {name for node in self.graph.node for name in names_read(node)}
        read |= {value.name for value in self.graph.output}
        # Popped one by one: to rebuild the list would copy every weight.
        for index in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[index].name not in read:
                del self.graph.initializer[index]
        self._constants = {item.name: item for item in self.graph.initializer}

    def refused(self, node: NodeProto, what: str, hint: str) -> CompileError:
        """Return the error that names a node."""
        return CompileError(what, backend=self.backend, node=node.name, op=node.op_type, hint=hint)


def draft_of(model: ModelProto, backend: str) -> Draft:
    """Return a model with local functions inlined, named nodes and constants as initializers; `look` comes next."""
    import onnx.inliner

    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    model.doc_string = ""
    del model.metadata_props[:]
    _name_nodes(model.graph)
    _settle_constants(model.graph)
    return Draft(model, backend)


def copied(draft: Draft) -> Draft:
    """Return a copy that can be rewritten by itself."""
    from onnx import ModelProto

    model = ModelProto()
    model.CopyFrom(draft.model)
    copy = Draft(model, draft.backend)
    copy.look()
    return copy


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    from onnx import helper

    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def bodies(node: NodeProto) -> list[GraphProto]:
    """Return the graphs that a node has as attributes: branches and loop bodies."""
    return [
        inner for item in node.attribute for inner in [*([item.g] if item.type == item.GRAPH else []), *item.graphs]
    ]


def nodes_within(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield all nodes, those of bodies too."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from nodes_within(body)


def names_read(node: NodeProto) -> set[str]:
    """Return what a node reads, including what its bodies take from outside."""
    names = {name for name in node.input if name}
    for body in bodies(node):
        own = {value.name for value in body.input} | {item.name for item in body.initializer}
        own |= {name for child in body.node for name in child.output}
        wanted = {name for child in body.node for name in names_read(child)} | {value.name for value in body.output}
        names |= wanted - own
    return names


def rename_read(node: NodeProto, names: dict[str, str]) -> None:
    """Give tensors that a node's bodies take from outside other names."""
    for body in bodies(node):
        for child in body.node:
            for index, name in enumerate(child.input):
                child.input[index] = names.get(name, name)
            rename_read(child, names)
        # A branch may hand a tensor from outside on as it is.
        for value in body.output:
            value.name = names.get(value.name, value.name)


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Give a node an attribute, or another value for the one it has."""
    from onnx import helper

    drop_attributes(node, name)
    node.attribute.append(helper.make_attribute(name, value))


def drop_attributes(node: NodeProto, *names: str) -> None:
    """Take attributes from a node."""
    kept = [_copied(item) for item in node.attribute if item.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _copied(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _name_nodes(graph: GraphProto) -> None:
    """Give every node a name of its own: layers of an engine are called by it."""
    used: set[str] = set()
    for index, node in enumerate(nodes_within(graph)):
        node.doc_string = ""
        del node.metadata_props[:]
        name = node.name or f"{node.op_type}_{index}"
        node.name = name if name not in used else f"{name}_{index}"
        used.add(node.name)


def _settle_constants(graph: GraphProto) -> None:
    """Turn Constant nodes of the main graph into initializers."""
    from onnx import numpy_helper

    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type != "Constant" or node.domain not in OWN_DOMAINS or not node.attribute:
            continue
        item = node.attribute[0]
        if item.name == "value":
            tensor = _copied(item.t)
        elif item.name in ("value_float", "value_floats"):
            tensor = numpy_helper.from_array(np.asarray(attributes(node)[item.name], np.float32))
        elif item.name in ("value_int", "value_ints"):
            tensor = numpy_helper.from_array(np.asarray(attributes(node)[item.name], np.int64))
        else:
            continue
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        del graph.node[index]


def _inferred(model: ModelProto) -> tuple[dict[str, int], dict[str, tuple[int | None, ...]]]:
    import onnx

    inferred = onnx.shape_inference.infer_shapes(_slim(model), data_prop=True).graph
    kinds: dict[str, int] = {}
    shapes: dict[str, tuple[int | None, ...]] = {}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        tensor = value.type.tensor_type
        if tensor.elem_type:
            kinds[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(
                int(size.dim_value) if size.HasField("dim_value") else None for size in tensor.shape.dim
            )
    for item in model.graph.initializer:
        kinds[item.name], shapes[item.name] = item.data_type, tuple(item.dims)
    return kinds, shapes


def _slim(model: ModelProto) -> ModelProto:
    """Return a copy in which large constants have become inputs, so that inference copies no weights."""
    import onnx
    from onnx import helper

    slim = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = slim.graph
    graph.name = model.graph.name or "main"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    known = {value.name for value in model.graph.input}
    for item in model.graph.initializer:
        if int(np.prod(item.dims, dtype=np.int64)) <= _LARGEST_SHOWN:
            graph.initializer.append(item)
        elif item.name not in known:
            graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))
    return slim
