"""ONNX Runtime's host half: what it writes, refuses and reports. Its int8 fusion is tested in test_prepare_quantize."""

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgedeploy.backends import parse_options  # noqa: E402
from edgedeploy.backends.onnxruntime import BACKEND, Options  # noqa: E402
from edgedeploy.errors import CompileError, UsageError  # noqa: E402
from edgedeploy.prepare.compression import compression_report  # noqa: E402
from edgedeploy.prepare.graph import specs_of  # noqa: E402
from edgedeploy.records.model import Model  # noqa: E402
from edgedeploy.records.target import Target  # noqa: E402
from edgedeploy.storage import sha256_file  # noqa: E402

TARGET = Target(format="edgedeploy.target/1", name="any", description="any")


def model_with(nodes, folder, *, opset=18, domains=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    program = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path = folder / "source.onnx"
    path.write_bytes(program.SerializeToString())
    return Model(
        path=str(path),
        sha256=sha256_file(path),
        source="made",
        opset=opset,
        inputs=specs_of(graph.input),
        outputs=specs_of(graph.output),
        compression=compression_report(path),
    )


def test_artifact_runs_and_its_bytes_repeat(tmp_path):
    model = model_with([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], tmp_path)
    for name in ("a.onnx", "b.onnx"):
        BACKEND.compile(model, TARGET, Options(), tmp_path / name)
    assert sha256_file(tmp_path / "a.onnx") == sha256_file(tmp_path / "b.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    vector = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(session.run(None, {"x": vector})[0], vector)


def test_report_of_a_float_model_has_no_islands(tmp_path):
    model = model_with([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], tmp_path)
    report = BACKEND.inspect(Path(model.path))
    assert report.operators == {"MatMul": 1}
    assert (report.quantized, report.float_islands) == ((), ())


def test_operator_without_a_kernel_is_named_with_its_node(tmp_path):
    # ONNX allows bfloat16 here and the CPU has no kernel for it.
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.BFLOAT16),
        helper.make_node("Erf", ["i"], ["e"], name="the_culprit"),
        helper.make_node("Cast", ["e"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_with(nodes, tmp_path)
    with pytest.raises(CompileError, match="onnxruntime could not compile the model at node 'the_culprit'") as caught:
        BACKEND.compile(model, TARGET, Options(), tmp_path / "a.onnx")
    assert caught.value.op == "Erf"
    assert not (tmp_path / "a.onnx").exists()


def test_foreign_domain_is_named_with_its_node(tmp_path):
    node = helper.make_node("Spin", ["x"], ["y"], name="spinner", domain="com.example")
    model = model_with([node], tmp_path, domains=["com.example"])
    with pytest.raises(CompileError, match=r"at node 'spinner' \(Spin\).*'com.example'"):
        BACKEND.compile(model, TARGET, Options(), tmp_path / "a.onnx")


def test_options_are_checked(tmp_path):
    model = model_with([helper.make_node("MatMul", ["x", "w"], ["y"])], tmp_path)
    assert parse_options(BACKEND.options, {"threads": "2"}) == Options(threads=2)
    with pytest.raises(UsageError, match='did you mean "threads"'):
        parse_options(BACKEND.options, {"treads": 2})
    with pytest.raises(CompileError, match=r"threads is 0.*give 1 or more"):
        BACKEND.compile(model, TARGET, Options(threads=0), tmp_path / "a.onnx")


def test_nothing_is_missing_here():
    assert BACKEND.missing() is None
