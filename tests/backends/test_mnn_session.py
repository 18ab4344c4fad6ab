"""What the device half of MNN does beyond what every device half promises."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedeploy.backends import session_file
from edgedeploy.ondevice.runner import load_device_half
from tests.backends.mnn_files import write_mnn

pytest.importorskip("MNN", reason="needs MNN; pip install 'edgedeploy[mnn]'")
helper = pytest.importorskip("onnx.helper", reason="needs onnx; pip install 'edgedeploy[onnxruntime]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime; pip install 'edgedeploy[onnxruntime]'")

SESSION = session_file("mnn")
RUNNER = Path(__file__).parents[2] / "edgedeploy" / "ondevice" / "runner.py"
RNG = np.random.default_rng(7)
WEIGHT = RNG.standard_normal((5, 3, 3, 3), np.float32)


@pytest.fixture(scope="module")
def image_net(tmp_path_factory) -> Path:
    """Relu(conv(x)) on images that are not square, with a free batch."""
    return write_mnn(
        tmp_path_factory.mktemp("image"),
        [
            helper.make_node("Conv", ["x", "w"], ["made"], name="conv", pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Relu", ["made"], ["y"], name="relu"),
        ],
        {"x": ("float32", ["batch", 3, 10, 14])},
        {"y": ("float32", ["batch", 5, 5, 7])},
        {"w": WEIGHT},
    )


@pytest.fixture(scope="module")
def mixed_net(tmp_path_factory) -> Path:
    """Every type that a model may have at its border, a scalar, five axes, an output that is read further, a lost one."""
    return write_mnn(
        tmp_path_factory.mktemp("mixed"),
        [
            helper.make_node("Neg", ["x"], ["n"], name="neg"),
            helper.make_node("ReduceSum", ["n"], ["total"], name="sum", keepdims=0),
            helper.make_node("Gather", ["table", "ids"], ["rows"], name="gather"),
            helper.make_node("Cast", ["count"], ["counted"], name="cast", to=1),
            helper.make_node("Cast", ["flag"], ["flagged"], name="cast_flag", to=1),
            helper.make_node("Reshape", ["n", "five"], ["wide"], name="reshape"),
            helper.make_node("TopK", ["n", "two"], ["lost", "best"], name="topk"),
        ],
        {
            "x": ("float32", [1, 6]),
            "ids": ("int64", [1, 4]),
            "count": ("int32", [1, 4]),
            "flag": ("bool", [1, 4]),
        },
        {
            "n": ("float32", [1, 6]),
            "total": ("float32", []),
            "rows": ("float32", [1, 4, 2]),
            "counted": ("float32", [1, 4]),
            "flagged": ("float32", [1, 4]),
            "wide": ("float32", [1, 1, 2, 1, 3]),
            "best": ("int64", [1, 2]),
        },
        {
            "table": RNG.standard_normal((9, 2), np.float32),
            "five": np.array([1, 1, 2, 1, 3]),
            "two": np.array([2]),
        },
    )


MIXED = {
    "x": RNG.standard_normal((1, 6), np.float32),
    "ids": np.array([[0, 8, 3, 1]]),
    "count": np.array([[0, 8, 3, -1]], np.int32),
    "flag": np.array([[True, False, False, True]]),
}


def load(path: Path, **options: Any) -> Any:
    return load_device_half(str(SESSION)).Session(str(path), options)


def packed(arrays: dict[str, np.ndarray]) -> dict[str, tuple[bytes, str, list[int]]]:
    return {
        name: (np.ascontiguousarray(values).tobytes(), values.dtype.name, list(values.shape))
        for name, values in arrays.items()
    }


def fetched(session: Any) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(data, dtype).reshape(shape) for name, (data, dtype, shape) in session.outputs().items()}


def answers(session: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session.bind(packed(arrays))
    session.infer()
    return fetched(session)


def expected(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path.with_suffix(".onnx")), providers=["CPUExecutionProvider"])
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, arrays), strict=True))


def images(count: int) -> np.ndarray:
    return RNG.standard_normal((count, 3, 10, 14), np.float32)


def test_answers_are_right_at_every_batch(image_net):
    with load(image_net) as session:
        for count in (1, 3, 2):
            x = images(count)
            found = answers(session, {"x": x})
            assert found["y"].shape == (count, 5, 5, 7)
            np.testing.assert_allclose(found["y"], expected(image_net, {"x": x})["y"], rtol=1e-4, atol=1e-4)


def test_every_inference_computes_on_the_inputs_that_were_bound(image_net):
    """MNN computes in its inputs' memory: without writing them anew a second run answers to something else."""
    x = images(1)
    with load(image_net) as session:
        first = answers(session, {"x": x})["y"].copy()
        for _ in range(3):
            session.infer()
            np.testing.assert_array_equal(fetched(session)["y"], first)
        assert session.boundary()["includes_input_copy"] is True


def test_mnn_itself_still_destroys_its_inputs(image_net):
    """The reason for the copy in each inference; when this fails, the copy can go."""
    import MNN

    interpreter = MNN.Interpreter(str(image_net))
    session = interpreter.createSession({"numThread": 1, "backend": "CPU"})
    target = interpreter.getSessionInput(session, "x")
    x = images(1)
    target.copyFrom(MNN.Tensor(x.shape, MNN.Halide_Type_Float, x, MNN.Tensor_DimensionType_Caffe))
    assert np.array_equal(target.getNumpyData(), x)
    interpreter.runSession(session)
    assert not np.array_equal(target.getNumpyData(), x)


def test_types_scalars_and_many_axes_pass_through(mixed_net):
    with load(mixed_net, ports={"best": {"tensor": "best", "dtype": "int64"}}) as session:
        found = answers(session, MIXED)
    right = expected(mixed_net, MIXED)
    assert set(found) == set(right)
    for name, values in right.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


def test_scalar_inputs_are_taken(tmp_path):
    path = write_mnn(
        tmp_path,
        [helper.make_node("Mul", ["x", "k"], ["y"], name="mul")],
        {"x": ("float32", [1, 4]), "k": ("float32", [])},
        {"y": ("float32", [1, 4])},
        {},
    )
    x = RNG.standard_normal((1, 4), np.float32)
    with load(path) as session:
        session.bind(packed({"x": x}) | {"k": (np.float32(3).tobytes(), "float32", [])})
        session.infer()
        np.testing.assert_allclose(fetched(session)["y"], 3 * x, rtol=1e-6)


def test_integers_that_the_artifact_cannot_hold_are_refused(mixed_net):
    with load(mixed_net) as session, pytest.raises(ValueError, match="'ids' holds values beyond int32"):
        session.bind(packed({**MIXED, "ids": MIXED["ids"] + 2**40}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": np.zeros((1, 10, 14, 3), np.float32)}, r"'x' takes the shape \[any, 3, 10, 14\], not \[1, 10, 14, 3\]"),
        ({"x": np.zeros((1, 3, 5, 7), np.float32)}, "'x' takes the shape"),
        ({"x": np.zeros((0, 3, 10, 14), np.float32)}, "'x' takes the shape"),
        ({"x": np.zeros((1, 3, 10, 14), np.float64)}, "'x' takes float32, not float64"),
        ({"x": np.zeros((1, 3, 10, 14), np.float16)}, "'x' takes float32, not float16"),
        ({"image": np.zeros((1, 3, 10, 14), np.float32)}, r"takes the inputs \['x'\], not \['image'\]"),
        ({}, r"takes the inputs \['x'\], not \[\]"),
    ],
    ids=["layout", "size", "empty", "double", "half", "name", "none"],
)
def test_inputs_that_mnn_would_take_in_silence_are_refused(image_net, change, sentence):
    with load(image_net) as session, pytest.raises(ValueError, match=sentence):
        session.bind(packed(change))


def test_bytes_that_are_not_the_shape_are_refused(image_net):
    with load(image_net) as session, pytest.raises(ValueError, match="holds 100 values"):
        session.bind({"x": (bytes(400), "float32", [1, 3, 10, 14])})


def test_axes_are_the_models_where_a_port_says_so(image_net):
    """The artifact of a model that takes NHWC, with ports as a converter that permutes would give them."""
    back = {"permutation": [0, 3, 1, 2]}
    ports = {"image": {"tensor": "x", **back}, "feature": {"tensor": "y", **back}}
    x = images(2)
    with load(image_net, ports=ports) as session:
        found = answers(session, {"image": x.transpose(0, 2, 3, 1)})
        assert "permuted outside" in session.boundary()["detail"]
        with pytest.raises(ValueError, match=r"'image' takes the shape \[any, 10, 14, 3\]"):
            session.bind(packed({"image": x}))
    right = expected(image_net, {"x": x})["y"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found["feature"], right, rtol=1e-4, atol=1e-4)


def test_ports_that_do_not_fit_the_artifact_are_refused(image_net):
    with pytest.raises(ValueError, match="no tensor 'img', where 'x' should be"):
        load(image_net, ports={"x": {"tensor": "img"}})
    with pytest.raises(ValueError, match="'x' has 4 axes"):
        load(image_net, ports={"x": {"tensor": "x", "permutation": [0, 1]}})


@pytest.mark.parametrize(
    ("name", "word"), [("precision", "low"), ("memory", "low"), ("power", "low"), ("winograd", "none")]
)
def test_words_that_mnn_would_ignore_are_refused(image_net, name, word):
    with pytest.raises(ValueError, match=f"{name} is 'hi'"):
        load(image_net, **{name: "hi"})
    with load(image_net, **{name: word}) as session:
        assert f"{name} {word}" in session.boundary()["detail"]


def test_convolutions_are_exact_unless_large_tiles_are_allowed(tmp_path):
    """What MNN chooses by itself is the last; many channels and a kernel of 3 make it fast and inexact."""
    weight = (RNG.standard_normal((64, 64, 3, 3)) / 24).astype(np.float32)
    path = write_mnn(
        tmp_path,
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1])],
        {"x": ("float32", [1, 64, 32, 32])},
        {"y": ("float32", [1, 64, 32, 32])},
        {"w": weight},
    )
    x = RNG.standard_normal((1, 64, 32, 32), np.float32)
    right = expected(path, {"x": x})["y"]
    errors = {}
    for winograd in ("none", "small", "large"):
        with load(path, winograd=winograd) as session:
            errors[winograd] = np.abs(answers(session, {"x": x})["y"] - right).max() / np.abs(right).max()
    assert errors["none"] < 1e-5
    assert errors["small"] < 1e-5
    assert errors["large"] > 2 * errors["small"], "large tiles are as exact by now: they can be the default"


def test_boundary_says_the_threads_that_mnn_took(image_net):
    """It takes 32 at most, and says nothing."""
    with load(image_net, threads=1) as session:
        assert session.boundary()["threads"] == 1
    with load(image_net, threads=10_000) as session:
        assert 1 <= session.boundary()["threads"] < 10_000
    with pytest.raises(ValueError, match="threads is 0"):
        load(image_net, threads=0)


def test_shapes_that_an_operator_cannot_take_are_refused(tmp_path):
    """The batch is free in the file, and a reshape to a constant makes that a lie."""
    path = write_mnn(
        tmp_path,
        [
            helper.make_node("Reshape", ["x", "shape"], ["r"], name="reshape"),
            helper.make_node("MatMul", ["r", "w"], ["y"], name="matmul"),
        ],
        {"x": ("float32", ["batch", 4])},
        {"y": ("float32", [2, 3])},
        {"shape": np.array([2, 2]), "w": RNG.standard_normal((2, 3), np.float32)},
    )
    x = RNG.standard_normal((1, 4), np.float32)
    with load(path) as session:
        with pytest.raises(ValueError, match=r"cannot take inputs of these shapes, x \[3, 4\]"):
            session.bind(packed({"x": np.repeat(x, 3, axis=0)}))
        with pytest.raises(RuntimeError, match="bind them first"):
            session.infer()
        np.testing.assert_allclose(answers(session, {"x": x})["y"], expected(path, {"x": x})["y"], rtol=1e-5)


def test_answers_and_times_before_an_inference_are_refused(image_net):
    with load(image_net) as session:
        with pytest.raises(RuntimeError, match="bind them first"):
            session.profile()
        session.bind(packed({"x": images(1)}))
        with pytest.raises(RuntimeError, match="infer first"):
            session.outputs()


def test_profile_names_every_operator_and_changes_no_answer(image_net):
    x = images(2)
    with load(image_net) as session:
        before = answers(session, {"x": x})["y"].copy()
        times = session.profile(runs=3)
        np.testing.assert_array_equal(fetched(session)["y"], before)
        session.infer()
        np.testing.assert_array_equal(fetched(session)["y"], before)
    assert {kind for _, kind, _ in times} >= {"Convolution", "Raster"}
    assert all(0 < time_s < 1 for *_, time_s in times)


def test_memory_is_what_mnn_says_and_grows_with_the_batch(image_net):
    with load(image_net) as session:
        session.bind(packed({"x": images(1)}))
        one = session.memory_bytes()
        session.bind(packed({"x": images(64)}))
        # 64 images of float32 and nothing shared between input and output.
        assert session.memory_bytes() >= one + 63 * 3 * 10 * 14 * 4


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_truncated_file_is_refused_in_a_sentence(image_net, tmp_path, share):
    whole = image_net.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"not a whole \.mnn file|does not load the artifact"):
        load(tmp_path / "cut")


def test_empty_model_of_a_failed_conversion_is_refused(tmp_path):
    """MNN's converter calls a file without operators a success; MNN itself dies of it when it is run."""
    # A FlatBuffer whose root table has no field at all.
    (tmp_path / "empty").write_bytes(struct.pack("<IHHi", 8, 4, 4, 4))
    with pytest.raises(ValueError, match=r"not a whole \.mnn file|no input"):
        load(tmp_path / "empty")


@pytest.fixture(scope="module")
def file_class(image_net) -> Any:
    load_device_half(str(SESSION))
    return sys.modules["edgedeploy_device_half"].File


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_files_declare_inputs_or_are_refused_in_a_sentence(image_net, file_class, tmp_path_factory, changes):
    data = bytearray(image_net.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.mnn"
    path.write_bytes(data)
    try:
        declared = file_class(str(path)).inputs()
    except ValueError as error:
        assert str(error).startswith(("the artifact", "input"))
    else:
        assert all(dtype in ("float32", "float64", "int32", "uint8", "int64") for dtype, _ in declared.values())


def test_file_declares_what_the_graph_has(mixed_net, file_class):
    assert file_class(str(mixed_net)).inputs() == {
        "x": ("float32", [1, 6]),
        "ids": ("int32", [1, 4]),
        "count": ("int32", [1, 4]),
        "flag": ("int32", [1, 4]),
    }


# ------------------------------------------------------------------------------------------------ what is not started

GUARD = """
import os, socket, subprocess
def refused(*arguments, **_options):
    with open(os.environ["SEEN"], "a") as stream:
        stream.write(repr(arguments) + "\\n")
    raise PermissionError("a test allows no network and no process")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refused
os.system = os.popen = os.posix_spawn = subprocess.Popen.__init__ = refused
"""
USE = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import runner
with runner.load_device_half(sys.argv[2]).Session(sys.argv[3], {}) as session:
    x = np.ones((1, 3, 10, 14), "float32")
    session.bind({"x": (x.tobytes(), "float32", list(x.shape))})
    session.infer()
    session.outputs()
    session.profile(runs=1)
print("MODULES", *sorted(sys.modules))
"""


def test_no_network_no_pip_and_no_uploading_module(image_net, tmp_path):
    """MNN.tools runs pip and uploads what it is given; `import MNN` must stay the runtime alone."""
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    seen = tmp_path / "seen"
    for name in ("pip", "pip3", "curl", "wget"):
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f'#!/bin/sh\necho "{name} $*" >> "$SEEN"\n')
        fake.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SEEN": str(seen), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(RUNNER.parent), str(SESSION), str(image_net)],
        capture_output=True, text=True, timeout=60, env=environment, check=True,
    )  # fmt: skip
    modules = done.stdout.partition("MODULES ")[2].split()
    assert "MNN" in modules
    assert "sitecustomize" in modules
    assert not [name for name in modules if name.startswith(("MNN.tools", "_tools", "aliyun"))]
    assert not seen.exists(), seen.read_text()


def test_guard_of_the_test_above_sees_what_it_is_to_see(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    tries = textwrap.dedent("""
        import os, socket
        for attempt in (lambda: socket.create_connection(("192.0.2.1", 9)), lambda: os.system("pip install x")):
            try:
                attempt()
            except PermissionError:
                pass
    """)
    environment = {**os.environ, "SEEN": str(tmp_path / "seen"), "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", tries], timeout=60, env=environment, check=True)
    assert len((tmp_path / "seen").read_text().splitlines()) == 2
