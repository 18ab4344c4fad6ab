"""Says a graph in opset 17, and in operators that TensorRT 8.5 knows.

Every TensorRT from 8.5 on parses opset 17. onnx.version_converter has no adapters for most of these steps down. What
has changed since 17 in name, arguments or meaning is written anew here; what has changed only in the types that it
takes is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedeploy.backends.trt_graph import (
    OWN_DOMAINS,
    Draft,
    attributes,
    bodies,
    drop_attributes,
    set_attribute,
)
from edgedeploy.errors import CompileError

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

# "TensorRT 8.5 supports operators up to Opset 17", and so does 8.6 (onnx-tensorrt, docs/operators.md).
OPSET = 17
# Axis attributes of QuantizeLinear and three-input pairs came with 13; our own export is at 18, other files at 17 up.
_OLDEST_OPSET = 13
# The file format that goes with opset 17 (https://github.com/onnx/onnx/blob/main/docs/Versioning.md).
_IR_VERSION = 8
_EXPORT_AGAIN = f"export the model again with opset {OPSET}"

Rule = Callable[[Draft, "NodeProto"], "list[NodeProto]"]


class _Steps:
    """Writes several nodes in the place of one; the last takes its name and its output."""

    def __init__(self, draft: Draft, node: NodeProto) -> None:
        self.nodes: list[NodeProto] = []
        self._draft, self._node = draft, node

    def constant(self, step: str, value: Any) -> str:
        """Add a constant of one of the steps."""
        return self._draft.add(f"{self._node.output[0]}/{step}", value)

    def then(self, operator: str, inputs: Sequence[str], step: str, **settings: Any) -> str:
        """Add a node and return the tensor that it makes."""
        from onnx import helper

        made = self._draft.fresh(f"{self._node.output[0]}/{step}")
        name = self._draft.fresh(f"{self._node.name}/{step}")
        self.nodes.append(helper.make_node(operator, list(inputs), [made], name=name, **settings))
        return made

    def last(self, operator: str, inputs: Sequence[str], **settings: Any) -> list[NodeProto]:
        """Add the node that makes what the replaced one made, and return all."""
        from onnx import helper

        outputs = [self._node.output[0]]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=self._node.name, **settings))
        return self.nodes


def lower(draft: Draft) -> None:
    """Bring a model to opset 17 where it has a newer one.

    Raises:
        CompileError: naming the node that says what opset 17 has no words for.
    """
    import onnx
    from onnx import helper

    opset = next((int(item.version) for item in draft.model.opset_import if item.domain in OWN_DOMAINS), 0)
    if opset < _OLDEST_OPSET:
        raise CompileError(
            f"the model has opset {opset}, and quantized weights have an axis from opset {_OLDEST_OPSET} on only",
            backend=draft.backend,
            hint=_EXPORT_AGAIN,
        )
    if opset > OPSET:
        _lower_graph(draft, draft.graph, opset)
    del draft.model.opset_import[:]
    draft.model.opset_import.append(helper.make_opsetid("", min(opset, OPSET)))
    draft.model.ir_version = min(draft.model.ir_version, _IR_VERSION)
    del draft.graph.value_info[:]
    draft.look()
    try:
        onnx.checker.check_model(draft.model)
    except onnx.checker.ValidationError as error:
        raise CompileError(
            f"brought from opset {opset} to {OPSET} it is no valid model: {error}",
            backend=draft.backend,
            hint=_EXPORT_AGAIN,
        ) from error


def _lower_graph(draft: Draft, graph: GraphProto, opset: int) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        for body in bodies(node):
            _lower_graph(draft, body, opset)
        nodes += _lowered(draft, node, opset)
    copies = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _copy(node: NodeProto) -> NodeProto:
    copy: NodeProto = type(node).FromString(node.SerializeToString())
    return copy


def _lowered(draft: Draft, node: NodeProto, opset: int) -> list[NodeProto]:
    import onnx

    if not onnx.defs.has(node.op_type):
        raise draft.refused(node, "ONNX has no such operator", "export the model again")
    newest = onnx.defs.get_schema(node.op_type, opset, "")
    if newest.since_version <= OPSET:
        return [node]
    if rule := _RULES.get(node.op_type):
        return rule(draft, node)
    if not onnx.defs.has(node.op_type, OPSET, ""):
        raise draft.refused(node, f"the operator is newer than opset {OPSET}", _EXPORT_AGAIN)
    older = onnx.defs.get_schema(node.op_type, OPSET, "")
    _drop_new_settings(draft, node, newest, older)
    if len(node.input) > older.max_input or len(node.output) > older.max_output:
        raise draft.refused(node, f"it has arguments that it did not have in opset {OPSET}", _EXPORT_AGAIN)
    return [node]


# Attributes whose default is another one than what all others of that kind do: no scale per block, no dilation.
_NEUTRAL = {"dilations": 1, "antialias": 0, "block_size": 0, "output_dtype": 0, "precision": 0}


def _drop_new_settings(draft: Draft, node: NodeProto, newest: Any, older: Any) -> None:
    """Drop attributes that opset 17 does not know where they say nothing, and refuse the node where they do."""
    from onnx import helper

    for item in list(node.attribute):
        if item.name in older.attributes:
            continue
        value, known = helper.get_attribute_value(item), newest.attributes[item.name]
        default = helper.get_attribute_value(known.default_value) if known.default_value.name else None
        # What a cast to a float of 8 bits does with values beyond it concerns no type that we carry.
        says_nothing = value == default or item.name in ("saturate", "round_mode")
        if item.name in _NEUTRAL:
            says_nothing = says_nothing or bool(np.all(np.asarray(value) == _NEUTRAL[item.name]))
        if not says_nothing:
            raise draft.refused(node, f"{item.name} = {value!r} is unknown to opset {OPSET}", _EXPORT_AGAIN)
        drop_attributes(node, item.name)


def _settled(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Return a node whose rule has changed it, without attributes that say nothing."""
    import onnx

    opset = next(int(item.version) for item in draft.model.opset_import if item.domain in OWN_DOMAINS)
    newest = onnx.defs.get_schema(node.op_type, opset, "")
    _drop_new_settings(draft, node, newest, onnx.defs.get_schema(node.op_type, OPSET, ""))
    return [node]


def _numbers(draft: Draft, node: NodeProto, place: int, what: str) -> list[int] | None:
    """Return a constant input as numbers; None where the node does not have it."""
    name = node.input[place] if len(node.input) > place else ""
    if not name:
        return None
    value = draft.value(name)
    if value is None:
        raise draft.refused(
            node, f"its {what} are computed in each inference", f"make them constant, or {_EXPORT_AGAIN}"
        )
    return [int(number) for number in value.reshape(-1)]


def _rank(draft: Draft, node: NodeProto) -> int:
    shape = draft.shapes.get(node.input[0])
    if shape is None:
        raise draft.refused(node, f"the number of axes of {node.input[0]!r} is unknown", _EXPORT_AGAIN)
    return len(shape)


# What a reduction over no axis still does to each element (https://onnx.ai/onnx/operators/onnx__ReduceL2.html).
_WITHOUT_AXES = {"ReduceL1": "Abs", "ReduceL2": "Abs", "ReduceLogSum": "Log", "ReduceSumSquare": "Mul"}


def _reduce(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Say the axes of a reduction as an attribute again."""
    axes = _numbers(draft, node, 1, "axes")
    del node.input[1:]
    if not axes and attributes(node).get("noop_with_empty_axes"):
        operator = _WITHOUT_AXES.get(node.op_type, "Identity")
        return _Steps(draft, node).last(operator, [node.input[0]] * (2 if operator == "Mul" else 1))
    drop_attributes(node, "noop_with_empty_axes")
    if axes:
        set_attribute(node, "axes", axes)
    return [node]


def _split(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Say how many parts there are by the outputs alone; the last part may be smaller since opset 18 only."""
    settings = attributes(node)
    drop_attributes(node, "num_outputs")
    if len(node.input) > 1 and node.input[1]:
        return [node]
    parts = len(node.output)
    shape = draft.shapes.get(node.input[0])
    size = None if shape is None else shape[settings.get("axis", 0)]
    if size is None:
        raise draft.refused(
            node, "the axis that it splits has no fixed size, so its parts may differ", "give the sizes of its parts"
        )
    whole = math.ceil(size / parts)
    sizes = [min(whole, size - whole * part) for part in range(parts)]
    del node.input[1:]
    node.input.append(draft.add(f"{node.name}/split", np.asarray(sizes, np.int64)))
    return [node]


def _pad(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Say the pads of all axes."""
    axes = _numbers(draft, node, 3, "axes")
    if attributes(node).get("mode") == b"wrap":
        raise draft.refused(node, "it pads with the values of the other side (wrap)", "concatenate them instead")
    if axes is not None:
        pads, rank = _numbers(draft, node, 1, "pads") or [], _rank(draft, node)
        every = np.zeros((2, rank), np.int64)
        for place, axis in enumerate(axes):
            every[:, axis] = pads[place], pads[place + len(axes)]
        node.input[1] = draft.add(f"{node.name}/pads", every.reshape(-1))
    del node.input[3:]
    return [node]


def _resize(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Say the scales or sizes of all axes."""
    settings = attributes(node)
    if settings.get("coordinate_transformation_mode") == b"half_pixel_symmetric":
        raise draft.refused(node, "half_pixel_symmetric is newer than opset 18", "use half_pixel")
    axes = settings.get("axes")
    if axes is not None and list(axes) != list(range(_rank(draft, node))):
        _fill_resized_axes(draft, node, [axis % _rank(draft, node) for axis in axes])
    drop_attributes(node, "axes")
    return _settled(draft, node)


def _fill_resized_axes(draft: Draft, node: NodeProto, axes: list[int]) -> None:
    rank = _rank(draft, node)
    if len(node.input) > 3 and node.input[3]:
        shape, sizes = draft.shapes[node.input[0]], _numbers(draft, node, 3, "sizes") or []
        every = [size for size in shape if size is not None]
        if len(every) < rank:
            raise draft.refused(node, "it resizes some axes to sizes, and others are dynamic", "give it scales")
        for axis, size in zip(axes, sizes, strict=True):
            every[axis] = size
        node.input[3] = draft.add(f"{node.name}/sizes", np.asarray(every, np.int64))
        return
    scales = draft.value(node.input[2])
    if scales is None:
        raise draft.refused(node, "its scales are computed in each inference", "make them constant")
    factors = np.ones(rank, np.float32)
    factors[axes] = scales
    node.input[2] = draft.add(f"{node.name}/scales", factors)


def _scatter(draft: Draft, node: NodeProto) -> list[NodeProto]:
    if attributes(node).get("reduction") in (b"max", b"min"):
        raise draft.refused(node, "it keeps the larger or smaller value (reduction)", _EXPORT_AGAIN)
    return [node]


def _grid_sample(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Call the modes by their old names."""
    if (rank := _rank(draft, node)) != 4:
        raise draft.refused(node, f"it samples a tensor of {rank} axes, and TensorRT samples images only", "use 4 axes")
    mode = attributes(node).get("mode", b"linear")
    set_attribute(node, "mode", {b"linear": b"bilinear", b"cubic": b"bicubic"}.get(mode, mode))
    return [node]


def _gelu(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Write x/2 (1 + erf(x/√2)), or its approximation by tanh: https://onnx.ai/onnx/operators/onnx__Gelu.html."""
    steps, x = _Steps(draft, node), node.input[0]
    if attributes(node).get("approximate", b"none") == b"tanh":
        cube = steps.then("Pow", [x, steps.constant("three", np.float32(3.0))], "cube")
        small = steps.then("Mul", [cube, steps.constant("small", np.float32(0.044715))], "small_part")
        scaled = steps.then("Mul", [steps.then("Add", [x, small], "inner"), _root(steps, 2 / math.pi)], "scaled")
        bent = steps.then("Tanh", [scaled], "tanh")
    else:
        scaled = steps.then("Mul", [x, _root(steps, 0.5)], "scaled")
        bent = steps.then("Erf", [scaled], "erf")
    raised = steps.then("Add", [bent, steps.constant("one", np.float32(1.0))], "raised")
    half = steps.then("Mul", [x, steps.constant("half_of_one", np.float32(0.5))], "half_of_it")
    return steps.last("Mul", [half, raised])


def _root(steps: _Steps, value: float) -> str:
    return steps.constant("root", np.float32(math.sqrt(value)))


def _mish(draft: Draft, node: NodeProto) -> list[NodeProto]:
    steps = _Steps(draft, node)
    soft = steps.then("Softplus", [node.input[0]], "softplus")
    return steps.last("Mul", [node.input[0], steps.then("Tanh", [soft], "tanh")])


def _swish(draft: Draft, node: NodeProto) -> list[NodeProto]:
    steps, x = _Steps(draft, node), node.input[0]
    alpha = attributes(node).get("alpha", 1.0)
    scaled = x if alpha == 1.0 else steps.then("Mul", [x, steps.constant("alpha", np.float32(alpha))], "scaled")
    return steps.last("Mul", [x, steps.then("Sigmoid", [scaled], "sigmoid")])


def _group_normalization(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Write it as InstanceNormalization of (N, groups, everything else), then a factor and a term per channel."""
    settings, steps = attributes(node), _Steps(draft, node)
    groups = int(settings["num_groups"])
    shape = draft.shapes.get(node.input[0])
    scale, bias = draft.value(node.input[1]), draft.value(node.input[2])
    if shape is None or shape[1] is None or scale is None or bias is None:
        raise draft.refused(node, "its channels, its factor or its term are no constants", _EXPORT_AGAIN)
    channels = shape[1]
    # Before opset 21 the two are given per group.
    factor, term = (np.repeat(value, channels // value.size) for value in (scale, bias))
    along = (1, channels, *[1] * (len(shape) - 2))
    grouped = steps.then("Reshape", [node.input[0], steps.constant("groups", np.array([0, groups, -1]))], "grouped")
    ones, zeros = (
        steps.constant("ones", np.ones(groups, np.float32)),
        steps.constant("zeros", np.zeros(groups, np.float32)),
    )
    epsilon = settings.get("epsilon", 1e-5)
    normal = steps.then("InstanceNormalization", [grouped, ones, zeros], "normalized", epsilon=epsilon)
    size = steps.then("Shape", [node.input[0]], "shape")
    back = steps.then("Reshape", [normal, size], "ungrouped")
    scaled = steps.then("Mul", [back, steps.constant("factor", factor.reshape(along))], "scaled")
    return steps.last("Add", [scaled, steps.constant("term", term.reshape(along))])


def _rms_normalization(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Write x / √(mean(x²) + ε) times its factor: https://onnx.ai/onnx/operators/onnx__RMSNormalization.html."""
    settings, steps = attributes(node), _Steps(draft, node)
    axes = _normalized_axes(draft, node, settings)
    root = _root_mean_square(steps, node.input[0], axes, settings.get("epsilon", 1e-5))
    return steps.last("Mul", [steps.then("Div", [node.input[0], root], "normalized"), node.input[1]])


def _root_mean_square(steps: _Steps, x: str, axes: list[int], epsilon: float) -> str:
    # Pow, so that the rules that keep operators in float32 see what it is: a square, which float16 cannot hold.
    square = steps.then("Pow", [x, steps.constant("two", np.float32(2.0))], "square")
    mean = steps.then("ReduceMean", [square], "mean_square", axes=axes)
    raised = steps.then("Add", [mean, steps.constant("epsilon", np.float32(epsilon))], "variance")
    return steps.then("Sqrt", [raised], "deviation")


def _normalized_axes(draft: Draft, node: NodeProto, settings: dict[str, Any]) -> list[int]:
    axis = int(settings.get("axis", -1))
    return list(range(axis, 0)) if axis < 0 else list(range(axis - _rank(draft, node), 0))


def _attention(draft: Draft, node: NodeProto) -> list[NodeProto]:
    raise draft.refused(
        node, f"the operator is newer than opset {OPSET}", "export the model with opset 18, which writes it in parts"
    )


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
         "ReduceProd", "ReduceSumSquare"),
        _reduce,
    ),
    **dict.fromkeys(("ScatterElements", "ScatterND"), _scatter),
    **dict.fromkeys(("Attention", "RotaryEmbedding"), _attention),
    "Gelu": _gelu,
    "GridSample": _grid_sample,
    "GroupNormalization": _group_normalization,
    "Mish": _mish,
    "Pad": _pad,
    "RMSNormalization": _rms_normalization,
    "Resize": _resize,
    "Split": _split,
    "Swish": _swish,
}  # fmt: skip


def _layer_normalization(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Write (x - mean) / √(variance + ε) times a factor, plus a term: opset 17, which 8.5 does not parse."""
    settings, steps, x = attributes(node), _Steps(draft, node), node.input[0]
    axes = _normalized_axes(draft, node, settings)
    centred = steps.then("Sub", [x, steps.then("ReduceMean", [x], "mean", axes=axes)], "centred")
    root = _root_mean_square(steps, centred, axes, settings.get("epsilon", 1e-5))
    normal = [centred, root]
    if len(node.input) > 2 and node.input[2]:
        scaled = steps.then("Mul", [steps.then("Div", normal, "normalized"), node.input[1]], "scaled")
        return steps.last("Add", [scaled, node.input[2]])
    return steps.last("Mul", [steps.then("Div", normal, "normalized"), node.input[1]])


def _hard_swish(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Write x times max(0, min(1, x/6 + 1/2)): https://onnx.ai/onnx/operators/onnx__HardSwish.html."""
    steps = _Steps(draft, node)
    gate = steps.then("HardSigmoid", [node.input[0]], "gate", alpha=1 / 6, beta=0.5)
    return steps.last("Mul", [node.input[0], gate])


# HardSwish came to the parser late in 8.5: its branch has tables with and without it.
_FOR_8_5: dict[str, Rule] = {"HardSwish": _hard_swish, "LayerNormalization": _layer_normalization}


def spell_out(draft: Draft) -> None:
    """Replace operators that TensorRT 8.5 does not parse by what they are made of, in bodies too."""
    _spell_out_graph(draft, draft.graph)
    draft.look()


def _spell_out_graph(draft: Draft, graph: GraphProto) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        for body in bodies(node):
            _spell_out_graph(draft, body)
        rule = _FOR_8_5.get(node.op_type)
        nodes += rule(draft, node) if rule else [node]
    copies = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def settle_normalizations(draft: Draft) -> None:
    """Drop the second and third output of LayerNormalization, which TensorRT does not compute.

    Raises:
        CompileError: something reads them.
    """
    readers, outputs = draft.readers(), {value.name for value in draft.graph.output}
    for node in draft.graph.node:
        if node.op_type != "LayerNormalization":
            continue
        for name in node.output[1:]:
            if name in readers or name in outputs:
                raise draft.refused(
                    node, f"its mean or deviation {name!r} is read, which TensorRT does not give out", _EXPORT_AGAIN
                )
        del node.output[1:]
