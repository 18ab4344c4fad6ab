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
from edgedeploy.prepare.count.compression import compression_report  # noqa: E402
from edgedeploy.prepare.graph import specs_of  # noqa: E402
from edgedeploy.records.model import Model  # noqa: E402
from edgedeploy.records.target import Target  # noqa: E402
from edgedeploy.storage import sha256_file  # noqa: E402

TARGET = Target(format="edgedeploy.target/1", name="any", description="any")


def model_with(nodes, folder, *, opset=18, domains=(), constants=None):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in (constants or {"w": np.eye(4, dtype=np.float32)}).items()
        ],
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


def test_scales_are_found_under_the_names_that_the_file_gave_them(tmp_path):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "zero"], ["x/stored"]),
        helper.make_node("DequantizeLinear", ["x/stored", "xs", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w/integers", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["p"], name="product"),
        helper.make_node("Relu", ["p"], ["r"], name="clamp"),
        helper.make_node("QuantizeLinear", ["r", "rs", "low"], ["r/stored"]),
        helper.make_node("DequantizeLinear", ["r/stored", "rs", "low"], ["rd"]),
        helper.make_node("Sin", ["rd"], ["y"]),
    ]
    constants = {
        # Equal scales: the runtime keeps one of them.
        "xs": np.float32(0.5), "rs": np.float32(0.5), "zero": np.uint8(128), "low": np.uint8(0),
        "w/integers": np.eye(4, dtype=np.int8), "ws": np.arange(1, 5, dtype=np.float32), "wz": np.zeros(4, np.int8),
    }  # fmt: skip
    model = model_with(nodes, tmp_path, constants=constants)
    report = BACKEND.inspect(Path(model.path))
    assert report.operators["QLinearMatMul"] == 1
    assert report.scales == {"r": (0.5,), "w": (1.0, 2.0, 3.0, 4.0), "x": (0.5,)}
    assert (report.float_islands, report.expanded) == ((), ())


def test_weights_that_the_runtime_widens_are_named(tmp_path):
    nodes = [
        helper.make_node("Cast", ["h"], ["first"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "first"], ["p"]),
        helper.make_node("DequantizeLinear", ["q/integers", "s", "z"], ["second"], axis=0),
        helper.make_node("Gemm", ["p", "second"], ["y"], transB=1),
    ]
    constants = {
        "h": np.eye(4, dtype=np.float16), "q/integers": np.eye(4, dtype=np.int8), "s": np.ones(4, np.float32),
        "z": np.zeros(4, np.int8),
    }  # fmt: skip
    model = model_with(nodes, tmp_path, constants=constants)
    report = BACKEND.inspect(Path(model.path))
    assert report.expanded == ("h", "q")
    assert [label.split()[0] for label in report.float_islands] == ["MatMul", "Gemm"]


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
