"""What became of each trained scale: in the table, in the emitted form, in what a runtime executes."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import helper, numpy_helper  # noqa: E402

from edgedeploy import pipeline  # noqa: E402
from edgedeploy.errors import FidelityError  # noqa: E402
from edgedeploy.prepare.count.compression import compression_report  # noqa: E402
from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.emission.emit import emit  # noqa: E402
from edgedeploy.prepare.graph import opset_of, read_graph, specs_of, write_graph  # noqa: E402
from edgedeploy.prepare.source.absorb import absorb  # noqa: E402
from edgedeploy.prepare.source.inherit import inherited_table  # noqa: E402
from edgedeploy.prepare.source.protect import protect, release  # noqa: E402
from edgedeploy.prepare.source.survival import demand_survival, trace  # noqa: E402
from edgedeploy.records.artifact import LayerReport  # noqa: E402
from edgedeploy.records.model import Model  # noqa: E402
from edgedeploy.records.target import QuantizationRules  # noqa: E402
from edgedeploy.storage import sha256_file  # noqa: E402

from .quantized_sources import Cnn, plain_form, pt2e, seeded  # noqa: E402

RULES = {
    "arm": QuantizationRules(activation_dtype="int8", activation_symmetric=False, clamps="absorbed"),
    "x86": QuantizationRules(activation_dtype="uint8", activation_symmetric=False, clamps="absorbed"),
    "tensorrt": QuantizationRules(
        activation_dtype="int8", activation_symmetric=True, bias="float32", residual_add="skip"
    ),
}


@pytest.fixture(scope="module")
def inherited(tmp_path_factory):
    """Return a model that PT2E quantized, simplified, with its samples and its own table."""
    import onnxslim

    folder = tmp_path_factory.mktemp("inherited")
    clean, record = absorb(pt2e(seeded(Cnn), (4, 3, 8, 8)))
    simpler, record = release(onnxslim.slim(protect(clean, record)), record, clean)
    path = folder / "clean.onnx"
    write_graph(simpler, path)
    model = Model(
        path=str(path),
        sha256=sha256_file(path),
        source="pt2e",
        opset=opset_of(simpler),
        inputs=specs_of(simpler.graph.input),
        outputs=specs_of(simpler.graph.output),
        compression=compression_report(path),
        quantization=record,
    )
    return model, random_samples(model.inputs, 16, 0), inherited_table(model, RULES["arm"])


@pytest.fixture(scope="module")
def plain(inherited):
    """Return the plainest form: every activation in a pair, weights as the floats that their codes stand for."""
    model, _, _ = inherited
    return plain_form(read_graph(Path(model.path)), model.quantization)


def fates(report, stage):
    return {entry.tensor: entry.stages[stage] for entry in report.entries}


@pytest.mark.parametrize("target", ["arm", "x86"])
def test_asymmetric_targets_keep_every_trained_scale(inherited, target, tmp_path):
    model, samples, table = inherited
    form = emit(model, table, RULES[target], samples, tmp_path / "q.onnx")
    report = trace(model.quantization, table, tmp_path / "q.onnx")
    assert set(fates(report, "canonical").values()) == {"kept"}
    assert set(fates(report, "emitted").values()) <= {"kept", "folded"}
    assert report.largest_relative_change == 0
    assert len(report.entries) == len(model.quantization.activations) + len(model.quantization.weights)
    demand_survival(report)
    assert form.model.path == str(tmp_path / "q.onnx")


def test_symmetric_target_scales_anew_what_has_another_zero_point(inherited, tmp_path):
    model, samples, table = inherited
    emit(model, table, RULES["tensorrt"], samples, tmp_path / "q.onnx", allow_change=True)
    report = trace(model.quantization, table, tmp_path / "q.onnx")
    entries = {entry.tensor: entry for entry in report.entries}
    changed = [name for name, fate in fates(report, "emitted").items() if fate == "re-scaled"]
    assert changed
    assert all(entries[name].role == "activation" for name in changed)
    assert report.largest_relative_change == max(entries[name].relative_change for name in changed) > 0.01
    assert "folded" in fates(report, "emitted").values()  # the branch that the engine adds within its convolution
    assert all(entry.stages["emitted"] == "kept" for entry in report.entries if entry.role == "weight")


def test_scale_of_the_form_is_compared_to_the_last_bit(inherited, plain):
    model, _, table = inherited
    assert {entry.stages["emitted"] for entry in trace(model.quantization, table, plain).entries} == {"kept", "folded"}
    changed = onnx.ModelProto()
    changed.CopyFrom(plain)
    name = list(model.quantization.activations)[1]
    for item in changed.graph.initializer:
        if item.name == f"{name}/scale":
            old = numpy_helper.to_array(item)
            item.CopyFrom(numpy_helper.from_array(np.nextafter(old, np.float32(np.inf)), item.name))
    report = trace(model.quantization, table, changed)
    assert fates(report, "emitted")[name] == "re-scaled"
    assert 0 < report.largest_relative_change < 1e-6


def test_dropped_scale_is_an_error_that_names_it(inherited, plain):
    model, _, table = inherited
    name = list(model.quantization.activations)[2]
    less = {key: values for key, values in table.activations.items() if key != name}
    report = trace(model.quantization, msgspec.structs.replace(table, activations=less), plain)
    assert fates(report, "canonical")[name] == "dropped"
    with pytest.raises(FidelityError, match=rf"1 of \d+ scales .* '{name}' .activation, canonical."):
        demand_survival(report)
    bare = read_graph(Path(model.path))
    report = trace(model.quantization, table, bare)
    with pytest.raises(FidelityError, match=r"and \d+ more; the layers around them"):
        demand_survival(report)


def test_runtime_that_loses_or_changes_a_scale_is_found_out(inherited, plain):
    model, _, table = inherited
    source = model.quantization
    said = {name: (values.grid.scale,) for name, values in source.activations.items()}
    said |= {name: grid.scales for name, grid in source.weights.items()}

    def artifact(scales):
        layers = LayerReport(operators={}, quantized=(), float_islands=(), scales=scales)
        return trace(source, table, plain, layers)

    demand_survival(artifact(said))
    first, second = list(source.activations)[:2]
    report = artifact({name: scales for name, scales in said.items() if name != first})
    assert fates(report, "artifact")[first] == "dropped"
    report = artifact(said | {second: (said[second][0] * 1.5,)})
    assert fates(report, "artifact")[second] == "re-scaled"
    assert report.largest_relative_change == pytest.approx(0.5)


def test_tensor_that_is_only_moved_may_share_its_neighbours_numbers(inherited, plain):
    model, _, table = inherited
    source = model.quantization
    clean = read_graph(Path(model.path)).graph
    moved = next(
        node.output[0]
        for node in clean.node
        if node.op_type in ("Reshape", "Flatten") and node.output[0] in source.activations
    )
    said = {name: (values.grid.scale,) for name, values in source.activations.items() if name != moved}
    layers = LayerReport(operators={}, quantized=(), float_islands=(), scales=said)
    assert fates(trace(source, table, plain, layers), "artifact")[moved] == "folded"


def test_weights_that_lose_their_integers_are_dropped(inherited, plain):
    model, _, table = inherited
    name = next(iter(table.weights))
    changed = onnx.ModelProto()
    changed.CopyFrom(plain)
    for item in changed.graph.initializer:
        if item.name == name:
            item.CopyFrom(helper.make_tensor(name, onnx.TensorProto.FLOAT16, item.dims, np.ones(item.dims).ravel()))
    assert fates(trace(model.quantization, table, changed), "emitted")[name] == "dropped"


def test_every_trained_scale_reaches_the_tflite_file(tmp_path, monkeypatch):
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path))
    built = pipeline.compile(
        "tests.kinds:fx_qat",
        inputs=["image=batchx3x16x16"],
        target="raspberry-pi-4",
        backend="tflite",
        precision="int8",
    )
    stages = {stage: fate for entry in built.artifact.survival.entries for stage, fate in entry.stages.items()}
    assert stages == {"canonical": "kept", "emitted": "kept", "artifact": "kept"}
    assert built.artifact.survival.largest_relative_change == 0.0
    assert built.artifact.layers.float_islands == ()
    assert [note for note in built.artifact.notes if "became -127" in note]
