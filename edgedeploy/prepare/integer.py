"""The integer-exact reference: computes an explicit Q/DQ or QOperator graph as an ideal integer engine does.

Codes are multiplied and summed in whole numbers (int32 accumulators, which wrap around as ONNX allows), biases are
added there, and a sum becomes a code again where the graph has a QuantizeLinear, rounded once. Nothing is
pattern-matched: a DequantizeLinear only notes what its codes stand for, and operators that know how go on in integers
(`_KERNELS`). All others (Softmax, LayerNormalization, Sigmoid …) are computed in the graph's float type by
`onnx.reference`, as written, from dequantized inputs; so is a convolution or product with a side that is not quantized.

Means and sums of tensors of different grids (Add, Sub, Concat) are formed in float64 from exact products; they are
rounded right whenever the scales lie within a factor of 2**15 of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedeploy.documents import Record
from edgedeploy.errors import BackendMissing, FidelityError, ModelError, UsageError
from edgedeploy.prepare.graph import Tensors, attributes, read_graph
from edgedeploy.prepare.integer_operators import (
    Arithmetic,
    Array,
    Integers,
    Reals,
    Scaled,
    along,
    clamped,
    convolution,
    product,
    quantized,
    requantized,
    stored,
    window,
    window_counts,
    window_maxima,
    window_sums,
    wrapped,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# A bias in the accumulator's own grid says so with float32(input scale * weight scale), which is that close to it.
_SAME_SCALE = 1e-6


class CodeDifference(Record, frozen=True, kw_only=True):
    """How the codes of one tensor differ between two engines.

    Attributes:
        differing: how many elements differ.
        differing_fraction: of all elements.
        max_lsb: the largest difference, in steps of the tensor's grid.
    """

    tensor: str
    elements: int
    differing: int
    differing_fraction: float
    max_lsb: int


@dataclass(frozen=True, slots=True)
class Codes:
    """What a graph computes in integers.

    Attributes:
        outputs: the graph's outputs.
        codes: output of a QuantizeLinear, DynamicQuantizeLinear, QLinearConv or QLinearMatMul → its codes.
        overflows: node → how many sums left 32 bits and were wrapped around; nodes without any are not listed.
    """

    outputs: Tensors
    codes: Tensors
    overflows: dict[str, int]


class IntegerReference:
    """An explicit Q/DQ graph, computed as an exact integer engine computes it.

    Args:
        model: a file or serialised model with its weights inside, or a graph.
        arithmetic: how sums become codes: rounded exactly, or as MLAS or TFLite do; see integer_operators.py.

    Raises:
        ModelError: the graph holds operators of other domains than ONNX's, or branches and loops.
    """

    def __init__(self, model: Path | bytes | ModelProto, *, arithmetic: Arithmetic = "exact") -> None:
        from onnx import numpy_helper

        graph = _read(model)
        self._constants: Tensors = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
        self._inputs = [value.name for value in graph.graph.input if value.name not in self._constants]
        self._outputs = [value.name for value in graph.graph.output]
        self._nodes = [_Node(proto, attributes(proto), _Float(proto, graph.opset_import)) for proto in graph.graph.node]
        self._arithmetic: Arithmetic = arithmetic
        for node in self._nodes:
            node.demand_known()

    def run(self, inputs: Mapping[str, Array], *, instead: Mapping[str, Array] | None = None) -> Codes:
        """Compute the graph.

        Args:
            inputs: one array for each input, in the graph's types.
            instead: another engine's codes of some tensors, which the nodes that follow read in place of ours. With all
                of an engine's codes, the difference in a tensor is made by the nodes right before it, and by none
                earlier.

        Returns:
            Outputs, and our own codes in any case.

        Raises:
            UsageError: an input is missing, or not the graph's.
            ModelError: a node cannot be computed, or NaN is to be quantized.
        """
        if set(inputs) != set(self._inputs):
            raise UsageError(f"the graph has the inputs {', '.join(self._inputs)}, and {', '.join(inputs)} were given")
        given = {name: np.asarray(value) for name, value in inputs.items()}
        run = _Run(self._arithmetic, {**self._constants, **given}, instead or {})
        last = {name: index for index, node in enumerate(self._nodes) for name in node.proto.input}
        for index, node in enumerate(self._nodes):
            run.compute(node)
            for name in {*node.proto.input, *node.proto.output}:
                if last.get(name, index) == index and name not in self._outputs:
                    run.values.pop(name, None)
        outputs = {name: _as_written(run.values[name]) for name in self._outputs}
        return Codes(outputs, run.codes, run.overflows)


def compare_codes(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> tuple[CodeDifference, ...]:
    """Compare two engines' codes, tensor by tensor, in the reference's order.

    Args:
        reference: tensor → codes, as `Codes.codes`.
        candidate: likewise, all of the reference's tensors and perhaps more.

    Raises:
        FidelityError: a tensor is missing, or has another shape or type.
    """
    missing = [name for name in reference if name not in candidate]
    if missing:
        raise FidelityError(f"the engine gives no codes for {', '.join(missing)}; compare the tensors that it stores")
    differences = []
    for name, expected in reference.items():
        actual = candidate[name]
        if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
            raise FidelityError(
                f"codes of {name!r} are {actual.dtype} {actual.shape} and the reference has {expected.dtype} "
                f"{expected.shape}; the two are not the same graph"
            )
        steps = np.abs(actual.astype(np.int64) - expected.astype(np.int64))
        count = int(np.count_nonzero(steps))
        differences.append(
            CodeDifference(
                tensor=name,
                elements=steps.size,
                differing=count,
                differing_fraction=count / max(steps.size, 1),
                max_lsb=int(steps.max(initial=0)),
            )
        )
    return tuple(differences)


def runtime_codes(model: Path | bytes | ModelProto, inputs: Mapping[str, Array], *, precise: bool) -> Tensors:
    """Return the codes that ONNX Runtime's CPU kernels compute here, for the same tensors as `Codes.codes`.

    Args:
        model: as for `IntegerReference`.
        inputs: one array for each input.
        precise: use kernels that do not saturate on x86 without VNNI. Without, the session is one with default
            options, which is what a person gets.

    Raises:
        BackendMissing: onnxruntime is not installed.
        ModelError: it cannot load or run the graph.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendMissing(
            "ONNX Runtime is not installed, so there are no codes to compare; pip install 'edgedeploy[onnxruntime]'"
        ) from error
    import onnx

    graph = onnx.ModelProto()
    graph.CopyFrom(_read(model))
    present = {value.name for value in graph.graph.output}
    names = [node.output[0] for node in graph.graph.node if node.op_type in _BOUNDARIES]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if precise:
        options.add_session_config_entry(_exact_setting(graph), "1")
    try:
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = session.run(names, dict(inputs))
    except Exception as error:  # onnxruntime has one exception class for each status code, and none in common
        raise ModelError(f"ONNX Runtime cannot give the codes of the graph: {error}") from error
    return dict(zip(names, values, strict=True))


def _exact_setting(model: ModelProto) -> str:
    """Return the session option by which x86 without VNNI sums products of this graph's codes exactly.

    int8 activations have exact kernels, which are used when they need not become uint8 first; with uint8 activations
    the weights become uint8. Both options together make a QGemm for which ONNX Runtime 1.31 has no kernel.
    """
    types = {item.name: item.data_type for item in model.graph.initializer}
    stored_as = {
        types.get(node.input[2]) if len(node.input) > 2 else None
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    is_int8 = stored_as == {3}  # TensorProto.INT8
    return "session.qdqisint8allowed" if is_int8 else "session.x64quantprecision"


def _read(model: Path | bytes | ModelProto) -> ModelProto:
    import onnx

    if isinstance(model, Path):
        return read_graph(model)
    return onnx.load_from_string(model) if isinstance(model, bytes) else model


@dataclass(frozen=True, slots=True)
class _Real:
    """Real numbers of no single grid: a sum of tensors of different scales, not rounded to the graph's float type."""

    values: Reals
    dtype: np.dtype[Any]

    def reals(self) -> Reals:
        return self.values


_Value = Array | Scaled | _Real


def _as_written(value: _Value) -> Array:
    """Return a value in the graph's own type."""
    return value if isinstance(value, np.ndarray) else value.reals().astype(value.dtype)


class _Float:
    """One node computed by `onnx.reference`, as it is written."""

    def __init__(self, proto: NodeProto, opsets: Sequence[Any]) -> None:
        self._proto, self._opsets = proto, opsets
        # The types of the inputs → what evaluates the node: some operators are defined by their types only.
        self._evaluators: dict[tuple[Any, ...], Any] = {}

    def __call__(self, inputs: Sequence[Array | None]) -> list[Array]:
        given = {name: value for name, value in zip(self._proto.input, inputs, strict=True) if value is not None}
        kinds = tuple((name, value.dtype, value.ndim) for name, value in given.items())
        try:
            if kinds not in self._evaluators:
                self._evaluators[kinds] = self._evaluator(given)
            return [np.asarray(value) for value in self._evaluators[kinds].run(None, given)]
        except Exception as error:  # onnx.reference raises whatever numpy does, and classes of its own
            raise ModelError(
                f"node {self._proto.name!r} ({self._proto.op_type}) cannot be computed by onnx.reference: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _evaluator(self, given: Mapping[str, Array]) -> Any:
        import onnx
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
            for name, value in given.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in self._proto.output if name]
        graph = helper.make_graph([self._proto], "alone", inputs, outputs)
        return ReferenceEvaluator(helper.make_model(graph, opset_imports=self._opsets))


@dataclass(frozen=True, slots=True)
class _Node:
    """A node, its attributes read.

    Attributes:
        in_float: computes the node on plain arrays.
    """

    proto: NodeProto
    settings: dict[str, Any]
    in_float: _Float

    @property
    def label(self) -> str:
        """What to call it in a sentence."""
        return f"node {self.proto.name!r} ({self.proto.op_type})"

    def demand_known(self) -> None:
        from onnx import AttributeProto

        proto = self.proto
        if proto.domain not in ("", "ai.onnx"):
            raise ModelError(
                f"node {proto.name!r} is a {proto.domain}.{proto.op_type}, which the integer reference does not know; "
                f"give it the Q/DQ form with operators of ONNX only"
            )
        if any(item.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for item in proto.attribute):
            raise ModelError(
                f"node {proto.name!r} ({proto.op_type}) holds a graph of its own, which the integer reference does not "
                f"run; export the model without data-dependent branches and loops"
            )


@dataclass(slots=True)
class _Run:
    """The tensors of one run.

    Attributes:
        instead: codes that take the place of those that were computed.
    """

    arithmetic: Arithmetic
    values: dict[str, _Value]
    instead: Mapping[str, Array]
    codes: Tensors = field(default_factory=dict)
    overflows: dict[str, int] = field(default_factory=dict)

    def compute(self, node: _Node) -> None:
        given = [self.values[name] if name else None for name in node.proto.input]
        kernel = _KERNELS.get(node.proto.op_type)
        made = kernel(self, node, given) if kernel else None
        if made is None:
            made = [*node.in_float([None if value is None else _as_written(value) for value in given])]
        names = [name for name in node.proto.output if name]
        self.values.update(zip(names, made, strict=True))
        if node.proto.op_type in _BOUNDARIES:
            self.codes[names[0]] = _as_written(made[0])
            self.values[names[0]] = self.instead.get(names[0], made[0])

    def accumulated(self, node: _Node, sums: Integers) -> Integers:
        """Return sums as an int32 accumulator holds them."""
        held, overflows = wrapped(sums)
        if overflows:
            self.overflows[node.proto.name] = self.overflows.get(node.proto.name, 0) + overflows
        return held


# Returns the outputs, or None where the node is not computed in integers and is left to `onnx.reference`.
_Kernel = Callable[[_Run, _Node, "list[_Value | None]"], "list[_Value] | None"]


def _quantize(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    values, scale, zero_point = _required(given, 0), _plain(given, 1), _optional(given, 2)
    dtype = _code_type(node, zero_point)
    if dtype is None or scale.ndim > 1 or node.settings.get("precision"):
        return None  # short floats, 4-bit codes, blocks: as written
    axes, axis = _ndim(values), int(node.settings.get("axis", 1))
    step = along(scale, axes, axis)
    zero = along(np.zeros((), dtype) if zero_point is None else zero_point, axes, axis)
    if isinstance(values, Scaled):
        return [requantized(values, step, zero, dtype, run.arithmetic)]
    reals = values if isinstance(values, np.ndarray) else values.values
    if np.isnan(reals).any():
        raise ModelError(f"NaN is to be quantized by {node.label}; check the inputs, and the float operators before it")
    return [quantized(reals, step, zero, dtype)]


def _code_type(node: _Node, zero_point: Array | None) -> np.dtype[Any] | None:
    """Return the type of the codes that a QuantizeLinear makes, or None where numpy has no such integers."""
    from onnx import TensorProto, helper

    named = int(node.settings.get("output_dtype", 0)) or TensorProto.UINT8
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(named)) if zero_point is None else zero_point.dtype
    return dtype if dtype.kind in "iu" else None


def _dequantize(_: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    codes, scale, zero_point = _plain(given, 0), _plain(given, 1), _optional(given, 2)
    is_integer = codes.dtype.kind in "iu" or codes.dtype.name in ("int4", "uint4", "int2", "uint2")
    if not is_integer or scale.ndim > 1 or node.settings.get("output_dtype"):
        return None  # short floats and blocks: dequantized as written
    return [stored(codes, scale, zero_point, int(node.settings.get("axis", 1)))]


def _conv(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    values, weight = _codes(given, 0), _codes(given, 1)
    if values is None or weight is None or values.scale.size > 1 or not _has_one_scale_per_filter(weight):
        return None
    sums = _convolved(node, values.integers, weight.integers)
    shape = (1, -1, *[1] * (sums.ndim - 2))
    scale = weight.scale
    if scale.ndim:
        scale = scale.reshape(len(scale), -1)[:, 0].reshape(shape)
    bias = given[2] if len(given) > 2 else None
    return [_with_bias(run, node, sums, values.scale.reshape(()) * scale, _reshaped(bias, shape), values.dtype)]


def _convolved(node: _Node, values: Integers, weight: Integers) -> Integers:
    move = window(node.settings, values.shape[2:], weight.shape[2:])
    return convolution(values, weight, move, int(node.settings.get("group", 1)))


def _has_one_scale_per_filter(weight: Scaled) -> bool:
    return all(_is_constant_along(weight.scale, axis) for axis in range(1, weight.scale.ndim))


def _is_constant_along(scale: Reals, axis: int) -> bool:
    return scale.ndim == 0 or bool((scale == scale.take([0], axis)).all())


def _reshaped(bias: _Value | None, shape: tuple[int, ...]) -> _Value | None:
    """Return the bias of a convolution, one number for each filter, in a shape that is added to its output."""
    if isinstance(bias, Scaled):
        scale = bias.scale.reshape(shape) if bias.scale.ndim else bias.scale
        return replace(bias, integers=bias.integers.reshape(shape), scale=scale)
    if isinstance(bias, _Real):
        return _Real(bias.values.reshape(shape), bias.dtype)
    return None if bias is None else bias.reshape(shape)


def _with_bias(
    run: _Run, node: _Node, sums: Integers, scale: Reals, bias: _Value | None, dtype: np.dtype[Any]
) -> Scaled | _Real:
    """Add a bias: in the accumulator when it has the accumulator's grid, in real numbers otherwise."""
    if isinstance(bias, Scaled) and _has_grid(bias, scale):
        return _sum_of_products(run, node, sums + bias.integers, scale, dtype)
    held = _sum_of_products(run, node, sums, scale, dtype)
    return held if bias is None else _Real(held.reals() + _reals(bias), dtype)


def _sum_of_products(run: _Run, node: _Node, sums: Integers, scale: Reals, dtype: np.dtype[Any]) -> Scaled:
    held = run.accumulated(node, sums)
    return Scaled(integers=held, scale=scale, divisor=_ONE, dtype=dtype, is_stored=False)


def _has_grid(value: Scaled, scale: Reals) -> bool:
    is_plain = bool((value.divisor == 1).all()) and not value.has_clamp
    return is_plain and bool(np.allclose(value.scale, scale, rtol=_SAME_SCALE, atol=0))


def _gemm(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    settings = node.settings
    left, right = _codes(given, 0), _codes(given, 1)
    is_plain = settings.get("alpha", 1.0) == 1.0 and settings.get("beta", 1.0) == 1.0
    if left is None or right is None or not is_plain:
        return None
    left = _transposed(left) if settings.get("transA") else left
    right = _transposed(right) if settings.get("transB") else right
    return _multiplied(run, node, left, right, given[2] if len(given) > 2 else None)


def _transposed(matrix: Scaled) -> Scaled:
    return replace(matrix, integers=matrix.integers.T, scale=matrix.scale.T)


def _matmul(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    left, right = _codes(given, 0), _codes(given, 1)
    return None if left is None or right is None else _multiplied(run, node, left, right, None)


def _multiplied(run: _Run, node: _Node, left: Scaled, right: Scaled, bias: _Value | None) -> list[_Value] | None:
    is_matrix = left.integers.ndim > 1 and right.integers.ndim > 1
    if not is_matrix or not _is_constant_along(left.scale, -1) or not _is_constant_along(right.scale, -2):
        return None  # scales that vary within a sum
    rows = left.scale.take([0], -1) if left.scale.ndim else left.scale
    columns = right.scale.take([0], -2) if right.scale.ndim else right.scale
    return [_with_bias(run, node, product(left.integers, right.integers), rows * columns, bias, left.dtype)]


def _add(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    """Add tensors: a bias of a product in its accumulator, all else in real numbers."""
    left, right = _required(given, 0), _required(given, 1)
    if not _is_scaled(left, right):
        return None
    for sums, bias in ((left, right), (right, left)):
        if not isinstance(sums, Scaled) or not isinstance(bias, Scaled) or sums.is_stored:
            continue
        if _has_grid(sums, sums.scale) and _has_grid(bias, sums.scale):
            return [_sum_of_products(run, node, sums.integers + bias.integers, sums.scale, sums.dtype)]
    return [_Real(_reals(left) + _reals(right), left.dtype)]


def _subtract(_: _Run, __: _Node, given: list[_Value | None]) -> list[_Value] | None:
    left, right = _required(given, 0), _required(given, 1)
    return [_Real(_reals(left) - _reals(right), left.dtype)] if _is_scaled(left, right) else None


def _multiply(_: _Run, __: _Node, given: list[_Value | None]) -> list[_Value] | None:
    left, right = _codes(given, 0), _codes(given, 1)
    if left is None or right is None:
        return None
    return [replace(left, integers=left.integers * right.integers, scale=left.scale * right.scale, is_stored=False)]


def _concatenate(_: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    parts = [value for value in given if value is not None]
    if not _is_scaled(*parts):
        return None
    axis = int(node.settings["axis"])
    grids = [item for place in range(len(given)) if (item := _codes(given, place)) is not None and item.scale.ndim == 0]
    if len(grids) == len(parts) and len({float(item.scale) for item in grids}) == 1:
        return [replace(grids[0], integers=np.concatenate([item.integers for item in grids], axis))]
    return [_Real(np.concatenate([_reals(part) for part in parts], axis), parts[0].dtype)]


def _relu(_: _Run, __: _Node, given: list[_Value | None]) -> list[_Value] | None:
    return _clamp(_required(given, 0), 0.0, np.inf)


def _clip(_: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    low, high = (_optional(given, place) for place in (1, 2))
    floor = node.settings.get("min", -np.inf) if low is None else low
    ceiling = node.settings.get("max", np.inf) if high is None else high
    return _clamp(_required(given, 0), float(floor), float(ceiling))


def _clamp(value: _Value, low: float, high: float) -> list[_Value] | None:
    if isinstance(value, Scaled):
        return [clamped(value, low, high)]
    return [_Real(np.clip(value.values, low, high), value.dtype)] if isinstance(value, _Real) else None


def _max_pool(_: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    value = _required(given, 0)
    if len(node.proto.output) > 1:
        return None  # positions of the maxima are asked for

    def maxima(values: Array) -> Array:
        return window_maxima(values, window(node.settings, values.shape[2:], node.settings["kernel_shape"]))

    if isinstance(value, Scaled) and value.scale.ndim == 0 and value.divisor.ndim == 0:
        return [replace(value, integers=maxima(value.integers))]
    return [maxima(_as_written(value))]


def _average_pool(_: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    codes = _codes(given, 0)
    is_integer = codes is not None and codes.scale.ndim == 0
    values = codes.integers if codes is not None and is_integer else _as_written(_required(given, 0))
    sizes = values.shape[2:]
    move = window(node.settings, sizes, node.settings["kernel_shape"])
    sums = window_sums(values, move)
    counts = window_counts(sizes, move, include_padding=bool(node.settings.get("count_include_pad")))
    if codes is not None and is_integer:
        return [replace(codes, integers=sums, divisor=counts, is_stored=False)]
    return [(sums / counts).astype(values.dtype)]


def _global_average_pool(_: _Run, __: _Node, given: list[_Value | None]) -> list[_Value] | None:
    return _mean(_codes(given, 0), tuple(range(2, _ndim(_required(given, 0)))), keeps_axes=True)


def _reduce_mean(_: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    listed = _optional(given, 1)
    axes = node.settings.get("axes") if listed is None else listed.tolist()
    if not axes:
        return None
    return _mean(_codes(given, 0), tuple(axes), keeps_axes=bool(node.settings.get("keepdims", 1)))


def _mean(codes: Scaled | None, axes: tuple[int, ...], *, keeps_axes: bool) -> list[_Value] | None:
    if codes is None or codes.scale.ndim:
        return None
    sums = codes.integers.sum(axes, keepdims=keeps_axes)
    count = np.asarray(np.prod([codes.integers.shape[axis] for axis in axes]), np.int64)
    return [replace(codes, integers=np.asarray(sums), divisor=count, is_stored=False)]


def _move(_: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    """Rearrange or pick values: what happens to the integers happens to their scales."""
    value = _required(given, 0)
    others = [None if item is None else _as_written(item) for item in given[1:]]
    if isinstance(value, np.ndarray):
        return None
    if isinstance(value, _Real):
        return [_Real(part, value.dtype) for part in node.in_float([value.values, *others])]

    def moved(parts: Array, count: int) -> list[Array]:
        if parts.ndim == 0:
            return [parts] * count
        return node.in_float([np.broadcast_to(parts, value.integers.shape), *others])

    integers = node.in_float([value.integers, *others])
    scales, divisors = moved(value.scale, len(integers)), moved(value.divisor, len(integers))
    return [
        replace(value, integers=part, scale=scale, divisor=divisor)
        for part, scale, divisor in zip(integers, scales, divisors, strict=True)
    ]


def _pad(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    """Pad with zero, which every grid has, or with values of the tensor's own."""
    value, fill = _required(given, 0), _optional(given, 2)
    if isinstance(value, np.ndarray) or (fill is not None and fill.any()):
        return None
    if isinstance(value, Scaled) and (value.scale.ndim or value.divisor.ndim or value.has_clamp):
        return None
    if fill is not None:
        given = [*given[:2], np.zeros((), np.int64 if isinstance(value, Scaled) else np.float64), *given[3:]]
    return _move(run, node, given)


def _resize(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    return _move(run, node, given) if node.settings.get("mode", b"nearest") == b"nearest" else None


def _qlinear_conv(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    codes, weight, step, zero = (_plain(given, place) for place in (0, 3, 6, 7))
    values = stored(codes, _plain(given, 1), _plain(given, 2), 1)
    filters = stored(weight, _plain(given, 4), _plain(given, 5), 0)
    shape = (1, -1, *[1] * (codes.ndim - 2))
    sums = _convolved(node, values.integers, filters.integers)
    bias = _optional(given, 8)
    if bias is not None:
        sums = sums + bias.reshape(shape).astype(np.int64)
    scale = values.scale * (filters.scale.reshape(shape) if filters.scale.ndim else filters.scale)
    held = _sum_of_products(run, node, sums, scale, values.dtype)
    return [requantized(held, step.reshape(()), zero.reshape(()), zero.dtype, run.arithmetic)]


def _qlinear_matmul(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    left = stored(_plain(given, 0), _plain(given, 1), _plain(given, 2), -2)
    right = stored(_plain(given, 3), _plain(given, 4), _plain(given, 5), -1)
    step, zero = _plain(given, 6), _plain(given, 7)
    made = _multiplied(run, node, left, right, None)
    if made is None or not isinstance(made[0], Scaled):
        raise ModelError(f"{node.label} has scales that vary within a sum, which no integer engine can compute")
    axes = made[0].integers.ndim
    return [requantized(made[0], along(step, axes, -2), along(zero, axes, -2), zero.dtype, run.arithmetic)]


def _conv_integer(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    values = _less(_plain(given, 0), _optional(given, 2), 1)
    weight = _less(_plain(given, 1), _optional(given, 3), 0)
    return [run.accumulated(node, _convolved(node, values, weight)).astype(np.int32)]


def _matmul_integer(run: _Run, node: _Node, given: list[_Value | None]) -> list[_Value] | None:
    left = _less(_plain(given, 0), _optional(given, 2), -2)
    right = _less(_plain(given, 1), _optional(given, 3), -1)
    return [run.accumulated(node, product(left, right)).astype(np.int32)]


def _less(codes: Array, zero_point: Array | None, axis: int) -> Integers:
    """Return codes less their zero-point."""
    return stored(codes, np.ones((), np.float32), zero_point, axis).integers


def _required(given: list[_Value | None], place: int) -> _Value:
    value = given[place]
    assert value is not None, "ONNX's checker demands it"
    return value


def _plain(given: list[_Value | None], place: int) -> Array:
    return _as_written(_required(given, place))


def _optional(given: list[_Value | None], place: int) -> Array | None:
    value = given[place] if len(given) > place else None
    return None if value is None else _as_written(value)


def _codes(given: list[_Value | None], place: int) -> Scaled | None:
    """Return an input that an integer kernel can read, or None."""
    value = given[place]
    return value if isinstance(value, Scaled) and value.is_stored and not value.has_clamp else None


def _is_scaled(*values: _Value) -> bool:
    """Whether one of them is more exact than the graph's float type, and all are numbers of that kind."""
    is_float = all(value.dtype.kind == "f" for value in values)
    return is_float and any(not isinstance(value, np.ndarray) for value in values)


def _reals(value: _Value) -> Reals:
    return value.astype(np.float64) if isinstance(value, np.ndarray) else value.reals()


def _ndim(value: _Value) -> int:
    values = value.integers if isinstance(value, Scaled) else value.values if isinstance(value, _Real) else value
    return int(values.ndim)


_ONE = np.asarray(1, np.int64)
_BOUNDARIES = ("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")
_MOVES = (
    "DepthToSpace", "Expand", "Flatten", "Gather", "GlobalMaxPool", "Identity", "Reshape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_KERNELS: dict[str, _Kernel] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": _concatenate,
    "Conv": _conv,
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
    "MaxPool": _max_pool,
    "Mul": _multiply,
    "Pad": _pad,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _quantize,
    "ReduceMean": _reduce_mean,
    "Relu": _relu,
    "Resize": _resize,
    "Sub": _subtract,
    **dict.fromkeys(_MOVES, _move),
}
