"""Opt-in: the spine on a real device of the person's own lab.toml, named by EDGEDEPLOY_TEST_DEVICE."""

import os
from pathlib import Path

import pytest

from edgedeploy import pipeline

DEVICE = os.environ.get("EDGEDEPLOY_TEST_DEVICE", "")
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not DEVICE, reason="opt in with EDGEDEPLOY_TEST_DEVICE=<name of a device in lab.toml>"),
]
onnx = pytest.importorskip("onnx", reason="compiling needs onnx: pip install 'edgedeploy[onnxruntime]'")


def test_onnxruntime_artifact_is_measured_on_the_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 8]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "tiny", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), "tiny.onnx")
    built = pipeline.compile("tiny.onnx", target="arm64-linux", output=Path("out"))
    run, _ = pipeline.bench(built.folder, device=DEVICE, visits=2)
    assert all(len(visit.bursts) * len(visit.bursts[0].samples_s) >= 59 for visit in run.visits)
    assert run.facts.cores > 0
