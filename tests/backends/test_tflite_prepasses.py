"""Graphs before and after the rewrites for onnx2tf: on ONNX Runtime, and as the .tflite that comes out of them."""

import itertools
import json
import subprocess
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, compose, helper, numpy_helper  # noqa: E402

from edgedeploy.backends import backend  # noqa: E402
from edgedeploy.backends.tflite import convert as script  # noqa: E402
from edgedeploy.backends.tflite.prepasses import REFUSED, prepare  # noqa: E402
from edgedeploy.errors import BackendMissing, CompileError  # noqa: E402
from edgedeploy.prepare.graph import Runner  # noqa: E402
from edgedeploy.records.quantization import Grid  # noqa: E402

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return (RNG.normal(size=shape) * scale).astype(np.float32)


MAPS = {"x": normal(1, 6, 9, 7)}
ROWS = {"x": normal(5, 12)}
STACK = {"x": normal(1, 3, 6, 12)}
SEQUENCE = {"x": normal(6, 2, 5)}


@dataclass(frozen=True)
class Case:
    """One graph: nodes as (operator, inputs, outputs, settings)."""

    nodes: list
    inputs: dict
    constants: dict = field(default_factory=dict)
    outputs: tuple = ("y",)
    opset: int = 18

    def model(self):
        nodes = [
            helper.make_node(node[0], node[1], node[2], name=f"node_{index}", **(node[3] if len(node) > 3 else {}))
            for index, node in enumerate(self.nodes)
        ]
        graph = helper.make_graph(
            nodes,
            "case",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
                for name, value in self.inputs.items()
            ],
            [helper.make_empty_tensor_value_info(name) for name in self.outputs],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        if self.nodes[0][0] == "GroupNormalization":  # ONNX infers no shape for that of opset 18
            model.graph.output[0].CopyFrom(
                helper.make_tensor_value_info("y", TensorProto.FLOAT, self.inputs["x"].shape)
            )
        elif self.nodes[0][0] != "Foreign":
            model = onnx.shape_inference.infer_shapes(model)
            del model.graph.value_info[:]
        return model


def one(operator, inputs=MAPS, constants=None, opset=18, **settings):
    """Return a case of one operator whose other inputs are constants, in their order."""
    return Case([(operator, [*inputs, *(constants or {})], ["y"], settings)], inputs, constants or {}, opset=opset)


def clamped(operator, **settings):
    return Case([("Relu", ["x"], ["r"]), (operator, ["r"], ["y"], settings)], MAPS, opset=19)


def resized(mode, how, sizes=(15, 4), **settings):
    settings = {"mode": mode, "coordinate_transformation_mode": how, **settings}
    return Case([("Resize", ["x", "", "", "sizes"], ["y"], settings)], MAPS, {"sizes": np.int64([1, 6, *sizes])})


def sliced(inputs, starts, ends, axes, steps):
    bounds = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    return one("Slice", inputs, {name: np.int64(values) for name, values in bounds.items()})


def contracted(equation, first, second, *, constant=False):
    other = {"z": normal(*second)}
    inputs = {"x": normal(*first)} | ({} if constant else other)
    return Case([("Einsum", ["x", "z"], ["y"], {"equation": equation})], inputs, other if constant else {})


def recurrent(operator, outputs=("y",), **settings):
    gates, directions = (
        {"LSTM": 4, "GRU": 3, "RNN": 1}[operator],
        2 if settings.get("direction") == "bidirectional" else 1,
    )
    constants = {
        "w": normal(directions, 4 * gates, 5, scale=0.5),
        "r": normal(directions, 4 * gates, 4, scale=0.5),
        "b": normal(directions, 8 * gates, scale=0.3),
    }
    names = ["" if name == "-" else name for name in outputs]
    return Case(
        [(operator, ["x", *constants], names, {"hidden_size": 4, **settings})],
        SEQUENCE,
        constants,
        tuple(name for name in names if name),
    )


PADDED = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
UNEVEN = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 1, 0]}
CEILED = {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}
CEILED_AND_PADDED = {**PADDED, "ceil_mode": 1}
VOLUME = {"x": normal(1, 2, 5, 6, 7)}
LINEAR = {"w": normal(12, 8), "b": normal(8), "low": np.float32(0), "high": np.float32(6)}

# What onnx2tf 2.6.9 makes a file of that computes something else.
WRONG = {
    "elu with an alpha": one("Elu", alpha=0.5),
    "resize by a factor": one(
        "Resize", MAPS, {"roi": np.float32([]), "s": np.float32([1, 1, 1.5, 2.5])}, mode="linear"
    ),
    "average pool with ceil_mode that counts its padding": clamped("AveragePool", **CEILED, count_include_pad=1),
    "last state of an LSTM without its states": recurrent("LSTM", ("-", "h")),
}
# What it makes a custom operator of, or a file that cannot be loaded, or refuses.
LOUD = {
    "group norm": one("GroupNormalization", MAPS, {"s": normal(2), "b": normal(2)}, num_groups=2),
    "slice backwards": sliced(MAPS, [-1], [-100], [3], [-1]),
    "slice backwards by three": sliced(MAPS, [8], [1], [2], [-3]),
    "slice both ways": sliced(MAPS, [-1, 0], [-(2**62), 4], [2, 1], [-1, 1]),
    "slice channels backwards": sliced(MAPS, [5], [-100], [1], [-2]),
    "slice a matrix backwards": sliced(ROWS, [-1], [-100], [1], [-1]),
    "dilated max pool": one("MaxPool", kernel_shape=[3, 2], dilations=[2, 3], strides=[2, 1], pads=[2, 1, 2, 1]),
    "max pool over a volume": one("MaxPool", VOLUME, kernel_shape=[2, 2, 3], strides=[2, 1, 2], pads=[0, 1, 1, 1, 0, 1]),
    "average pool over a volume": one("AveragePool", VOLUME, kernel_shape=[2, 3, 2], strides=[2, 1, 2], pads=[1, 1, 0, 0, 1, 1]),
    "nearest, even": resized("nearest", "half_pixel"),
    "nearest, up": resized("nearest", "asymmetric", nearest_mode="ceil"),
    "nearest between corners": resized("nearest", "align_corners", nearest_mode="round_prefer_ceil"),
    "bilinear about the middle": resized("linear", "half_pixel_symmetric"),
    "product of two matrices": Case([("Gemm", ["x", "z"], ["y"])], {"x": normal(4, 12), "z": normal(12, 5)}),
    "gemm of two activations": Case(
        [("Gemm", ["x", "z", "b"], ["y"], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0})],
        {"x": normal(12, 4), "z": normal(5, 12)},
        {"b": normal(5)},
    ),
    "last state of a GRU": recurrent("GRU", ("-", "h"), linear_before_reset=1),
    "last state of an RNN": recurrent("RNN", ("-", "h")),
}  # fmt: skip
# What is right in float, and wrong or left out of the integers otherwise; or is written in another way for the others.
RIGHT = {
    "padded max pool after a ReLU": clamped("MaxPool", **PADDED),
    "padded max pool": one("MaxPool", **UNEVEN),
    "max pool with ceil_mode": one("MaxPool", **CEILED),
    "padded max pool with ceil_mode": one("MaxPool", **CEILED_AND_PADDED),
    "max pool padded as TFLite does": one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    "max pool padded below": one("MaxPool", kernel_shape=[2, 2], strides=[1, 1], auto_pad="SAME_LOWER"),
    "max pool over a line": one("MaxPool", {"x": normal(1, 4, 11)}, kernel_shape=[3], strides=[2], pads=[1, 1]),
    "padded average pool": clamped("AveragePool", **PADDED),
    "padded average pool that counts its padding": clamped("AveragePool", **PADDED, count_include_pad=1),
    "average pool with ceil_mode": clamped("AveragePool", **CEILED),
    "padded average pool with ceil_mode": clamped("AveragePool", **CEILED_AND_PADDED),
    "both in an average pool": clamped("AveragePool", **CEILED_AND_PADDED, count_include_pad=1),
    "average pool over a line": one("AveragePool", {"x": normal(1, 4, 11)}, kernel_shape=[3], strides=[2], pads=[1, 1]),
    "linear layers of rank 4": Case(
        [
            ("MatMul", ["x", "w"], ["m"]),
            ("Add", ["b", "m"], ["a"]),
            ("Relu", ["a"], ["r"]),
            ("MatMul", ["r", "w2"], ["y"]),
        ],
        STACK,
        {**LINEAR, "w2": normal(8, 5)},
    ),
    "linear layer of rank 2": Case(
        [("MatMul", ["x", "w"], ["m"]), ("Add", ["m", "b"], ["a"]), ("Clip", ["a", "low", "high"], ["y"])],
        ROWS,
        LINEAR,
    ),
    "gemm, reshape, clamp": Case(
        [("Gemm", ["x", "w", "b"], ["g"]), ("Reshape", ["g", "s"], ["r"]), ("Relu", ["r"], ["y"])],
        ROWS,
        {**LINEAR, "s": np.int64([1, 5, 8])},
    ),
    "gemm and a matrix": one("Gemm", ROWS, {"w": normal(12, 5), "c": normal(5, 5)}),
    "attention by einsum": contracted("bhqd,bhkd->bhqk", (1, 2, 5, 6), (1, 2, 4, 6)),
    "einsum with a constant": contracted("bchw,cwk->bhk", (1, 4, 9, 7), (4, 7, 5), constant=True),
    "einsum that turns its result": contracted("ij,kj->ki", (3, 4), (5, 4)),
    "einsum that sums on one side": contracted("bij,jk->k", (2, 3, 4), (4, 5)),
    "log softmax": one("LogSoftmax", axis=1),
    "bicubic": resized("cubic", "half_pixel", (18, 14)),
    "bicubic, uneven": resized("cubic", "align_corners", exclude_outside=0, cubic_coeff_a=-0.5),
    "bilinear": resized("linear", "half_pixel"),
    "bilinear between corners": resized("linear", "align_corners"),
    "nearest": resized("nearest", "asymmetric", nearest_mode="floor"),
    "nearest over a line": one("Resize", {"x": normal(1, 3, 6)}, {"roi": np.float32([]), "s": np.float32([1, 1, 2])}),
    "last states in both directions": recurrent("LSTM", ("-", "h"), direction="bidirectional"),
    "batch norm alone": one(
        "BatchNormalization",
        MAPS,
        {"s": normal(6), "b": normal(6), "m": normal(6), "v": np.abs(normal(6)) + np.float32(0.1)},
    ),
    "layer norm": one("LayerNormalization", STACK, {"s": normal(12), "b": normal(12)}),
    "instance norm": one("InstanceNormalization", MAPS, {"s": normal(6), "b": normal(6)}),
}
OLD = {
    "softmax of opset 11": one("Softmax", opset=11, axis=1),
    "log softmax of opset 11": one("LogSoftmax", opset=11, axis=2),
    "upsampling of opset 9": one("Upsample", MAPS, {"s": np.float32([1, 1, 2, 2])}, opset=9),
    "norm by the root mean square": one("RMSNormalization", STACK, {"s": normal(12)}, opset=23, axis=-1),
}
ALL = {**WRONG, **LOUD, **RIGHT, **OLD}


def run(model, inputs):
    return Runner(model.SerializeToString(), is_optimized=False)(inputs)


@pytest.mark.parametrize("name", ALL)
def test_rewritten_graph_computes_the_same(name):
    case = ALL[name]
    model = case.model()
    source = model.SerializeToString()
    prepared = prepare(model)
    assert model.SerializeToString() == source
    onnx.checker.check_model(prepared)
    expected, got = run(model, case.inputs), run(prepared, case.inputs)
    assert list(got) == list(expected)
    for output, value in expected.items():
        assert got[output].shape == value.shape
        np.testing.assert_allclose(got[output], value, rtol=1e-5, atol=2e-6 * np.abs(value).max())
    names = [node.name for node in prepared.graph.node]
    assert len(set(names)) == len(names)
    assert all(name.split("/")[0] in {node.name for node in model.graph.node} for name in names)


# The converter and the runtime.


@pytest.fixture(scope="module")
def converter():
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    tools = backend("tflite").tools
    assert tools is not None
    try:
        return tools.python()
    except BackendMissing as error:
        pytest.skip(str(error))


def merged(cases):
    """Return one graph of many, as a conversion takes a second whatever is in it; and its inputs and answers."""
    graph = onnx.GraphProto(name="cases")
    inputs, expected = {}, {}
    opset = max(case.opset for case in cases.values())
    for index, case in enumerate(cases.values()):
        part = compose.add_prefix(case.model(), f"case{index}_").graph
        for kind in ("node", "input", "initializer"):
            getattr(graph, kind).extend(getattr(part, kind))
        inputs |= {f"case{index}_{name}": value for name, value in case.inputs.items()}
        answers = run(case.model(), case.inputs)
        expected |= {f"case{index}_{name}": value for name, value in answers.items()}
    for name, value in expected.items():
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), inputs, expected


def converted(python, model, folder):
    """Convert a graph by the script of the back end and return the .tflite."""
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    job = {
        "folder": str(folder),
        "keep": [value.name for value in model.graph.input],
        "tflite": str(folder / "float.tflite"),
        "error": str(folder / "error.txt"),
        "steps": ["convert"],
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [str(python), script.__file__, str(folder / "job.json")], capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return folder / "float.tflite"


def answers(file, inputs):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(file), num_threads=1)
    interpreter.allocate_tensors()
    for item in interpreter.get_input_details():
        interpreter.set_tensor(item["index"], inputs[item["name"]])
    interpreter.invoke()
    return {item["name"]: interpreter.get_tensor(item["index"]) for item in interpreter.get_output_details()}


def error_of(got, expected):
    """Return the largest error in the best order of axes, relative to the largest value."""
    orders = [
        order for order in itertools.permutations(range(expected.ndim)) if expected.transpose(order).shape == got.shape
    ]
    errors = [np.abs(expected.transpose(order) - got).max() / np.abs(expected).max() for order in orders]
    return min(errors, default=np.inf)


def test_silent_traps_are_there_without_the_rewrites(converter, tmp_path):
    model, inputs, expected = merged(WRONG)
    got = answers(converted(converter, model, tmp_path), inputs)
    errors = {name: error_of(got[name], value) for name, value in expected.items()}
    assert all(error > 1e-2 for error in errors.values()), errors


@pytest.mark.parametrize("cases", [{**WRONG, **LOUD}, RIGHT], ids=["wrong before", "right before"])
def test_rewritten_graphs_are_right_in_the_runtime(converter, tmp_path, cases):
    model, inputs, expected = merged(cases)
    got = answers(converted(converter, prepare(model), tmp_path), inputs)
    errors = {name: error_of(got[name], value) for name, value in expected.items()}
    names = {
        f"case{index}_{output}": name for index, (name, case) in enumerate(cases.items()) for output in case.outputs
    }
    assert {names[name]: error for name, error in errors.items() if error > 1e-5} == {}


# What int8 needs of the float graph.


@given(
    scale=st.floats(1e-3, 1.0),
    zero_point=st.integers(-128, 127),
    pads=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    ceil=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_padding_of_a_rounded_max_pool_lies_on_its_grid_and_changes_no_code(scale, zero_point, pads, ceil):
    grid = Grid(scale=scale, zero_point=zero_point, low_code=-128, high_code=127)
    case = one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=pads, ceil_mode=int(ceil))
    prepared = prepare(case.model(), {"x": grid})
    kinds = [node.op_type for node in prepared.graph.node]
    values = [numpy_helper.to_array(item) for item in prepared.graph.initializer if item.name.endswith("/value")]
    assert kinds in (["MaxPool"], ["Pad", "MaxPool"])
    for value in values:
        assert float(value) == float(np.float32(scale) * np.float32(-128 - zero_point))

    def codes(answer):
        return np.clip(np.rint(answer / np.float32(scale)) + zero_point, -128, 127)

    expected, got = run(case.model(), case.inputs)["y"], run(prepared, case.inputs)["y"]
    np.testing.assert_array_equal(codes(got), codes(expected))


@given(
    kernel=st.integers(2, 4),
    stride=st.integers(1, 3),
    pads=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    ceil=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_rounded_average_pool_computes_the_same(kernel, stride, pads, ceil):
    case = one("AveragePool", kernel_shape=[kernel, 2], strides=[stride, 2], pads=pads, ceil_mode=int(ceil), opset=19)
    grid = Grid(scale=0.1, zero_point=0, low_code=-128, high_code=127)
    got = run(prepare(case.model(), {"x": grid}), case.inputs)["y"]
    np.testing.assert_allclose(got, run(case.model(), case.inputs)["y"], rtol=1e-5, atol=1e-6)


def test_rounded_average_pool_is_not_corrected_by_a_product():
    case = one("AveragePool", {"x": normal(1, 6, 8, 6)}, **PADDED)
    grid = Grid(scale=0.1, zero_point=0, low_code=-128, high_code=127)
    assert [node.op_type for node in prepare(case.model(), {"x": grid}).graph.node] == ["AveragePool", "Slice"]
    assert "Mul" in [node.op_type for node in prepare(case.model()).graph.node]


def test_rounded_tensors_keep_their_names_through_a_linear_layer():
    case = RIGHT["linear layers of rank 4"]
    grids = {name: Grid(scale=0.1, zero_point=0, low_code=-128, high_code=127) for name in ("x", "m", "a", "r", "y")}
    made = {name for node in prepare(case.model(), grids).graph.node for name in node.output}
    assert {"m", "a", "r", "y"} <= made
    free = {name for node in prepare(case.model(), {"r": grids["r"]}).graph.node for name in node.output}
    assert {"r", "y"} <= free
    assert not free & {"m", "a"}


@pytest.mark.parametrize("name", ["linear layers of rank 4", "linear layer of rank 2", "gemm, reshape, clamp"])
def test_clamp_follows_its_product_directly(name):
    nodes = list(prepare(RIGHT[name].model()).graph.node)
    makers = {output: node.op_type for node in nodes for output in node.output}
    clamps = [node for node in nodes if node.op_type in ("Relu", "Clip")]
    assert [makers[node.input[0]] for node in clamps] == ["Gemm"] * len(clamps)
    assert len(clamps) == 1


def test_weights_of_products_keep_their_names_and_values():
    case = RIGHT["linear layers of rank 4"]
    kept = {item.name: numpy_helper.to_array(item) for item in prepare(case.model()).graph.initializer}
    for name in ("w", "w2"):
        np.testing.assert_array_equal(kept[name], case.constants[name])


# What is refused.

FOREIGN = one("Foreign", domain="com.example")


@pytest.mark.parametrize("operator", sorted(REFUSED))
def test_operator_without_a_form_in_tflite_is_refused_by_name(operator):
    node = helper.make_node(operator, ["x"], ["y"], name="somewhere")
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])], [])
    why, _, hint = REFUSED[operator].partition("; ")
    assert why
    assert hint
    with pytest.raises(CompileError) as caught:
        prepare(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    assert (caught.value.node, caught.value.op, caught.value.hint) == ("somewhere", operator, hint)


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (FOREIGN, r"'node_0' \(Foreign\): the operator's domain 'com.example'"),
        (Case([("Einsum", ["x"], ["y"], {"equation": "ii->i"})], {"x": normal(4, 4)}), "contraction 'ii->i'"),
        (one("AveragePool", kernel_shape=[2, 2], dilations=[2, 2], opset=19), "no average pool with dilations"),
        (resized("linear", "half_pixel", antialias=1), "crop or smooth"),
        (recurrent("LSTM", ("y", "h", "c")), "last cell state"),
        (one("LSTM", SEQUENCE, {"w": normal(1, 16, 5), "r": normal(1, 16, 4), "b": normal(1, 32),
                                "l": np.int32([6, 4])}, hidden_size=4), "lengths of their own"),
        (Case([("LSTM", ["x", "w", "r", "", "", "h", "c"], ["y"], {"hidden_size": 4})], SEQUENCE,
              {"w": normal(1, 16, 5), "r": normal(1, 16, 4), "h": normal(1, 2, 4), "c": normal(1, 2, 4)}),
         "first state is a constant"),
    ],
)  # fmt: skip
def test_use_of_an_operator_that_comes_out_wrong_is_refused(case, what):
    with pytest.raises(CompileError, match=what) as caught:
        prepare(case.model())
    assert caught.value.node == "node_0"
    assert caught.value.hint
