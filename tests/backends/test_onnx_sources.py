"""ONNX that is quantized already, by ONNX Runtime's tools or by us, through the whole pipeline: its numbers are kept."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import helper, numpy_helper  # noqa: E402
from onnxruntime.quantization import QuantFormat, QuantType  # noqa: E402
from torch import nn  # noqa: E402

from edgedeploy import pipeline  # noqa: E402
from edgedeploy.errors import ModelError  # noqa: E402
from edgedeploy.prepare.count.statements import statements  # noqa: E402
from edgedeploy.prepare.emission.exact_products import exact_here  # noqa: E402
from edgedeploy.prepare.graph import Runner, opset_of, read_graph, view  # noqa: E402
from edgedeploy.prepare.integer import IntegerReference  # noqa: E402
from edgedeploy.prepare.source.absorb import absorb  # noqa: E402
from edgedeploy.records.model import FoundCompression  # noqa: E402

from .quantized_sources import (  # noqa: E402
    Cnn,
    Mlp,
    exported,
    onnxruntime_dynamic,
    onnxruntime_static,
    plain_form,
    rows,
    seeded,
)

SHAPES = {"cnn": (4, 3, 8, 8), "mlp": (4, 12), "tokens": (4, 7, 12)}
S8, U8 = QuantType.QInt8, QuantType.QUInt8
STATIC = {
    "S8S8 symmetric": {
        "activation_type": S8,
        "weight_type": S8,
        "per_channel": True,
        "extra_options": {"ActivationSymmetric": True},
    },
    "U8S8": {"activation_type": U8, "weight_type": S8, "per_channel": True},
    "U8S8 per tensor": {"activation_type": U8, "weight_type": S8},
    # Seven bits, or signed activations: ONNX Runtime's own kernels do not saturate, and are a reference, anywhere.
    "QOperator": {
        "quant_format": QuantFormat.QOperator,
        "activation_type": U8,
        "weight_type": S8,
        "per_channel": True,
        "reduce_range": True,
    },
    "QOperator S8S8": {"quant_format": QuantFormat.QOperator, "activation_type": S8, "weight_type": S8},
}
# Source → the kind that must be seen in it, and the least ratio of signal to noise, in dB, of the artifact against it.
# Symmetric grids of tensors without negative values get half the step, which rounds less than the source does; 8-bit
# MatMulNBits rounds its activations.
EXACT = 120
EXPECTED = {
    **{
        f"{net} {name}": ("static int8", 25 if name == "S8S8 symmetric" else EXACT)
        for net in ("cnn", "mlp")
        for name in STATIC
    },
    "cnn dynamic": ("dynamic int8", EXACT),
    "cnn dynamic per channel": ("dynamic int8", EXACT),
    "mlp dynamic": ("dynamic int8", EXACT),
    "tokens MatMulNBits 4": ("weight-only int4", EXACT),
    "tokens MatMulNBits 8": ("weight-only int8", 38),
    "cnn ours x86": ("static int8", EXACT),
    "cnn ours arm": ("static int8", EXACT),
    "mlp ours x86": ("static int8", EXACT),
    "tokens ours MatMulNBits 4": ("weight-only int4", EXACT),
}


class Tokens(nn.Module):
    """Linear layers of three axes, which the exporter writes as MatMul: what ONNX Runtime packs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 64), nn.Linear(64, 160)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all sources in it."""
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        floats = {
            net: exported(seeded(make), torch.from_numpy(rows(SHAPES[net])), opset_version=18)
            for net, make in (("cnn", Cnn), ("mlp", Mlp), ("tokens", Tokens))
        }
        for net, model in floats.items():
            onnx.save(model, folder / f"{net} float.onnx")
        for net in ("cnn", "mlp"):
            for name, settings in STATIC.items():
                made = onnxruntime_static(floats[net], SHAPES[net], folder, **settings)
                onnx.save(made, folder / f"{net} {name}.onnx")
            samples = rows((32, *SHAPES[net][1:]), 3)
            np.savez(folder / f"{net}.npz", **{floats[net].graph.input[0].name: samples})
        for name, settings in (
            ("cnn dynamic", {"weight_type": U8}),
            ("cnn dynamic per channel", {"weight_type": S8, "per_channel": True, "reduce_range": True}),
            ("mlp dynamic", {"weight_type": U8}),
        ):
            made = onnxruntime_dynamic(floats[name.split()[0]], folder, **settings)
            onnx.save(made, folder / f"{name}.onnx")
        for bits in (4, 8):
            onnx.save(packed(floats["tokens"], bits), folder / f"tokens MatMulNBits {bits}.onnx")
        for name, source, settings in (
            ("cnn ours x86", "cnn float", {"calibration": folder / "cnn.npz", "target": "x86-64"}),
            ("cnn ours arm", "cnn float", {"calibration": folder / "cnn.npz", "target": "raspberry-pi-5"}),
            ("mlp ours x86", "mlp float", {"calibration": folder / "mlp.npz", "target": "x86-64"}),
            ("tokens ours MatMulNBits 4", "tokens MatMulNBits 4", {"target": "x86-64"}),
        ):
            built = pipeline.compile(str(folder / f"{source}.onnx"), precision="int8", **settings)
            (folder / f"{name}.onnx").write_bytes(built.file.read_bytes())
        built = pipeline.compile(str(folder / "mlp float.onnx"), precision="fp16")
        (folder / "mlp ours fp16.onnx").write_bytes(built.file.read_bytes())
        yield folder


def packed(model, bits):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = onnx.ModelProto.FromString(model.SerializeToString())
    quantizer = MatMulNBitsQuantizer(copy, block_size=32, is_symmetric=False, bits=bits)
    quantizer.process()
    return quantizer.model.model


def answer(path, name, **how):
    model = read_graph(path) if isinstance(path, Path) else onnx.load_from_string(path)
    (output,) = Runner(path, **how)({model.graph.input[0].name: rows(SHAPES[name.split()[0]], 9)}).values()
    return output.astype(np.float64)


def ratio_db(meant, got):
    error = ((meant - got) ** 2).sum()
    return np.inf if error == 0 else 10 * np.log10((meant**2).sum() / error)


def stored_values(path):
    """Return what the quantized weights of a file stand for, in any order and layout, as bytes."""
    clean, record = absorb(read_graph(path))
    constants = view(clean.graph).constants
    return Counter(np.sort(constants[name], axis=None).tobytes() for name in record.weights)


@pytest.mark.parametrize("name", EXPECTED)
def test_source_is_recognised_kept_and_right(name, place):
    kind, least_db = EXPECTED[name]
    source = place / f"{name}.onnx"
    built = pipeline.compile(str(source), precision="int8", target="x86-64")
    (statement,) = built.artifact.compression.statements
    assert (statement.kind, statement.onnx, statement.artifact) == (kind, "kept", "kept")
    fates = {fate for entry in built.artifact.survival.entries for fate in entry.stages.values()}
    assert "kept" in fates <= {"kept", "folded"}
    assert built.artifact.survival.largest_relative_change == 0
    assert stored_values(built.file) == stored_values(source)
    meant = answer(source, name, is_optimized=False)
    assert ratio_db(meant, answer(built.file, name, is_optimized=False)) > least_db
    assert ratio_db(meant, answer(built.file, name)) > least_db
    assert len(built.artifact.notes) <= 1


@pytest.mark.parametrize("name", ["cnn U8S8", "mlp QOperator", "cnn ours x86"])
def test_artifact_of_a_source_has_the_codes_of_an_exact_engine(name, place):
    built = pipeline.compile(str(place / f"{name}.onnx"), precision="int8", target="raspberry-pi-5")
    graph = read_graph(built.file)
    feeds = {graph.graph.input[0].name: rows(SHAPES[name.split()[0]], 9)}
    (exact,) = IntegerReference(graph).run(feeds).outputs.values()
    assert ratio_db(answer(place / f"{name}.onnx", name, is_optimized=False), exact) > 35


@pytest.mark.parametrize("name", EXPECTED)
def test_inspection_names_the_kind_and_fp32_is_refused(name, place):
    source = str(place / f"{name}.onnx")
    found = pipeline.inspect(source)
    assert {item.kind for item in found.kinds} == {EXPECTED[name][0]}
    assert [item.onnx for item in found.compression.statements] == ["kept"]
    with pytest.raises(ModelError, match=r"would drop its \d+ scales .* build it as int8, or accept .* --allow-loss"):
        pipeline.compile(source, precision="fp32")


def test_our_fp16_form_stays_fp16_and_its_halves_are_not_doubled(place):
    source = place / "mlp ours fp16.onnx"
    built = pipeline.compile(str(source), precision="fp16")
    assert built.artifact.size_bytes == pytest.approx(source.stat().st_size, rel=0.01)
    np.testing.assert_array_equal(answer(source, "mlp"), answer(built.file, "mlp"))
    assert {item.name for item in read_graph(built.file).graph.initializer} == {
        item.name for item in read_graph(source).graph.initializer
    }
    with pytest.raises(ModelError, match=r"weights in float16, .* twice the bytes \(fp16 keeps them\)"):
        pipeline.compile(str(source), precision="fp32")


def test_names_of_weights_do_not_grow_from_form_to_form(place):
    _, record = absorb(read_graph(place / "cnn ours x86.onnx"))
    assert set(record.weights) == {"stem.weight", "inner.weight", "project.weight", "head.weight"}


def test_constants_before_opset_19_are_computed_and_what_depends_on_inputs_is_not_touched(place):
    """onnx's reference implementation of DequantizeLinear begins at opset 19."""
    ours = read_graph(place / "cnn ours x86.onnx")
    makers = view(ours.graph).producers
    assert opset_of(ours) == 18
    assert any(
        node.op_type == "QuantizeLinear" and makers[node.input[0]].op_type == "Conv"
        for node in ours.graph.node
        if node.input[0] in makers
    )
    codes = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["codes", "step"], ["real"]),
            helper.make_node("Transpose", ["real"], ["turned"], perm=[1, 0]),
            helper.make_node("QuantizeLinear", ["turned", "step", "zero"], ["again"]),
            helper.make_node("DequantizeLinear", ["again", "step", "zero"], ["weights"]),
            helper.make_node("MatMul", ["x", "weights"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 4])],
        [helper.make_tensor_value_info("y", 1, ["n", 3])],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in {"codes": codes, "step": np.float32(0.5), "zero": np.int8(0)}.items()
        ],
    )
    clean, record = absorb(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    (name,) = record.weights
    np.testing.assert_array_equal(view(clean.graph).constants[name], codes.T * np.float32(0.5))


def test_signed_weights_of_integer_operators_have_an_exact_twin(place, tmp_path):
    dynamic = onnxruntime_dynamic(onnx.load(place / "mlp float.onnx"), tmp_path, weight_type=S8)
    feeds = {dynamic.graph.input[0].name: rows(SHAPES["mlp"], 9)}
    (meant,) = IntegerReference(dynamic).run(feeds).outputs.values()
    assert ratio_db(meant, answer(exact_here(dynamic), "mlp", is_optimized=False)) > 100
    wide = STATIC["QOperator"] | {"reduce_range": False}
    for net in ("cnn", "mlp"):
        source = onnxruntime_static(onnx.load(place / f"{net} float.onnx"), SHAPES[net], tmp_path, **wide)
        as_meant = answer(plain_form(*absorb(source)).SerializeToString(), net, is_optimized=False)
        # Saturated sums end at 15 to 19 dB.
        assert ratio_db(as_meant, answer(exact_here(source), net, is_optimized=False)) > 30
    for name in ("cnn QOperator S8S8", "cnn U8S8", "mlp dynamic"):
        assert exact_here(read_graph(place / f"{name}.onnx")) is None


@pytest.mark.parametrize("net", ["cnn", "mlp"])
def test_sources_whose_own_kernels_saturate_here_are_taken_for_what_they_mean(net, place, tmp_path):
    wide = STATIC["QOperator"] | {"reduce_range": False}
    signed = {"weight_type": S8}
    for name, source in (
        ("operators", onnxruntime_static(onnx.load(place / f"{net} float.onnx"), SHAPES[net], tmp_path, **wide)),
        ("dynamic", onnxruntime_dynamic(onnx.load(place / f"{net} float.onnx"), tmp_path, **signed)),
    ):
        onnx.save(source, tmp_path / f"{name}.onnx")
        built = pipeline.compile(str(tmp_path / f"{name}.onnx"), precision="int8", target="x86-64")
        assert built.artifact.survival.largest_relative_change == 0
        meant = answer(exact_here(source) or source.SerializeToString(), net, is_optimized=False)
        assert ratio_db(meant, answer(built.file, net, is_optimized=False)) > 30


def test_layers_that_onnx_renamed_are_counted_with_those_that_it_did_not(place):
    report = pipeline.inspect(str(place / "cnn U8S8.onnx")).compression
    artifact = pipeline.compile(str(place / "cnn U8S8.onnx"), precision="int8", target="x86-64").artifact.compression
    known = report.layers[0].weight
    found = FoundCompression(kind="static int8", layers=(known, "lost.0", "lost.1", "lost.2"), detail="PT2E")
    (statement,) = statements((found,), report, artifact)
    assert statement.artifact_reason.endswith("in 4 of 4 layers")
    (alone,) = statements((FoundCompression(kind="static int8", layers=(known,), detail="PT2E"),), report, artifact)
    assert alone.artifact_reason.endswith("in 1 of 1 layer")


def test_what_is_said_of_many_layers_is_said_once(place):
    (note,) = pipeline.compile(str(place / "cnn U8S8.onnx"), precision="int8", target="x86-64").artifact.notes
    assert "... (4 in all) have trained codes beyond 64" in note
    assert note.count("weight'") == 2
