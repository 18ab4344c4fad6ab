"""Values too large for float16, seen on samples: largest magnitudes, whatever the batches."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgedeploy.errors import ModelError  # noqa: E402
from edgedeploy.prepare.count.compression import compression_report  # noqa: E402
from edgedeploy.prepare.dataset import Samples  # noqa: E402
from edgedeploy.prepare.graph import specs_of  # noqa: E402
from edgedeploy.prepare.half_range import HEADROOM, LARGEST_HALF, beyond_half  # noqa: E402
from edgedeploy.records.model import Model  # noqa: E402


def model_of(folder, nodes, constants, *, shape=("batch", 4), outputs=("y",)):
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    path = Path(folder) / "made.onnx"
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(made), path)
    inputs, results = specs_of(made.graph.input), specs_of(onnx.load(path).graph.output)
    return Model(
        path=str(path),
        sha256="",
        source="made",
        opset=18,
        inputs=inputs,
        outputs=results,
        compression=compression_report(path),
    )


def samples_of(values):
    return Samples("made", "", len(values), None, {"x": np.asarray(values, np.float32)}, {})


def product(name, factor, source, result):
    return helper.make_node("Mul", [source, factor], [result], name=name)


def test_tensors_beyond_the_limit_are_named_with_their_largest_magnitude(tmp_path):
    nodes = [product("grow", "large", "x", "grown"), product("shrink", "small", "grown", "y")]
    model = model_of(tmp_path, nodes, {"large": np.float32(1e4), "small": np.float32(1e-4)})
    rows = np.ones((9, 4), np.float32)
    rows[7, 2] = -12.5  # one value of one sample, in the last batch
    assert beyond_half(model, samples_of(rows)) == {"grown": 125_000.0}


def test_limit_leaves_room_for_inputs_that_no_sample_shows(tmp_path):
    model = model_of(tmp_path, [product("grow", "factor", "x", "y")], {"factor": np.float32(LARGEST_HALF / HEADROOM)})
    assert beyond_half(model, samples_of(np.full((2, 4), 0.99))) == {}
    assert beyond_half(model, samples_of(np.full((2, 4), 1.01))).keys() == {"y"}
    assert beyond_half(model, samples_of(np.full((2, 4), 1.01)), LARGEST_HALF) == {}


def test_inputs_count_and_integers_do_not(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["count"], name="cast", to=TensorProto.INT64),
        helper.make_node("Mul", ["count", "million"], ["counts"], name="multiply"),
        helper.make_node("Cast", ["counts"], ["y"], name="back", to=TensorProto.FLOAT),
    ]
    model = model_of(tmp_path, nodes, {"million": np.int64(1_000_000)})
    assert beyond_half(model, samples_of(np.full((2, 4), 3e4))) == {"x": 3e4, "y": float(np.float32(3e10))}


def test_fixed_batch_and_scalars_are_read_too(tmp_path):
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], name="sum", keepdims=0)]
    model = model_of(tmp_path, nodes, {}, shape=(2, 4))
    assert beyond_half(model, samples_of(np.full((6, 4), 2e3))) == {"y": 16e3}


def test_infinity_of_a_mask_is_no_overflow(tmp_path):
    nodes = [
        product("grow", "large", "x", "grown"),
        helper.make_node("Greater", ["grown", "zero"], ["seen"], name="compare"),
        helper.make_node("Where", ["seen", "grown", "hidden"], ["y"], name="mask"),
    ]
    constants = {"large": np.float32(1e4), "zero": np.float32(0), "hidden": np.float32(-np.inf)}
    model = model_of(tmp_path, nodes, constants)
    assert beyond_half(model, samples_of([[1, -2, 3, 4]] * 3)) == {"grown": 4e4, "y": 4e4}


@pytest.mark.parametrize(
    ("operator", "values", "what"),
    [("Sqrt", [[1.0, 2.0, -1.0, 3.0]], "'y' becomes NaN"), ("Exp", [[1.0, 2.0, 3.0, 200.0]], "'y' becomes infinite")],
)
def test_nan_and_infinity_are_refused_by_name(tmp_path, operator, values, what):
    model = model_of(tmp_path, [helper.make_node(operator, ["x"], ["y"], name="n")], {})
    with pytest.raises(ModelError, match=rf"tensor {what} on samples 2 to 2 of made; repair"):
        beyond_half(model, samples_of([[1.0] * 4] * 2 + values))


def test_empty_tensors_have_no_magnitude(tmp_path):
    nodes = [
        helper.make_node("Slice", ["x", "end", "end", "axis"], ["nothing"], name="slice"),
        helper.make_node("Concat", ["nothing", "x"], ["y"], name="concat", axis=1),
    ]
    model = model_of(tmp_path, nodes, {"end": np.array([4]), "axis": np.array([1])})
    assert beyond_half(model, samples_of(np.full((2, 4), 9e3))) == {"x": 9e3, "y": 9e3}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    nodes = [product("a", "large", "x", "grown"), helper.make_node("Relu", ["grown"], ["y"], name="b")]
    return model_of(tmp_path_factory.mktemp("chain"), nodes, {"large": np.float32(100)})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), min_size=1, max_size=5))
def test_magnitudes_are_those_of_all_samples_at_once(chain, rows):
    values = np.asarray(rows, np.float32)
    grown = values * np.float32(100)
    wanted = {"x": values, "grown": grown, "y": np.maximum(grown, 0)}
    largest = {name: float(np.abs(array).max()) for name, array in wanted.items()}
    limit = LARGEST_HALF / HEADROOM
    assert beyond_half(chain, samples_of(rows)) == {name: value for name, value in largest.items() if value > limit}
