"""Forms read back: the float graph computes what the form computes without its pairs, and no number is lost."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgedeploy.backends.qdq import read_form  # noqa: E402
from edgedeploy.errors import CompileError  # noqa: E402
from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.emission.emit import emit, shorten  # noqa: E402
from edgedeploy.prepare.export import export  # noqa: E402
from edgedeploy.prepare.graph import Runner, read_graph, write_graph  # noqa: E402
from edgedeploy.prepare.load import Loaded, load  # noqa: E402
from edgedeploy.prepare.ptq.quantize import quantize  # noqa: E402
from edgedeploy.prepare.simplify import simplify  # noqa: E402
from edgedeploy.records.model import TensorSpec  # noqa: E402
from edgedeploy.records.quantization import Grid, QuantizationTable, WeightQuantization  # noqa: E402
from edgedeploy.records.target import load_target  # noqa: E402
from edgedeploy.storage import sha256_file  # noqa: E402

HERE = Path(__file__).parent
IMAGE = [TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))]
VECTOR = [TensorSpec(name="vector", dtype="float32", shape=("batch", 12))]
RULES = load_target("x86-64", machine="x86_64", isa=("avx2",)).quantization


def run(model, inputs):
    """Run a graph as it is written."""
    return Runner(model.SerializeToString(), is_optimized=False)(inputs)


def without_pairs(model):
    """Return a graph whose activations pass their pairs untouched; weights are still dequantized by ONNX Runtime."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    stored = set()
    for node in plain.graph.node:
        is_pair = node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in stored)
        if node.op_type == "QuantizeLinear":
            stored.add(node.output[0])
        if is_pair:
            node.op_type = "Identity"
            del node.input[1:]
            del node.attribute[:]
    return plain


def made(nodes, constants, *, inputs, outputs, opset=17, shape=None):
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def saved(model, folder):
    path = Path(folder) / "form.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def canonical(module, specs, folder):
    samples = random_samples(specs, 24, 0)
    model = export(Loaded("module", "made", module.eval()), specs, samples, folder / "e.onnx")
    return simplify(model, samples, folder / "s.onnx"), samples


@pytest.fixture(scope="module", params=["tflite", "mnn"])
def emitted(request, tmp_path_factory):
    """A residual net with a rounded tensor that is an output too: its table, form and what was read of it."""
    folder = tmp_path_factory.mktemp("emitted")
    model, samples = canonical(load("tiny_nets:residual_with_taps", None, base=HERE).program, IMAGE, folder)
    rules = RULES[request.param]
    table = quantize(model, samples, rules)
    form = emit(model, table, rules, samples, folder / "q.onnx").model
    return model, table, form, read_form(Path(form.path)), samples


def test_float_graph_of_an_emitted_form_computes_what_the_form_does_without_its_pairs(emitted):
    _, _, form, read, samples = emitted
    inputs = samples.batch(0, 4)
    expected = run(without_pairs(read_graph(Path(form.path))), inputs)
    got = run(read.graph, inputs)
    assert list(got) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def test_float_graph_has_the_names_and_nodes_of_the_fp32_model(emitted):
    model, _, _, read, _ = emitted
    source = read_graph(Path(model.path)).graph
    onnx.checker.check_model(read.graph)
    assert [(node.op_type, node.name, list(node.output)) for node in read.graph.graph.node] == [
        (node.op_type, node.name, list(node.output)) for node in source.node
    ]
    assert [value.name for value in read.graph.graph.input] == [value.name for value in source.input]
    assert [value.name for value in read.graph.graph.output] == [value.name for value in source.output]


def test_every_number_of_the_table_is_in_the_form_that_is_read(emitted):
    _, table, _, read, _ = emitted
    constants = {item.name: numpy_helper.to_array(item) for item in read.graph.graph.initializer}
    assert read.precision == "int8"
    assert set(read.activations) == set(table.activations)
    assert set(read.weights) == set(table.weights)
    for name, stored in read.weights.items():
        assert stored.codes.dtype == np.int8
        np.testing.assert_array_equal(stored.scales, np.float32(table.weights[name].scales))
        wide = [-1 if axis == stored.axis else 1 for axis in range(stored.codes.ndim)]
        differences = stored.codes.astype(np.int32) - stored.zero_points.reshape(wide)
        np.testing.assert_array_equal(differences.astype(np.float32) * stored.scales.reshape(wide), constants[name])


def test_nodes_between_rounded_tensors_are_named_the_answer_too(emitted):
    _, table, _, read, _ = emitted
    kinds = {node.name: node.op_type for node in read.graph.graph.node}
    last = next(node.name for node in read.graph.graph.node if "logits" in node.output)
    assert last in read.quantized_nodes
    for node in read.graph.graph.node:
        assert node.op_type != "Conv" or node.name in read.quantized_nodes
    assert {kinds[name] for name in table.nodes} <= {kinds[name] for name in read.quantized_nodes}


def test_plain_model_is_read_as_fp32_and_unchanged(emitted):
    model, *_ = emitted
    read = read_form(Path(model.path))
    assert (read.precision, dict(read.activations), dict(read.weights), read.short) == ("fp32", {}, {}, frozenset())
    assert read.graph == read_graph(Path(model.path))


def test_float16_weights_are_read_as_the_numbers_that_they_are(emitted, tmp_path):
    model, *_, samples = emitted
    form = shorten(model, "float16", tmp_path / "h.onnx", samples).model
    read = read_form(Path(form.path))
    constants = {item.name: numpy_helper.to_array(item) for item in read.graph.graph.initializer}
    assert read.precision == "fp16"
    assert len(read.short) == 5
    for name in read.short:
        assert constants[name].dtype == np.float32
        np.testing.assert_array_equal(constants[name].astype(np.float16).astype(np.float32), constants[name])
    inputs = samples.batch(0, 4)
    for name, value in run(read_graph(Path(form.path)), inputs).items():
        np.testing.assert_array_equal(run(read.graph, inputs)[name], value)


def test_bfloat16_weights_beyond_float16_are_not_called_short(tmp_path):
    import ml_dtypes

    weights = np.array([[1.0, 2.5], [3e5, 1.0]], np.float32)
    nodes = [
        helper.make_node("Cast", ["w/bfloat16"], ["w"], name="w/cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    constants = {"w/bfloat16": weights.astype(ml_dtypes.bfloat16)}
    model = made(nodes, constants, inputs=[("x", TensorProto.FLOAT, [1, 2])], outputs=["y"])
    read = read_form(saved(model, tmp_path))
    assert (read.precision, read.short) == ("fp16", frozenset())
    (kept,) = [numpy_helper.to_array(item) for item in read.graph.graph.initializer]
    np.testing.assert_array_equal(kept, weights.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return canonical(load("tiny_nets:small_mlp", None, base=HERE).program, VECTOR, tmp_path_factory.mktemp("mlp"))


def weight_only(model, weights):
    return QuantizationTable(
        model_sha256=model.sha256,
        calibration="",
        calibration_sha256="",
        samples=0,
        method="made",
        nodes=(),
        activations={},
        weights=weights,
    )


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 0), (0, 4), (1, 4), (0, 5), (1, 5)])
def test_blocks_and_channels_of_weights_that_compute_in_float_are_read_back(tmp_path, mlp, axis, block):
    model, samples = mlp
    graph = read_graph(Path(model.path))
    item = next(item for item in graph.graph.initializer if sorted(item.dims) == [12, 16])
    name, weight = item.name, numpy_helper.to_array(item)
    rows = weight if axis == 0 else weight.T
    width = block or rows.shape[1]
    starts = range(0, rows.shape[1], width)
    scales = np.float32([[np.abs(row[start : start + width]).max() / 127 for start in starts] for row in rows])
    wide = scales.repeat(width, axis=1)[:, : rows.shape[1]]
    rows = np.rint(rows / wide).astype(np.float32) * wide
    item.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rows if axis == 0 else rows.T), name))
    write_graph(graph, tmp_path / "on_grid.onnx")
    model = msgspec.structs.replace(
        model, path=str(tmp_path / "on_grid.onnx"), sha256=sha256_file(tmp_path / "on_grid.onnx")
    )
    grid = WeightQuantization(axis=axis, block=block, scales=tuple(map(float, scales.reshape(-1))), origin="trained")
    form = emit(model, weight_only(model, {name: grid}), RULES["tflite"], samples, tmp_path / "q.onnx").model
    read = read_form(Path(form.path))
    stored = read.weights[name]
    assert (read.precision, stored.axis, stored.block, stored.codes.shape) == ("int8", axis, block, weight.shape)
    np.testing.assert_array_equal(stored.scales, scales if block else scales.reshape(-1))
    assert not read.quantized_nodes
    inputs = samples.batch(0, 4)
    expected = run(read_graph(Path(form.path)), inputs)
    for output, value in run(read.graph, inputs).items():
        np.testing.assert_array_equal(value, expected[output])


@pytest.mark.parametrize(("axis", "shape"), [(0, (3, 6)), (1, (6, 3))])
def test_blocks_of_the_standard_operator_are_read(tmp_path, axis, shape):
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (6, 6)).astype(np.int8)
    scales = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "s"], ["w"], name="w/dequantize", axis=axis, block_size=2),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    model = made(nodes, {"c": codes, "s": scales}, inputs=[("x", TensorProto.FLOAT, [2, 6])], outputs=["y"], opset=21)
    read = read_form(saved(model, tmp_path))
    assert (read.weights["w"].axis, read.weights["w"].block) == (1 - axis, 2)
    np.testing.assert_array_equal(read.weights["w"].scales, scales if axis == 1 else scales.T)
    inputs = {"x": rng.normal(size=(2, 6)).astype(np.float32)}
    np.testing.assert_array_equal(run(read.graph, inputs)["y"], run(model, inputs)["y"])


def test_unsigned_weights_keep_their_values_as_signed_codes(tmp_path):
    codes = np.array([[0, 128], [255, 7]], np.uint8)
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["w"], name="w/dequantize"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    constants = {"c": codes, "s": np.float32(0.5), "z": np.uint8(100)}
    read = read_form(saved(made(nodes, constants, inputs=[("x", TensorProto.FLOAT, [1, 2])], outputs=["y"]), tmp_path))
    stored = read.weights["w"]
    assert (stored.axis, stored.zero_points.tolist()) == (None, [-28])
    np.testing.assert_array_equal(stored.codes, codes.astype(np.int16) - 128)
    (kept,) = [numpy_helper.to_array(item) for item in read.graph.graph.initializer]
    np.testing.assert_array_equal(kept, np.float32(0.5) * (codes.astype(np.float32) - 100))


def test_excluded_node_that_reads_the_unrounded_tensor_reads_the_same_tensor(tmp_path, emitted):
    model, table, *_, samples = emitted
    rules = msgspec.structs.replace(RULES["tflite"], excluded_operators=("Add",))
    form = emit(model, table, rules, samples, tmp_path / "q.onnx", allow_change=True).model
    written = read_graph(Path(form.path)).graph
    (add,) = [node for node in written.node if node.op_type == "Add"]
    assert any(name.endswith("/float") for name in add.input)
    read = read_form(Path(form.path))
    (add,) = [node for node in read.graph.graph.node if node.op_type == "Add"]
    assert not any(name.endswith("/float") for name in add.input)
    assert add.name not in read.quantized_nodes
    inputs = samples.batch(0, 4)
    for name, value in run(without_pairs(read_graph(Path(form.path))), inputs).items():
        np.testing.assert_array_equal(run(read.graph, inputs)[name], value)


def test_output_that_is_a_rounded_input_is_copied(tmp_path):
    nodes = pair("x", "x", "y", 0)
    model = made(nodes, numbers("x", 0.1, 3), inputs=[("x", TensorProto.FLOAT, [2])], outputs=["y"])
    read = read_form(saved(model, tmp_path))
    inputs = {"x": np.float32([0.123, -4])}
    np.testing.assert_array_equal(run(read.graph, inputs)["y"], inputs["x"])
    assert read.activations == {"x": Grid(scale=float(np.float32(0.1)), zero_point=3, low_code=-128, high_code=127)}


def pair(tensor, source, result, number):
    stored = f"{tensor}/stored{number}"
    scales = [f"{tensor}/scale", f"{tensor}/zero_point"]
    return [
        helper.make_node("QuantizeLinear", [source, *scales], [stored], name=f"{tensor}/quantize{number}"),
        helper.make_node("DequantizeLinear", [stored, *scales], [result], name=f"{tensor}/dequantize{number}"),
    ]


def numbers(tensor, scale, zero_point):
    return {f"{tensor}/scale": np.float32(scale), f"{tensor}/zero_point": np.int8(zero_point)}


class Chain:
    """Draws a graph of products, sums and clamps in the manner of `emit`, every tensor rounded or not."""

    def __init__(self, data):
        self.data, self.nodes, self.front, self.constants, self.rounded = data, [], [], {}, {}
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
        self.unrounded = {}
        self.last = self.round_input("x")
        self.tensors = [self.last]

    def grid(self, tensor):
        scale = self.data.draw(st.floats(1e-3, 1.0), label="scale")
        zero_point = self.data.draw(st.integers(-128, 127), label="zero-point")
        self.constants |= numbers(tensor, scale, zero_point)
        self.rounded[tensor] = (float(np.float32(scale)), zero_point)

    def round_input(self, name):
        if not self.data.draw(st.booleans(), label="rounds the input"):
            return name
        self.grid(name)
        self.nodes += pair(name, name, f"{name}/dequantized", 0)
        self.unrounded[f"{name}/dequantized"] = name
        return f"{name}/dequantized"

    def weights(self, name):
        kind = self.data.draw(st.sampled_from(["channels", "rows", "one", "half", "float"]), label="weights")
        codes = self.rng.integers(-127, 128, (4, 4)).astype(np.int8)
        if kind == "float":
            self.constants[name] = self.rng.normal(size=(4, 4)).astype(np.float32)
        elif kind == "half":
            self.constants[f"{name}/float16"] = self.rng.normal(size=(4, 4)).astype(np.float16)
            self.front.append(helper.make_node("Cast", [f"{name}/float16"], [name], name=f"{name}/cast", to=1))
        else:
            size = () if kind == "one" else (4,)
            points = self.rng.integers(-5, 6, size).astype(np.int8)
            scales = self.rng.uniform(0.001, 0.1, size).astype(np.float32)
            self.constants |= {f"{name}/integers": codes, f"{name}/scale": scales, f"{name}/zero_point": points}
            inputs = [f"{name}/{word}" for word in ("integers", "scale", "zero_point")]
            settings = {} if kind == "one" else {"axis": 1 if kind == "channels" else 0}
            self.front.append(
                helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}/dequantize", **settings)
            )
        return name

    def step(self, number):
        operator = self.data.draw(st.sampled_from(["MatMul", "Relu", "Add", "shared"]), label="operator")
        name = f"t{number}"
        source = self.data.draw(st.sampled_from(self.tensors), label="source")
        if self.data.draw(st.booleans(), label="reads the unrounded tensor"):
            source = self.unrounded.get(source, source)
        inputs = [source]
        if operator == "Add":
            inputs.append(self.tensors[-1])
        elif operator == "shared" and "w" in self.constants | {f"{n.output[0]}": 0 for n in self.front}:
            inputs.append("w")
        elif operator in ("MatMul", "shared"):
            inputs.append(self.weights("w" if operator == "shared" else f"w{number}"))
        kind = "MatMul" if operator == "shared" else operator
        is_rounded = self.data.draw(st.booleans(), label="rounds")
        result = f"{name}/float" if is_rounded else name
        self.nodes.append(helper.make_node(kind, inputs, [result], name=f"node{number}"))
        if is_rounded:
            self.grid(name)
            self.nodes += pair(name, result, name, 0)
            self.unrounded[name] = result
        self.tensors.append(name)

    def model(self, steps):
        for number in range(steps):
            self.step(number)
        extra = self.data.draw(st.lists(st.sampled_from(self.tensors[1:]), max_size=2), label="more outputs")
        outputs = list(dict.fromkeys([self.tensors[-1], *extra]))
        return made(
            [*self.front, *self.nodes],
            self.constants,
            inputs=[("x", TensorProto.FLOAT, [3, 4])],
            outputs=outputs,
            shape=[3, 4],
        )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), steps=st.integers(1, 6))
def test_float_graph_equals_the_form_without_its_pairs(data, steps, tmp_path_factory):
    chain = Chain(data)
    model = chain.model(steps)
    read = read_form(saved(model, tmp_path_factory.mktemp("chain")))
    onnx.checker.check_model(read.graph)
    inputs = {"x": chain.rng.normal(size=(3, 4)).astype(np.float32)}
    expected, got = run(without_pairs(model), inputs), run(read.graph, inputs)
    assert list(got) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)
    kinds = {node.op_type for node in read.graph.graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear", "Cast"}
    assert {name: (grid.scale, grid.zero_point) for name, grid in read.activations.items()} == chain.rounded
    tensors = {name for node in read.graph.graph.node for name in (*node.input, *node.output)}
    assert set(read.activations) <= tensors | {"x"}
    assert not any(name.endswith(("/float", "/dequantized")) for name in tensors)


DYNAMIC = [helper.make_node("DynamicQuantizeLinear", ["x"], ["c", "s", "z"], name="rounds"),
           helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"], name="widens")]  # fmt: skip
TWICE = [*pair("t", "x", "a", 0), *pair("u", "x", "b", 0), helper.make_node("Add", ["a", "b"], ["y"], name="sum")]
BROKEN = [
    helper.make_node("QuantizeLinear", ["x", "t/scale", "t/zero_point"], ["c"], name="rounds"),
    helper.make_node("DequantizeLinear", ["c", "u/scale", "u/zero_point"], ["y"], name="widens"),
]
CHANNELS = [
    helper.make_node("QuantizeLinear", ["x", "s", "z"], ["c"], name="rounds", axis=1),
    helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"], name="widens", axis=1),
]
CONSTANT = [
    helper.make_node("QuantizeLinear", ["w", "t/scale", "t/zero_point"], ["c"], name="rounds"),
    helper.make_node("DequantizeLinear", ["c", "t/scale", "t/zero_point"], ["v"], name="widens"),
    helper.make_node("MatMul", ["x", "v"], ["y"], name="product"),
]
PACKED = [helper.make_node("MatMulNBits", ["x", "w"], ["y"], name="packed", domain="com.microsoft", K=2, N=2, bits=4)]
INTEGER = [helper.make_node("MatMulInteger", ["c", "w"], ["y"], name="multiplies")]
LINEAR = [helper.make_node("QLinearMatMul", ["c"] * 8, ["y"], name="multiplies")]


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        (DYNAMIC, r"'rounds' \(DynamicQuantizeLinear\)"),
        (PACKED, r"'packed' \(MatMulNBits\)"),
        (INTEGER, r"'multiplies' \(MatMulInteger\)"),
        (LINEAR, r"'multiplies' \(QLinearMatMul\)"),
        (TWICE, r"'u/quantize0' \(QuantizeLinear\).*two grids"),
        (BROKEN, r"'widens' \(DequantizeLinear\).*another scale"),
        (CHANNELS, r"'rounds' \(QuantizeLinear\).*each channel"),
        (CONSTANT, r"'rounds' \(QuantizeLinear\).*constant 'w'"),
    ],
)
def test_what_is_no_form_of_ours_is_refused_by_operator_and_node(tmp_path, nodes, named):
    constants = numbers("t", 0.1, 0) | numbers("u", 0.2, 0)
    constants |= {"w": np.eye(2, dtype=np.float32), "s": np.float32([0.1, 0.2]), "z": np.int8([0, 0])}
    model = made(nodes, constants, inputs=[("x", TensorProto.FLOAT, [2, 2])], outputs=["y"])
    with pytest.raises(CompileError, match=f"someone could not compile the model at node {named}"):
        read_form(saved(model, tmp_path), "someone")


def test_integer_input_behind_dequantize_is_refused(tmp_path):
    nodes = [helper.make_node("DequantizeLinear", ["x", "t/scale", "t/zero_point"], ["y"], name="widens")]
    model = made(nodes, numbers("t", 0.1, 0), inputs=[("x", TensorProto.INT8, [2, 2])], outputs=["y"])
    with pytest.raises(CompileError, match=r"'widens' \(DequantizeLinear\).*'x' is an integer tensor"):
        read_form(saved(model, tmp_path))


def test_pairs_within_a_branch_are_refused(tmp_path):
    branch = helper.make_graph(
        pair("t", "x", "y", 0), "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    nodes = [helper.make_node("If", ["flag"], ["z"], name="choice", then_branch=branch, else_branch=branch)]
    constants = numbers("t", 0.1, 0) | {"flag": np.bool_(True)}
    model = made(nodes, constants, inputs=[("x", TensorProto.FLOAT, [2])], outputs=["z"])
    with pytest.raises(CompileError, match=r"'t/quantize0' \(QuantizeLinear\)"):
        read_form(saved(model, tmp_path))
