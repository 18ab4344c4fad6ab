"""Each bad input that TFLite's and MNN's tools were seen to take in silence, or to die of, given to `compile` and to a session."""

import json
import shutil

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgedeploy import pipeline  # noqa: E402
from edgedeploy.backends import backend, session_file, session_options  # noqa: E402
from edgedeploy.backends.mnn import conversion as mnn_conversion  # noqa: E402
from edgedeploy.backends.tflite import conversion as tflite_conversion  # noqa: E402
from edgedeploy.errors import CompileError, DocumentError, ModelError, ToolchainError, UsageError  # noqa: E402
from edgedeploy.ondevice.runner import load_device_half  # noqa: E402

RUNTIMES = ("tflite", "mnn")
IMAGE = ("x", TensorProto.FLOAT, [1, 3, 8, 6])
MAPS = ("y", TensorProto.FLOAT, [1, 4, 8, 6])
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
STEM = helper.make_node("Conv", ["x", "w"], ["c"], name="stem", pads=[1] * 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory, with a cache of its own."""
    made = tmp_path_factory.mktemp("failures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(made / "cache"))
        patch.chdir(made)
        yield made


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request, folder):
    """The name of a back end that can compile here."""
    return _usable(request.param)


def _usable(name):
    if reason := backend(name).missing():
        pytest.skip(reason)
    if (tools := backend(name).tools) is not None:
        try:
            tools.python()
        except ToolchainError as error:
            pytest.skip(str(error))
    return name


def write(folder, name, nodes, inputs=(IMAGE,), outputs=(MAPS,), constants=None, domains=()):
    tensors = [numpy_helper.from_array(np.asarray(value), key) for key, value in (constants or {"w": WEIGHTS}).items()]
    values = [[helper.make_tensor_value_info(*item) for item in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, name, *values, tensors)
    imports = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def compiled(source, runtime, **more):
    return pipeline.compile(source, backend=runtime, target="x86-64", **more)


def opened(built):
    half = load_device_half(str(session_file(built.artifact.recipe.backend)))
    return half.Session(str(built.file), session_options(built.artifact))


def packed(**arrays):
    return {
        name: (np.ascontiguousarray(values).tobytes(), values.dtype.name, list(values.shape))
        for name, values in arrays.items()
    }


def answers(session, **arrays):
    session.bind(packed(**arrays))
    session.infer()
    return {name: np.frombuffer(data, kind).reshape(shape) for name, (data, kind, shape) in session.outputs().items()}


def expected(path, **arrays):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([item.name for item in session.get_outputs()], session.run(None, arrays), strict=True))


def image(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------- models that have no form there


@pytest.mark.parametrize(
    ("name", "op", "says"),
    [
        ("tflite", "Det", r"at node 'odd' \(Det\): .* a custom one \(ONNX_DET\), which no runtime has; replace it"),
        ("tflite", "Hardmax", r"at node 'odd' \(Hardmax\): .*; take ArgMax"),
        ("tflite", "Unique", r"at node 'odd' \(Unique\): the shape of its result depends on the values; find"),
        ("mnn", "Hardmax", r"at node 'odd' \(Hardmax\): .* does not know the operator Hardmax; replace"),
        ("mnn", "Unique", r"at node 'odd' \(Unique\): MNN returns the values in another order than ONNX says; sort"),
    ],
)
def test_an_operator_that_would_become_custom_or_wrong_is_refused_by_name(folder, name, op, says):
    shape = {"Det": [1, 4, 4], "Unique": [1, 12], "Hardmax": [1, 12]}[op]
    made = {"Det": [1], "Unique": ["count"], "Hardmax": [1, 12]}[op]
    node = helper.make_node(op, ["x"], ["y"], name="odd")
    source = write(
        folder, op, [node], [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, made)], {"w": WEIGHTS[:0]}
    )
    with pytest.raises(CompileError, match=says) as caught:
        compiled(source, _usable(name))
    assert (caught.value.node, caught.value.op) == ("odd", op)


def test_an_operator_of_nobody_is_refused_by_name(folder, runtime):
    mine = helper.make_node("MyOp", ["c"], ["y"], name="mine", domain="my.ops")
    source = write(folder, "mine", [STEM, mine], domains=["my.ops"])
    with pytest.raises(ModelError, match=r"has the operator my\.ops:MyOp, .*; replace it in the model by standard op"):
        compiled(source, runtime)


def branch(op):
    made = helper.make_tensor_value_info(f"{op}.y", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(op, ["c"], [f"{op}.y"], name=f"by {op}")], op, [], [made])


def branching():
    return [
        STEM,
        helper.make_node("ReduceSum", ["c"], ["total"], name="total", keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["flag"], name="greater"),
        helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=branch("Relu"), else_branch=branch("Neg")),
    ]


def looping():
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes on"]), helper.make_node("Add", ["v", "v"], ["doubled"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("doubled", TensorProto.FLOAT, None),
        ],
    )
    return [
        STEM,
        helper.make_node("ReduceMax", ["c"], ["most"], name="most", keepdims=0),
        helper.make_node("Cast", ["most"], ["count"], name="count", to=TensorProto.INT64),
        helper.make_node("Loop", ["count", "", "c"], ["y"], name="repeat", body=body),
    ]


def test_a_loop_that_the_data_ends_is_refused_by_name(folder, runtime):
    source = write(folder, "looping", looping())
    with pytest.raises(CompileError, match=r"at node 'repeat' \(Loop\): .*; (replace|export)"):
        compiled(source, runtime)


def test_a_choice_by_the_data_is_right_on_both_sides_or_refused_by_name(folder, runtime):
    source = write(folder, "branching", branching(), constants={"w": WEIGHTS, "zero": np.float32(0)})
    if runtime == "mnn":
        with pytest.raises(CompileError, match=r"at node 'choice' \(If\): .* a loop or a branch .*; export"):
            compiled(source, runtime)
        return
    x, signs = image(1, 3, 8, 6), set()
    with opened(compiled(source, runtime)) as session:
        for sign in (1, -1):
            right = expected(source, x=sign * x)["y"]
            signs.add(bool((right < 0).any()))
            np.testing.assert_allclose(answers(session, x=sign * x)["y"], right, rtol=0, atol=1e-4)
    assert signs == {True, False}


def test_an_image_of_open_height_and_width_is_right_at_every_size(folder, runtime):
    sizes = [TensorProto.FLOAT, ["batch", 3, "height", "width"]]
    head = [
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "v"], ["y"], name="head"),
    ]
    constants = {"w": WEIGHTS, "v": np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)}
    source = write(folder, "open", [STEM, *head], [("x", *sizes)], [("y", TensorProto.FLOAT, ["batch", 5])], constants)
    with opened(compiled(source, runtime)) as session:
        for shape in ((1, 3, 8, 6), (2, 3, 11, 7), (1, 3, 24, 24)):
            x = image(*shape)
            np.testing.assert_allclose(answers(session, x=x)["y"], expected(source, x=x)["y"], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def source(folder):
    """A convolution of a fixed batch with its weights in a file beside it, which is no mistake at all."""
    relu = helper.make_node("Relu", ["c"], ["y"], name="relu")
    whole = onnx.load(write(folder, "whole", [STEM, relu]))
    path = folder / "good.onnx"
    onnx.save(whole, path, save_as_external_data=True, location="good.weights", size_threshold=0)
    return path


@pytest.fixture(scope="module")
def built(source, runtime):
    return compiled(source, runtime, output=f"{runtime}.artifact")


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("half", ModelError, "cannot be read as ONNX .truncated or damaged.*; export or copy it again"),
        ("empty", ModelError, r"empty\.onnx is not a valid ONNX model"),
        ("missing", UsageError, r"missing\.onnx does not exist; give"),
    ],
)
def test_a_damaged_or_missing_model_is_refused(folder, source, runtime, name, error, says):
    whole = (folder / "whole.onnx").read_bytes()
    (folder / "half.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.onnx").write_bytes(b"")
    with pytest.raises(error, match=says):
        compiled(f"{name}.onnx", runtime)


def test_a_model_whose_weights_lie_beside_it_is_taken_whole(folder, source, built):
    assert (folder / "good.weights").stat().st_size >= WEIGHTS.nbytes > source.stat().st_size
    x = image(1, 3, 8, 6)
    with opened(built) as session:
        right = expected(folder / "whole.onnx", x=x)["y"]
        np.testing.assert_allclose(answers(session, x=x)["y"], right, rtol=0, atol=1e-5)


def test_a_truncated_artifact_is_neither_measured_nor_opened(folder, built):
    cut = folder / f"cut.{built.artifact.recipe.backend}"
    shutil.copytree(built.folder, cut, dirs_exist_ok=True)
    file = cut / built.artifact.file
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DocumentError, match=r"is not the file that .* describes .*; compile again"):
        pipeline.bench(cut, visits=1)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"not a whole \.\w+ file|does not load the artifact"):
        load_device_half(str(session_file(built.artifact.recipe.backend))).Session(str(file), {})


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"x": np.where(np.arange(16).reshape(16, 1, 1, 1) == 3, np.nan, 1) * image(16, 3, 8, 6)}, "holds nan at sample 3"),
        ({"x": np.zeros((16, 3, 8, 6))}, "all 16 samples of bad are the same; calibrate on different ones"),
        ({"x": np.arange(16).reshape(16, 1, 1, 1) * np.ones((16, 3, 8, 6))}, "each sample of bad is one single value"),
        ({"x": image(16, 8, 6, 3)}, "has shape 8×6×3; the model's input takes 3×8×6"),
        ({"x": image(16, 3, 4, 6)}, "has shape 3×4×6; the model's input takes 3×8×6"),
        ({"image": image(16, 3, 8, 6)}, 'has no array "x" .* .it holds: image.'),
        ({}, 'has no array "x" .* .it holds: nothing.'),
    ],
    ids=["NaN", "zeros", "constants", "layout", "size", "name", "nothing"],
)  # fmt: skip
def test_calibration_that_the_quantizer_would_take_or_die_of_is_refused(folder, source, runtime, values, says):
    np.savez(folder / "bad.npz", **{name: array.astype(np.float32) for name, array in values.items()})
    with pytest.raises(DocumentError, match=says):
        compiled(source, runtime, precision="int8", calibration="bad.npz")


def test_int8_without_calibration_or_with_doubles_or_no_file_is_refused(folder, source, runtime):
    with pytest.raises(UsageError, match="int8 needs samples to calibrate on; give --calibration"):
        compiled(source, runtime, precision="int8")
    with pytest.raises(UsageError, match=r"nowhere\.npz does not exist"):
        compiled(source, runtime, precision="int8", calibration="nowhere.npz")
    np.savez(folder / "doubles.npz", x=image(16, 3, 8, 6).astype(np.float64))
    with pytest.raises(DocumentError, match="is float64 and the model's input is float32; save it as float32"):
        compiled(source, runtime, precision="int8", calibration="doubles.npz")


# ---------------------------------------------------------------- what a session is fed


@pytest.mark.parametrize(
    ("fed", "says"),
    [
        ({"x": image(1, 8, 6, 3)}, r"'x' takes the shape \[1, 3, 8, 6\], not \[1, 8, 6, 3\]"),
        ({"x": image(1, 3, 4, 3)}, r"'x' takes the shape \[1, 3, 8, 6\], not \[1, 3, 4, 3\]"),
        ({"x": image(3, 3, 8, 6)}, r"'x' takes the shape \[1, 3, 8, 6\], not \[3, 3, 8, 6\]"),
        ({"x": image(1, 3, 8, 6).astype(np.float64)}, "'x' takes float32, not float64"),
        ({"X": image(1, 3, 8, 6)}, r"takes the inputs \['x'\], not \['X'\]"),
        ({}, r"takes the inputs \['x'\], not \[\]"),
    ],
    ids=["layout", "size", "batch", "type", "name", "absent"],
)
def test_inputs_that_do_not_fit_are_refused_and_the_next_ones_are_answered(source, built, fed, says):
    x = image(1, 3, 8, 6)
    with opened(built) as session:
        with pytest.raises(ValueError, match=says):
            session.bind(packed(**fed))
        np.testing.assert_allclose(answers(session, x=x)["y"], expected(source, x=x)["y"], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- a converter that dies


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("sys.exit('it is the weights')", "it is the weights"),
        ("sys.exit(0)", "said nothing|without an answer"),
    ],
)
def test_a_converter_that_dies_takes_nothing_with_it(folder, source, built, monkeypatch, tmp_path, ending, says):
    script = tmp_path / "dies.py"
    script.write_text(f"import os, sys\n{ending}\n")
    monkeypatch.setattr(mnn_conversion, "SCRIPT", script)
    monkeypatch.setattr(tflite_conversion, "_SCRIPT", script)
    before = (built.folder / "manifest.json").read_bytes()
    kept = sorted((folder / "cache" / "artifacts").iterdir())
    with pytest.raises(CompileError, match=says):
        compiled(source, built.artifact.recipe.backend, output=built.folder, rebuild=True)
    assert (built.folder / "manifest.json").read_bytes() == before
    assert json.loads(before)["sha256"] == built.artifact.sha256
    assert sorted((folder / "cache" / "artifacts").iterdir()) == kept
