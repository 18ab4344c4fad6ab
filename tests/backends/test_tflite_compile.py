"""What the TFLite host half writes: right in every precision, on the form's own numbers, or refused by name."""

import json
import os
import stat
import types

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
litert = pytest.importorskip("ai_edge_litert.interpreter", reason="needs ai-edge-litert")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgedeploy.backends import parse_options  # noqa: E402
from edgedeploy.backends.qdq import StoredWeights, read_form  # noqa: E402
from edgedeploy.backends.tflite import BACKEND, TOOLS, Options  # noqa: E402
from edgedeploy.backends.tflite.constants import KnownWeights  # noqa: E402
from edgedeploy.backends.tflite.conversion import _match, _named_in, convert, with_batch  # noqa: E402
from edgedeploy.backends.tflite.flatbuffer import read  # noqa: E402
from edgedeploy.errors import CompileError, ToolchainError, UsageError  # noqa: E402

SHAPE = (3, 3, 10, 14)


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, inputs, outputs, constants):
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def network(batch="batch"):
    """Stem with ReLU6, depthwise, padded max-pool, residual sum, 3x3 average, product that answers in float, softmax."""
    random = np.random.default_rng(0)

    def weights(*shape):
        return (random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    node = helper.make_node
    nodes = [
        node("Conv", ["image", "stem.w", "stem.b"], ["stem"], name="stem", pads=[1] * 4),
        node("Clip", ["stem", "zero", "six"], ["clipped"], name="relu6"),
        node("Conv", ["clipped", "deep.w"], ["deep"], name="deep", pads=[1] * 4, group=8),
        node("MaxPool", ["deep"], ["pooled"], name="pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        node("Conv", ["pooled", "point.w", "point.b"], ["point"], name="point"),
        node("Add", ["point", "pooled"], ["sum"], name="sum"),
        node("AveragePool", ["sum"], ["mean"], name="mean", kernel_shape=[3, 3], strides=[2, 2]),
        node("GlobalAveragePool", ["mean"], ["global"], name="global"),
        node("Flatten", ["global"], ["flat"], name="flat"),
        node("Gemm", ["flat", "head.w", "head.b"], ["logits"], name="head", transB=1),
        node("Softmax", ["logits"], ["classes"], name="softmax"),
    ]
    constants = {
        "stem.w": weights(8, 3, 3, 3),
        "stem.b": weights(8),
        "deep.w": weights(8, 1, 3, 3),
        "point.w": weights(8, 8, 1, 1),
        "point.b": weights(8),
        "head.w": weights(5, 8),
        "head.b": weights(5),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    outputs = [value("classes", [batch, 5]), value("mean", [batch, 8, 2, 3])]
    return model(nodes, [value("image", [batch, 3, 10, 14])], outputs, constants)


# Scales that no quantizer would find in the weights or activations, as training leaves them.
WEIGHTS = {"stem.w": 0.011, "deep.w": 0.013, "point.w": 0.0123, "head.w": 0.017}
GRIDS = {
    "image": (0.031, -3),
    "clipped": (0.0173, -128),
    "deep": (0.0221, 5),
    "pooled": (0.0221, 5),
    "point": (0.0247, -11),
    "sum": (0.0313, -7),
    "mean": (0.0191, -20),
    "global": (0.0133, -31),
    "flat": (0.0133, -31),
}


def with_integers(source, grids=GRIDS, weights=WEIGHTS):
    """Write explicit Q/DQ as prepare/emission/emit.py does for rules with float biases."""
    graph = onnx.ModelProto()
    graph.CopyFrom(source)
    inputs = {item.name for item in graph.graph.input}
    constants, nodes = {}, []
    stored = {item.name: item for item in graph.graph.initializer}

    def pair(tensor, start, end):
        scale, point = grids[tensor]
        constants[f"{tensor}/scale"], constants[f"{tensor}/zero_point"] = np.float32(scale), np.int8(point)
        names = [f"{tensor}/scale", f"{tensor}/zero_point"]
        nodes.append(helper.make_node("QuantizeLinear", [start, *names], [f"{tensor}/stored"], name=f"{tensor}/q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{tensor}/stored", *names], [end], name=f"{tensor}/dq"))

    for name in inputs & set(grids):
        pair(name, name, f"{name}/dequantized")
    for name, scale in weights.items():
        array = numpy_helper.to_array(stored[name])
        scales = (scale * np.linspace(0.8, 1.4, len(array))).astype(np.float32)
        codes = np.rint(array / scales.reshape(-1, *[1] * (array.ndim - 1))).clip(-127, 127).astype(np.int8)
        constants[f"{name}/stored"], constants[f"{name}/scale"] = codes, scales
        graph.graph.initializer.remove(stored[name])
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}/stored", f"{name}/scale"], [name], name=f"{name}/dq", axis=0)
        )
    for node in source.graph.node:
        written = onnx.NodeProto()
        written.CopyFrom(node)
        for place, name in enumerate(node.input):
            if name in inputs and name in grids:
                written.input[place] = f"{name}/dequantized"
        nodes.append(written)
        for place, name in enumerate(node.output):
            if name in grids:
                written.output[place] = f"{name}/float"
                pair(name, f"{name}/float", name)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()
    )
    return graph


def with_halves(source):
    """Store weights in float16 behind a Cast, as prepare/emission/emit.py does."""
    graph = onnx.ModelProto()
    graph.CopyFrom(source)
    for item in list(graph.graph.initializer):
        array = numpy_helper.to_array(item)
        if array.ndim < 2:
            continue
        graph.graph.initializer.remove(item)
        graph.graph.initializer.append(numpy_helper.from_array(array.astype(np.float16), f"{item.name}/float16"))
        cast = helper.make_node("Cast", [f"{item.name}/float16"], [item.name], name=f"{item.name}/cast", to=1)
        graph.graph.node.insert(0, cast)
    return graph


def compiled(graph, folder, options=None):
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, folder / "form.onnx")
    form = types.SimpleNamespace(path=str(folder / "form.onnx"))
    BACKEND.compile(form, None, options or Options(), folder / "model.tflite")
    return folder / "model.tflite"


def answers_of_onnx(graph, feeds):
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.SerializeToString(), plain, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def answers(file, feeds):
    """Run an artifact as the device does: found by its ports, in the model's order of axes."""
    ports = BACKEND.inspect(file).ports
    interpreter = litert.Interpreter(model_path=str(file), num_threads=1)
    inputs = {item["name"]: item for item in interpreter.get_input_details()}
    for name, array in feeds.items():
        order = ports[name].permutation or tuple(range(array.ndim))
        interpreter.resize_tensor_input(inputs[ports[name].tensor]["index"], array.transpose(order).shape)
    interpreter.allocate_tensors()
    for name, array in feeds.items():
        order = ports[name].permutation or tuple(range(array.ndim))
        interpreter.set_tensor(inputs[ports[name].tensor]["index"], np.ascontiguousarray(array.transpose(order)))
    interpreter.invoke()
    found = {}
    outputs = {item["name"]: item for item in interpreter.get_output_details()}
    for name in ports.keys() - feeds.keys():
        got = interpreter.get_tensor(outputs[ports[name].tensor]["index"])
        found[name] = got.transpose(np.argsort(ports[name].permutation)) if ports[name].permutation else got
    return found


def cosine(one, other):
    one, other = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.fixture(scope="module", autouse=True)
def tools():
    """The converter's environment; where it cannot be made, nothing here can be shown."""
    try:
        return TOOLS.python()
    except ToolchainError as error:
        pytest.skip(f"the converter cannot be installed here: {error}")


@pytest.fixture(scope="module")
def feeds():
    return {"image": np.random.default_rng(7).normal(size=SHAPE).astype(np.float32)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One network in each precision: (form, artifact) by precision."""
    folder = tmp_path_factory.mktemp("built")
    forms = {"fp32": network(), "fp16": with_halves(network()), "int8": with_integers(network())}
    return {name: (form, compiled(form, folder / name)) for name, form in forms.items()}


def test_fp32_gives_the_models_numbers_at_any_batch(built, feeds):
    form, file = built["fp32"]
    for batch in (1, 3):
        given = {"image": feeds["image"][:batch]}
        meant, got = answers_of_onnx(form, given), answers(file, given)
        for name, array in meant.items():
            assert got[name].shape == array.shape
            np.testing.assert_allclose(got[name], array, atol=1e-5 * np.abs(array).max(), rtol=0)


def test_an_open_batch_costs_no_operator(built):
    report = BACKEND.inspect(built["fp32"][1])
    assert not {"SHAPE", "FILL", "SLICE", "CONCATENATION"} & set(report.operators)
    assert report.operators["CONV_2D"] == 2
    assert report.operators["DEPTHWISE_CONV_2D"] == 1


def test_images_enter_in_the_runtimes_order_of_axes_and_the_file_says_so(built):
    port = BACKEND.inspect(built["fp32"][1]).ports["image"]
    assert (port.tensor, port.layout, port.permutation) == ("image", "NHWC", (0, 2, 3, 1))
    assert BACKEND.inspect(built["fp32"][1]).ports["classes"].permutation == ()


def test_fp16_stores_halves_and_computes_in_float32(built, feeds):
    form, file = built["fp16"]
    meant, got = answers_of_onnx(form, feeds), answers(file, feeds)
    assert all(cosine(got[name], meant[name]) > 0.9999 for name in meant)
    assert {array.dtype.name for array in got.values()} == {"float32"}
    graph = read(file)
    large = [i for i in range(len(graph.tensors)) if graph.constant(i) is not None and len(graph.shape(i)) > 1]
    assert {graph.dtype(index) for index in large} <= {"float16", "int32"}
    assert BACKEND.inspect(file).expanded == ("deep.w", "head.w", "point.w", "stem.w")


def test_int8_gives_the_forms_numbers(built, feeds):
    form, file = built["int8"]
    meant, got = answers_of_onnx(form, feeds), answers(file, feeds)
    assert cosine(got["classes"], meant["classes"]) > 0.999
    assert cosine(got["mean"], meant["mean"]) > 0.99
    # One code of its own grid, and what rounding at the 3x3 average's input adds.
    assert np.abs(got["mean"] - meant["mean"]).max() < 4 * GRIDS["mean"][0]
    assert got["classes"].dtype == np.float32


def test_int8_keeps_every_scale_and_zero_point_to_the_bit(built):
    report = BACKEND.inspect(built["int8"][1])
    kept = {name: report.scales[name] for name in GRIDS}
    assert kept == {name: (float(np.float32(scale)),) for name, (scale, _) in GRIDS.items()}
    graph = read(built["int8"][1])
    places = {graph.name(index): index for index in range(len(graph.tensors))}
    holders = json.loads(graph.metadata("edgedeploy.tensors"))
    points = {name: graph.tensors[places[holders[name]]].quantization.zeroPoint.tolist() for name in GRIDS}
    assert points == {name: [point] for name, (_, point) in GRIDS.items()}


def test_int8_keeps_every_integer_weight_and_learned_scale(built):
    form, file = built["int8"]
    graph = read(file)
    stored = {item.name: numpy_helper.to_array(item) for item in form.graph.initializer}
    for name in WEIGHTS:
        index = next(i for i in range(len(graph.tensors)) if graph.name(i) == f"{name}/stored")
        axis = int(graph.tensors[index].quantization.quantizedDimension)
        # Channels first again, then the rest as ONNX has it: [out, in, height, width].
        codes = np.moveaxis(graph.constant(index), axis, 0)
        meant = stored[f"{name}/stored"]
        if name != "deep.w" and codes.ndim == 4:
            codes = codes.transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(codes.reshape(meant.shape), meant)
        np.testing.assert_array_equal(np.float32(graph.scales(index)), stored[f"{name}/scale"])


def test_int8_biases_stand_at_input_scale_times_weight_scale(built):
    graph = read(built["int8"][1])
    seen = 0
    for operator in graph.operators:
        if graph.operator_name(operator) in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            data, weights, bias = (np.float32(graph.scales(int(index))) for index in operator.inputs)
            np.testing.assert_array_equal(bias, data * weights)
            assert graph.dtype(int(operator.inputs[2])) == "int32"
            seen += 1
    assert seen == 3


def test_int8_computes_on_integers_all_that_the_form_rounds(built):
    report = BACKEND.inspect(built["int8"][1])
    for kind in ("CONV_2D clipped", "DEPTHWISE_CONV_2D deep", "MAX_POOL_2D pooled", "CONV_2D point", "ADD sum"):
        assert kind in report.quantized
    assert report.float_islands == ("FULLY_CONNECTED logits", "SOFTMAX classes")
    # The last product answers in float, by decision of the form; its weights stay small in the file.
    assert report.expanded == ("head.w",)


def test_two_compiles_are_byte_identical(built, tmp_path):
    form, file = built["int8"]
    assert compiled(form, tmp_path / "elsewhere").read_bytes() == file.read_bytes()


def test_constants_are_aligned_as_the_schema_demands(built):
    from ai_edge_litert import schema_py_generated as schema

    data = built["int8"][1].read_bytes()
    packed = schema.Model.GetRootAs(data, 0)
    places = [
        table.Vector(field)
        for table in (packed.Buffers(index)._tab for index in range(packed.BuffersLength()))
        if (field := table.Offset(4))  # the first field of the schema's Buffer: its data
    ]
    assert len(places) > 5
    assert all(place % 16 == 0 for place in places)


def test_what_kernels_keep_for_themselves_is_no_tensor_of_the_file(built):
    graph, values = read(built["fp32"][1]), np.float32([1, 2, 3])
    places = _match({"a": values, "b": values + 1}, {2: values[::-1], len(graph.tensors): values}, graph)
    assert places == {"a": (2,), "b": ()}


def test_a_layout_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UsageError, match=r"'NHCW' is not known; did you mean \"NCHW\"\? \(known: '', NCHW\)"):
        parse_options(Options, {"keep_layout": "NHCW"})


def test_an_error_names_a_node_only_where_it_names_it_whole():
    nodes = [helper.make_node("Cast", ["x"], ["n"], name="count"), helper.make_node("Loop", ["n"], ["y"], name="loop")]
    assert _named_in("needs max_trip_count. node=loop", nodes).name == "loop"
    assert _named_in("needs max_trip_count", nodes) is None


def test_keep_layout_keeps_the_models_axes(tmp_path, feeds):
    image = {"image": feeds["image"][:1]}
    source = network(1)
    file = compiled(source, tmp_path, Options(keep_layout="NCHW"))
    assert {port.permutation for port in BACKEND.inspect(file).ports.values()} == {()}
    got = answers(file, image)
    for name, array in answers_of_onnx(source, image).items():
        np.testing.assert_allclose(got[name], array, atol=1e-5 * np.abs(array).max(), rtol=0)


def test_recurrent_layers_are_said_to_keep_their_state_and_to_take_one_sample(tmp_path, built):
    random = np.random.default_rng(4)
    constants = {name: random.normal(size=(1, 20, width)).astype(np.float32) for name, width in (("w", 3), ("r", 5))}
    nodes = [
        helper.make_node("Transpose", ["x"], ["by time"], name="turn", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["by time", "w", "r"], ["states"], name="lstm", hidden_size=5),
        helper.make_node("ReduceMean", ["states"], ["y"], name="mean", axes=[0, 1], keepdims=0),
    ]
    source = model(nodes, [value("x", ["batch", 4, 3])], [value("y", ["batch", 5])], constants)
    file = compiled(source, tmp_path)
    state, batch = BACKEND.inspect(file).notes
    assert "reset_all_variables" in state
    assert "one sample at a time" in batch
    assert BACKEND.inspect(built["fp32"][1]).notes == ()
    feeds = {"x": random.normal(size=(1, 4, 3)).astype(np.float32)}
    np.testing.assert_allclose(answers(file, feeds)["y"], answers_of_onnx(source, feeds)["y"], rtol=0, atol=1e-6)


def test_a_clamp_behind_a_turn_of_axes_does_not_keep_a_product_from_integers(tmp_path):
    # One-dimensional convolutions become two-dimensional ones between RESHAPEs, and the ReLU stands behind those.
    random = np.random.default_rng(3)
    nodes = [
        helper.make_node("Conv", ["x", "first.w"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "second.w"], ["y"], name="second"),
    ]
    constants = {name: random.normal(size=(6, 6, 3)).astype(np.float32) for name in ("first.w", "second.w")}
    source = model(nodes, [value("x", [1, 6, 16])], [value("y", [1, 6, 12])], constants)
    grids = {"x": (0.03, 2), "b": (0.07, -128), "y": (0.4, 3)}
    form = with_integers(source, grids, {"first.w": 0.02, "second.w": 0.02})
    file = compiled(form, tmp_path)
    report = BACKEND.inspect(file)
    assert "RELU" not in report.operators
    assert (report.operators["CONV_2D"], report.float_islands) == (2, ())
    feeds = {"x": random.normal(size=(1, 6, 16)).astype(np.float32)}
    meant, got = answers_of_onnx(form, feeds)["y"], answers(file, feeds)["y"]
    assert np.abs(meant - got).max() <= 1.01 * 0.4  # one code


def relu(op="Relu", inputs=("x",)):
    nodes = [helper.make_node(op, list(inputs), ["y"], name="the_node")]
    return model(nodes, [value("x", [1, 4, 4])], [value("y", None)], {})


def test_nan_in_weights_is_refused_by_name(tmp_path):
    source = network(1)
    broken = next(item for item in source.graph.initializer if item.name == "deep.w")
    array = numpy_helper.to_array(broken).copy()
    array[0] = np.nan
    broken.CopyFrom(numpy_helper.from_array(array, "deep.w"))
    with pytest.raises(CompileError, match=r"at node 'deep'.*'deep.w' holds NaN"):
        compiled(source, tmp_path)


def test_an_operator_that_becomes_a_custom_one_is_refused_by_name():
    with pytest.raises(CompileError) as error:
        convert(relu("Det"), lambda graph: graph, TOOLS)
    assert (error.value.node, error.value.op) == ("the_node", "Det")


def test_a_wrong_conversion_is_found_and_named():
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Exp", ["a"], ["b"], name="second"),
        helper.make_node("Neg", ["b"], ["y"], name="third"),
    ]
    source = model(nodes, [value("x", [1, 5])], [value("y", [1, 5])], {})

    def mistaken(graph):
        graph = onnx.ModelProto.FromString(graph.SerializeToString())
        graph.graph.node[1].op_type = "Tanh"
        return graph

    with pytest.raises(CompileError, match="computes something else") as error:
        convert(source, mistaken, TOOLS)
    assert error.value.node == "second"


def fake_tools(folder, script):
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return types.SimpleNamespace(python=lambda _progress: path)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -SEGV $$", "onnx2tf was ended by SIGSEGV"),
        ("echo the reason; exit 3", "onnx2tf failed: the reason"),
        ("exit 0", "onnx2tf said nothing and wrote no file"),
    ],
)
def test_a_converter_that_dies_ends_in_a_sentence(tmp_path, script, said):
    with pytest.raises(CompileError, match=said):
        convert(relu(), lambda graph: graph, fake_tools(tmp_path, script))


def test_a_rounded_tensor_that_the_file_does_not_have_is_listed(tmp_path):
    # Between two rounded tensors TFLite fuses the clamp into the convolution, and its input is nowhere.
    grids = {**GRIDS, "stem": (0.05, 0)}
    with pytest.raises(CompileError, match="leaves out 1 of 10 rounded tensors: stem"):
        compiled(with_integers(network(1), grids), tmp_path)


def test_what_is_no_tflite_of_ours_is_refused_in_a_sentence(built, tmp_path):
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(built["fp32"][1].read_bytes()[:700])
    with pytest.raises(CompileError, match=r"cut\.tflite"):
        BACKEND.inspect(cut)
    (tmp_path / "text.tflite").write_text("no model at all")
    with pytest.raises(CompileError, match=r"is not a \.tflite file"):
        BACKEND.inspect(tmp_path / "text.tflite")


def test_a_batch_is_fixed_only_where_it_alone_is_open():
    fixed = with_batch(network(), 1)
    assert fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert with_batch(network(1), 1) is None
    wide = relu()
    wide.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    assert with_batch(wide, 1) is None


def stored_weights(codes, scales, axis):
    return StoredWeights(
        np.asarray(codes, np.int8), np.asarray(scales, np.float32), axis, np.zeros(len(scales), np.int32)
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    outside=st.integers(1, 6),
    inside=st.integers(1, 4),
    kernel=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
)
def test_integer_weights_are_found_again_however_they_are_turned_and_split(seed, outside, inside, kernel, groups):
    random = np.random.default_rng(seed)
    codes = random.integers(-127, 128, size=(outside * groups, inside, kernel, kernel)).astype(np.int8)
    scales = random.uniform(1e-6, 10, size=outside * groups).astype(np.float32)
    known = KnownWeights({"w": stored_weights(codes, scales, 0)})
    values = codes.astype(np.float32) * scales.reshape(-1, 1, 1, 1)
    for part in range(groups):
        rows = slice(part * outside, (part + 1) * outside)
        found = known.find(values[rows].transpose(0, 2, 3, 1), 0)
        assert found is not None
        assert found.names == ("w",)
        used = (codes[rows] != 0).any(axis=(1, 2, 3))  # a channel of zeros has no scale that could be told
        np.testing.assert_array_equal(found.codes, codes[rows].transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(found.scales[used], scales[rows][used])


def test_weights_whose_values_changed_are_not_found():
    known = KnownWeights({"w": stored_weights([[1, 2], [3, 4]], [0.5, 0.25], 0)})
    assert known.find(np.float32([[0.5, 1.0], [0.75, 1.0]]), 0) is not None
    assert known.find(np.float32([[0.5, 1.0], [0.75, 1.01]]), 0) is None


def test_minus_128_in_weights_is_refused():
    known = KnownWeights({"w": stored_weights([[-128, 2]], [0.5], 0)})
    with pytest.raises(CompileError, match="'w' have the integer -128"):
        known.find(np.float32([[-64, 1]]), 0)


def test_a_zero_point_that_leaves_integers_in_range_is_taken_up():
    stored = StoredWeights(np.int8([[10, -20]]), np.float32([0.5]), 0, np.int32([3]))
    found = KnownWeights({"w": stored}).find(np.float32([[3.5, -11.5]]), 0)
    np.testing.assert_array_equal(found.codes, [[7, -23]])


def test_the_test_form_is_what_read_form_reads(tmp_path):
    onnx.save(with_integers(network()), tmp_path / "form.onnx")
    form = read_form(tmp_path / "form.onnx")
    assert set(form.activations) == set(GRIDS)
    assert set(form.weights) == set(WEIGHTS)
    assert "head" not in form.quantized_nodes
    assert {"stem", "deep", "pool", "point", "sum"} <= form.quantized_nodes


def test_no_converter_is_left_behind_in_the_temporary_folder(built, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CompileError):
        convert(relu(), lambda graph: graph, fake_tools(tmp_path, "exit 1"))
    assert [item.name for item in tmp_path.iterdir()] == ["python"]
