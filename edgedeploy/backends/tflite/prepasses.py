"""Rewrites an ONNX graph so that onnx2tf makes a right TFLite model of it, or refuses it by node and operator.

What is rewritten or refused here was seen to go wrong, most of it in silence: onnx2tf 2.6.9 with `flatbuffer_direct`,
ai-edge-litert 2.3.0; tests/backends/test_tflite_prepasses.py runs each case before and after. A node that stands for
another keeps its name, nodes beside it are called after it, and every tensor of the source keeps its name and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import CompileError
from edgedeploy.records.quantization import Grid

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Shape = tuple[int | None, ...]
Rule = Callable[["_Graph", "NodeProto"], "list[NodeProto] | None"]

_BACKEND = "tflite"
# The lowest finite float32: what a float MaxPool may be padded with, as infinity times zero is no number.
_LOWEST = float(np.finfo(np.float32).min)


def prepare(graph: ModelProto, activations: Mapping[str, Grid] | None = None) -> ModelProto:
    """Return a graph that onnx2tf converts right; the one that is given stays as it is.

    Args:
        graph: float32, as `qdq.read_form` gives it.
        activations: the grids of its rounded tensors; what is padded is padded with a number that lies on them.

    Raises:
        CompileError: an operator, or a way of using it, that TFLite has no kernel for, or that comes out wrong.
    """
    import onnx

    _demand_possible(graph)
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    draft = _Graph(model, activations or {})
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        # What an earlier node has taken over stands in the list already, under its own name.
        nodes += [] if node.name in draft.taken else _rewritten(draft, node)
    draft.finish(nodes)
    return model


def _rewritten(draft: _Graph, node: NodeProto) -> list[NodeProto]:
    for rule in _RULES.get(node.op_type, ()):
        made = rule(draft, node)
        if made is not None:
            return made
    return [node]


@dataclass(slots=True)
class _Graph:
    """One graph while it is rewritten: what is known about its tensors, and what is added to it.

    Attributes:
        shapes: tensor → shape with None where it is open; a tensor that is missing has an unknown rank.
        kinds: tensor → ONNX element type.
        taken: names of nodes that an earlier node has taken over.
        bounds: tensor of ours → a number that none of its values is below.
    """

    model: ModelProto
    grids: Mapping[str, Grid]
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    makers: dict[str, NodeProto] = field(default_factory=dict)
    readers: dict[str, list[NodeProto]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    bounds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look the graph up."""
        import onnx
        from onnx import numpy_helper

        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        for value in [*inferred.input, *inferred.value_info, *inferred.output]:
            tensor = value.type.tensor_type
            self.kinds[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.shapes[value.name] = tuple(
                    int(size.dim_value) if size.WhichOneof("value") == "dim_value" else None
                    for size in tensor.shape.dim
                )
        for item in self.model.graph.initializer:
            self.constants[item.name] = numpy_helper.to_array(item)
            self.shapes[item.name], self.kinds[item.name] = tuple(item.dims), item.data_type
        used: set[str] = set()
        for index, node in enumerate(self.model.graph.node):
            if not node.name or node.name in used:
                node.name = f"{node.name or node.op_type}_{index}"
            used.add(node.name)
            for name in node.output:
                self.makers[name] = node
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    @property
    def outputs(self) -> set[str]:
        """Names of the graph's outputs."""
        return {value.name for value in self.model.graph.output}

    def opset(self) -> int:
        """Return the version of ONNX's own operators."""
        return next((int(item.version) for item in self.model.opset_import if item.domain in ("", "ai.onnx")), 0)

    def constant(self, name: str, value: Any) -> str:
        """Add a constant and return its name."""
        from onnx import numpy_helper

        array = np.asarray(value)
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        self.constants[name] = array
        return name

    def rank(self, tensor: str) -> int | None:
        """Return how many axes a tensor has, None where that is unknown."""
        return len(self.shapes[tensor]) if tensor in self.shapes else None

    def sole_reader(self, tensor: str) -> NodeProto | None:
        """Return the only node that reads a tensor that is no output, or None."""
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def finish(self, nodes: Sequence[NodeProto]) -> None:
        """Put the nodes in, and leave out constants that nothing reads any more."""
        graph = self.model.graph
        kept = list(nodes)
        del graph.node[:]
        graph.node.extend(kept)
        del graph.value_info[:]
        used = _read_by(kept) | self.outputs
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name not in used:
                del graph.initializer[index]


def _read_by(nodes: Sequence[NodeProto]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        names.update(node.input)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                names |= _read_by(inner.node) | {value.name for value in inner.output}
    return names


def _settings(node: NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _node(operator: str, inputs: Sequence[str], output: str, name: str, **settings: Any) -> NodeProto:
    from onnx import helper

    return helper.make_node(operator, list(inputs), [output], name=name, **settings)


def _refused(node: NodeProto, what: str, hint: str) -> CompileError:
    return CompileError(what, backend=_BACKEND, node=node.name, op=node.op_type, hint=hint)


def _sizes(node: NodeProto, sizes: Sequence[int | None]) -> NDArray[np.int64]:
    """Return sizes as Reshape takes them, with -1 for the one that is open."""
    if sum(size is None for size in sizes) > 1:
        raise _refused(
            node, "more than one of its axes is open", "give the model's inputs fixed sizes but for the batch"
        )
    return np.array([-1 if size is None else size for size in sizes], np.int64)


def _reshape(
    draft: _Graph, node: NodeProto, source: str, result: str, word: str, sizes: Sequence[int | None]
) -> NodeProto:
    name = f"{node.name}/{word}"
    return _node("Reshape", [source, draft.constant(f"{name}/sizes", _sizes(node, sizes))], result, name)


def _integers(values: Sequence[int | None]) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _product_of(sizes: Sequence[int | None]) -> int | None:
    return None if any(size is None for size in sizes) else math.prod(size or 0 for size in sizes)


def _reduced(draft: _Graph, operator: str, source: str, result: str, name: str, axes: Sequence[int]) -> NodeProto:
    """Return a reduction that keeps its axes; their list became an input in opset 18, for sums in 13."""
    if draft.opset() >= (13 if operator == "ReduceSum" else 18):
        return _node(operator, [source, draft.constant(f"{name}/axes", _integers(axes))], result, name, keepdims=1)
    return _node(operator, [source], result, name, keepdims=1, axes=list(axes))


# Pools.


@dataclass(frozen=True, slots=True)
class _Window:
    """A pool along one spatial axis.

    Attributes:
        size: of the input.
        kernel, stride, dilation: of the windows.
        before, after: cells of padding that the node asks for.
        count: how many windows there are.
        beyond: cells behind the input that the last window reaches, more than `after` with ceil_mode.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    count: int
    beyond: int

    @property
    def is_same(self) -> bool:
        """Whether TFLite's own padding SAME puts as many cells on either side."""
        return self.count == -(-self.size // self.stride) and self.before == (self.before + self.beyond) // 2

    def cells(self, *, with_padding: bool) -> NDArray[np.float64]:
        """Return how many cells each window counts, of the input and of the padding that the node asks for."""
        low, high = (-self.before, self.size + self.after) if with_padding else (0, self.size)
        starts = np.arange(self.count)[:, None] * self.stride - self.before
        places = starts + np.arange(self.kernel)[None, :] * self.dilation
        return np.asarray(((places >= low) & (places < high)).sum(1), np.float64)


def _windows(draft: _Graph, node: NodeProto) -> list[_Window] | None:
    """Return a pool's windows along each spatial axis, None where sizes are open.

    Source: ONNX operators, MaxPool-22: with ceil_mode a last window that would start in the end padding is left out.
    """
    settings = _settings(node)
    kernel = list(settings["kernel_shape"])
    axes = len(kernel)
    shape = draft.shapes.get(node.input[0])
    if shape is None or any(size is None for size in shape[2:]):
        return None
    strides = settings.get("strides") or [1] * axes
    dilations = settings.get("dilations") or [1] * axes
    pads = settings.get("pads") or [0] * (2 * axes)
    automatic = settings.get("auto_pad", b"NOTSET").decode()
    windows = []
    for axis, size in enumerate(size or 0 for size in shape[2:]):
        stride, reach = strides[axis], (kernel[axis] - 1) * dilations[axis] + 1
        before, after = (pads[axis], pads[axis + axes]) if automatic == "NOTSET" else (0, 0)
        if automatic.startswith("SAME"):
            total = max(0, (-(-size // stride) - 1) * stride + reach - size)
            before = total // 2 if automatic == "SAME_UPPER" else total - total // 2
            after = total - before
        room = size + before + after - reach
        is_ceil = bool(settings.get("ceil_mode"))
        count = (-(-room // stride) if is_ceil else room // stride) + 1
        if is_ceil and (count - 1) * stride >= size + before:
            count -= 1
        beyond = max(0, (count - 1) * stride + reach - size - before)
        windows.append(_Window(size, kernel[axis], stride, dilations[axis], before, after, count, beyond))
    return windows


def _is_padded_as_tflite(windows: Sequence[_Window]) -> bool:
    """Whether TFLite's padding SAME, which counts no cell of it, does; onnx2tf knows it for pools over two axes."""
    has_padding = any(window.before or window.beyond for window in windows)
    return has_padding and len(windows) == 2 and all(window.is_same for window in windows)


def _plain_pool(node: NodeProto, source: str, result: str, windows: Sequence[_Window], **more: Any) -> NodeProto:
    """Return a pool whose windows all lie within its input, or that pads as TFLite does."""
    return _node(
        node.op_type,
        [source],
        result,
        node.name,
        kernel_shape=[window.kernel for window in windows],
        strides=[window.stride for window in windows],
        **more,
    )


def _padded(draft: _Graph, node: NodeProto, windows: Sequence[_Window], value: float) -> tuple[str, list[NodeProto]]:
    """Return what a pool reads with the cells around it that its windows reach, and the node that puts them there."""
    source = node.input[0]
    if not any(window.before or window.beyond for window in windows):
        return source, []
    cells = [0, 0, *(window.before for window in windows), 0, 0, *(window.beyond for window in windows)]
    name, result = f"{node.name}/pad", f"{node.output[0]}/padded"
    if draft.opset() < 11:
        return result, [_node("Pad", [source], result, name, pads=cells, value=value)]
    inputs = [
        source,
        draft.constant(f"{name}/cells", _integers(cells)),
        draft.constant(f"{name}/value", np.float32(value)),
    ]
    return result, [_node("Pad", inputs, result, name)]


def _lower_bound(draft: _Graph, tensor: str) -> float:
    """Return a number that no value of a tensor is below: that of its grid, of what makes it, or float32's lowest."""
    if tensor in draft.bounds:
        return draft.bounds[tensor]
    if tensor in draft.grids:
        grid = draft.grids[tensor]
        return float(np.float32(grid.scale) * np.float32(grid.low_code - grid.zero_point))
    maker = draft.makers.get(tensor)
    if maker is None:
        return _LOWEST
    if maker.op_type in ("Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs", "Softplus"):
        return 0.0
    if maker.op_type == "Clip" and len(maker.input) > 1 and maker.input[1] in draft.constants:
        return float(draft.constants[maker.input[1]])
    if maker.op_type in ("MaxPool", "AveragePool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity"):
        return _lower_bound(draft, maker.input[0])
    return _LOWEST


def _max_pool(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Pad with a number of the tensor's own grid: onnx2tf pads with float32's lowest, which no 8-bit grid can hold."""
    windows = _windows(draft, node)
    if windows is None or len([name for name in node.output if name]) > 1:
        return None
    if len(windows) == 3:
        return _pool_by_axes(draft, node, windows)
    if any(window.dilation > 1 for window in windows):
        return _pool_of_picked(draft, node, windows)
    if _is_padded_as_tflite(windows):
        return [_plain_pool(node, node.input[0], node.output[0], windows, auto_pad="SAME_UPPER")]
    source, nodes = _padded(draft, node, windows, _lower_bound(draft, node.input[0]))
    return [*nodes, _plain_pool(node, source, node.output[0], windows)]


def _pool_of_picked(draft: _Graph, node: NodeProto, windows: Sequence[_Window]) -> list[NodeProto]:
    """Return a dilated MaxPool, which TFLite does not have, as one over the rows and columns that its windows see.

    A window that reaches beyond the input sees one of its own cells twice instead, so that nothing is padded.
    """
    nodes: list[NodeProto] = []
    source = node.input[0]
    for axis, window in enumerate(windows, 2):
        starts = np.arange(window.count)[:, None] * window.stride - window.before
        places = starts + np.arange(window.kernel)[None, :] * window.dilation
        is_inside = (places >= 0) & (places < window.size)
        own = places[np.arange(window.count), is_inside.argmax(1)]
        name = f"{node.name}/picked_{axis}"
        rows = draft.constant(f"{name}/rows", np.where(is_inside, places, own[:, None]).reshape(-1))
        nodes.append(_node("Gather", [source, rows], f"{name}/value", name, axis=axis))
        source = nodes[-1].output[0]
    kernel = [window.kernel for window in windows]
    return [*nodes, _node("MaxPool", [source], node.output[0], node.name, kernel_shape=kernel, strides=kernel)]


def _average_pool(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Pad with zeros that are seen, and correct what a window counts where that is not its whole kernel."""
    windows = _windows(draft, node)
    if windows is None:
        return None
    if any(window.dilation > 1 for window in windows):
        raise _refused(node, "TFLite has no average pool with dilations", "use a depthwise convolution")
    if len(windows) == 3:
        return _pool_by_axes(draft, node, windows)
    with_padding = bool(_settings(node).get("count_include_pad"))
    if not with_padding and _is_padded_as_tflite(windows):
        return [_plain_pool(node, node.input[0], node.output[0], windows, auto_pad="SAME_UPPER")]
    if not with_padding and node.input[0] in draft.grids and (chosen := _chosen_windows(draft, node, windows)):
        return chosen
    source, nodes = _padded(draft, node, windows, 0.0)
    factor = np.ones(1)
    for window in windows:
        factor = factor[..., None] * (window.kernel / window.cells(with_padding=with_padding))
    if (factor == 1).all():
        return [*nodes, _plain_pool(node, source, node.output[0], windows)]
    pooled = _plain_pool(node, source, f"{node.output[0]}/of_kernel", windows)
    pooled.name = f"{node.name}/of_kernel"
    inputs = [pooled.output[0], draft.constant(f"{node.name}/factor", factor[None].astype(np.float32))]
    return [*nodes, pooled, _node("Mul", inputs, node.output[0], node.name)]


def _pool_by_axes(draft: _Graph, node: NodeProto, windows: Sequence[_Window]) -> list[NodeProto]:
    """Return a pool over three axes, whose file TFLite cannot load, as one over two axes and one over the third."""
    shape = draft.shapes[node.input[0]]
    batch, channels = shape[0], shape[1]
    depth, height, width = windows
    planes = (batch, None if channels is None else channels * depth.size, height.size, width.size)
    columns = (batch, channels, depth.size, height.count * width.count)
    source, result = node.input[0], node.output[0]
    flat, pooled, column, last = (f"{result}/{word}" for word in ("planes", "pooled", "columns", "last"))
    first = _of_axes(node, flat, pooled, (height, width))
    first.name = f"{node.name}/planes"
    second = _of_axes(node, column, last, (depth, _Window(columns[3], 1, 1, 1, 0, 0, columns[3], 0)))
    draft.shapes |= {flat: planes, column: columns}
    draft.bounds |= dict.fromkeys((flat, column), _lower_bound(draft, source))
    rule = _max_pool if node.op_type == "MaxPool" else _average_pool
    return [
        _reshape(draft, node, source, flat, "to_planes", planes),
        *(rule(draft, first) or [first]),
        _reshape(draft, node, pooled, column, "to_columns", columns),
        *(rule(draft, second) or [second]),
        _reshape(draft, node, last, result, "to_volume", (batch, channels, depth.count, height.count, width.count)),
    ]


def _of_axes(node: NodeProto, source: str, result: str, windows: Sequence[_Window]) -> NodeProto:
    """Return a node's own pool over some of its axes."""
    settings = _settings(node)
    more = {name: settings[name] for name in ("ceil_mode", "count_include_pad") if name in settings}
    made = _plain_pool(node, source, result, windows, **more)
    from onnx import helper

    pads = [*(window.before for window in windows), *(window.after for window in windows)]
    made.attribute.append(helper.make_attribute("pads", pads))
    if any(window.dilation > 1 for window in windows):
        made.attribute.append(helper.make_attribute("dilations", [window.dilation for window in windows]))
    return made


def _chosen_windows(draft: _Graph, node: NodeProto, windows: Sequence[_Window]) -> list[NodeProto]:
    """Return an average pool with stride 1 and TFLite's own padding, and a slice of it; nothing where that is another.

    What corrects the counts of a padded pool is a product, which would round once more than the pool does on integers.
    """
    firsts = [(window.kernel - 1) // 2 - window.before for window in windows]
    lasts = [first + (window.count - 1) * window.stride for first, window in zip(firsts, windows, strict=True)]
    has_corrections = any((window.cells(with_padding=False) != window.kernel).any() for window in windows)
    fits = all(first >= 0 and last < window.size for first, last, window in zip(firsts, lasts, windows, strict=True))
    if not has_corrections or not fits or len(windows) != 2 or draft.opset() < 10:
        return []
    dense = [replace(window, stride=1) for window in windows]
    pooled = _plain_pool(node, node.input[0], f"{node.output[0]}/dense", dense, auto_pad="SAME_UPPER")
    name = f"{node.name}/windows"
    bounds = {
        "starts": firsts,
        "ends": [last + 1 for last in lasts],
        "axes": [2, 3],
        "steps": [window.stride for window in windows],
    }
    inputs = [draft.constant(f"{name}/{word}", _integers(values)) for word, values in bounds.items()]
    return [pooled, _node("Slice", [pooled.output[0], *inputs], node.output[0], name)]


# Products.


def _matrix_product(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Turn a product with a constant matrix into a Gemm, which becomes FULLY_CONNECTED.

    onnx2tf makes BATCH_MATMUL of it, whose 8-bit form gives garbage (relative L2 error 0.93 to 0.97, in silence). The
    bias and the clamp that follow go into the Gemm, as they do in FULLY_CONNECTED.
    """
    source, weight = node.input
    shape, matrix = draft.shapes.get(source), draft.constants.get(weight)
    if matrix is None or matrix.ndim != 2 or shape is None or len(shape) < 2 or source in draft.constants:
        return None
    lead = shape[:-1]
    if sum(size is None for size in lead) > 1:
        return None
    inputs, bias, tail = [source, weight], _bias_behind(draft, node, matrix.shape[1]), node
    if bias is not None:
        tail, constant = bias
        inputs.append(draft.constant(f"{node.name}/bias", draft.constants[constant].reshape(-1)))
    clamp = _clamp_behind(draft, tail)
    draft.taken |= {item.name for item in (tail, clamp) if item is not None and item is not node}
    last = (clamp or tail).output[0]
    if draft.opset() < 11 and bias is None:
        inputs.append(draft.constant(f"{node.name}/bias", np.zeros(matrix.shape[1], np.float32)))
    if len(shape) == 2:
        gemm = _node("Gemm", inputs, tail.output[0] if clamp is not None else last, node.name)
        return [gemm, *_clamp_again(clamp, gemm.output[0], last)]
    flat, product = f"{node.name}/rows", f"{node.name}/product"
    clamped = f"{node.name}/clamped" if clamp is not None else product
    return [
        _reshape(draft, node, source, flat, "flatten", (_product_of(lead), matrix.shape[0])),
        _node("Gemm", [flat, *inputs[1:]], product, node.name),
        *_clamp_again(clamp, product, clamped),
        _reshape(draft, node, clamped, last, "unflatten", (*lead, matrix.shape[1])),
    ]


def _bias_behind(draft: _Graph, node: NodeProto, width: int) -> tuple[NodeProto, str] | None:
    """Return the sum with a constant vector that alone reads a product, and that vector."""
    reader = _follower(draft, node, ("Add",))
    if reader is None:
        return None
    other = next((name for name in reader.input if name != node.output[0]), "")
    value = draft.constants.get(other)
    is_vector = value is not None and value.size == width and value.shape[-1:] == (width,)
    return (reader, other) if is_vector and (draft.rank(node.output[0]) or 0) >= getattr(value, "ndim", 99) else None


def _clamp_behind(draft: _Graph, node: NodeProto) -> NodeProto | None:
    reader = _follower(draft, node, ("Relu", "Clip"))
    return reader if reader is not None and all(name in draft.constants for name in reader.input[1:] if name) else None


def _follower(draft: _Graph, node: NodeProto, operators: Sequence[str]) -> NodeProto | None:
    """Return the node that alone reads another's output, which is not rounded before, if it is one of these."""
    reader = draft.sole_reader(node.output[0])
    is_free = reader is not None and reader.op_type in operators and node.output[0] not in draft.grids
    return reader if is_free else None


def _clamp_again(clamp: NodeProto | None, source: str, result: str) -> list[NodeProto]:
    """Return a clamp in its new place."""
    if clamp is None:
        return []
    return [_node(clamp.op_type, [source, *clamp.input[1:]], result, clamp.name, **_settings(clamp))]


def _clamped_gemm(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Clamp what a Gemm makes before it is reshaped, so that the clamp can go into FULLY_CONNECTED."""
    reshape = _follower(draft, node, ("Reshape",))
    clamp = _clamp_behind(draft, reshape) if reshape is not None else None
    if reshape is None or clamp is None or reshape.input[1] not in draft.constants:
        return None
    if node.input[1] not in draft.constants or reshape.input[0] != node.output[0]:
        return None
    draft.taken |= {reshape.name, clamp.name}
    product, clamped = f"{node.name}/product", f"{node.name}/clamped"
    return [
        _node(node.op_type, node.input, product, node.name, **_settings(node)),
        *_clamp_again(clamp, product, clamped),
        _node("Reshape", [clamped, reshape.input[1]], clamp.output[0], reshape.name, **_settings(reshape)),
    ]


def _gemm(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Take a Gemm apart that onnx2tf cannot convert: of two activations, or with a matrix added."""
    settings = _settings(node)
    has_bias = len(node.input) > 2 and bool(node.input[2])
    bias = draft.constants.get(node.input[2]) if has_bias else None
    is_vector = not has_bias or (bias is not None and bias.ndim <= 1) or (bias is not None and bias.shape[0] == 1)
    if node.input[1] in draft.constants and not settings.get("transA") and is_vector:
        return None
    nodes, sources = [], []
    for name, word in zip(node.input[:2], ("transA", "transB"), strict=True):
        if settings.get(word):
            nodes.append(_node("Transpose", [name], f"{node.name}/{word}/turned", f"{node.name}/{word}", perm=[1, 0]))
        sources.append(nodes[-1].output[0] if settings.get(word) else name)
    nodes.append(_node("MatMul", sources, f"{node.name}/product", f"{node.name}/multiply"))
    scaled = _scaled(draft, node, nodes, nodes[-1].output[0], "alpha")
    if has_bias:
        nodes.append(_node("Add", [scaled, _scaled(draft, node, nodes, node.input[2], "beta")], scaled, node.name))
    nodes[-1].name, nodes[-1].output[0] = node.name, node.output[0]
    return nodes


def _scaled(draft: _Graph, node: NodeProto, nodes: list[NodeProto], source: str, word: str) -> str:
    factor = float(_settings(node).get(word, 1.0))
    if factor == 1.0:
        return source
    name = f"{node.name}/{word}"
    nodes.append(_node("Mul", [source, draft.constant(f"{name}/factor", np.float32(factor))], f"{name}/scaled", name))
    return f"{name}/scaled"


def _einsum(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Write a contraction of two tensors as one matrix product; onnx2tf knows some of them only.

    Axes are sorted into those that both have and that stay (batch), those that one has (rows, columns) and those that
    both have and that are summed over. Source: the lowering of opt_einsum's tensordot, with a batch.
    """
    equation = _settings(node)["equation"].decode().replace(" ", "")
    left, _, result = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation:
        result = "".join(sorted(label for label in set(left) - {","} if left.count(label) == 1))
    shapes = [draft.shapes.get(name) for name in node.input]
    is_plain = "." not in equation and len(terms) == 2 and all(len(set(term)) == len(term) for term in terms)
    if not is_plain or any(shape is None for shape in shapes):
        raise _refused(
            node, f"the contraction {equation!r} has no form in TFLite", "write it with matmul, transpose and sum"
        )
    sizes = {
        label: size
        for term, shape in zip(terms, shapes, strict=True)
        for label, size in zip(term, shape or (), strict=True)
    }
    first, second = terms
    batch = [label for label in result if label in first and label in second]
    summed = [label for label in first if label in second and label not in result]
    rows, columns = ([label for label in result if label in term and label not in batch] for term in terms)
    nodes: list[NodeProto] = []
    operands = []
    for index, (ends, labels) in enumerate(zip(((rows, summed), (summed, columns)), terms, strict=True)):
        order = [*batch, *ends[0], *ends[1]]
        name, term = _summed_out(draft, node, nodes, node.input[index], labels, order, index)
        turn = [term.index(label) for label in order]
        shape = [_product_of([sizes[label] for label in group]) for group in ([batch] if batch else []) + [*ends]]
        operands.append(f"{node.name}/operand_{index}")
        if name in draft.constants:
            draft.constant(operands[-1], draft.constants[name].transpose(turn).reshape(_sizes(node, shape)))
            continue
        name = _turned(draft, node, nodes, name, turn, f"turn_{index}")
        nodes.append(_reshape(draft, node, name, operands[-1], f"group_{index}", shape))
    product, grouped = f"{node.name}/product", f"{node.name}/grouped"
    is_matrix = not batch and operands[1] in draft.constants and draft.opset() >= 11
    nodes.append(_node("Gemm" if is_matrix else "MatMul", operands, product, f"{node.name}/multiply"))
    order = [*batch, *rows, *columns]
    nodes.append(_reshape(draft, node, product, grouped, "ungroup", [sizes[label] for label in order]))
    _turned(draft, node, nodes, grouped, [order.index(label) for label in result], "turn_result")
    nodes[-1].name, nodes[-1].output[0] = node.name, node.output[0]
    return nodes


def _summed_out(
    draft: _Graph, node: NodeProto, nodes: list[NodeProto], name: str, term: str, kept: Sequence[str], index: int
) -> tuple[str, str]:
    """Sum over the axes of an operand that neither the other operand nor the result has."""
    axes = [axis for axis, label in enumerate(term) if label not in kept]
    if not axes:
        return name, term
    word = f"{node.name}/sum_{index}"
    settings: dict[str, Any] = {"keepdims": 0}
    inputs = [name]
    if draft.opset() >= 13:
        inputs.append(draft.constant(f"{word}/axes", _integers(axes)))
    else:
        settings["axes"] = axes
    nodes.append(_node("ReduceSum", inputs, f"{word}/sums", word, **settings))
    return nodes[-1].output[0], "".join(label for label in term if label in kept)


def _turned(draft: _Graph, node: NodeProto, nodes: list[NodeProto], name: str, order: Sequence[int], word: str) -> str:
    if list(order) == sorted(order):
        return name
    result = f"{node.name}/{word}/turned"
    nodes.append(_node("Transpose", [name], result, f"{node.name}/{word}", perm=list(order)))
    return result


# Recurrence.


def _recurrent(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Take the last state of a recurrent layer from its sequence of states; onnx2tf gives another number for it."""
    outputs = [*node.output, "", "", ""][:3]
    is_read = [bool(name) and (name in draft.readers or name in draft.outputs) for name in outputs]
    settings = _settings(node)
    if len(node.input) > 4 and node.input[4]:
        raise _refused(node, "its sequences have lengths of their own", "run sequences of one length, or one by one")
    if is_read[2]:
        raise _refused(
            node, "its last cell state is an output", "use its hidden states, or export the cell step by step"
        )
    if settings.get("layout"):
        raise _refused(node, "its batch comes first (layout = 1)", "export it with time first (layout = 0)")
    states_in = [draft.constants.get(name) for name in node.input[5:7] if name]
    if node.op_type != "GRU" and any(value is not None and value.any() for value in states_in):
        # TFLite keeps states in variables, which can be reset between two inferences to zero only.
        raise _refused(node, "its first state is a constant that is not zero", "make the first state an input")
    if not is_read[1]:
        return None
    shape = draft.shapes.get(node.input[0])
    if shape is None or shape[0] is None:
        raise _refused(node, "its last state depends on a length that is open", "give the sequence a fixed length")
    states = outputs[0] or f"{node.name}/states"
    layer = _node(node.op_type, node.input, states, node.name, **settings)
    direction = settings.get("direction", b"forward").decode()
    steps = {"forward": [shape[0] - 1], "reverse": [0], "bidirectional": [shape[0] - 1, 0]}[direction]
    nodes = [layer]
    for number, step in enumerate(steps):
        nodes += _state(draft, node, states, number, step)
    last = [nodes[-1 - 2 * number].output[0] for number in reversed(range(len(steps)))]
    if len(last) == 1:
        nodes[-1].output[0] = outputs[1]
        return nodes
    return [*nodes, _node("Concat", last, outputs[1], f"{node.name}/last", axis=0)]


def _state(draft: _Graph, node: NodeProto, states: str, direction: int, step: int) -> list[NodeProto]:
    """Return nodes that pick one step of one direction: (time, directions, batch, hidden) to (1, batch, hidden)."""
    name = f"{node.name}/last_{direction}"
    along = draft.constant(f"{name}/direction", _integers([direction]))
    # A number without an axis: the axis of time goes.
    at = draft.constant(f"{name}/step", np.array(step, np.int64))
    return [
        _node("Gather", [states, along], f"{name}/states", name, axis=1),
        _node("Gather", [f"{name}/states", at], f"{name}/state", f"{name}/pick", axis=0),
    ]


# Activations and norms.


def _elu(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Keep the alpha of an Elu, which onnx2tf drops in silence: max(x, 0) + alpha * elu(min(x, 0))."""
    alpha = float(_settings(node).get("alpha", 1.0))
    if alpha == 1.0:
        return None
    below, curve, scaled, above = (f"{node.name}/{word}" for word in ("below", "curve", "scaled", "above"))
    zero = draft.constant(f"{node.name}/zero", np.float32(0))
    factor = draft.constant(f"{node.name}/alpha", np.float32(alpha))
    return [
        _node("Relu", [node.input[0]], f"{above}/value", above),
        _node("Min", [node.input[0], zero], f"{below}/value", below),
        _node("Elu", [f"{below}/value"], f"{curve}/value", curve),
        _node("Mul", [f"{curve}/value", factor], f"{scaled}/value", scaled),
        _node("Add", [f"{above}/value", f"{scaled}/value"], node.output[0], node.name),
    ]


def _swish(draft: _Graph, node: NodeProto) -> list[NodeProto]:
    alpha = float(_settings(node).get("alpha", 1.0))
    nodes: list[NodeProto] = []
    source = node.input[0]
    if alpha != 1.0:
        factor = draft.constant(f"{node.name}/alpha", np.float32(alpha))
        nodes.append(_node("Mul", [source, factor], f"{node.name}/scaled", f"{node.name}/scale"))
        source = nodes[0].output[0]
    return [
        *nodes,
        _node("Sigmoid", [source], f"{node.name}/gate", f"{node.name}/sigmoid"),
        _node("Mul", [node.input[0], f"{node.name}/gate"], node.output[0], node.name),
    ]


def _log_softmax(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Write x - max - log(sum(exp(x - max))); the logarithm of a softmax, as onnx2tf has it, is infinite soon."""
    rank = draft.rank(node.input[0])
    if rank is None:
        return None
    if draft.opset() < 13:
        return _softmax_of_rows(draft, node)
    axes = [int(_settings(node).get("axis", -1)) % rank]
    largest, centred, powers, total, logs = (
        f"{node.name}/{word}" for word in ("largest", "centred", "powers", "total", "logs")
    )
    return [
        _reduced(draft, "ReduceMax", node.input[0], f"{largest}/value", largest, axes),
        _node("Sub", [node.input[0], f"{largest}/value"], f"{centred}/value", centred),
        _node("Exp", [f"{centred}/value"], f"{powers}/value", powers),
        _reduced(draft, "ReduceSum", f"{powers}/value", f"{total}/value", total, axes),
        _node("Log", [f"{total}/value"], f"{logs}/value", logs),
        _node("Sub", [f"{centred}/value", f"{logs}/value"], node.output[0], node.name),
    ]


def _softmax_of_rows(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Write a softmax of opset 12 and before as what it is there: one over all axes from `axis` on, taken together."""
    rank, shape = draft.rank(node.input[0]), draft.shapes.get(node.input[0])
    axis = int(_settings(node).get("axis", 1))
    if draft.opset() >= 13 or rank is None or shape is None or axis % rank == rank - 1:
        return None
    axis %= rank
    rows, scored = f"{node.name}/rows", f"{node.name}/scored"
    return [
        _reshape(draft, node, node.input[0], rows, "flatten", (_product_of(shape[:axis]), _product_of(shape[axis:]))),
        _node(node.op_type, [rows], scored, node.name, axis=1),
        _reshape(draft, node, scored, node.output[0], "unflatten", shape),
    ]


def _group_norm(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Write a GroupNormalization as an InstanceNormalization of its groups; onnx2tf makes a custom operator of it."""
    shape = draft.shapes.get(node.input[0])
    scale, bias = (draft.constants.get(name) for name in node.input[1:3])
    if shape is None or shape[1] is None or scale is None or bias is None:
        raise _refused(node, "its channels, scale or bias are not known before it runs", "make them constants")
    settings = _settings(node)
    groups, channels = int(settings["num_groups"]), shape[1]
    wide = [-1, *[1] * (len(shape) - 2)]
    grouped, centred, restored, scaled = (
        f"{node.name}/{word}" for word in ("grouped", "centred", "restored", "scaled")
    )
    ones = draft.constant(f"{node.name}/ones", np.ones(groups, np.float32))
    zeros = draft.constant(f"{node.name}/zeros", np.zeros(groups, np.float32))
    # Opset 18 has one scale a group, opset 21 one a channel.
    numbers = [
        draft.constant(f"{node.name}/{word}", value.repeat(channels // value.size).reshape(wide))
        for word, value in (("scale", scale), ("bias", bias))
    ]
    return [
        _reshape(draft, node, node.input[0], grouped, "group", (shape[0], groups, _of_group(shape, groups))),
        _node(
            "InstanceNormalization",
            [grouped, ones, zeros],
            centred,
            f"{node.name}/centre",
            epsilon=settings.get("epsilon", 1e-5),
        ),
        _reshape(draft, node, centred, restored, "ungroup", shape),
        _node("Mul", [restored, numbers[0]], scaled, f"{node.name}/rescale"),
        _node("Add", [scaled, numbers[1]], node.output[0], node.name),
    ]


def _of_group(shape: Shape, groups: int) -> int | None:
    inner = _product_of(shape[1:])
    return None if inner is None else inner // groups


def _rms_norm(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Write an RMSNormalization as x / sqrt(mean(x * x) + epsilon) * scale."""
    rank = draft.rank(node.input[0])
    if rank is None:
        return None
    settings = _settings(node)
    axes = list(range(int(settings.get("axis", -1)) % rank, rank))
    words = ("square", "mean", "shift", "root", "quotient")
    square, mean, shift, root, quotient = (f"{node.name}/{word}" for word in words)
    epsilon = draft.constant(f"{node.name}/epsilon", np.float32(settings.get("epsilon", 1e-5)))
    return [
        _node("Mul", [node.input[0], node.input[0]], f"{square}/value", square),
        _reduced(draft, "ReduceMean", f"{square}/value", f"{mean}/value", mean, axes),
        _node("Add", [f"{mean}/value", epsilon], f"{shift}/value", shift),
        _node("Sqrt", [f"{shift}/value"], f"{root}/value", root),
        _node("Div", [node.input[0], f"{root}/value"], f"{quotient}/value", quotient),
        _node("Mul", [f"{quotient}/value", node.input[1]], node.output[0], node.name),
    ]


# Slices and sizes.


def _slice(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Pick rows by their numbers where a slice runs backwards; onnx2tf makes a custom operator of it."""
    shape = draft.shapes.get(node.input[0])
    numbers = [draft.constants.get(name) for name in node.input[1:]]
    if len(node.input) < 5 or numbers[3] is None or (numbers[3] > 0).all():
        return None
    if shape is None or any(value is None for value in numbers[:3] if value is not numbers[2] or node.input[3]):
        raise _refused(node, "it runs backwards, from where is only known when it runs", "make its bounds constants")
    starts, ends, steps = (np.asarray(numbers[index]).tolist() for index in (0, 1, 3))
    axes = np.asarray(numbers[2]).tolist() if node.input[3] else list(range(len(starts)))
    forward = [index for index, step in enumerate(steps) if step > 0]
    nodes: list[NodeProto] = []
    source = node.input[0]
    if forward:
        name = f"{node.name}/forward"
        inputs = [
            draft.constant(f"{name}/{word}", _integers([values[index] for index in forward]))
            for word, values in (("starts", starts), ("ends", ends), ("axes", axes), ("steps", steps))
        ]
        nodes.append(_node("Slice", [source, *inputs], f"{name}/value", name))
        source = nodes[0].output[0]
    for index in (index for index, step in enumerate(steps) if step < 0):
        axis = axes[index] % len(shape)
        size = shape[axis]
        if size is None:
            raise _refused(node, f"it runs backwards along axis {axis}, whose size is open", "give that axis a size")
        # Python reads bounds as ONNX does, but for an end before the first element.
        end = None if ends[index] < -size else ends[index]
        rows = np.arange(size, dtype=np.int64)[slice(starts[index], end, steps[index])]
        name = f"{node.name}/backward_{axis}"
        nodes.append(_node("Gather", [source, draft.constant(f"{name}/rows", rows)], f"{name}/value", name, axis=axis))
        source = nodes[-1].output[0]
    nodes[-1].name, nodes[-1].output[0] = node.name, node.output[0]
    return nodes


_CUBIC = -0.75


@dataclass(frozen=True, slots=True)
class _Scaling:
    """How one axis is resized.

    Attributes:
        axis, size: of the input.
        result: how many elements come out.
        factor: what coordinates are divided by; not `result / size` where the node gives another.
    """

    axis: int
    size: int
    result: int
    factor: float

    @property
    def is_exact(self) -> bool:
        """Whether the factor is that of the sizes, the only one that TFLite knows."""
        return math.isclose(self.size * self.factor, self.result, rel_tol=1e-6)


def _resize(draft: _Graph, node: NodeProto) -> list[NodeProto] | None:
    """Keep what TFLite's two resize operators compute; write the rest as picked rows, or products with weights.

    onnx2tf rounds sizes that ONNX rounds down, takes the ratio of sizes for the factor that the node gives, and makes
    custom operators of most modes of nearest neighbours.
    """
    settings = _settings(node)
    mode = settings.get("mode", b"nearest").decode()
    how = settings.get("coordinate_transformation_mode", b"half_pixel").decode()
    if node.op_type == "Upsample" or draft.opset() < 11:
        how = "asymmetric"
        settings["nearest_mode"] = b"floor"
    if how == "tf_crop_and_resize" or settings.get("antialias"):
        raise _refused(
            node, "TFLite cannot crop or smooth while it resizes", "resize without antialiasing, or before the model"
        )
    scalings = _scalings(draft, node, settings)
    if not scalings:
        return [_node("Identity", [node.input[0]], node.output[0], node.name)]
    is_exact = all(scaling.is_exact for scaling in scalings)
    can_name_sizes = draft.opset() >= 11 and None not in draft.shapes[node.input[0]]
    is_image = draft.rank(node.input[0]) == 4 and all(scaling.axis >= 2 for scaling in scalings)
    is_image = is_image and (is_exact or can_name_sizes)
    if mode == "nearest":
        rounding = settings.get("nearest_mode", b"round_prefer_floor").decode()
        rows = [_nearest(scaling, how, rounding) for scaling in scalings]
        if is_image and all(_is_floor(scaling, picked) for scaling, picked in zip(scalings, rows, strict=True)):
            return _plain_resize(draft, node, scalings, mode="nearest", how="asymmetric")
        return _picked(draft, node, [(scaling.axis, picked) for scaling, picked in zip(scalings, rows, strict=True)])
    is_native = how in ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel") and mode == "linear"
    if is_image and is_native and is_exact and all(scaling.result > 1 for scaling in scalings):
        return _plain_resize(draft, node, scalings, mode="linear", how=how)
    weights = [_weights(scaling, how, settings) for scaling in scalings]
    return _weighted(draft, node, scalings, weights)


def _scalings(draft: _Graph, node: NodeProto, settings: Mapping[str, Any]) -> list[_Scaling]:
    """Return how each axis that changes is resized."""
    shape = draft.shapes.get(node.input[0])
    has_roi = node.op_type == "Resize" and draft.opset() >= 11
    factors, sizes = (
        draft.constants.get(node.input[index]) if index < len(node.input) and node.input[index] else None
        for index in ((2, 3) if has_roi else (1, 99))
    )
    is_stretched = settings.get("keep_aspect_ratio_policy", b"stretch") == b"stretch"
    if shape is None or (factors is None and sizes is None) or not is_stretched:
        raise _refused(node, "its size is only known when it runs", "give it constant sizes or factors")
    numbers = np.asarray(sizes if factors is None or not factors.size else factors)
    axes = [int(axis) % len(shape) for axis in settings.get("axes", range(len(shape)))]
    found = []
    for axis, number in zip(axes, numbers.tolist(), strict=True):
        size = shape[axis]
        if size is None and number != 1:
            raise _refused(node, f"axis {axis} that it resizes is open", "give that axis a size")
        if size is not None:
            is_factor = numbers.dtype.kind == "f"
            result = math.floor(size * number) if is_factor else int(number)
            factor = float(number) if is_factor else result / size
            if result != size or factor != 1:
                found.append(_Scaling(axis, size, result, factor))
    return found


def _coordinates(scaling: _Scaling, how: str) -> NDArray[np.float32]:
    """Return for each element that comes out where it lies in the input.

    Source: ONNX operators, Resize-19, coordinate_transformation_mode.
    """
    places = np.arange(scaling.result, dtype=np.float64)
    # A quotient of sizes, not of rounded factors: a coordinate midway between two elements must stay there.
    above, below = (scaling.size, scaling.result) if scaling.is_exact else (1, scaling.factor)
    if how == "align_corners":
        found = places * (scaling.size - 1) / max(scaling.result - 1, 1)
    elif how == "asymmetric":
        found = places * above / below
    elif how == "pytorch_half_pixel" and scaling.result == 1:
        found = places * 0
    else:
        found = (places + 0.5) * above / below - 0.5
    if how == "half_pixel_symmetric":
        found = found + scaling.size / 2 * (1 - scaling.result / (scaling.factor * scaling.size))
    return found.astype(np.float32)


def _nearest(scaling: _Scaling, how: str, rounding: str) -> NDArray[np.int64]:
    where = _coordinates(scaling, how)
    half = np.float32(0.5)
    nearest = {
        "round_prefer_floor": np.ceil(where - half),
        "round_prefer_ceil": np.floor(where + half),
        "floor": np.floor(where),
        "ceil": np.ceil(where),
    }[rounding]
    return np.asarray(np.clip(nearest, 0, scaling.size - 1), np.int64)


def _is_floor(scaling: _Scaling, picked: NDArray[np.int64]) -> bool:
    """Whether TFLite's RESIZE_NEAREST_NEIGHBOR picks the same: floor(place * size / result) in float32."""
    ratio = np.float32(scaling.size) / np.float32(scaling.result)
    own = np.floor(np.arange(scaling.result, dtype=np.float32) * ratio)
    return bool((np.minimum(own, scaling.size - 1) == picked).all())


def _weights(scaling: _Scaling, how: str, settings: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return what each element that comes out takes of each that goes in, shape (result, size).

    Source: ONNX operators, Resize-19, modes linear and cubic; Keys 1981 for the cubic weights.
    """
    where = _coordinates(scaling, how).astype(np.float64)
    if settings["mode"] == b"linear":
        where = np.clip(where, 0, scaling.size - 1)
        taps = {0: 1 - (where - np.floor(where)), 1: where - np.floor(where)}
    else:
        a, rest = float(settings.get("cubic_coeff_a", _CUBIC)), where - np.floor(where)
        taps = {tap: _keys(np.abs(rest - tap), a) for tap in (-1, 0, 1, 2)}
    weights = np.zeros((scaling.result, scaling.size))
    for tap, part in taps.items():
        column = np.floor(where).astype(np.int64) + tap
        is_inside = (column >= 0) & (column < scaling.size)
        counted = np.where(is_inside, part, 0) if settings.get("exclude_outside") else part
        np.add.at(weights, (np.arange(scaling.result), np.clip(column, 0, scaling.size - 1)), counted)
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)


def _keys(distance: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _plain_resize(
    draft: _Graph, node: NodeProto, scalings: Sequence[_Scaling], *, mode: str, how: str
) -> list[NodeProto] | None:
    """Return a resize by its sizes, which onnx2tf takes as they are."""
    shape = list(draft.shapes[node.input[0]])
    for scaling in scalings:
        shape[scaling.axis] = scaling.result
    settings = {"mode": mode, "coordinate_transformation_mode": how}
    if mode == "nearest":
        settings["nearest_mode"] = "floor"
    if draft.opset() < 11:
        return None
    if any(size is None for size in shape):
        return [_node("Resize", node.input, node.output[0], node.name, **settings)]
    sizes = draft.constant(f"{node.name}/sizes", _integers(shape))
    return [_node("Resize", [node.input[0], "", "", sizes], node.output[0], node.name, **settings)]


def _picked(draft: _Graph, node: NodeProto, rows: Sequence[tuple[int, NDArray[np.int64]]]) -> list[NodeProto]:
    """Return nodes that pick rows by their numbers along one axis after another."""
    nodes: list[NodeProto] = []
    source = node.input[0]
    for axis, numbers in rows:
        name = f"{node.name}/rows_{axis}"
        numbers_name = draft.constant(f"{name}/numbers", numbers)
        nodes.append(_node("Gather", [source, numbers_name], f"{name}/value", name, axis=axis))
        source = nodes[-1].output[0]
    nodes[-1].name, nodes[-1].output[0] = node.name, node.output[0]
    return nodes


def _weighted(
    draft: _Graph, node: NodeProto, scalings: Sequence[_Scaling], weights: Sequence[NDArray[np.float32]]
) -> list[NodeProto]:
    """Return products with weights along one axis after another."""
    nodes: list[NodeProto] = []
    rank, source = draft.rank(node.input[0]) or 0, node.input[0]
    for scaling, matrix in zip(scalings, weights, strict=True):
        name = f"{node.name}/weights_{scaling.axis}"
        order = [axis for axis in range(rank) if axis != scaling.axis] + [scaling.axis]
        source = _turned(draft, node, nodes, source, order, f"turn_{scaling.axis}")
        constant = draft.constant(f"{name}/matrix", np.ascontiguousarray(matrix.T))
        nodes.append(_node("MatMul", [source, constant], f"{name}/value", name))
        back = [order.index(axis) for axis in range(rank)]
        source = _turned(draft, node, nodes, f"{name}/value", back, f"turn_back_{scaling.axis}")
    nodes[-1].name, nodes[-1].output[0] = node.name, node.output[0]
    return nodes


_RULES: dict[str, tuple[Rule, ...]] = {
    "MaxPool": (_max_pool,),
    "AveragePool": (_average_pool,),
    "MatMul": (_matrix_product,),
    "Gemm": (_gemm, _clamped_gemm),
    "Einsum": (_einsum,),
    "Elu": (_elu,),
    "Swish": (_swish,),
    "LogSoftmax": (_log_softmax,),
    "Softmax": (_softmax_of_rows,),
    "GroupNormalization": (_group_norm,),
    "RMSNormalization": (_rms_norm,),
    "Slice": (_slice,),
    "Resize": (_resize,),
    "LSTM": (_recurrent,),
    "GRU": (_recurrent,),
    "RNN": (_recurrent,),
    "Upsample": (_resize,),
}

_SEQUENCES = "sequences of tensors have no form in TFLite; return and take tensors"
# Operator → why it is refused and what to do.
REFUSED: dict[str, str] = {
    "Hardmax": "what onnx2tf makes of it marks another element; take ArgMax and compare outside of the model",
    "Scan": "TFLite has no loops over slices; unroll the loop before the export",
    "Unique": "the shape of its result depends on the values; find unique values outside of the model",
    "Multinomial": "a model that draws at random gives no two answers alike; draw outside of the model",
    "TfIdfVectorizer": "TFLite computes on numbers; turn text into numbers outside of the model",
    "StringNormalizer": "TFLite computes on numbers; turn text into numbers outside of the model",
    "StringConcat": "TFLite computes on numbers; turn text into numbers outside of the model",
    "StringSplit": "TFLite computes on numbers; turn text into numbers outside of the model",
    "RegexFullMatch": "TFLite computes on numbers; turn text into numbers outside of the model",
    "ImageDecoder": "TFLite has no decoder of image files; decode outside of the model",
    "Optional": "TFLite has no optional values; return and take tensors",
    "OptionalGetElement": "TFLite has no optional values; return and take tensors",
    "OptionalHasElement": "TFLite has no optional values; return and take tensors",
    "SequenceEmpty": _SEQUENCES,
    "SequenceConstruct": _SEQUENCES,
    "SequenceAt": _SEQUENCES,
    "SequenceInsert": _SEQUENCES,
    "SequenceErase": _SEQUENCES,
    "SequenceLength": _SEQUENCES,
    "SequenceMap": _SEQUENCES,
    "SplitToSequence": _SEQUENCES,
    "ConcatFromSequence": _SEQUENCES,
}


def _demand_possible(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise _refused(
                node, f"the operator's domain {node.domain!r} is unknown to TFLite", "replace it by standard operators"
            )
        if node.op_type in REFUSED:
            why, _, hint = REFUSED[node.op_type].partition("; ")
            raise _refused(node, why, hint)
