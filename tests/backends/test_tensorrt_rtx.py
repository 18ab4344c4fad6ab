"""The TensorRT-RTX back end: real engines built without a GPU, what is in them, and every way to fail as a sentence."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX; pip install 'edgedeploy[tensorrt_rtx]'")
pytest.importorskip("onnxruntime", reason="forms are compared by ONNX Runtime: pip install 'edgedeploy[onnxruntime]'")

import onnx
from onnx import TensorProto, helper, numpy_helper

from edgedeploy.backends.tensorrt_rtx import BACKEND, COMPUTE_CAPABILITIES, Options, building, capabilities
from edgedeploy.backends.tensorrt_rtx.building import build_engine
from edgedeploy.backends.tensorrt_rtx.grouping import join_small_groups
from edgedeploy.backends.trt_layers import layers_from_rtx_log
from edgedeploy.backends.trt_proof import disagreement
from edgedeploy.build import BuildRequest, build, deliver
from edgedeploy.errors import CompileError

INPUT = "x"
SHAPE = (3, 16, 16)


def constant(name, value):
    return numpy_helper.from_array(np.asarray(value), name)


def value(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def weights():
    """Of a net with a residual sum: two convolutions, a mean, a linear head."""
    rng = np.random.default_rng(0)
    return {
        "c1.weight": rng.standard_normal((8, 3, 3, 3)).astype(np.float32) * 0.2,
        "c2.weight": rng.standard_normal((8, 8, 3, 3)).astype(np.float32) * 0.1,
        "fc.weight": rng.standard_normal((5, 8)).astype(np.float32),
        "c1.bias": rng.standard_normal(8).astype(np.float32),
        "fc.bias": rng.standard_normal(5).astype(np.float32),
    }


def float_nodes(read=lambda name: name):
    """The net's nodes; `read` says which tensor stands for a tensor where it is read."""
    same = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    return [
        helper.make_node("Conv", [read(INPUT), read("c1.weight"), "c1.bias"], ["c1"], name="/c1/Conv", **same),
        helper.make_node("Relu", ["c1"], ["r1"], name="/r1/Relu"),
        helper.make_node("Conv", [read("r1"), read("c2.weight")], ["c2"], name="/c2/Conv", **same),
        helper.make_node("Add", ["c2", read("r1")], ["sum"], name="/Add"),
        helper.make_node("Relu", ["sum"], ["r2"], name="/r2/Relu"),
        helper.make_node("GlobalAveragePool", [read("r2")], ["pooled"], name="/pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="/flatten"),
        helper.make_node("Gemm", [read("flat"), read("fc.weight"), "fc.bias"], ["y"], name="/fc/Gemm", transB=1),
    ]


def model_of(nodes, initializers, batch=1, inputs=None, outputs=None):
    graph = helper.make_graph(
        nodes, "net", inputs or [value(INPUT, (batch, *SHAPE))], outputs or [value("y", (batch, 5))], initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def float_model(batch=1):
    return model_of(float_nodes(), [constant(*item) for item in weights().items()], batch)


def trained_model():
    """The net as quantization-aware training leaves it: int8, symmetric, pairs before each product and none in the sum."""
    tensors = dict(weights())
    initializers = [constant(name, tensors[name]) for name in ("c1.bias", "fc.bias")]
    nodes = []
    for name in ("c1.weight", "c2.weight", "fc.weight"):
        array = tensors[name]
        scales = (np.abs(array).reshape(len(array), -1).max(1) / 127).astype(np.float32)
        codes = np.round(array / scales.reshape(-1, *[1] * (array.ndim - 1))).astype(np.int8)
        initializers += [constant(f"{name}.codes", codes), constant(f"{name}.scale", scales)]
        initializers.append(constant(f"{name}.point", np.zeros(len(array), np.int8)))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}.codes", f"{name}.scale", f"{name}.point"], [f"{name}.value"], axis=0, name=f"{name}.dq")
        )  # fmt: skip
    before = {INPUT: [], "r1": [], "r2": [], "flat": []}
    for index, name in enumerate(before):
        initializers += [
            constant(f"{name}.scale", np.float32(0.011 * (index + 1))),
            constant(f"{name}.point", np.int8(0)),
        ]
        before[name] = [
            helper.make_node("QuantizeLinear", [name, f"{name}.scale", f"{name}.point"], [f"{name}.codes"], name=f"{name}.q"),
            helper.make_node("DequantizeLinear", [f"{name}.codes", f"{name}.scale", f"{name}.point"], [f"{name}.value"], name=f"{name}.dq"),
        ]  # fmt: skip
    nodes += before[INPUT]
    for node in float_nodes(lambda name: f"{name}.value"):
        nodes += [node, *before.get(node.output[0], [])]
    return model_of(nodes, initializers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rtx")


@pytest.fixture(scope="module")
def request_of(folder):
    """Return a function that makes a request to build a model at one precision."""
    samples = folder / "samples.npz"
    np.savez(samples, **{INPUT: np.random.default_rng(1).standard_normal((8, *SHAPE)).astype(np.float32)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))

        def make(model, precision, **options):
            source = folder / f"{abs(hash(model.SerializeToString()))}.onnx"
            onnx.save(model, source)
            return BuildRequest(
                name="net", source=str(source), base=folder, target="nvidia-rtx", backend="tensorrt_rtx",
                precision=precision, calibration=samples, options=options,
            )  # fmt: skip

        yield make


def made(request):
    return build(request, lambda text: None)


@pytest.fixture(scope="module")
def int8(request_of):
    return made(request_of(float_model(), "int8"))


# ---------------------------------------------------------------- engines


def test_int8_engine_runs_every_product_on_integers_and_says_so(int8):
    layers = int8.artifact.layers
    assert [label.partition(" ")[2] for label in layers.quantized] == ["/c1/Conv", "/c2/Conv", "/fc/Gemm"]
    products = [layer for layer in layers.layers if layer.kind in ("correlation", "gemm")]
    assert [layer.precision for layer in products] == ["int8"] * 3
    assert set(layers.scales) >= {INPUT, "c1.weight", "c2.weight", "fc.weight"}
    assert not any("meant to run on integers" in note for note in int8.artifact.notes)


def test_engine_is_built_and_not_compared_where_there_is_no_gpu(int8):
    note = next((note for note in int8.artifact.notes if "golden answers were not compared" in note), None)
    compared = [one for one in int8.artifact.fidelity if "on this machine" in one.candidate]
    assert (note is None) == bool(compared)


def test_layers_lie_beside_the_engine_wherever_it_is_delivered(int8, tmp_path):
    delivered = deliver(int8, tmp_path)
    assert BACKEND.inspect(delivered.file) == int8.artifact.layers


def test_engine_without_its_layers_is_a_sentence(int8, tmp_path):
    delivered = deliver(int8, tmp_path)
    (tmp_path / "layers.json").write_text("{}")
    with pytest.raises(CompileError, match=r"layers\.json"):
        BACKEND.inspect(delivered.file)
    (tmp_path / "layers.json").unlink()
    with pytest.raises(CompileError, match=r"layers\.json is missing.*compile again"):
        BACKEND.inspect(delivered.file)


def test_same_model_gives_the_same_bytes(int8, request_of):
    import dataclasses

    again = made(dataclasses.replace(request_of(float_model(), "int8"), rebuild=True))
    assert not again.is_cached
    assert again.artifact.sha256 == int8.artifact.sha256
    assert (again.folder / "layers.json").read_bytes() == (int8.folder / "layers.json").read_bytes()


@pytest.mark.parametrize(("precision", "floats"), [("fp32", "fp32"), ("fp16", "fp16")])
def test_float_engine_computes_products_in_the_type_that_was_asked_for(precision, floats, request_of):
    layers = made(request_of(float_model(), precision)).artifact.layers
    convolutions = [layer for layer in layers.layers if layer.kind == "correlation"]
    assert [layer.precision for layer in convolutions] == [floats, floats]
    assert layers.quantized == ()
    assert layers.float_islands == ()


def test_scales_of_quantization_aware_training_survive_into_the_engine(request_of):
    report = made(request_of(trained_model(), "int8")).artifact.survival
    assert {entry.tensor for entry in report.entries if entry.role == "activation"} >= {INPUT, "r1"}
    assert {entry.stages["artifact"] for entry in report.entries} <= {"kept", "folded"}
    assert [entry for entry in report.entries if entry.stages["artifact"] == "kept"]
    assert report.largest_relative_change == 0


def test_open_batch_needs_a_range_and_becomes_a_profile(request_of):
    with pytest.raises(CompileError, match=r"batch|axes"):
        made(request_of(float_model("batch"), "fp16"))
    built = made(request_of(float_model("batch"), "fp16", axes="batch=1:2:4"))
    assert built.artifact.layers.layers


# ---------------------------------------------------------------- small groups of channels


def grouped(groups, channels, outputs, side=5):
    """Return a convolution on integers of `groups` groups with `channels` inputs and `outputs` outputs each."""
    rng = np.random.default_rng(groups)
    codes = rng.integers(-127, 128, (groups * outputs, channels, 3, 3)).astype(np.int8)
    constants = {
        "s": np.float32(1), "z": np.int8(0), "w": codes,
        "ws": np.ones(len(codes), np.float32), "wz": np.zeros(len(codes), np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", [INPUT, "s", "z"], ["xq"], name="x/quantize"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="x/dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="w/dequantize", axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["y"], name="conv", group=groups, pads=[1, 1, 1, 1]),
    ]
    shapes = ((1, groups * channels, side, side), (1, groups * outputs, side, side))
    initializers = [constant(*item) for item in constants.items()]
    return model_of(nodes, initializers, inputs=[value(INPUT, shapes[0])], outputs=[value("y", shapes[1])])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_joined_groups_give_the_same_sums(folder, groups, channels, outputs):
    model, plain = grouped(groups, channels, outputs), folder / "plain.onnx"
    onnx.save(model, plain)
    join_small_groups(model, ["conv"])
    onnx.checker.check_model(model, full_check=True)
    width = next(item.dims[1] for item in model.graph.initializer if item.name == "w")
    assert width == (4 if channels in (1, 2) and groups % (4 // channels) == 0 else channels)
    # Sums of 127 x 127 x 45 at most are exact in float32.
    feed = {INPUT: np.random.default_rng(1).integers(-127, 128, (1, groups * channels, 5, 5)).astype(np.float32)}
    assert disagreement(model, plain, [feed]) == 0.0


def test_convolution_in_float_and_weights_that_others_read_are_left_alone():
    plain = grouped(4, 1, 1)
    shared = onnx.ModelProto.FromString(plain.SerializeToString())
    shared.graph.output.append(helper.make_tensor_value_info("w2", TensorProto.FLOAT, [4, 1, 3, 3]))
    shared.graph.node.append(helper.make_node("Identity", ["wd"], ["w2"], name="other"))
    for model, nodes in ((plain, []), (shared, ["conv"])):
        before = model.SerializeToString(deterministic=True)
        join_small_groups(model, nodes)
        assert model.SerializeToString(deterministic=True) == before


def test_depthwise_engine_holds_no_zeros_as_large_as_its_activations(tmp_path):
    model = grouped(16, 1, 1, side=64)
    how = {"compute_capabilities": ["SM86"], "profiles": {}, "tf32": False, "limit_s": 60}
    filled = build_engine(model, tmp_path, **how)
    join_small_groups(model, ["conv"])
    joined = build_engine(model, tmp_path, **how)
    # Three channels of zeros beside each of 16; the kernels' own text differs by a few kilobytes.
    assert len(filled.engine) - len(joined.engine) > 0.9 * 3 * 16 * 64 * 64
    products = [layer for layer in layers_from_rtx_log(joined.log) if layer.kind == "correlation"]
    assert [layer.precision for layer in products] == ["int8"]


# ---------------------------------------------------------------- refusals of the compiler itself


def engine_of(nodes, initializers=(), shape=(1, 4), **settings):
    graph = helper.make_graph(nodes, "net", [value(INPUT, shape)], [value("y", ["a", "b"])], list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    known = {"compute_capabilities": ["SM86"], "profiles": {}, "tf32": False, "limit_s": 60, **settings}
    return build_engine(model, **known)


def test_operator_that_the_parser_does_not_know_is_named(tmp_path):
    nodes = [
        helper.make_node("Relu", [INPUT], ["r"], name="/relu"),
        helper.make_node("Det", ["r"], ["y"], name="/head/Det"),
    ]
    with pytest.raises(CompileError, match="does not know this operator") as refused:
        engine_of(nodes, folder=tmp_path)
    assert (refused.value.node, refused.value.op) == ("/head/Det", "Det")
    assert "another back end" in refused.value.hint


def test_asymmetric_pair_is_refused_with_the_remedy(tmp_path):
    numbers = [constant("s", np.float32(0.1)), constant("z", np.int8(3))]
    nodes = [
        helper.make_node("QuantizeLinear", [INPUT, "s", "z"], ["q"], name="x/quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="x/dequantize"),
    ]
    with pytest.raises(CompileError, match="zero point is not supported") as refused:
        engine_of(nodes, numbers, folder=tmp_path)
    assert (refused.value.node, refused.value.op) == ("x/quantize", "QuantizeLinear")
    assert "symmetric" in refused.value.hint


def test_types_that_do_not_fit_are_refused_without_a_trace_of_foreign_sources(tmp_path):
    nodes = [
        helper.make_node("Cast", [INPUT], ["h"], name="/cast", to=TensorProto.FLOAT16),
        helper.make_node("Div", [INPUT, "h"], ["y"], name="/div"),
    ]
    with pytest.raises(CompileError, match="DIV must have same input types") as refused:
        engine_of(nodes, folder=tmp_path)
    assert refused.value.node == "/div"
    assert "float_type=float32" in refused.value.hint
    assert ".cpp" not in str(refused.value)


def test_kernel_that_a_gpu_does_not_have_is_refused_by_the_node_that_needs_it(tmp_path):
    nodes = [helper.make_node("Gemm", [INPUT, "w"], ["y"], name="/fc/Gemm")]
    with pytest.raises(CompileError, match=r"Turing \(SM75\): FP32 GEMM is not supported") as refused:
        engine_of(nodes, [constant("w", np.eye(4, dtype=np.float32))], folder=tmp_path, compute_capabilities=["SM75"])
    assert (refused.value.node, refused.value.op) == ("/fc/Gemm", "Gemm")
    assert "7.5" in refused.value.hint


def test_open_axis_without_a_profile_is_refused(tmp_path):
    nodes = [helper.make_node("Relu", [INPUT], ["y"], name="/relu")]
    with pytest.raises(CompileError, match="no optimization profile") as refused:
        engine_of(nodes, folder=tmp_path, shape=("n", 4))
    assert "axes" in refused.value.hint


# ---------------------------------------------------------------- a child that does not end as it should

CHILD = """
import json, os, signal, sys, time
job = json.load(open(sys.argv[1]))
with open(job["log"], "w") as log:
    log.write("[V] Parsing node: /first/Relu [Relu]\\n[V] Parsing node: /odd/Conv [Conv]\\n")
{end}
"""


def failing(tmp_path, monkeypatch, end, **settings):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(end=end))
    monkeypatch.setattr(building, "SCRIPT", script)
    with pytest.raises(CompileError) as refused:
        engine_of([helper.make_node("Relu", [INPUT], ["y"], name="/relu")], folder=tmp_path, **settings)
    return refused.value


def test_crash_names_the_node_that_was_parsed_last(tmp_path, monkeypatch):
    error = failing(tmp_path, monkeypatch, "os.kill(os.getpid(), signal.SIGSEGV)")
    assert (error.node, error.op) == ("/odd/Conv", "Conv")
    assert "died of SIGSEGV" in str(error)


def test_hang_ends_at_the_time_limit(tmp_path, monkeypatch):
    error = failing(tmp_path, monkeypatch, "time.sleep(60)", limit_s=1)
    assert "did not end within 1 s" in str(error)
    assert error.hint


def test_crash_while_building_blames_no_node(tmp_path, monkeypatch):
    end = "open(job['log'], 'a').write('[V] Original: 3 layers\\n'); os.kill(os.getpid(), signal.SIGKILL)"
    error = failing(tmp_path, monkeypatch, end)
    assert (error.node, "died of SIGKILL" in str(error)) == ("", True)
    assert "memory" in error.hint


@pytest.mark.parametrize(("end", "words"), [("sys.exit(3)", "exit code 3"), ("pass", "without an answer")])
def test_child_without_an_answer_is_a_sentence(end, words, tmp_path, monkeypatch):
    assert words in str(failing(tmp_path, monkeypatch, end))


def test_builder_that_makes_nothing_and_says_nothing_is_a_sentence(tmp_path, monkeypatch):
    end = "json.dump({'errors': [], 'engine_bytes': 0}, open(job['result'], 'w'))"
    assert "did not say why" in str(failing(tmp_path, monkeypatch, end))


def test_message_of_several_lines_is_read_whole_and_without_the_compilers_own_names(tmp_path, monkeypatch):
    said = [
        "[E] buildSerializedNetwork: Error Code 1: Myelin ([shape.cpp:175: ~streamer_t] Error during shape inference of ",
        "__resh2186 = reshape(/relu_first_output.1)", "Error is:",
        "Mismatched number of elements in reshape op: __resh2186 input tensor /relu_first_output.1; [a.h:1: f] Check",
        "[V] and something else",
    ]  # fmt: skip
    end = f"open(job['log'], 'a').write('\\n'.join({said!r}))"
    end += "; json.dump({'errors': [], 'engine_bytes': 0}, open(job['result'], 'w'))"
    error = failing(tmp_path, monkeypatch, end)
    assert "Mismatched number of elements in reshape op: resh input tensor" in str(error)
    assert "something else" not in str(error)
    assert (error.node, error.op) == ("/relu", "Relu")
    assert "float_type=float32" in error.hint


# ---------------------------------------------------------------- options and what is installed


@pytest.mark.parametrize("text", ["8.7", "9.0", "SM110", "", "8.6,", "ampere", "8"])
def test_gpu_that_the_compiler_does_not_know_is_refused_with_those_that_it_does(text):
    with pytest.raises(CompileError, match=r"8\.6.*12\.0"):
        capabilities(text)


def test_current_stands_alone():
    assert capabilities("current") == ("CURRENT",)
    with pytest.raises(CompileError, match="stands alone"):
        capabilities("current,8.6")


@given(st.lists(st.sampled_from(COMPUTE_CAPABILITIES), min_size=1))
def test_capabilities_may_be_written_in_any_order_and_way(names):
    dotted = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in names)
    expected = tuple(name for name in COMPUTE_CAPABILITIES if name in names)
    assert capabilities(dotted) == capabilities(",".join(names).lower()) == expected


def test_compiler_knows_the_gpus_that_are_named():
    import tensorrt_rtx

    assert set(COMPUTE_CAPABILITIES) == set(tensorrt_rtx.ComputeCapability.__members__) - {"NONE", "CURRENT"}


@pytest.mark.parametrize("options", [Options(time_limit_s=0), Options(threads=2), Options(compute_capabilities="8.7")])
def test_options_without_sense_are_refused_before_anything_is_read(options, tmp_path):
    with pytest.raises(CompileError, match="give"):
        BACKEND.compile(None, None, options, tmp_path / "out.engine")


def test_missing_wheel_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    assert BACKEND.missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt_rtx" else found(name))
    assert "pip install 'edgedeploy[tensorrt_rtx]'" in BACKEND.missing()


def test_device_half_is_the_one_that_both_tensorrt_back_ends_share():
    assert BACKEND.device_half == Path(building.__file__).parent.parent / "trt_session.py"
    assert BACKEND.device_half.is_file()
