"""Weights that are cut, joined and turned after they are dequantized keep one constant with one grid."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="graphs need onnx: pip install 'edgedeploy[onnxruntime]'")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgedeploy.prepare.markers import DOMAIN  # noqa: E402
from edgedeploy.prepare.source.moved_weights import settle_moves  # noqa: E402

HIDDEN, WIDTH = 3, 5


def graph(nodes, constants):
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return helper.make_model(
        helper.make_graph(nodes, "moved", [], made, values),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)],
    )


def marker(name, axis, result):
    parts = [f"{name}.codes", f"{name}.scale", f"{name}.zero"]
    return helper.make_node("DequantizeWeight", parts, [result], domain=DOMAIN, axis=axis, block=0, bits=8)


def stored(name, rng, *, per_channel):
    count = 4 * HIDDEN if per_channel else 1
    return {
        f"{name}.codes": rng.integers(-127, 128, (4 * HIDDEN, WIDTH)).astype(np.int8),
        f"{name}.scale": rng.uniform(0.01, 0.1, count).astype(np.float32),
        f"{name}.zero": np.zeros(count, np.int32),
    }


def gates():
    """Return the nodes by which an exporter puts the gates of an LSTM into ONNX's order, and their constants."""
    constants = {"axes": np.array([0]), **{f"at_{gate}": np.array([gate * HIDDEN]) for gate in range(5)}}
    nodes = [
        helper.make_node("Slice", ["w", f"at_{gate}", f"at_{gate + 1}", "axes"], [f"gate_{gate}"]) for gate in range(4)
    ]
    nodes.append(helper.make_node("Concat", [f"gate_{gate}" for gate in (0, 3, 1, 2)], ["ordered"], axis=0))
    return [*nodes, helper.make_node("Unsqueeze", ["ordered", "axes"], ["y"])], constants


@pytest.mark.parametrize("per_channel", [True, False])
def test_gates_in_another_order_become_one_constant(per_channel):
    parts = stored("w", np.random.default_rng(0), per_channel=per_channel)
    nodes, constants = gates()
    settled = settle_moves(graph([marker("w", 0 if per_channel else -1, "w"), *nodes], parts | constants))
    (only,) = settled.graph.node
    assert only.op_type == "DequantizeWeight"
    values = {item.name: numpy_helper.to_array(item) for item in settled.graph.initializer}
    codes, scale, _ = (values[name] for name in only.input)
    axis = next(item.i for item in only.attribute if item.name == "axis")
    assert axis == (1 if per_channel else -1)
    order = np.concatenate([np.arange(gate * HIDDEN, (gate + 1) * HIDDEN) for gate in (0, 3, 1, 2)])
    expected = (parts["w.codes"] * parts["w.scale"].reshape(-1, 1))[order][None]
    np.testing.assert_array_equal(codes * (scale.reshape(1, -1, 1) if per_channel else scale), expected)


def test_scales_that_would_lie_along_no_axis_stay_where_they_are():
    parts = stored("w", np.random.default_rng(1), per_channel=True)
    nodes = [helper.make_node("Reshape", ["w", "flat"], ["y"])]
    settled = settle_moves(graph([marker("w", 0, "w"), *nodes], parts | {"flat": np.array([2, -1])}))
    assert [node.op_type for node in settled.graph.node] == ["DequantizeWeight", "Reshape"]


def test_weights_of_other_widths_are_not_joined():
    rng = np.random.default_rng(2)
    parts = stored("a", rng, per_channel=True) | stored("b", rng, per_channel=True)
    narrow = marker("b", 0, "right")
    next(item for item in narrow.attribute if item.name == "bits").i = 4
    nodes = [marker("a", 0, "left"), narrow, helper.make_node("Concat", ["left", "right"], ["y"], axis=0)]
    settled = settle_moves(graph(nodes, parts))
    assert [node.op_type for node in settled.graph.node] == ["DequantizeWeight", "DequantizeWeight", "Concat"]


@pytest.mark.parametrize("block", [0, 4])
def test_rows_of_an_embedding_that_are_always_the_same_are_picked_from_its_codes(block):
    rng = np.random.default_rng(0)
    rows = np.array([2, 0, 5])
    width = (8 // block,) if block else ()
    parts = {
        "w.codes": rng.integers(-8, 8, (6, 8)).astype(np.int8),
        "w.scale": rng.uniform(0.01, 0.1, (6, *width)).astype(np.float32),
        "w.zero": np.zeros((6, *width), np.int32),
    }
    weights = helper.make_node(
        "DequantizeWeight", list(parts), ["w"], domain=DOMAIN, axis=0, block=block, bits=4 if block else 8
    )
    pick = helper.make_node("Gather", ["w", "rows"], ["y"])
    settled = settle_moves(graph([weights, pick], parts | {"rows": rows}))
    (only,) = settled.graph.node
    values = {item.name: numpy_helper.to_array(item) for item in settled.graph.initializer}
    codes, scale, _ = (values[name] for name in only.input)
    assert np.array_equal(codes, parts["w.codes"][rows])
    assert np.array_equal(scale, parts["w.scale"][rows])
    assert {item.name: item.i for item in only.attribute} == {"axis": 0, "block": block, "bits": 4 if block else 8}
