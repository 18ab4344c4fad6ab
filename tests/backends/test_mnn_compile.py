"""MNN's host half: what it writes, rewrites, refuses and reports, on the real converter and runtime."""

import dataclasses
import json
import struct
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("_tools", reason="MNN is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgedeploy import pipeline  # noqa: E402
from edgedeploy.backends import parse_options  # noqa: E402
from edgedeploy.backends.mnn import BACKEND, Options, contents, conversion, parameters, report, rewrites  # noqa: E402
from edgedeploy.backends.mnn.contents import read_contents  # noqa: E402
from edgedeploy.backends.qdq import read_form  # noqa: E402
from edgedeploy.errors import CompileError, FidelityError, UsageError  # noqa: E402
from edgedeploy.prepare.count.compression import compression_report  # noqa: E402
from edgedeploy.prepare.graph import specs_of  # noqa: E402
from edgedeploy.records.model import Model  # noqa: E402
from edgedeploy.records.target import Target  # noqa: E402
from edgedeploy.storage import sha256_file  # noqa: E402

TARGET = Target(format="edgedeploy.target/1", name="any", description="any")
RUN = """
import sys
import MNN, numpy as np
feeds = np.load(sys.argv[2])
net = MNN.Interpreter(sys.argv[1])
net.setSessionHint(3, 0)
session = net.createSession({"numThread": 1, "precision": "high"})
for name in feeds.files:
    tensor, data = net.getSessionInput(session, name), feeds[name]
    net.resizeTensor(tensor, data.shape)
net.resizeSession(session)
for name in feeds.files:
    tensor, data = net.getSessionInput(session, name), np.ascontiguousarray(feeds[name])
    tensor.copyFrom(MNN.Tensor(data.shape, MNN.Halide_Type_Float, data, MNN.Tensor_DimensionType_Caffe))
net.runSession(session)
made = {}
for name, tensor in net.getSessionOutputAll(session).items():
    shape = tensor.getShape()
    host = MNN.Tensor(shape, MNN.Halide_Type_Float, np.zeros(shape, np.float32), MNN.Tensor_DimensionType_Caffe)
    tensor.copyToHostTensor(host)
    made[name] = np.array(host.getData(), np.float32).reshape(shape)
np.savez(sys.argv[3], **made)
"""


def graph_of(nodes, constants, *, source=("n", 3, 8, 6), outputs=("y",), metadata=(), opset=17):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(source))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(program, dict(metadata))
    return onnx.shape_inference.infer_shapes(program)


def model_of(program, folder):
    path = folder / "source.onnx"
    onnx.save(program, str(path))
    return Model(
        path=str(path),
        sha256=sha256_file(path),
        source="made",
        opset=17,
        inputs=specs_of(program.graph.input),
        outputs=specs_of(program.graph.output),
        compression=compression_report(path),
    )


def weights(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def compiled(program, folder, name="a.mnn"):
    folder.mkdir(parents=True, exist_ok=True)
    BACKEND.compile(model_of(program, folder), TARGET, Options(), folder / name)
    return folder / name


def on_mnn(file, feeds, folder):
    import subprocess

    np.savez(folder / "feeds.npz", **feeds)
    words = [sys.executable, "-c", RUN, str(file), str(folder / "feeds.npz"), str(folder / "made.npz")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(np.load(folder / "made.npz"))


def on_onnxruntime(program, feeds):
    choice = onnxruntime.SessionOptions()
    choice.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(program.SerializeToString(), choice, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def image(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pair(tensor, source, scale, zero_point=0):
    constants = {f"{tensor}/scale": np.float32(scale), f"{tensor}/zero_point": np.int8(zero_point)}
    read = [f"{tensor}/scale", f"{tensor}/zero_point"]
    nodes = [
        helper.make_node("QuantizeLinear", [source, *read], [f"{tensor}/stored"], name=f"{tensor}/quantize"),
        helper.make_node("DequantizeLinear", [f"{tensor}/stored", *read], [tensor], name=f"{tensor}/dequantize"),
    ]
    return nodes, constants


def stored(name, codes, scales, axis=0):
    constants = {
        f"{name}/integers": codes.astype(np.int8), f"{name}/scale": np.asarray(scales, np.float32),
        f"{name}/zero_point": np.zeros(len(scales), np.int8),
    }  # fmt: skip
    read = [f"{name}/{word}" for word in ("integers", "scale", "zero_point")]
    return [helper.make_node("DequantizeLinear", read, [name], name=f"{name}/dequantize", axis=axis)], constants


class Quantized:
    """Convolutions in a row and a linear head, quantized by hand with scales that no rule would give."""

    def __init__(self, *, zero_points=(0, 0, 0), zeros=0.0):
        rng = np.random.default_rng(3)
        # Codes neither reach 127 nor are they the nearest ones of any float weights.
        self.codes = {
            "w1": rng.integers(-90, 91, (8, 3, 3, 3)), "w2": rng.integers(-127, 128, (8, 1, 3, 3)),
            "w3": rng.integers(-60, 61, (5, 8)),
        }  # fmt: skip
        if zeros:
            self.codes["w1"][rng.random((8, 3, 3, 3)) < zeros] = 0
        self.scales = {
            name: (0.002 + 0.003 * rng.random(len(codes))).astype(np.float32) for name, codes in self.codes.items()
        }
        self.grids = {"x/q": (0.02, zero_points[0]), "r1": (0.03, zero_points[1]), "c2": (0.015, zero_points[2])}
        nodes, constants = [], {"b1": weights(8, seed=5) / 2, "b3": weights(5, seed=6)}
        for name in self.codes:
            more, values = stored(name, self.codes[name], self.scales[name])
            nodes += more
            constants |= values
        for tensor, source in (("x/q", "x"), ("r1", "r1/float"), ("c2", "c2/float")):
            more, values = pair(tensor, source, *self.grids[tensor])
            constants |= values
            if tensor == "r1":
                nodes.append(helper.make_node("Conv", ["x/q", "w1", "b1"], ["c1"], name="first", pads=[1] * 4))
                nodes.append(helper.make_node("Relu", ["c1"], ["r1/float"], name="clamp"))
            elif tensor == "c2":
                more_inputs = {"pads": [1] * 4, "group": 8, "strides": [2, 2]}
                nodes.append(helper.make_node("Conv", ["r1", "w2"], ["c2/float"], name="second", **more_inputs))
            nodes += more
        nodes += [
            helper.make_node("GlobalAveragePool", ["c2"], ["g"], name="pool"),
            helper.make_node("Flatten", ["g"], ["f"], name="flat"),
            helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="head", transB=1),
        ]
        self.program = graph_of(nodes, constants, source=(1, 3, 8, 6))


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    net = Quantized()
    return net, compiled(net.program, folder), folder


@pytest.fixture(scope="module")
def plain():
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="stem", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="clamp"),
        helper.make_node("Conv", ["r", "v"], ["y"], name="last"),
    ]
    constants = {"w": weights(8, 3, 3, 3), "b": weights(8), "v": weights(5, 8, 1, 1)}
    return graph_of(nodes, constants, metadata={"origin": "/somewhere/private"})


def test_artifact_answers_like_onnxruntime_on_every_batch_and_its_bytes_repeat(plain, tmp_path):
    first, second = compiled(plain, tmp_path / "one"), compiled(plain, tmp_path / "two", "other.mnn")
    assert first.read_bytes() == second.read_bytes()
    start, count = read_contents(first.read_bytes()).inputs["x"]
    assert struct.unpack_from(f"<{count}i", first.read_bytes(), start) == (-1, 3, 8, 6)
    for batch in (1, 3):
        feeds = {"x": image(batch, 3, 8, 6)}
        np.testing.assert_allclose(
            on_mnn(first, feeds, tmp_path)["y"], on_onnxruntime(plain, feeds)["y"], rtol=0, atol=1e-5
        )


def test_id_follows_from_the_content(plain, tmp_path):
    data = compiled(plain, tmp_path).read_bytes()
    place = read_contents(data).uuid_place
    other = data[:place] + b"12345678-1234-1234-1234-123456789012" + data[place + 36 :]
    assert parameters.with_content_id(other) == data
    changed = data.replace(struct.pack("<f", weights(8)[0]), struct.pack("<f", 0.5))
    assert changed != data
    assert parameters.with_content_id(changed)[place : place + 36] != data[place : place + 36]


def test_nothing_that_an_exporter_noted_reaches_the_artifact(plain, tmp_path):
    assert b"/somewhere/private" not in compiled(plain, tmp_path).read_bytes()


def test_float16_weights_are_stored_in_16_bits_and_widened(tmp_path):
    half = weights(8, 3, 3, 3).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["w/float16"], ["w"], name="w/cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "w"], ["y"], name="stem"),
    ]
    program = graph_of(nodes, {"w/float16": half}, source=(1, 3, 8, 6))
    file = compiled(program, tmp_path)
    found = [item.weights.storage for item in read_contents(file.read_bytes()).operators if item.weights]
    assert found == ["float16"]
    assert BACKEND.inspect(file).expanded == ("w",)
    feeds = {"x": image(1, 3, 8, 6)}
    np.testing.assert_allclose(
        on_mnn(file, feeds, tmp_path)["y"], on_onnxruntime(program, feeds)["y"], rtol=0, atol=1e-5
    )


def test_integer_artifact_holds_exactly_the_codes_and_scales_of_the_form(int8):
    net, file, _ = int8
    found = {item.name: item for item in read_contents(file.read_bytes()).operators if item.weights}
    for operator, name in (("c1", "w1"), ("c2", "w2"), ("y__matmul_converted", "w3")):
        codes = net.codes[name].reshape(len(net.codes[name]), -1)
        np.testing.assert_array_equal(found[operator].weights.codes, codes)
        np.testing.assert_array_equal(found[operator].weights.scales, net.scales[name])
    assert (found["c1"].input_scale, found["c1"].output_scale) == (np.float32(0.02), np.float32(0.03))


def test_integer_artifact_answers_like_exact_arithmetic(int8):
    net, file, folder = int8
    feeds = {"x": image(1, 3, 8, 6)}
    exact = on_onnxruntime(net.program, feeds)["y"]
    # A sum that lies near a half may be rounded to the other side, which the next sums see; a wrong scale costs 1 % up.
    np.testing.assert_allclose(on_mnn(file, feeds, folder)["y"], exact, rtol=0, atol=0.004 * np.abs(exact).max())


def test_report_says_what_runs_on_integers_and_what_does_not(int8):
    net, file, _ = int8
    seen = BACKEND.inspect(file)
    assert seen.quantized == ("Convolution first", "ConvolutionDepthwise second")
    assert seen.operators["Convolution"] == 2
    assert "Pooling g_raster_0" in seen.float_islands
    assert [label for label in seen.float_islands if "Convolution" in label] == ["Convolution head"]
    assert seen.expanded == ("w3",)
    assert seen.scales["w1"] == tuple(float(scale) for scale in net.scales["w1"])
    grids = {name.removesuffix("/q"): float(np.float32(scale)) for name, (scale, _) in net.grids.items()}
    assert {name: seen.scales[name] for name in grids} == {name: (scale,) for name, scale in grids.items()}


def test_zero_points_of_activations_are_kept(tmp_path):
    net = Quantized(zero_points=(-20, -128, 10))
    file = compiled(net.program, tmp_path)
    grids = {item.zero_point for item in read_contents(file.read_bytes()).grids.values()}
    assert grids == {-20, -128, 10}
    feeds = {"x": image(1, 3, 8, 6)}
    exact = on_onnxruntime(net.program, feeds)["y"]
    np.testing.assert_allclose(on_mnn(file, feeds, tmp_path)["y"], exact, rtol=0, atol=0.004 * np.abs(exact).max())


def test_pruned_weights_that_the_converter_packs_are_read_back(tmp_path):
    net = Quantized(zeros=0.95)
    data = compiled(net.program, tmp_path).read_bytes()
    found = next(item for item in read_contents(data).operators if item.name == "c1")
    np.testing.assert_array_equal(found.weights.codes, net.codes["w1"].reshape(8, -1))


def test_products_of_full_8_bit_codes_do_not_saturate(tmp_path):
    # 64 products of 127 * 127, all positive: two of them leave 16 bits, in which AVX2 without VNNI could add them.
    codes, scales = np.full((4, 64, 1, 1), 127), np.full(4, 0.001, np.float32)
    nodes, constants = stored("w", codes, scales)
    for tensor, source, scale in (("x/q", "x", 1 / 127), ("y", "y/float", 64 * 0.127 / 127)):
        more, values = pair(tensor, source, scale)
        constants |= values
        if tensor == "y":
            nodes.append(helper.make_node("Conv", ["x/q", "w"], ["y/float"], name="product"))
        nodes += more
    program = graph_of(nodes, constants, source=(1, 64, 4, 4))
    file = compiled(program, tmp_path)
    feeds = {"x": np.ones((1, 64, 4, 4), np.float32)}
    assert BACKEND.inspect(file).quantized == ("Convolution product",)
    np.testing.assert_allclose(on_mnn(file, feeds, tmp_path)["y"], 64 * 0.127, rtol=1e-5)


def test_large_matrix_products_between_rounded_tensors_run_on_integers(tmp_path):
    # MNN's own way keeps weights of this size outside of the graph, where its quantizer finds none.
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (1000, 1280))
    scales = np.full(1000, 0.0005, np.float32)
    nodes, constants = stored("w", codes, scales)
    for tensor, source, scale in (("x/q", "x", 0.02), ("y", "y/float", 0.04)):
        more, values = pair(tensor, source, scale)
        constants |= values
        if tensor == "y":
            nodes.append(helper.make_node("Gemm", ["x/q", "w"], ["y/float"], name="head", transB=1))
        nodes += more
    program = graph_of(nodes, constants, source=(2, 1280))
    file = compiled(program, tmp_path)
    assert BACKEND.inspect(file).quantized == ("Convolution head",)
    feeds = {"x": image(2, 1280)}
    made, exact = on_mnn(file, feeds, tmp_path)["y"], on_onnxruntime(program, feeds)["y"]
    assert np.abs(made - exact).max() <= 0.04 * 1.001
    assert (made != exact).mean() < 0.01


# ---------------------------------------------------------------- rewrites, each executed before and after

CASES = {
    "groups": ("Conv", {"group": 2, "pads": [1] * 4}, weights(10, 4, 3, 3), (1, 8, 7, 5)),
    "multiplier": ("Conv", {"group": 4, "strides": [2, 2]}, weights(12, 1, 3, 3), (1, 4, 9, 7)),
    "line": ("Conv", {"pads": [2, 1], "strides": [2]}, weights(5, 6, 4), (1, 6, 15)),
    "pool": ("MaxPool", {"kernel_shape": [3], "strides": [2]}, None, (1, 6, 15)),
    "maximum without strides": ("MaxPool", {"kernel_shape": [3, 3]}, None, (1, 3, 5, 4)),
    "mean without strides": ("AveragePool", {"kernel_shape": [3, 2]}, None, (1, 3, 5, 4)),
    "mish": ("Mish", {}, None, (1, 3, 5, 4)),
    "bicubic": ("Resize", {"mode": "cubic", "cubic_coeff_a": -0.75}, np.array([1, 3, 13, 4], np.int64), (1, 3, 6, 7)),
}


def test_rewritten_graph_computes_the_same_and_so_does_its_artifact(tmp_path):
    nodes, constants = [], {}
    for name, (kind, settings_, constant, _) in CASES.items():
        read = [f"{name}.x"] if constant is None else [f"{name}.x", f"{name}.w"]
        read = [read[0], "", "", read[1]] if kind == "Resize" else read
        nodes.append(helper.make_node(kind, read, [f"{name}.y"], name=name, **settings_))
        constants |= {} if constant is None else {f"{name}.w": constant}
    program = graph_of(nodes, constants, outputs=[f"{name}.y" for name in CASES], opset=18)
    del program.graph.input[:]
    for name, (*_, shape) in CASES.items():
        program.graph.input.append(helper.make_tensor_value_info(f"{name}.x", TensorProto.FLOAT, shape))
    program = onnx.shape_inference.infer_shapes(program)
    feeds = {f"{name}.x": image(*shape) for name, (*_, shape) in CASES.items()}
    before = on_onnxruntime(program, feeds)
    prepared = rewrites.prepare(read_form(Path(model_of(program, tmp_path).path))).graph
    assert not {"Mish", "Resize"} & {node.op_type for node in prepared.graph.node}
    after = on_onnxruntime(prepared, feeds)
    made = on_mnn(compiled(program, tmp_path), feeds, tmp_path)
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(made[name], values, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["MaxPool", "MaxPool of codes below zero", "Resize"])
def test_what_mnn_computes_wrongly_on_integers_stays_exact(kind, tmp_path):
    rng = np.random.default_rng(2)
    nodes, constants = [], {"sizes": np.array([1, 4, 16, 12], np.int64)}
    for name, shape in (("w", (4, 3, 3, 3)), ("v", (2, 4, 1, 1))):
        more, values = stored(name, rng.integers(-127, 128, shape), np.full(shape[0], 0.002, np.float32))
        nodes += more
        constants |= values
    layer = (
        helper.make_node("MaxPool", ["c"], ["p/float"], name="layer", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        if kind != "Resize"
        else helper.make_node("Resize", ["c", "", "", "sizes"], ["p/float"], name="layer", mode="linear")
    )
    is_low = kind == "MaxPool of codes below zero"
    convolution = helper.make_node("Conv", ["x/q", "w"], ["c/raw" if is_low else "c/float"], name="first", pads=[1] * 4)
    making = {
        "x/q": [],
        "c": [convolution, *([helper.make_node("Relu", ["c/raw"], ["c/float"], name="relu")] if is_low else [])],
        "p": [layer], "y": [helper.make_node("Conv", ["p", "v"], ["y/float"], name="last")],
    }  # fmt: skip
    for tensor, scale in (("x/q", 0.02), ("c", 0.03), ("p", 0.02), ("y", 0.01)):
        zero_point, scale = (-128, 0.01) if is_low and tensor in ("c", "p") else (0, scale)
        more, values = pair(tensor, "x" if tensor == "x/q" else f"{tensor}/float", scale, zero_point)
        constants |= values
        nodes += [*making[tensor], *more]
    program = graph_of(nodes, constants, source=(1, 3, 8, 6))
    file, feeds = compiled(program, tmp_path), {"x": image(1, 3, 8, 6)}
    made, exact = on_mnn(file, feeds, tmp_path)["y"].ravel(), on_onnxruntime(program, feeds)["y"].ravel()
    assert made @ exact / np.linalg.norm(made) / np.linalg.norm(exact) > 0.995
    assert "Convolution last" in BACKEND.inspect(file).quantized


# Arithmetic, what follows it, zero-point of the result, and whether MNN may compute it on integers.
ARITHMETIC = {
    "symmetric sum": ("Add", "Relu", 0, True),
    "clipped sum": ("Add", "Clip", -128, True),
    "sum": ("Add", "Relu", -128, False),
    "product": ("Mul", "Relu", 20, False),
    "pooled sum": ("Add", "MaxPool of Relu", -128, False),
    "larger": ("Max", "", 0, False),
    "smaller and clipped": ("Min", "Clip", 0, False),
    "quotient": ("Div", "", 0, False),
}


@pytest.mark.parametrize("case", ARITHMETIC)
def test_arithmetic_between_rounded_tensors_is_right_whatever_the_zero_points(case, tmp_path):
    op, then, zero_point, is_on_integers = ARITHMETIC[case]
    rng = np.random.default_rng(2)
    nodes, constants = [], {"low": np.float32(-0.3), "high": np.float32(1.5)} if then == "Clip" else {}

    def rounded(name, scale, zero_point, source=""):
        more, values = pair(name, source or f"{name}/float", scale, zero_point)
        constants.update(values)
        nodes.extend(more)

    for name, shape in (("v", (4, 3, 3, 3)), ("w", (4, 3, 3, 3)), ("last", (2, 4, 1, 1))):
        more, values = stored(name, rng.integers(-127, 128, shape), np.full(shape[0], 0.002, np.float32))
        nodes += more
        constants |= values
    rounded("x/q", 0.02, -5, "x")
    for name, kernel, point in (("left", "v", 7), ("right", "w", 11)):
        nodes.append(helper.make_node("Conv", ["x/q", kernel], [f"{name}/float"], name=name, pads=[1] * 4))
        rounded(name, 0.03, point)
    steps = [(op, ["left", "right"], {})]
    steps += [("Relu", ["made 0"], {})] if "Relu" in then else []
    steps += [("Clip", ["made 0", "low", "high"], {})] if then == "Clip" else []
    steps += [("MaxPool", ["made 1"], {"kernel_shape": [3, 3], "pads": [1] * 4})] if "MaxPool" in then else []
    for place, (kind, read, settings_) in enumerate(steps):
        result = "a/float" if kind == steps[-1][0] else f"made {place}"
        nodes.append(helper.make_node(kind, read, [result], name=kind, **settings_))
    rounded("a", 0.03, zero_point)
    nodes.append(helper.make_node("Conv", ["a", "last"], ["y/float"], name="last"))
    rounded("y", 0.03, 9)
    program = graph_of(nodes, constants, source=(1, 3, 8, 6))
    file, feeds = compiled(program, tmp_path), {"x": image(1, 3, 8, 6)}
    made, exact = on_mnn(file, feeds, tmp_path)["y"], on_onnxruntime(program, feeds)["y"]
    assert np.abs(made - exact).max() < 1.01 * 0.03  # one code
    seen = BACKEND.inspect(file)
    assert "Convolution last" in seen.quantized
    assert any(label.startswith("BinaryOp") for label in seen.quantized) == is_on_integers


def summed_then_averaged(size):
    """Return two convolutions, their sum, its mean over the map and a last convolution, all rounded."""
    rng = np.random.default_rng(2)
    nodes, constants = [], {}

    def rounded(name, scale, source=""):
        more, values = pair(name, source or f"{name}/float", scale)
        constants.update(values)
        nodes.extend(more)

    for name, shape in (("v", (6, 3, 3, 3)), ("w", (6, 3, 3, 3)), ("last", (2, 6, 1, 1))):
        more, values = stored(name, rng.integers(-127, 128, shape), np.full(shape[0], 0.002, np.float32))
        nodes += more
        constants |= values
    rounded("x/q", 0.02, "x")
    for name, kernel in (("left", "v"), ("right", "w")):
        nodes.append(helper.make_node("Conv", ["x/q", kernel], [f"{name}/float"], name=name, pads=[1] * 4))
        rounded(name, 0.03)
    nodes.append(helper.make_node("Add", ["left", "right"], ["sum/float"], name="sum"))
    rounded("sum", 0.04)
    nodes.append(helper.make_node("GlobalAveragePool", ["sum"], ["mean/float"], name="mean"))
    rounded("mean", 0.004)
    nodes.append(helper.make_node("Conv", ["mean", "last"], ["y/float"], name="last"))
    rounded("y", 0.0005)
    return graph_of(nodes, constants, source=(1, 3, *size), outputs=("y",))


@pytest.mark.parametrize("most", [1024, 47], ids=["kept", "too large"])
def test_trained_scale_of_a_sum_that_only_a_mean_reads_is_kept_or_named(most, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(rewrites, "_MOST_PIXELS", most)
    program = summed_then_averaged((8, 6))
    onnx.save(program, tmp_path / "trained.onnx")
    asked = {"backend": "mnn", "precision": "int8", "target": "x86-64"}
    if most < 8 * 6:
        with pytest.raises(FidelityError, match=r"are dropped: '\S*sum\S*' \(activation, artifact\); .* --allow-loss"):
            pipeline.compile(tmp_path / "trained.onnx", **asked)
        return
    built = pipeline.compile(tmp_path / "trained.onnx", **asked)
    layers = built.artifact.layers
    assert (float(np.float32(0.04)),) in [scales for name, scales in layers.scales.items() if name.startswith("sum")]
    assert layers.float_islands == ()
    assert {fate for entry in built.artifact.survival.entries for fate in entry.stages.values()} <= {"kept", "folded"}
    feeds = {"x": image(1, 3, 8, 6)}
    made, exact = on_mnn(built.file, feeds, tmp_path)["y"], on_onnxruntime(program, feeds)["y"]
    assert np.abs(made - exact).max() <= 2.01 * 0.0005  # codes: one of the mean's, which weighs up to two


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (helper.make_node("Unique", ["x"], ["y"], name="odd"), r"'odd' \(Unique\).*another order"),
        (
            helper.make_node("MaxPool", ["x"], ["y"], name="odd", kernel_shape=[2, 2], dilations=[2, 2]),
            r"'odd' \(MaxPool\).*ignores the dilations",
        ),
        (
            helper.make_node("Hardmax", ["x"], ["y"], name="odd"),
            r"'odd' \(Hardmax\).*does not know the operator Hardmax",
        ),
    ],
)
def test_operator_that_would_go_wrong_is_refused_by_name(node, says, tmp_path):
    with pytest.raises(CompileError, match=says) as caught:
        compiled(graph_of([node], {}, source=(1, 3, 8, 6)), tmp_path)
    assert caught.value.hint
    assert not (tmp_path / "a.mnn").exists()


def test_model_of_which_nothing_would_run_on_integers_is_refused(tmp_path):
    nodes, constants = stored("w", np.random.default_rng(0).integers(-127, 128, (5, 6)), np.full(5, 0.01))
    more, values = pair("x/q", "x", 0.02)
    nodes += [*more, helper.make_node("Gemm", ["x/q", "w"], ["y"], name="head", transB=1)]
    with pytest.raises(CompileError, match=r"at node 'head' .Gemm.: of what is quantized here .* nothing on integers"):
        compiled(graph_of(nodes, constants | values, source=(1, 6)), tmp_path)


def test_weights_alone_are_stored_in_8_bits_when_that_is_asked_for(tmp_path):
    codes, scales = np.random.default_rng(0).integers(-127, 128, (5, 6)), np.full(5, 0.01)
    nodes, constants = stored("w", codes, scales)
    more, values = pair("x/q", "x", 0.02)
    nodes += [*more, helper.make_node("Gemm", ["x/q", "w"], ["y"], name="head", transB=1)]
    model = model_of(graph_of(nodes, constants | values, source=(1, 6)), tmp_path)
    BACKEND.compile(model, TARGET, Options(weights_only=True), tmp_path / "a.mnn")
    seen = BACKEND.inspect(tmp_path / "a.mnn")
    assert (seen.quantized, seen.float_islands, seen.expanded) == ((), ("Convolution head",), ("w",))
    feeds = {"x": image(1, 6)}
    exact = feeds["x"] @ (codes * np.float32(0.01)).astype(np.float32).T
    np.testing.assert_allclose(on_mnn(tmp_path / "a.mnn", feeds, tmp_path)["y"], exact, rtol=0, atol=1e-5)


def test_weights_with_zero_points_keep_their_values(tmp_path):
    codes, points = np.random.default_rng(0).integers(-128, 128, (5, 6)), np.array([3, -7, 0, 120, -128])
    nodes, constants = stored("w", codes, np.full(5, 0.01))
    constants["w/zero_point"] = points.astype(np.int8)
    nodes.append(helper.make_node("Gemm", ["x", "w"], ["y"], name="head", transB=1))
    file, feeds = compiled(graph_of(nodes, constants, source=(1, 6)), tmp_path), {"x": image(1, 6)}
    found = next(item for item in read_contents(file.read_bytes()).operators if item.weights)
    np.testing.assert_array_equal(found.weights.codes, codes)
    exact = feeds["x"] @ ((codes - points[:, None]) * 0.01).astype(np.float32).T
    np.testing.assert_allclose(on_mnn(file, feeds, tmp_path)["y"], exact, rtol=0, atol=2e-5)


def fake_script(folder, body):
    script = folder / "fake.py"
    script.write_text("import json, os, sys, time\njob = json.load(open(sys.argv[1]))\n" + textwrap.dedent(body))
    return script


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("os.kill(os.getpid(), 11)", r"at node 'stem' \(Conv\): its converter broke down: it died of SIGSEGV"),
        ("os.abort()", r"at node 'stem' \(Conv\): its converter broke down: it died of SIGABRT"),
        ("sys.exit(3)", "ended with exit code 3"),
        ("print('weights are odd')", r"ended without an answer \(it said: weights are odd\)"),
        ("json.dump({'answer': True}, open(job['result'], 'w'))", "its converter gave up: it did not say why"),
        (
            "print('Converted Failed!'); json.dump({'answer': True}, open(job['result'], 'w')); open('model.mnn', 'w')",
            "its converter gave up",
        ),
    ],
)
def test_every_way_that_the_converter_can_end_is_a_sentence(body, says, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SCRIPT", fake_script(tmp_path, body))
    with pytest.raises(CompileError, match=says):
        compiled(plain, tmp_path)
    assert not (tmp_path / "a.mnn").exists()


def test_converter_that_does_not_end_is_ended(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SCRIPT", fake_script(tmp_path, "time.sleep(60)"))
    with pytest.raises(CompileError, match="did not end within"):
        conversion.run_once(tmp_path / "any.mnn", {}, tmp_path, limit_s=0.3)


def test_empty_model_that_the_converter_calls_a_success_is_refused(plain, tmp_path):
    other = graph_of([helper.make_node("Relu", ["x"], ["z"], name="r")], {}, source=(1, 3, 8, 6), outputs=("z",))
    data = compiled(other, tmp_path).read_bytes()
    from edgedeploy.backends.mnn import _demand_whole

    model = model_of(plain, tmp_path)
    with pytest.raises(CompileError, match="its converter lost the output 'y'"):
        _demand_whole(model, rewrites.prepare(read_form(Path(model.path))), data)


def test_options_are_checked():
    assert parse_options(Options, {"precision": "low", "threads": 2}) == Options(threads=2, precision="low")
    with pytest.raises(UsageError, match=r"'lowest' is not known; did you mean \"low\"\? .known: high, normal, low"):
        parse_options(Options, {"precision": "lowest"})
    with pytest.raises(UsageError, match="-O threads=two is not valid: expected `int`, got `str`"):
        parse_options(Options, {"threads": "two"})


# ---------------------------------------------------------------- the converter's package must stay by itself


def test_nothing_is_installed_sent_or_imported_beside_the_converter(plain, tmp_path, monkeypatch):
    tools, site, notes = tmp_path / "bin", tmp_path / "site", tmp_path / "notes"
    for folder in (tools, site, notes):
        folder.mkdir()
    for name in ("pip", "pip3", "mnnconvert", "mnnquant"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} >> '{notes}/called'\n")
        (tools / name).chmod(0o755)
    (site / "sitecustomize.py").write_text(
        textwrap.dedent(
            f"""
            import atexit, os, socket, sys, json
            def refuse(*words, **more):
                open({str(notes / "connected")!r}, "a").write("x")
                raise OSError("no network in this test")
            socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
            where = os.path.join({str(notes)!r}, "modules-%d" % os.getpid())
            atexit.register(lambda: json.dump([sys.argv, sorted(sys.modules)], open(where, "w")))
            """
        )
    )
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(site))
    BACKEND.inspect(compiled(plain, tmp_path))
    assert not (notes / "called").exists()
    assert not (notes / "connected").exists()
    seen = [json.loads(file.read_text()) for file in notes.glob("modules-*")]
    assert len([words for words, _ in seen if words[0].endswith("convert.py")]) == 3
    for _, modules in seen:
        assert not [name for name in modules if name.startswith(("MNN.tools", "aliyun", "pip", "requests", "urllib3"))]


# ---------------------------------------------------------------- the file format


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=4))
def test_damaged_file_is_a_sentence_or_readable(int8, cut, flips):
    data = bytearray(int8[1].read_bytes())
    for place, mask in flips:
        data[place % len(data)] ^= mask
    try:
        read_contents(bytes(data[: cut % len(data)] if cut % 2 else data))
    except CompileError as error:
        assert "damaged" in str(error) or "unknown way" in str(error)


def test_file_of_something_else_is_refused(tmp_path):
    for data in (b"", b"\0" * 40, b"not a model at all, but long enough to be read as one"):
        (tmp_path / "a.mnn").write_bytes(data)
        with pytest.raises(CompileError, match=r"damaged|cannot run"):
            BACKEND.inspect(tmp_path / "a.mnn")


@pytest.mark.parametrize("noted", ["", "no JSON", '{"operators": {"c1": ["too", "short"]}}', "[1]"])
def test_report_of_a_file_that_another_program_made_has_its_own_names(int8, noted):
    program = read_contents(int8[1].read_bytes())
    other = dataclasses.replace(program, metadata={report.ORIGINS: noted} if noted else {})
    found = report.layer_report(other, [("c1", "Convolution [ DT_INT8 ] "), ("y", "Raster")])
    assert (found.quantized, found.scales) == (("Convolution c1",), {})


def packed(numbers, bits):
    flags = ((np.asarray(numbers)[:, None] >> np.arange(bits)[::-1]) & 1).astype(np.uint8)
    return np.packbits(flags.reshape(-1)).tobytes()


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), codes=st.lists(st.integers(-128, 127), min_size=1, max_size=40))
def test_weights_packed_into_a_table_are_read(bits, codes):
    half = 2 ** (bits - 1)
    codes = [max(-half, min(half - 1, code)) for code in codes]
    table = np.arange(-half, half).astype(np.int8).tobytes()
    data = bytes([2]) + struct.pack("<HH", 1, len(codes)) + bytes([(2 * half) % 256]) + table
    found, place, offset = contents._from_table(data + packed([code + half for code in codes], bits), 100, False)
    assert found.tolist() == codes
    assert (place is not None) == (bits == 8)
    if place is not None:
        assert place == 100 + len(data)
        assert offset == 128


@settings(max_examples=60, deadline=None)
@given(codes=st.lists(st.sampled_from([0, 0, 0, 0, -3, 5, 127, -128]), min_size=1, max_size=60), step=st.integers(2, 8))
def test_sparse_weights_are_read(codes, step):
    values = sorted({0, *codes})
    steps, numbers, last = [], [], 0
    for place, code in enumerate(codes):
        if code or place - last >= 2**step - 1:
            steps.append(place - last)
            numbers.append(values.index(code))
            last = place
    bits = max(1, (len(values) - 1).bit_length())
    data = bytes([2]) + struct.pack("<HHIB", 1, len(codes), len(steps), step)
    data += (packed(steps, step) if steps else b"") + bytes([len(values)]) + np.array(values, np.int8).tobytes()
    found = contents._from_sparse(data + (packed(numbers, bits) if numbers else b""), False)
    assert found.tolist() == codes
