"""A mean whose last window hangs over the border: onnxruntime's integer kernel counts what its float one does not."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="models are run by ONNX Runtime: pip install 'edgedeploy[onnxruntime]'")

import onnx
from onnx import helper, numpy_helper

from edgedeploy import pipeline
from edgedeploy.prepare.graph import Runner, attributes, read_graph

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((16, 3, 12, 10)).astype(np.float32)


def pooled(path):
    """Write conv → relu → AveragePool(ceil_mode, count_include_pad) → conv."""
    weights = {
        "first": RNG.standard_normal((8, 3, 3, 3)).astype(np.float32) / 4,
        "second": RNG.standard_normal((5, 8, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node(
            "AveragePool", ["b"], ["c"], name="pool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1,
        ),
        helper.make_node("Conv", ["c", "second"], ["scores"], name="head"),
    ]  # fmt: skip
    shapes = [["batch", 3, 12, 10], ["batch", 5, "rows", "columns"]]
    ends = [
        helper.make_tensor_value_info(name, 1, shape) for name, shape in zip(("image", "scores"), shapes, strict=True)
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "pooled", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def test_mean_that_hangs_over_the_border_is_right_on_integers(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    source = pooled(tmp_path / "pooled.onnx")
    np.savez(tmp_path / "images.npz", image=IMAGES)
    built = pipeline.compile(str(source), target="x86-64", precision="int8", calibration=tmp_path / "images.npz")
    assert any("AveragePool" in label for label in built.artifact.layers.quantized)
    expected, actual = (Runner(path)({"image": IMAGES})["scores"] for path in (source, built.file))
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)
    (pool,) = [node for node in read_graph(built.file).graph.node if node.op_type == "AveragePool"]
    assert "count_include_pad" not in attributes(pool)


def test_padding_that_is_there_still_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    graph = onnx.load(pooled(tmp_path / "pooled.onnx"))
    graph.graph.node[2].attribute.append(helper.make_attribute("pads", [1, 1, 1, 1]))
    onnx.save(graph, tmp_path / "padded.onnx")
    built = pipeline.compile(str(tmp_path / "padded.onnx"), target="x86-64", precision="fp32")
    expected, actual = (Runner(path)({"image": IMAGES})["scores"] for path in (tmp_path / "padded.onnx", built.file))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
