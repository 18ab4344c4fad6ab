"""`explain` on real runtimes: what a candidate was made slower or less accurate by is named first."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'edgedeploy[onnxruntime]'")

import onnx
from onnx import TensorProto, helper, numpy_helper

from edgedeploy import pipeline
from edgedeploy.cli.explaining import explain_command
from edgedeploy.documents import read_json
from edgedeploy.errors import UsageError
from edgedeploy.records.explanation import FORMAT, Explanation

SIZE, CLASSES = 32, 6


def network(path, widths=(16, 32, 32, 16), seed=0):
    """Four convolutions with a Relu each, the mean over places, and a product: scores of six classes."""
    random_ = np.random.default_rng(seed)
    nodes, constants, source, channels = [], [], "image", 3
    for number, width in enumerate(widths, 1):
        weights = random_.standard_normal((width, channels, 3, 3)).astype(np.float32) * (2 / (9 * channels)) ** 0.5
        constants.append(numpy_helper.from_array(weights, f"w{number}"))
        constants.append(numpy_helper.from_array(np.zeros(width, np.float32), f"b{number}"))
        nodes.append(
            helper.make_node(
                "Conv", [source, f"w{number}", f"b{number}"], [f"c{number}"], name=f"conv{number}", pads=[1] * 4
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"], name=f"relu{number}"))
        source, channels = f"r{number}", width
    head = random_.standard_normal((CLASSES, channels)).astype(np.float32)
    constants += [numpy_helper.from_array(head, "wh"), numpy_helper.from_array(np.zeros(CLASSES, np.float32), "bh")]
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "wh", "bh"], ["scores"], name="head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Artifacts of one network: as it is, with a layer twice as wide, in int8, and in int8 but for one layer."""
    folder = tmp_path_factory.mktemp("place")
    network(folder / "net.onnx")
    network(folder / "wide.onnx", widths=(16, 32, 128, 16))
    images = np.random.default_rng(1).standard_normal((24, 3, SIZE, SIZE)).astype(np.float32)
    np.savez(folder / "samples.npz", image=images, labels=np.arange(24) % CLASSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.setenv("EDGEDEPLOY_STATE_DIR", str(folder / "state"))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.chdir(folder)
        quick = ("rounding=nearest",)
        pipeline.compile("net.onnx", output="fp32", name="fp32")
        pipeline.compile("wide.onnx", output="wide", name="wide")
        pipeline.compile(
            "net.onnx", output="int8", name="int8", precision="int8", calibration="samples.npz", quantization=quick
        )
        pipeline.compile(
            "net.onnx",
            output="mixed",
            name="mixed",
            precision="int8",
            calibration="samples.npz",
            quantization=(*quick, "float_layers=conv3"),
        )
        yield folder


@pytest.fixture(scope="module")
def widened(place):
    """What the command says of a layer that was made four times as wide: its words, and what it kept."""
    done = CliRunner().invoke(explain_command, ["fp32", "wide", "--passes", "3", "--html", "why.html", "-q"])
    assert done.exit_code == 0, done.output
    (path,) = (place / "bench_results" / "explanations").iterdir()
    return done.output, read_json(path, Explanation, FORMAT)


@pytest.fixture(scope="module")
def quantized(place):
    """What the command says of integers beside floats, with samples, as one document."""
    arguments = ["fp32", "int8", "--passes", "2", "--evaluation", "samples.npz", "--json", "-q"]
    done = CliRunner().invoke(explain_command, arguments)
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    assert document["format"] == FORMAT
    return read_json(Path(document["path"]), Explanation, FORMAT)


def group_of(found, node):
    return next(group for group in found.speed.groups if node in group.nodes)


def test_a_convolution_made_four_times_as_wide_is_named_first(widened, place):
    output, found = widened
    first = found.speed.causes[0]
    assert first.kind == "work"
    named = {node for number in first.groups for node in found.speed.groups[number].nodes}
    assert named & {"conv3", "conv4"}
    assert "4 times the multiply-adds of the baseline" in first.text
    assert "Why it is slower\n1. conv" in output
    assert "4 times the multiply-adds" in (place / "why.html").read_text()


def test_every_layer_of_the_model_is_found_on_both_sides(quantized):
    """Whatever the runtime fuses and renames, float and integers meet at the model's own nodes."""
    for number in range(1, 5):
        group = group_of(quantized, f"conv{number}")
        assert group.nodes == (f"conv{number}", f"relu{number}")
        assert group.baseline_layers
        assert group.candidate_layers
        assert (group.baseline_precision, group.candidate_precision) == ("fp32", "int8")
    assert not [one for one in quantized.speed.groups if one.role == "compute" and not one.nodes]


def test_accuracy_is_explained_where_there_are_samples(quantized):
    accuracy = quantized.accuracy
    assert accuracy.samples == 24
    assert {layer.tensor for layer in accuracy.layers.layers} >= {"c1", "c4", "scores"}
    # Rescaled channels are no error: without a factor for each, equalization alone leaves 14 to 25 dB.
    assert all(layer.sqnr_db is None or layer.sqnr_db > 25 for layer in accuracy.layers.layers)
    assert any("one factor a channel" in note for note in accuracy.notes)


def test_a_layer_left_in_float_is_seen_with_the_conversions_around_it(place):
    found, _ = pipeline.explain("int8", "mixed", passes=3)
    group = group_of(found, "conv3")
    assert (group.baseline_precision, group.candidate_precision) == ("int8", "fp32")
    assert group.changes[0] == "int8 → fp32"
    assert group_of(found, "conv4").changes == ()
    assert [one for one in found.speed.groups if one.role == "convert" and not one.baseline_layers]


@pytest.mark.parametrize(
    ("names", "says"),
    [(("fp32",), "name the candidate too"), (("nothing", "fp32"), "neither an artifact folder nor a run")],
)
def test_a_wrong_name_is_a_sentence(place, names, says):
    with pytest.raises(UsageError, match=says):
        pipeline.explain(*names)


def test_a_runtime_that_does_not_say_is_explained_by_what_is_known(place):
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'edgedeploy[tflite]'")
    for name in ("net", "wide"):
        pipeline.compile(f"{name}.onnx", backend="tflite", output=f"{name}-tflite", name=f"{name}-tflite")
    found, _ = pipeline.explain("net-tflite", "wide-tflite", passes=2)
    assert "benchmark_model" in found.speed.baseline.not_available
    assert found.speed.groups == ()
    assert found.speed.causes[0].text == "conv3 has 4 times the multiply-adds of the baseline (not timed)"


@pytest.fixture(scope="module")
def in_mnn(place):
    pytest.importorskip("MNN", reason="needs MNN: pip install 'edgedeploy[mnn]'")
    for name in ("net", "wide"):
        pipeline.compile(f"{name}.onnx", backend="mnn", output=f"{name}-mnn", name=f"{name}-mnn")
    quick = {"precision": "int8", "calibration": "samples.npz", "quantization": ("rounding=nearest",)}
    pipeline.compile("net.onnx", backend="mnn", output="int8-mnn", name="int8-mnn", **quick)


def test_of_mnn_too_a_convolution_made_four_times_as_wide_is_named_first(in_mnn):
    found, _ = pipeline.explain("net-mnn", "wide-mnn", passes=3)
    first = found.speed.causes[0]
    assert first.kind == "work"
    assert "4 times the multiply-adds" in first.text


@pytest.mark.parametrize("baseline", ["net-mnn", "fp32"])
def test_float_and_integers_and_two_runtimes_meet_at_the_models_nodes(in_mnn, baseline):
    found, _ = pipeline.explain(baseline, "int8-mnn", passes=2)
    for number in range(1, 5):
        group = group_of(found, f"conv{number}")
        assert group.baseline_layers
        assert group.candidate_layers
        assert (group.baseline_precision, group.candidate_precision) == ("fp32", "int8")
