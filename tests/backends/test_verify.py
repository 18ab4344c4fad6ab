"""verify: a model's source, its ONNX and its artifact side by side, from real PyTorch models through the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import numpy_helper  # noqa: E402

from edgedeploy import cli, pipeline  # noqa: E402
from edgedeploy.backends import load_backends  # noqa: E402
from edgedeploy.build import BuildRequest, canonical_model  # noqa: E402
from edgedeploy.errors import FidelityError, ModelError, UsageError  # noqa: E402
from edgedeploy.judge.metrics import metric_from_text  # noqa: E402
from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.graph import read_graph  # noqa: E402
from edgedeploy.prepare.layerwise import CEILING_DB, compare_layers  # noqa: E402
from edgedeploy.records.model import TensorSpec  # noqa: E402
from edgedeploy.verify import VerifyRequest, limit_from_text, verify  # noqa: E402

HERE = Path(__file__).parent
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))
VECTOR = TensorSpec(name="vector", dtype="float32", shape=("batch", 12))
COUNT = 40

FACTORIES = '''
import torch
from quantized_nets import eager_qat, seeded
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules_qat


class Plain(nn.Module):
    """A convolution and a head of 10,240 weights, in whose fake-quantized form nothing but the grids is rounded."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(512, 20)

    def forward(self, image):
        return self.dequant(self.head(self.stem(self.quant(image)).flatten(1)))


def trained_with_fake_quantization():
    fused = fuse_modules_qat(seeded(Plain).train(), [["stem.0", "stem.1", "stem.2"]], inplace=True)
    prepared, converted = eager_qat(fused, "qnnpack")
    return prepared


class Nan(torch.nn.Module):
    def forward(self, vector):
        return torch.log(vector)


def share_of_right(outputs, labels):
    return (outputs.argmax(1) == labels).mean()


def wrong(outputs, labels):
    return outputs.argmax(1) != labels


wrong.larger_is_better = False
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with samples whose labels are what the PyTorch networks answer, an own cache, and own modules."""
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.syspath_prepend(str(HERE))
        (folder / "verify_factories.py").write_text(FACTORIES)
        patch.syspath_prepend(str(folder))
        import tiny_nets

        images = random_samples([IMAGE], COUNT, 1).arrays["image"]
        vectors = random_samples([VECTOR], COUNT, 1).arrays["vector"]
        with torch.no_grad():
            answer = tiny_nets.residual().eval()(torch.from_numpy(images)).argmax(1).numpy()
        np.savez(folder / "images.npz", image=images, labels=answer)
        np.savez(folder / "unlabelled.npz", image=images)
        np.savez(folder / "vectors.npz", vector=vectors)
        yield folder


@pytest.fixture(scope="module")
def artifact(place):
    """The residual network in int8, calibrated on other samples than it is verified on."""
    np.savez(place / "calibration.npz", image=random_samples([IMAGE], 32, 2).arrays["image"])
    built = pipeline.compile(
        "tiny_nets:residual",
        inputs=[IMAGE],
        precision="int8",
        calibration=place / "calibration.npz",
        output=place / "int8",
    )
    return built.folder


def verified(subject, place, **more):
    return verify(VerifyRequest(subject=str(subject), base=HERE, **more), lambda text: None)


@pytest.fixture(scope="module")
def of_artifact(place, artifact):
    top1 = (metric_from_text("top1"),)
    return verified(
        artifact, place, model="tiny_nets:residual", evaluation=place / "images.npz", metrics=top1, layers=True
    )


def test_all_three_forms_are_compared_with_pytorch_and_the_artifact_with_its_onnx(of_artifact):
    assert [form.name for form in of_artifact.forms] == ["PyTorch", "fp32 ONNX", "artifact"]
    pairs = {(pair.reference, pair.candidate): pair.outputs[0] for pair in of_artifact.fidelity}
    assert set(pairs) == {("PyTorch", "fp32 ONNX"), ("PyTorch", "artifact"), ("fp32 ONNX", "artifact")}
    assert pairs["PyTorch", "fp32 ONNX"].max_relative < 1e-5
    assert 10 < pairs["PyTorch", "artifact"].sqnr_db < 60
    assert of_artifact.samples == COUNT
    (note,) = of_artifact.notes
    assert "equalized" in note


def test_metrics_stand_side_by_side_with_paired_counts(of_artifact):
    (top1,) = of_artifact.metrics
    # The labels are PyTorch's own answers, so that its score is known, and the artifact's is its agreement.
    (agreement,) = [
        pair.outputs[0].argmax_agreement
        for pair in of_artifact.fidelity
        if (pair.reference, pair.candidate) == ("PyTorch", "artifact")
    ]
    assert top1.values == {"PyTorch": 1.0, "fp32 ONNX": 1.0, "artifact": pytest.approx(agreement)}
    assert [(pair.candidate, pair.lost, pair.gained) for pair in top1.pairs] == [
        ("fp32 ONNX", 0, 0),
        ("artifact", round(COUNT * (1 - agreement)), 0),
    ]


def test_layers_are_in_the_order_of_the_graph_and_end_at_the_output(of_artifact):
    layers = of_artifact.layers.layers
    assert [layer.operator for layer in layers if layer.operator in ("Conv", "Gemm")] == [*["Conv"] * 4, "Gemm"]
    assert layers[-1].tensor == "output"
    assert all(layer.sqnr_db is not None and layer.sqnr_db > 5 for layer in layers)


def _onnx_of(source, spec):
    request = BuildRequest(
        name="m", source=source, base=HERE, target="host", backend="onnxruntime", precision="fp32", inputs=(spec,)
    )
    return read_graph(Path(canonical_model(request, lambda text: None).path))


def _disturbed(graph, node, noise):
    """Return a copy in which the weights of one node carry noise of so many times their own power."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    (weight,) = [item for item in copy.graph.initializer if item.name == node.input[1]]
    values = numpy_helper.to_array(weight)
    other = np.random.default_rng(0).standard_normal(values.shape) * values.std() * noise
    weight.CopyFrom(numpy_helper.from_array((values + other).astype(np.float32), weight.name))
    return copy


@pytest.mark.parametrize("place_of_error", range(4))
def test_the_error_is_said_to_jump_at_the_layer_whose_weights_are_wrong(place, place_of_error):
    graph = _onnx_of("tiny_nets:residual", IMAGE)
    node = [node for node in graph.graph.node if node.op_type == "Conv"][place_of_error]
    samples = random_samples([IMAGE], 4, 0)
    found = compare_layers(graph, _disturbed(graph, node, 0.3), samples, [IMAGE], names=("a", "b"))
    assert found.jump == node.output[0]
    before = found.layers[: [layer.tensor for layer in found.layers].index(found.jump)]
    assert all(layer.sqnr_db is None and layer.drop_db == 0 for layer in before)
    (wrong,) = [layer for layer in found.layers if layer.tensor == found.jump]
    assert wrong.drop_db == pytest.approx(CEILING_DB - wrong.sqnr_db)
    assert (found.samples, found.not_compared) == (4, 0)


@pytest.mark.parametrize("source", ["tiny_nets:small_mlp", "tiny_nets:large_mlp"])
def test_a_form_that_is_exact_has_no_jump(place, source):
    graph = _onnx_of(source, VECTOR)
    found = compare_layers(graph, graph, random_samples([VECTOR], 3, 0), [VECTOR], names=("a", "b"))
    assert found.jump == ""
    assert all(layer.sqnr_db is None for layer in found.layers)


def test_graphs_of_other_shapes_or_names_are_refused(place):
    small, large = (_onnx_of(f"tiny_nets:{size}_mlp", VECTOR) for size in ("small", "large"))
    samples = random_samples([VECTOR], 2, 0)
    with pytest.raises(FidelityError, match="not two forms of one model"):
        compare_layers(small, large, samples, [VECTOR], names=("a", "b"))
    other = onnx.ModelProto()
    other.CopyFrom(small)
    renamed = {name for node in small.graph.node for name in node.output}
    for node in other.graph.node:
        node.input[:] = [f"x_{name}" if name in renamed else name for name in node.input]
        node.output[:] = [f"x_{name}" for name in node.output]
    with pytest.raises(ModelError, match="no layer can be compared"):
        compare_layers(small, other, samples, [VECTOR], names=("a", "b"))


def test_a_source_with_trained_quantization_is_also_compared_in_its_own_quantized_form(place):
    found = verified(
        "verify_factories:trained_with_fake_quantization",
        place,
        inputs=(IMAGE,),
        evaluation=place / "images.npz",
        metrics=(metric_from_text("top1"),),
        layers=True,
    )
    assert [form.name for form in found.forms] == ["PyTorch", "fp32 ONNX", "quantized ONNX"]
    ratios = {pair.candidate: pair.outputs[0].sqnr_db for pair in found.fidelity}
    assert ratios["quantized ONNX"] is None or ratios["quantized ONNX"] > 25
    assert (found.layers.reference, found.layers.candidate) == ("fp32 ONNX", "quantized ONNX")


def test_a_quantized_onnx_file_is_told_by_its_simulated_form_and_not_by_its_fp32_form(place, artifact):
    found = verified(artifact / "model.onnx", place, evaluation=place / "images.npz")
    assert [form.name for form in found.forms] == ["given ONNX", "fp32 ONNX", "quantized ONNX"]
    fp32, quantized = (pair.outputs[0] for pair in found.fidelity)
    assert quantized.sqnr_db is None or quantized.sqnr_db > fp32.sqnr_db + 10


def test_an_onnx_file_is_its_own_reference_and_needs_no_input_option(place):
    onnx.save(_onnx_of("tiny_nets:residual", IMAGE), place / "given.onnx")
    found = verified(place / "given.onnx", place, evaluation=place / "images.npz", samples=7)
    assert [form.name for form in found.forms] == ["given ONNX", "fp32 ONNX"]
    assert found.samples == 7
    assert "no metric was asked for, though the set has labels" in found.notes[0]


def test_without_labels_only_outputs_are_compared_and_without_a_set_it_is_said_loudly(place):
    found = verified("tiny_nets:residual", place, inputs=(IMAGE,), evaluation=place / "unlabelled.npz")
    assert "unlabelled has no labels" in found.notes[0]
    assert not found.is_synthetic
    found = verified("tiny_nets:residual", place, inputs=(IMAGE,))
    assert found.notes[0].startswith("RANDOM SAMPLES")
    assert found.is_synthetic


def test_a_fixed_batch_leaves_out_the_rest_and_says_so(place):
    graph = _onnx_of("tiny_nets:residual", IMAGE)
    for value in [*graph.graph.input, *graph.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 16
    onnx.save(graph, place / "fixed.onnx")
    top1 = (metric_from_text("top1"),)
    found = verified(place / "fixed.onnx", place, evaluation=place / "images.npz", metrics=top1)
    assert found.samples == 32
    assert found.metrics[0].values == {"given ONNX": 1.0, "fp32 ONNX": 1.0}
    assert "leaves out the last 8 samples" in found.notes[-1]


def test_several_outputs_have_labels_of_their_own(place):
    images = np.load(place / "images.npz")
    stem = np.zeros((COUNT, 8, 8, 8), np.float32)
    np.savez(place / "named.npz", image=images["image"], **{"labels.logits": images["labels"], "labels.stem": stem})
    chosen = (metric_from_text("top1@logits"), metric_from_text("mse@stem"))
    found = verified(
        "tiny_nets:residual_with_taps", place, inputs=(IMAGE,), evaluation=place / "named.npz", metrics=chosen
    )
    assert [one.values["PyTorch"] > 0 for one in found.metrics] == [True, True]
    assert found.metrics[0].values["fp32 ONNX"] == 1.0
    with pytest.raises(UsageError, match="say which one top1 judges"):
        verified(
            "tiny_nets:residual_with_taps",
            place,
            inputs=(IMAGE,),
            evaluation=place / "named.npz",
            metrics=(metric_from_text("top1"),),
        )


def test_own_metrics_are_imported_and_paired(place):
    chosen = (metric_from_text("verify_factories:share_of_right"), metric_from_text("verify_factories:wrong"))
    request = {"inputs": (IMAGE,), "evaluation": place / "images.npz"}
    right, wrong = verified("tiny_nets:residual", place, metrics=chosen, **request).metrics
    assert (right.values["fp32 ONNX"], right.larger_is_better, right.pairs) == (1.0, True, ())
    assert (wrong.values["fp32 ONNX"], wrong.larger_is_better, wrong.pairs[0].lost) == (0.0, False, 0)
    for text, told in (
        ("verify_factories:share_of_rigth", 'did you mean "share_of_right"'),
        ("no_such_module_anywhere:f", "cannot be imported"),
        ("verify_factories:torch", "is a module; a metric is a function"),
    ):
        with pytest.raises(UsageError, match=told):
            verified("tiny_nets:residual", place, metrics=(metric_from_text(text),), **request)


def test_what_cannot_be_meant_is_a_sentence(place, artifact):
    images = place / "images.npz"
    top1 = (metric_from_text("top1"),)
    with pytest.raises(UsageError, match="its manifest holds no path to it; name the source"):
        verified(artifact, place, evaluation=images)
    with pytest.raises(UsageError, match="is a model itself; drop it"):
        verified("tiny_nets:residual", place, model="tiny_nets:residual", inputs=(IMAGE,))
    with pytest.raises(UsageError, match="does not exist"):
        verified("no_such_folder", place, model="tiny_nets:residual")
    with pytest.raises(UsageError, match="unlabelled has no labels, which top1 needs"):
        verified("tiny_nets:residual", place, inputs=(IMAGE,), evaluation=place / "unlabelled.npz", metrics=top1)
    with pytest.raises(UsageError, match="those of PyTorch and of other runtimes are not"):
        verified("tiny_nets:residual", place, inputs=(IMAGE,), evaluation=images, layers=True)
    with pytest.raises(UsageError, match='did you mean "output"'):
        verified("tiny_nets:residual", place, inputs=(IMAGE,), evaluation=images, output="outputs")


def test_another_source_than_the_artifacts_own_is_said_or_refused(place, artifact):
    graph = _onnx_of("tiny_nets:residual", IMAGE)
    other = _disturbed(graph, next(node for node in graph.graph.node if node.op_type == "Conv"), 1.0)
    onnx.save(other, place / "other.onnx")
    found = verified(artifact, place, model=str(place / "other.onnx"), evaluation=place / "images.npz")
    assert "was not compiled from this source (its code or file had another digest)" in found.notes[0]
    with pytest.raises(UsageError, match="the artifact has the outputs output and the source logits, stem"):
        verified(artifact, place, model="tiny_nets:residual_with_taps", evaluation=place / "images.npz")


def test_artifacts_of_a_runtime_that_invents_its_answers_are_sent_to_bench(place, artifact):
    folder = place / "for-fake"
    shutil.copytree(artifact, folder)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["recipe"]["backend"] = "fake"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"compiled for fake, which verify does not run.*edgedeploy bench"):
        verified(folder, place, model="tiny_nets:residual")


@pytest.mark.parametrize("backend", ["mnn", "tflite"])
def test_artifacts_of_other_runtimes_are_compared_by_their_device_half(place, backend):
    if reason := load_backends()[0][backend].missing():
        pytest.skip(reason)
    built = pipeline.compile(
        "tiny_nets:residual", inputs=(IMAGE,), backend=backend, precision="fp32", output=place / backend
    )
    found = verified(built.folder, place, model="tiny_nets:residual", evaluation=place / "images.npz")
    assert [form.name for form in found.forms] == ["PyTorch", "fp32 ONNX", "artifact"]
    assert max(one.max_relative for item in found.fidelity for one in item.outputs) < 1e-5
    assert found.samples == COUNT


def test_nan_is_named_with_its_form(place):
    vectors = np.load(place / "vectors.npz")["vector"]
    np.savez(place / "nan.npz", vector=vectors, labels=np.zeros(COUNT, np.int64))
    with pytest.raises(ModelError, match="PyTorch: output 'output' is NaN or infinite for sample 0"):
        verified(
            "verify_factories:Nan",
            place,
            inputs=(VECTOR,),
            evaluation=place / "nan.npz",
            metrics=(metric_from_text("top1"),),
        )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("top1", "METRIC=AMOUNT"),
        ("f1=1pt", 'did you mean "f1_macro"'),
        ("top1=1ms", "in points"),
        ("top1=-1pt", "is negative"),
        ("mae=1pt", "no share of samples"),
        ("top1=one", "not a number"),
    ],
)
def test_a_limit_that_cannot_be_meant_is_a_sentence(text, told):
    with pytest.raises(UsageError, match=told):
        limit_from_text(text)


def test_the_command_exits_with_1_only_when_a_limit_is_not_met(place, artifact, capsys):
    arguments = ["verify", str(artifact), "--model", "tiny_nets:residual", "--base", str(HERE), "-q"]
    arguments += ["--evaluation", str(place / "images.npz"), "--metric", "top1"]
    assert cli.run([*arguments, "--min-sqnr-db", "5", "--max-loss", "top1=100pt"]) == 0
    assert "artifact against PyTorch" in capsys.readouterr().out
    assert cli.run([*arguments, "--min-sqnr-db", "90", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "edgedeploy.verification/1"
    assert "90 dB are demanded" in document["unmet"][0]
    assert cli.run(["verify", str(artifact), "--metric", "top-1"]) == 2
    assert 'did you mean "top1"' in capsys.readouterr().err


def test_a_loss_is_measured_in_points_as_a_share_or_as_a_number(place, artifact):
    request = {"model": "tiny_nets:residual", "evaluation": place / "images.npz"}
    losses = [limit_from_text(text) for text in ("mse=0.000000001", "mse=100000%")]
    np.savez(place / "logits.npz", image=np.load(place / "images.npz")["image"], labels=np.ones((COUNT, 5), np.float32))
    request["evaluation"] = place / "logits.npz"
    found = verified(artifact, place, limits=tuple(losses), **request)
    (mse,) = found.metrics
    is_worse = mse.values["artifact"] - mse.values["PyTorch"] > 1e-9
    assert len(found.unmet) == int(is_worse)
