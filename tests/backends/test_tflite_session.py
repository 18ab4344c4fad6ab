"""What the device half of TFLite does beyond what every device half promises."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedeploy.backends import session_file
from edgedeploy.ondevice.runner import Refusal, load_device_half

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert; pip install 'edgedeploy[tflite]'")
from tests.backends.tflite_files import File, Operator, schema

SESSION = session_file("tflite")
RUNNER = Path(__file__).parents[2] / "edgedeploy" / "ondevice" / "runner.py"
RNG = np.random.default_rng(5)
KERNEL, BIAS = RNG.standard_normal((5, 3, 3, 3), np.float32), RNG.standard_normal(5, np.float32)
# Axis i of an NHWC tensor is axis TO_NHWC[i] of the model's NCHW one.
TO_NHWC = [0, 2, 3, 1]
PORTS = {
    "x": {"tensor": "img", "layout": "NHWC", "permutation": TO_NHWC},
    "y": {"tensor": "feature", "layout": "NHWC", "permutation": TO_NHWC},
}


def convolution() -> Any:
    options = schema.Conv2DOptionsT()
    options.padding, options.strideH, options.strideW = schema.Padding.SAME, 1, 1
    return options


def write_image_net(path: Path) -> Path:
    """Write |conv(x)| on NHWC images that are not square, with a free batch."""
    return File(
        tensors={n: ("float32", (-1, 4, 6, c)) for n, c in (("img", 3), ("made", 5), ("feature", 5))},
        inputs=("img",),
        outputs=("feature",),
        operators=(
            Operator("CONV_2D", ("img", "kernel", "bias"), ("made",), convolution()),
            Operator("ABS", ("made",), ("feature",), schema.AbsOptionsT()),
        ),
        constants={"kernel": KERNEL, "bias": BIAS},
        signature={"picture": "img", "out": "feature"},
    ).write(path)


def expected(images: np.ndarray) -> np.ndarray:
    """Return |conv(x)| of NCHW images in float64."""
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.abs(np.einsum("nchwij,oijc->nohw", windows, KERNEL) + BIAS[:, None, None])


@pytest.fixture(scope="module")
def image_net(tmp_path_factory) -> Path:
    return write_image_net(tmp_path_factory.mktemp("tflite") / "net.tflite")


def load(path: Path, **options: Any) -> Any:
    return load_device_half(str(SESSION)).Session(str(path), options)


def packed(arrays: dict[str, np.ndarray]) -> dict[str, tuple[bytes, str, list[int]]]:
    return {
        name: (np.ascontiguousarray(values).tobytes(), values.dtype.name, list(values.shape))
        for name, values in arrays.items()
    }


def answers(session: Any, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    session.bind(packed(arrays))
    session.infer()
    return {name: np.frombuffer(data, dtype).reshape(shape) for name, (data, dtype, shape) in session.outputs().items()}


def images(count: int) -> np.ndarray:
    return RNG.standard_normal((count, 3, 4, 6), np.float32)


@pytest.mark.parametrize("xnnpack", [True, False])
def test_inputs_and_outputs_are_in_the_models_axes_at_every_batch(image_net, xnnpack):
    with load(image_net, ports=PORTS, xnnpack=xnnpack) as session:
        for count in (1, 3, 2):
            x = images(count)
            found = answers(session, x=x)
            assert found["y"].shape == (count, 5, 4, 6)
            np.testing.assert_allclose(found["y"], expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("xnnpack", [True, False])
def test_inference_leaves_its_inputs_as_they_are(tmp_path, xnnpack):
    """Or a second timed inference would compute on something else: kernels may work in place."""
    path = File(
        tensors=dict.fromkeys(("x", "a", "b", "y"), ("float32", (1, 8))),
        inputs=("x",),
        outputs=("y",),
        operators=(
            Operator("ABS", ("x",), ("a",), schema.AbsOptionsT()),
            Operator("NEG", ("a",), ("b",), schema.NegOptionsT()),
            Operator("ADD", ("b", "b"), ("y",), schema.AddOptionsT()),
        ),
    ).write(tmp_path / "net")
    x = RNG.standard_normal((1, 8), np.float32)
    with load(path, xnnpack=xnnpack) as session:
        first = answers(session, x=x)["y"].copy()
        for _ in range(3):
            session.infer()
        again = np.frombuffer(session.outputs()["y"][0], np.float32).reshape(1, 8)
    np.testing.assert_array_equal(first, -2 * np.abs(x))
    np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("xnnpack", [True, False])
def test_no_state_is_left_from_one_inference_to_the_next(tmp_path, xnnpack):
    """TensorFlow Lite's recurrent operators go on where they ended; a model starts anew with every input."""
    options = schema.SequenceRNNOptionsT()
    options.fusedActivationFunction = schema.ActivationFunctionType.TANH
    read, again = RNG.standard_normal((2, 3), np.float32), RNG.standard_normal((2, 2), np.float32)
    path = File(
        tensors={"x": ("float32", (1, 4, 3)), "state": ("float32", (1, 2)), "y": ("float32", (1, 4, 2))},
        inputs=("x",), outputs=("y",),
        operators=(Operator("UNIDIRECTIONAL_SEQUENCE_RNN", ("x", "read", "again", "bias", "state"), ("y",), options),),
        constants={"read": read, "again": again, "bias": np.zeros(2, np.float32)}, variables=("state",),
    ).write(tmp_path / "net")  # fmt: skip
    with load(path, xnnpack=xnnpack) as session:
        for _ in range(2):
            x = RNG.standard_normal((1, 4, 3), np.float32)
            answers(session, x=x)
            session.infer()
            found = np.frombuffer(session.outputs()["y"][0], np.float32).reshape(4, 2)
            state, right = np.zeros(2), []
            for step in x[0]:
                state = np.tanh(read @ step + again @ state)
                right.append(state)
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)
        assert "state set to zero" in session.boundary()["detail"]


def test_names_come_from_the_signature_where_no_port_is_given(image_net):
    x = images(1)
    with load(image_net) as session:
        found = answers(session, picture=np.transpose(x, TO_NHWC))
    np.testing.assert_allclose(np.transpose(found["out"], (0, 3, 1, 2)), expected(x), rtol=1e-4, atol=1e-4)


def test_port_may_name_the_signature(image_net):
    ports = {"x": {**PORTS["x"], "tensor": "picture"}, "y": {**PORTS["y"], "tensor": "out"}}
    x = images(1)
    with load(image_net, ports=ports) as session:
        np.testing.assert_allclose(answers(session, x=x)["y"], expected(x), rtol=1e-4, atol=1e-4)


def test_one_tensor_may_be_two_outputs(tmp_path):
    path = File(
        tensors={"x": ("float32", (1, 4)), "t": ("float32", (1, 4))}, inputs=("x",), outputs=("t", "t"),
        operators=(Operator("NEG", ("x",), ("t",), schema.NegOptionsT()),),
    ).write(tmp_path / "net")  # fmt: skip
    x = RNG.standard_normal((1, 4), np.float32)
    with load(path, ports={"y": {"tensor": "t"}, "z": {"tensor": "t"}}) as session:
        found = answers(session, x=x)
    assert set(found) == {"y", "z"}
    for values in found.values():
        np.testing.assert_array_equal(values, -x)


def test_port_to_a_tensor_that_is_not_there_is_refused(image_net):
    with pytest.raises(ValueError, match="no tensor 'image', where 'x' should be"):
        load(image_net, ports={"x": {"tensor": "image"}})


def test_permutation_that_is_none_is_refused(image_net):
    with pytest.raises(ValueError, match="'x' has 4 axes"):
        load(image_net, ports={"x": {"tensor": "img", "permutation": [0, 1, 1, 2]}})


def test_shape_is_refused_in_the_models_axes(image_net):
    """NHWC data in an NCHW input is the usual mistake; both have four axes and the same number of values."""
    with load(image_net, ports=PORTS) as session:
        with pytest.raises(ValueError, match=r"'x' takes the shape \[any, 3, 4, 6\], not \[1, 4, 6, 3\]"):
            session.bind(packed({"x": np.zeros((1, 4, 6, 3), np.float32)}))
        with pytest.raises(ValueError, match=r"'x' takes the shape"):
            session.bind(packed({"x": np.zeros((0, 3, 4, 6), np.float32)}))
        with pytest.raises(ValueError, match="holds 70 values"):
            session.bind({"x": (bytes(280), "float32", [1, 3, 4, 6])})


def test_refused_inputs_leave_the_session_as_it_was(image_net):
    x = images(2)
    with load(image_net, ports=PORTS) as session:
        before = answers(session, x=x)["y"].copy()
        with pytest.raises(ValueError, match="float64"):
            session.bind(packed({"x": x.astype(np.float64)}))
        session.infer()
        np.testing.assert_array_equal(answers(session, x=x)["y"], before)


def test_integers_scalars_and_five_axes_pass_through(tmp_path):
    path = File(
        tensors={
            "ids": ("int32", (2, 3)), "rows": ("float32", (2, 3, 1, 2)),
            "wide": ("float32", (1, 2, 3, 1, 2)), "total": ("float32", ()), "same": ("int64", (2, 3)),
        },
        inputs=("ids",), outputs=("wide", "total", "same"),
        operators=(
            Operator("GATHER", ("values", "ids"), ("rows",), schema.GatherOptionsT()),
            Operator("RESHAPE", ("rows", "shape"), ("wide",), schema.ReshapeOptionsT()),
            Operator("SUM", ("rows", "axes"), ("total",), schema.ReducerOptionsT()),
            Operator("CAST", ("ids",), ("same",), schema.CastOptionsT()),
        ),
        constants={
            "values": np.arange(8, dtype=np.float32).reshape(4, 1, 2), "shape": np.array([1, 2, 3, 1, 2], np.int32),
            "axes": np.array([0, 1, 2, 3], np.int32),
        },
    ).write(tmp_path / "net")  # fmt: skip
    ids = np.array([[0, 3, 1], [2, 2, 0]], np.int64)
    with load(path, ports={"i": {"tensor": "ids"}}) as session:
        found = answers(session, i=ids)
        with pytest.raises(ValueError, match="beyond int32"):
            session.bind(packed({"i": ids + 2**40}))
    rows = np.arange(8, dtype=np.float32).reshape(4, 1, 2)[ids]
    np.testing.assert_array_equal(found["wide"], rows[None])
    assert found["total"].shape == ()
    assert found["total"] == rows.sum()
    assert found["same"].dtype == np.int64
    np.testing.assert_array_equal(found["same"], ids)


def test_scalar_inputs_are_taken(tmp_path):
    path = File(
        tensors={"x": ("float32", (1, 4)), "k": ("float32", ()), "y": ("float32", (1, 4))},
        inputs=("x", "k"), outputs=("y",),
        operators=(Operator("MUL", ("x", "k"), ("y",), schema.MulOptionsT()),),
    ).write(tmp_path / "net")  # fmt: skip
    x = RNG.standard_normal((1, 4), np.float32)
    with load(path) as session:
        session.bind(packed({"x": x}) | {"k": (np.float32(3).tobytes(), "float32", [])})
        session.infer()
        found = np.frombuffer(session.outputs()["y"][0], np.float32)
    np.testing.assert_allclose(found, 3 * x[0], rtol=1e-6)


def test_narrowed_output_gets_the_models_type_back(tmp_path):
    path = File(
        tensors={"x": ("float32", (1, 4)), "best": ("int32", (1,))}, inputs=("x",), outputs=("best",),
        operators=(Operator("ARG_MAX", ("x", "axis"), ("best",), argmax()),),
        constants={"axis": np.array(1, np.int32)},
    ).write(tmp_path / "net")  # fmt: skip
    with load(path, ports={"i": {"tensor": "best", "dtype": "int64"}}) as session:
        found = answers(session, x=np.array([[0, 1, 5, 2]], np.float32))
    assert found["i"].dtype == np.int64
    assert found["i"].tolist() == [2]


def argmax() -> Any:
    options = schema.ArgMaxOptionsT()
    options.outputType = schema.TensorType.INT32
    return options


def test_shapes_that_the_graph_cannot_take_are_refused_and_the_next_bind_works(tmp_path):
    """A reshape to a constant makes a free batch a lie, which only the kernels know."""
    path = File(
        tensors={"x": ("float32", (-1, 4)), "y": ("float32", (2, 2))}, inputs=("x",), outputs=("y",),
        operators=(Operator("RESHAPE", ("x", "shape"), ("y",), schema.ReshapeOptionsT()),),
        constants={"shape": np.array([2, 2], np.int32)},
    ).write(tmp_path / "net")  # fmt: skip
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with load(path) as session:
        with pytest.raises(ValueError, match=r"cannot take inputs of these shapes, x \[3, 4\]"):
            session.bind(packed({"x": x}))
        with pytest.raises(RuntimeError, match="bind them first"):
            session.infer()
        np.testing.assert_array_equal(answers(session, x=x[:1])["y"], x[0].reshape(2, 2))


def test_answers_before_an_inference_are_refused(image_net):
    with load(image_net, ports=PORTS) as session:
        session.bind(packed({"x": images(1)}))
        with pytest.raises(RuntimeError, match="infer first"):
            session.outputs()


def test_boundary_says_threads_delegate_and_permutation(image_net):
    with load(image_net, ports=PORTS, threads=2, xnnpack=False) as session:
        boundary = session.boundary()
    assert boundary["threads"] == 2
    assert (boundary["includes_input_copy"], boundary["includes_output_copy"]) == (False, False)
    assert "no delegate" in boundary["detail"]
    assert "permuted outside" in boundary["detail"]
    with load(image_net) as session:
        assert "XNNPACK" in session.boundary()["detail"]
        assert "permuted" not in session.boundary()["detail"]
    with pytest.raises(ValueError, match="threads is 0"):
        load(image_net, threads=0)


def test_delegated_operators_are_counted(tmp_path):
    """XNNPACK has no kernel for CUMSUM: two delegates with one operator between them."""
    path = File(
        tensors=dict.fromkeys(("x", "a", "b", "c", "y"), ("float32", (1, 8))),
        inputs=("x",), outputs=("y",),
        operators=(
            Operator("ABS", ("x",), ("a",), schema.AbsOptionsT()),
            Operator("NEG", ("a",), ("b",), schema.NegOptionsT()),
            Operator("CUMSUM", ("b", "axis"), ("c",), schema.CumsumOptionsT()),
            Operator("ADD", ("c", "x"), ("y",), schema.AddOptionsT()),
        ),
        constants={"axis": np.array(1, np.int32)},
    ).write(tmp_path / "net")  # fmt: skip
    with load(path) as session:
        assert session.delegated() == (3, 4, {"CUMSUM": 1})
        x = RNG.standard_normal((1, 8), np.float32)
        np.testing.assert_allclose(answers(session, x=x)["y"], np.cumsum(-np.abs(x), axis=1) + x, rtol=1e-5, atol=1e-6)
    with load(path, xnnpack=False) as session:
        assert session.delegated() == (0, 4, {"ABS": 1, "ADD": 1, "CUMSUM": 1, "NEG": 1})


def test_times_of_operators_are_refused_and_not_invented(image_net):
    with load(image_net) as session, pytest.raises(NotImplementedError, match="benchmark_model"):
        session.profile()


def test_custom_operator_is_refused_by_name(tmp_path):
    path = File(
        tensors={"x": ("float32", (1, 4)), "y": ("float32", (1, 4))}, inputs=("x",), outputs=("y",),
        operators=(Operator("CUSTOM:ONNX_DET", ("x",), ("y",)),),
    ).write(tmp_path / "net")  # fmt: skip
    with pytest.raises(ValueError, match="ONNX_DET"):
        load(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_file_is_refused_in_a_sentence(image_net, tmp_path, share):
    whole = image_net.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"not a whole \.tflite file"):
        load(tmp_path / "cut")


def test_missing_file_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"not a whole \.tflite file"):
        load(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------- tflite-runtime


@pytest.fixture
def only_tflite_runtime(tmp_path, monkeypatch):
    """This interpreter as if it had tflite_runtime and not ai_edge_litert; what is imported of it is ai_edge_litert's."""
    package = tmp_path / "tflite_runtime"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "interpreter.py").write_text("from ai_edge_litert.interpreter import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "ai_edge_litert" else find(name, *rest)
    )
    yield
    for name in [name for name in sys.modules if name.startswith("tflite_runtime")]:
        del sys.modules[name]


@pytest.mark.usefixtures("only_tflite_runtime")
def test_tflite_runtime_is_never_imported_under_numpy_2():
    assert np.lib.NumpyVersion(np.__version__) >= "2.0.0"
    with pytest.raises(Refusal, match=r"built for numpy 1, and this interpreter has numpy 2.*numpy<2.*ai-edge-litert"):
        load_device_half(str(SESSION))
    assert not [name for name in sys.modules if name.startswith("tflite_runtime")]


@pytest.mark.usefixtures("only_tflite_runtime")
def test_tflite_runtime_refuses_half_float_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "__version__", "1.26.4")
    path = File(
        tensors={"x": ("float16", (1, 4)), "y": ("float32", (1, 4))}, inputs=("x",), outputs=("y",),
        operators=(Operator("CAST", ("x",), ("y",), schema.CastOptionsT()),),
    ).write(tmp_path / "net")  # fmt: skip
    session_class = load_device_half(str(SESSION)).Session
    assert session_class.runtime.startswith("tflite tflite-runtime-")
    with pytest.raises(ValueError, match="'x' is float16"):
        session_class(str(path), {})


def write_hybrid(path: Path, channels: int) -> Path:
    """Write a float matrix product with int8 weights that have one scale, or one for each channel."""
    codes = np.arange(-24, 24, dtype=np.int8).reshape(6, 8)
    return File(
        tensors={"x": ("float32", (4, 8)), "y": ("float32", (4, 6))}, inputs=("x",), outputs=("y",),
        operators=(Operator("FULLY_CONNECTED", ("x", "w"), ("y",), schema.FullyConnectedOptionsT()),),
        constants={"w": codes}, scales={"w": (np.geomspace(0.01, 1.0, channels), 0)},
    ).write(path)  # fmt: skip


@pytest.mark.usefixtures("only_tflite_runtime")
def test_tflite_runtime_refuses_what_it_computes_wrongly(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "__version__", "1.26.4")
    session_class = load_device_half(str(SESSION)).Session
    with pytest.raises(ValueError, match="'w' multiplies float activations"):
        session_class(str(write_hybrid(tmp_path / "each", 6)), {})
    with session_class(str(write_hybrid(tmp_path / "one", 1)), {}) as session:
        assert session.delegated()[1] == 1


def test_litert_computes_what_tflite_runtime_does_not(tmp_path):
    path = write_hybrid(tmp_path / "net", 6)
    x = RNG.standard_normal((4, 8), np.float32)
    weights = np.arange(-24, 24).reshape(6, 8) * np.geomspace(0.01, 1.0, 6)[:, None]
    with load(path) as session:
        found = answers(session, x=x)["y"]
    # It rounds activations to 8 bits.
    np.testing.assert_allclose(found, x @ weights.T, atol=0.02 * np.abs(x @ weights.T).max())


def test_device_without_a_runtime_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(Refusal, match="no module 'ai_edge_litert'; install it") as refused:
        load_device_half(str(SESSION))
    assert refused.value.kind == "missing-runtime"


# The last argument is an artifact that tflite-runtime must refuse.
REAL = """
import json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from runner import load_device_half
answers = {}
Session = load_device_half(sys.argv[2]).Session
with Session(sys.argv[3], json.loads(sys.argv[4])) as session:
    for count in (1, 3):
        x = np.random.default_rng(count).standard_normal((count, 3, 4, 6)).astype("float32")
        session.bind({"x": (x.tobytes(), "float32", list(x.shape))})
        session.infer()
        data, dtype, shape = session.outputs()["y"]
        answers[count] = np.frombuffer(data, dtype).tolist()
try:
    Session(sys.argv[5], {})
except ValueError as error:
    print(json.dumps([Session.runtime, answers, str(error)]))
"""


def test_real_tflite_runtime_gives_the_same_answers(image_net, tmp_path):
    python = os.environ.get("EDGEDEPLOY_TEST_TFLITE_RUNTIME")
    if not python:
        pytest.skip("opt in: EDGEDEPLOY_TEST_TFLITE_RUNTIME=<python that has tflite-runtime 2.14 and numpy<2>")
    hybrid = write_hybrid(tmp_path / "net", 6)
    done = subprocess.run(
        [python, "-c", REAL, str(RUNNER.parent), str(SESSION), str(image_net), json.dumps({"ports": PORTS}), str(hybrid)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    runtime, found, refusal = json.loads(done.stdout)
    assert "computes wrongly" in refusal
    assert runtime.startswith("tflite tflite-runtime-2")
    for count, values in found.items():
        x = np.random.default_rng(int(count)).standard_normal((int(count), 3, 4, 6)).astype("float32")
        np.testing.assert_allclose(np.reshape(values, (-1, 5, 4, 6)), expected(x), rtol=1e-4, atol=1e-4)
