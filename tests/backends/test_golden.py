"""Golden answers: every artifact carries them, and none that answers otherwise is built or measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from edgedeploy import build, golden, pipeline
from edgedeploy.backends.onnxruntime import OnnxRuntimeBackend
from edgedeploy.documents import write_json
from edgedeploy.errors import CompileError, DocumentError, FidelityError
from edgedeploy.storage import sha256_file


def write_model(path: Path, scalar: bool = False) -> Path:
    helper = onnx.helper
    weight = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], name="product")]
    outputs = [helper.make_tensor_value_info("y", 1, ["batch", 5])]
    if scalar:
        nodes.append(helper.make_node("ReduceMean", ["y"], ["mean"], name="mean", keepdims=0))
        outputs.append(helper.make_tensor_value_info("mean", 1, []))
    inputs = [helper.make_tensor_value_info("x", 1, ["batch" if not scalar else 1, 6])]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    return write_model(tmp_path / "tiny.onnx")


def test_artifact_carries_what_its_model_answers_and_how_it_answered_here(model, tmp_path):
    built = pipeline.compile(str(model), precision="fp32", output=tmp_path / "out")
    inputs, outputs = (load_file(tmp_path / "out" / name) for name in (golden.INPUTS, golden.OUTPUTS))
    weight = numpy_helper.to_array(onnx.load(model).graph.initializer[0])
    np.testing.assert_allclose(outputs["y"], inputs["x"] @ weight, rtol=1e-5)
    answered = built.artifact.fidelity[-1]
    assert (answered.reference, answered.candidate) == ("golden answers", "onnxruntime on this machine")
    assert answered.outputs[0].max_relative <= 1e-6


def test_int8_is_judged_by_its_noise(model, tmp_path):
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=np.random.default_rng(1).standard_normal((64, 6)).astype(np.float32))
    built = pipeline.compile(str(model), precision="int8", calibration=samples, output=tmp_path / "out")
    assert built.artifact.golden.max_relative is None
    assert built.artifact.golden.max_noise >= 0.1
    assert built.artifact.fidelity[-1].reference == "golden answers"


def test_scalar_answers_of_a_fixed_batch_of_one_are_compared_too(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    built = pipeline.compile(str(write_model(tmp_path / "tiny.onnx", scalar=True)), precision="fp32")
    assert {output.output for output in built.artifact.fidelity[-1].outputs} == {"y", "mean"}


class _Wrong(OnnxRuntimeBackend):
    """Loses the sign of one weight, as no converter says that it does."""

    def compile(self, model, target, options, out):
        graph = onnx.load(model.path)
        weight = numpy_helper.to_array(graph.graph.initializer[0]).copy()
        weight[0, 0] *= -1
        graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, graph.graph.initializer[0].name))
        onnx.save(graph, out)


class _Torso(OnnxRuntimeBackend):
    """Writes what cannot be loaded."""

    def compile(self, model, target, options, out):
        out.write_bytes(Path(model.path).read_bytes()[:-40])

    def inspect(self, artifact):
        from edgedeploy.records.artifact import LayerReport

        return LayerReport(operators={}, quantized=(), float_islands=())


@pytest.mark.parametrize(
    ("kind", "sentence"), [(_Wrong, "is not what the model answers"), (_Torso, "what it compiled to does not run")]
)
def test_what_answers_otherwise_than_its_model_is_not_built(model, tmp_path, monkeypatch, kind, sentence):
    monkeypatch.setattr(build, "backend", lambda _name: kind())
    monkeypatch.setattr(
        golden, "session_file", lambda _name: Path(golden.__file__).parent / "backends/onnxruntime/session.py"
    )
    with pytest.raises(CompileError, match=sentence):
        pipeline.compile(str(model), precision="fp32", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache" / "artifacts").iterdir())


def forged(built, folder: Path, change) -> Path:
    """Copy an artifact with other golden answers, consistently described."""
    shutil.copytree(built.folder, folder)
    answers = load_file(folder / golden.OUTPUTS)
    save_file({name: change(values) for name, values in answers.items()}, folder / golden.OUTPUTS)
    promised = msgspec.structs.replace(built.artifact.golden, outputs_sha256=sha256_file(folder / golden.OUTPUTS))
    write_json(folder / build.MANIFEST, msgspec.structs.replace(built.artifact, golden=promised))
    return folder


def test_what_answers_otherwise_on_the_device_is_not_measured(model, tmp_path):
    built = pipeline.compile(str(model), precision="fp32")
    folder = forged(built, tmp_path / "forged", lambda values: values * np.float32(1.001))
    with pytest.raises(FidelityError, match=r"tiny-.* on local is not what the model answers"):
        pipeline.bench(folder, results=tmp_path / "results")
    assert not list((tmp_path / "results").rglob("*.json"))


def test_run_says_how_the_device_answered(model, tmp_path):
    built = pipeline.compile(str(model), precision="fp32", output=tmp_path / "out")
    run, _ = pipeline.bench(built.folder, results=tmp_path / "results")
    assert run.golden.candidate == f"{built.artifact.name} on local"


@pytest.mark.parametrize("name", [golden.INPUTS, golden.OUTPUTS])
def test_golden_files_are_those_that_the_manifest_describes(model, tmp_path, name):
    folder = pipeline.compile(str(model), precision="fp32", output=tmp_path / "out").folder
    with (folder / name).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(DocumentError, match=f"{name} is not the file that"):
        build.load_artifact(folder)
    (folder / name).unlink()
    with pytest.raises(DocumentError, match=f"describes {name}, which is not beside it"):
        build.load_artifact(folder)


def test_int8_for_another_processor_is_compared_there(model, tmp_path):
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=np.random.default_rng(1).standard_normal((64, 6)).astype(np.float32))
    built = pipeline.compile(str(model), target="raspberry-pi-4", precision="int8", calibration=samples)
    assert built.artifact.golden is not None
    assert [note for note in built.artifact.notes if "compared on the device" in note]
