"""The compression report counts what a file really holds, whatever form it stores it in."""

import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgedeploy.errors import ModelError  # noqa: E402
from edgedeploy.prepare.count.compression import _pattern, compression_report  # noqa: E402
from edgedeploy.prepare.count.declared import demand_declared  # noqa: E402
from edgedeploy.prepare.count.statements import statements  # noqa: E402
from edgedeploy.prepare.count.stored_weights import _unpacked  # noqa: E402
from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.export import export  # noqa: E402
from edgedeploy.prepare.graph import read_graph, view  # noqa: E402
from edgedeploy.prepare.load import load  # noqa: E402
from edgedeploy.prepare.simplify import simplify  # noqa: E402
from edgedeploy.records.compression import Numbers  # noqa: E402
from edgedeploy.records.model import FoundCompression, TensorSpec  # noqa: E402
from edgedeploy.records.quantization import (  # noqa: E402
    ActivationRange,
    DynamicActivation,
    Grid,
    QuantizationTable,
    SourceQuantization,
    WeightQuantization,
)
from edgedeploy.records.release import Declared  # noqa: E402

HERE = Path(__file__).parent
SPECS = {
    "mixed": TensorSpec(name="vector", dtype="float32", shape=("batch", 12)),
    "dense_cnn": TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8)),
    "pruned_cnn": TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8)),
    "tagger": TensorSpec(name="sequence", dtype="float32", shape=("batch", 6, 12)),
}


@pytest.fixture(scope="module")
def canonical(tmp_path_factory):
    """Return a function from a network's name to its simplified fp32 file and samples, made once."""
    made = {}

    def file_of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            samples = random_samples([SPECS[name]], 16, 0)
            model = export(load(f"report_nets:{name}", None, base=HERE), [SPECS[name]], samples, folder / "e.onnx")
            made[name] = Path(simplify(model, samples, folder / "s.onnx").path), samples
        return made[name]

    return file_of


class Reader:
    """Samples as onnxruntime.quantization wants them: one at a time, None at the end."""

    def __init__(self, samples):
        self.batches = iter([samples.batch(index, index + 1) for index in range(samples.count)])

    def get_next(self):
        return next(self.batches, None)


@pytest.fixture(scope="module")
def quantized(canonical, tmp_path_factory):
    """Return a function from (network, form) to what onnxruntime's own quantizer makes of it."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    made = {}

    def file_of(name, form):
        if (name, form) not in made:
            source, samples = canonical(name)
            out = tmp_path_factory.mktemp("quantized") / f"{name}.onnx"
            if form == "dynamic":
                operators = ["MatMul", "Gemm", "LSTM"]
                quantize_dynamic(source, out, operators, weight_type=QuantType.QInt8, per_channel=True)
            else:
                how = QuantFormat.QOperator if form == "operators" else QuantFormat.QDQ
                kinds = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
                quantize_static(source, out, Reader(samples), quant_format=how, per_channel=True, **kinds)
            made[name, form] = out
        return made[name, form]

    return file_of


def by_weight(report):
    return {layer.weight.removesuffix(".weight"): layer for layer in report.layers if not layer.shares_with}


# ---------------------------------------------------------------- zeros, ranks, shares


def test_zeros_and_their_patterns_are_those_that_the_masks_made(canonical):
    report = compression_report(canonical("mixed")[0])
    layers = by_weight(report)
    assert (layers["masked"].pattern, layers["masked"].zero_weights) == ("unstructured", round(0.7 * 600 * 12))
    assert (layers["two_of_four"].pattern, layers["two_of_four"].zero_weights) == ("2:4", 600 * 300)
    assert {layers[name].pattern for name in ("down", "up", "shared", "plain")} == {""}
    assert report.parameters - report.nonzero_parameters >= 5040 + 180_000
    assert layers["two_of_four"].effective_macs == layers["two_of_four"].macs // 2 == 180_000


def test_two_factors_have_a_rank_and_other_layers_have_none(canonical):
    layers = by_weight(compression_report(canonical("mixed")[0]))
    assert (layers["down"].rank, layers["up"].rank) == (8, 8)
    assert {layers[name].rank for name in ("masked", "two_of_four", "shared", "plain")} == {None}


def test_factors_with_an_activation_between_them_are_two_layers(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        "u": rng.standard_normal((64, 4)).astype(np.float32),
        "v": rng.standard_normal((4, 64)).astype(np.float32),
    }
    for between, rank in ((["Relu"], None), ([], 4)):
        nodes = [helper.make_node("MatMul", ["x", "u"], ["h"], name="u")]
        nodes += [helper.make_node(kind, ["h"], ["r"], name=kind) for kind in between]
        nodes.append(helper.make_node("MatMul", ["r" if between else "h", "v"], ["y"], name="v"))
        report = compression_report(save(nodes, {"x": [1, 64]}, {"y": [1, 64]}, weights, tmp_path / "m.onnx"))
        assert [layer.rank for layer in report.layers] == [rank, rank]


def test_shared_weights_are_counted_and_stored_once(canonical):
    path, _ = canonical("mixed")
    report = compression_report(path)
    first, second = (layer for layer in report.layers if layer.weight == "shared.weight")
    assert (first.shares_with, second.shares_with) == ("", first.name)
    assert first.stored_bytes >= 600 * 600 * 4 > second.stored_bytes
    assert second.macs == first.macs == 360_000
    stored = view(read_graph(path).graph).constants
    assert report.initializer_bytes == sum(value.nbytes for value in stored.values())
    assert sum(layer.stored_bytes for layer in report.layers) <= report.initializer_bytes


def test_zipped_bytes_are_what_zlib_makes_of_a_layer(canonical):
    path, _ = canonical("mixed")
    report = compression_report(path)
    layer = by_weight(report)["two_of_four"]
    constants = {item.name: item.raw_data for item in read_graph(path).graph.initializer}
    node = next(node for node in read_graph(path).graph.node if node.name == layer.name)
    assert layer.zipped_bytes == len(zlib.compress(constants[node.input[1]] + constants[node.input[2]]))
    assert layer.zipped_bytes < 0.65 * layer.stored_bytes
    assert report.zipped_bytes < report.initializer_bytes


def test_a_recurrent_layer_works_in_each_step(canonical):
    report = compression_report(canonical("tagger")[0])
    lstm = next(layer for layer in report.layers if layer.operator == "LSTM")
    assert lstm.macs == 6 * (80 * 12 + 80 * 20)
    assert lstm.weight_count == 80 * 12 + 80 * 20
    assert report.macs == lstm.macs + 20 * 5


# ---------------------------------------------------------------- integers, in every form


@pytest.mark.parametrize(
    ("form", "operator", "reads"),
    [
        ("pairs", "Gemm", Numbers(storage="uint8", bits=8, is_symmetric=False, scales="tensor")),
        ("operators", "QGemm", Numbers(storage="uint8", bits=8, is_symmetric=False, scales="tensor")),
        ("dynamic", "MatMulInteger", Numbers(storage="uint8", bits=8, is_symmetric=False, scales="tensor", is_dynamic=True)),
    ],
)  # fmt: skip
def test_integer_forms_of_onnxruntime_are_read_as_what_they_are(canonical, quantized, form, operator, reads):
    before = compression_report(canonical("mixed")[0])
    report = compression_report(quantized("mixed", form))
    products = [layer for layer in report.layers if layer.weight_count]
    assert {layer.operator for layer in products} == {operator}
    assert {layer.weights for layer in products} == {
        Numbers(storage="int8", bits=8, is_symmetric=True, scales="channel")
    }
    assert report.macs == before.macs == 12 * 600 + 3 * 600 * 600 + 2 * 8 * 600 + 600 * 5
    old, new = ([layer.zero_weights for layer in one.layers if layer.weight_count] for one in (before, report))
    assert all(after >= zeros for zeros, after in zip(old, new, strict=True))
    assert [layer.rank for layer in products] == [None, None, 8, 8, None, None, None]
    assert [layer.pattern for layer in products] == ["unstructured", "2:4", *[""] * 5]
    # Scales and zero-points are no parameters: a share of a percent, were they counted.
    assert report.parameters == before.parameters


def test_convolutions_on_integers_keep_their_work_and_their_channels(canonical, quantized):
    before = compression_report(canonical("dense_cnn")[0])
    for form in ("pairs", "operators"):
        report = compression_report(quantized("dense_cnn", form), reference=canonical("dense_cnn")[0])
        assert report.macs == before.macs == 350_288
        assert [layer.removed_channels for layer in report.layers] == [0, 0, 0]
        assert {layer.weights.storage for layer in report.layers} == {"int8"}


def test_packed_blocks_are_four_bits_and_read_floats(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((96, 64)).astype(np.float32)
    weight[:48] = 0
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    path = save(nodes, {"x": ["n", 96]}, {"y": ["n", 64]}, {"w": weight}, tmp_path / "m.onnx")
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    packer = MatMulNBitsQuantizer(str(path), block_size=32, is_symmetric=True)
    packer.process()
    onnx.save(packer.model.model, tmp_path / "packed.onnx")
    report = compression_report(tmp_path / "packed.onnx")
    (layer,) = report.layers
    assert (layer.operator, layer.parameters, layer.macs) == ("MatMulNBits", 96 * 64, 96 * 64)
    assert layer.weights == Numbers(storage="int4", bits=4, is_symmetric=True, scales="block")
    assert layer.activations == Numbers()
    assert 48 * 64 <= layer.zero_weights < 0.7 * 96 * 64
    assert layer.stored_bytes == 96 * 64 // 2 + 3 * 64 * 4


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda codes: len(codes) % 2 == 0))
def test_unpacking_undoes_packing_two_codes_in_a_byte(codes):
    packed = np.array([low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)], np.uint8)
    assert _unpacked(packed, 4).tolist() == codes


def test_zeros_of_asymmetric_weights_are_where_the_code_is_the_zero_point(tmp_path):
    codes = np.full((8, 16), 200, np.uint8)
    codes[:, ::2] = 7
    constants = {"w": codes, "s": np.full(8, 0.1, np.float32), "z": np.full(8, 7, np.uint8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], name="widen", axis=0),
        helper.make_node("Gemm", ["x", "d"], ["y"], name="product", transB=1),
    ]
    report = compression_report(save(nodes, {"x": ["n", 16]}, {"y": ["n", 8]}, constants, tmp_path / "m.onnx"))
    assert report.layers[0].zero_weights == 64
    assert report.layers[0].weights == Numbers(storage="uint8", bits=8, is_symmetric=False, scales="channel")
    assert report.layers[0].activations == Numbers()


def test_rounded_float_weights_are_eight_bits_that_the_file_stores_as_floats(tmp_path):
    weight = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    constants = {"w": weight, "s": np.full(8, 0.05, np.float32), "z": np.zeros(8, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], name="round", axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="widen", axis=0),
        helper.make_node("Gemm", ["x", "d"], ["y"], name="product", transB=1),
    ]
    report = compression_report(save(nodes, {"x": ["n", 16]}, {"y": ["n", 8]}, constants, tmp_path / "m.onnx"))
    (layer,) = report.layers
    assert layer.weights == Numbers(storage="float32", bits=8, is_symmetric=True, scales="channel")
    assert layer.zero_weights == int((np.rint(weight / np.float32(0.05)) == 0).sum())


def test_integers_that_the_runtime_widens_are_not_called_kept(tmp_path):
    constants = {"w/integers": np.ones((16, 8), np.int8), "s": np.float32(0.1), "z": np.int8(0), "u": np.uint8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "u"], ["q"], name="round"),
        helper.make_node("DequantizeLinear", ["q", "s", "u"], ["r"], name="real"),
        helper.make_node("DequantizeLinear", ["w/integers", "s", "z"], ["w"], name="widen"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="product"),
    ]
    report = compression_report(save(nodes, {"x": ["n", 16]}, {"y": ["n", 8]}, constants, tmp_path / "m.onnx"))
    found = FoundCompression(kind="static int8", layers=("product",), detail="")
    assert statements((found,), report, report)[0].artifact == "kept"
    (widened,) = statements((found,), report, report, expanded=["w"])
    assert widened.artifact == "changed"
    assert "widens their weights to float32" in widened.artifact_reason


def test_short_floats_behind_a_cast_are_read_as_short(tmp_path):
    constants = {"w": np.ones((16, 8), np.float16)}
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], name="widen", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["y"], name="product"),
    ]
    report = compression_report(save(nodes, {"x": ["n", 16]}, {"y": ["n", 8]}, constants, tmp_path / "m.onnx"))
    half = Numbers(storage="float16", bits=16)
    assert (report.layers[0].weights, report.layers[0].activations) == (half, Numbers())
    assert report.layers[0].stored_bytes == 256
    found = FoundCompression(kind="float16", layers=("product",), detail="")
    (widened,) = statements((found,), report, report, ["a trained scale changed"])
    assert (widened.artifact, widened.notes) == ("changed", ())
    assert "16 bits in the file, but expanded to float32" in widened.artifact_reason
    nodes = [
        helper.make_node("Cast", ["x"], ["short"], name="shorten", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["short", "w"], ["z"], name="product"),
        helper.make_node("Cast", ["z"], ["y"], name="widen", to=TensorProto.FLOAT),
    ]
    report = compression_report(save(nodes, {"x": ["n", 16]}, {"y": ["n", 8]}, constants, tmp_path / "s.onnx"))
    assert (report.layers[0].weights, report.layers[0].activations) == (half, half)
    assert statements((found,), report, report)[0].artifact == "kept"


def test_a_mask_that_is_still_multiplied_in_makes_its_zeros(tmp_path):
    weight, mask = np.ones((16, 8), np.float32), np.ones((16, 8), np.float32)
    mask[:8] = 0
    nodes = [
        helper.make_node("Mul", ["w", "mask"], ["masked"], name="mask"),
        helper.make_node("MatMul", ["x", "masked"], ["y"], name="product"),
    ]
    constants = {"w": weight, "mask": mask}
    report = compression_report(save(nodes, {"x": ["n", 16]}, {"y": ["n", 8]}, constants, tmp_path / "m.onnx"))
    (product,) = report.layers
    assert (product.zero_weights, product.pattern, product.parameters) == (64, "channels", 128)
    assert product.stored_bytes == 2 * 4 * 128


def test_blocks_that_are_put_together_from_rows_are_read_without_their_padding(tmp_path):
    codes = np.random.default_rng(0).integers(1, 8, (8 * 3, 16), np.int8)
    codes[2::3, 8:] = 0  # 40 inputs in blocks of 16: the last block ends in padding
    codes[0, :4] = 0
    constants = {
        "w": codes,
        "s": np.full(24, 0.1, np.float32),
        "z": np.zeros(24, np.int8),
        "shape": np.array([8, 48]),
        "start": np.array([0]),
        "end": np.array([40]),
        "axis": np.array([1]),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], name="widen", axis=0),
        helper.make_node("Reshape", ["d", "shape"], ["rows"], name="rows"),
        helper.make_node("Slice", ["rows", "start", "end", "axis"], ["cut"], name="cut"),
        helper.make_node("Transpose", ["cut"], ["columns"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "columns"], ["y"], name="product"),
    ]
    report = compression_report(save(nodes, {"x": ["n", 40]}, {"y": ["n", 8]}, constants, tmp_path / "m.onnx"))
    (layer,) = report.layers
    assert (layer.weight_shape, layer.zero_weights, layer.macs) == ((40, 8), 4, 320)
    assert layer.weights == Numbers(storage="int8", bits=8, is_symmetric=True, scales="block")


def test_a_table_says_how_an_fp32_file_is_quantized(canonical):
    path, _ = canonical("mixed")
    graph = read_graph(path).graph
    first, last = graph.node[0], graph.node[-1]
    grid = Grid(scale=0.1, zero_point=-128, low_code=-128, high_code=127)
    ranges = {first.input[0]: ActivationRange(low=0, high=25.5, origin="trained", grid=grid)}
    weights = {
        "masked.weight": WeightQuantization(axis=0, scales=(0.1,) * 600, origin="trained"),
        "plain.weight": WeightQuantization(bits=4, axis=0, block=32, scales=(0.1,) * 95, origin="trained"),
        "shared.weight": WeightQuantization(axis=None, scales=(), storage="float16", origin="trained"),
    }
    dynamic = {"plain.weight": DynamicActivation(symmetric=True, per_token=True)}
    source = SourceQuantization(activations=ranges, weights=weights, dynamic=dynamic)
    report = compression_report(path, table=source)
    layers = by_weight(report)
    assert layers["masked"].weights == Numbers(storage="int8", bits=8, is_symmetric=True, scales="channel")
    assert layers["masked"].activations == Numbers(storage="int8", bits=8, is_symmetric=False, scales="tensor")
    assert layers["plain"].weights == Numbers(storage="int4", bits=4, is_symmetric=True, scales="block")
    assert layers["plain"].activations == Numbers(
        storage="int8", bits=8, is_symmetric=True, scales="token", is_dynamic=True
    )
    assert layers["shared"].weights == Numbers(storage="float16", bits=16)
    assert layers["up"].weights == layers["up"].activations == Numbers()
    assert layers["masked"].stored_bytes == compression_report(path).layers[0].stored_bytes

    table = QuantizationTable(
        model_sha256="",
        calibration="",
        calibration_sha256="",
        samples=0,
        method="",
        nodes=(last.name,),
        activations={**ranges, last.input[0]: ActivationRange(low=0, high=1, origin="calibrated")},
        weights=weights,
    )
    layers = by_weight(compression_report(path, table=table))
    # The first node is not in the table's nodes: its weights are stored as integers and computed with in float.
    assert layers["masked"].weights.bits == 8
    assert layers["masked"].activations == Numbers()
    assert layers["plain"].activations.bits == 8


def test_a_quantized_lstm_is_one_layer_on_integers(canonical, quantized):
    before = compression_report(canonical("tagger")[0])
    after = compression_report(quantized("tagger", "dynamic"))
    lstm = next(layer for layer in after.layers if "LSTM" in layer.operator)
    assert lstm.operator == "DynamicQuantizeLSTM"
    assert (lstm.weight_count, lstm.macs) == (80 * 12 + 80 * 20, 6 * (80 * 12 + 80 * 20))
    assert (lstm.weights.storage, lstm.activations.is_dynamic) == ("int8", True)
    assert after.parameters == before.parameters
    found = FoundCompression(kind="dynamic int8", layers=("lstm", "head"), detail="")
    (statement,) = statements((found,), after, after)
    assert (statement.onnx, statement.artifact) == ("kept", "kept")
    assert statement.onnx_reason.endswith("in 2 of 2 layers")


# ---------------------------------------------------------------- patterns


masks = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31)).map(
    lambda made: np.random.default_rng(made[2]).random((made[0], made[1] * 4)) < 0.4
)


@settings(max_examples=200)
@given(masks)
def test_a_two_of_four_mask_is_one_that_has_two_zeros_in_each_group_by_hand(mask):
    by_hand = all((~row[start : start + 4]).sum() >= 2 for row in mask for start in range(0, len(row), 4))
    assert (_pattern([mask], 32) == "2:4") == by_hand


def test_whole_channels_of_zeros_are_a_pattern_of_their_own():
    mask = np.ones((16, 12, 3, 3), bool)
    mask[::2] = False
    mask[:, :3] = False
    assert _pattern([mask], 32) == "channels"
    mask[1, 5:, 1] = False
    mask[3:9] &= np.random.default_rng(0).random((6, 12, 3, 3)) < 0.5
    assert _pattern([mask], 32) == "unstructured"
    assert _pattern([np.ones((4, 4), bool)], 32) == ""


# ---------------------------------------------------------------- beside a dense reference


def test_channels_that_were_removed_are_counted_beside_the_dense_reference(canonical):
    dense, _ = canonical("dense_cnn")
    report = compression_report(canonical("pruned_cnn")[0], reference=dense)
    assert {name: layer.removed_channels for name, layer in by_weight(report).items()} == {
        "stem": 32 - 13,
        "body": 0,
        "head": 0,
    }
    assert by_weight(report)["stem"].pattern == "channels"
    assert (report.reference_parameters, report.reference_macs) == (5605, 350_288)
    (statement,) = statements((), report, None)
    assert (statement.kind, statement.onnx) == ("channel pruning", "kept")
    assert "19 output channels" in statement.detail


def test_a_reference_that_is_smaller_or_another_network_is_refused(canonical):
    dense, pruned = (canonical(name)[0] for name in ("dense_cnn", "pruned_cnn"))
    with pytest.raises(ModelError, match=r"the reference must be the dense one: exchange the two"):
        compression_report(dense, reference=pruned)
    with pytest.raises(ModelError, match=r"is not the same network before pruning"):
        compression_report(dense, reference=canonical("mixed")[0])


# ---------------------------------------------------------------- kept, changed, lost


FOUND = {
    "pruning masks": FoundCompression(kind="pruning masks", layers=("masked",), detail="l1"),
    "2:4 sparsity": FoundCompression(kind="2:4 sparsity", layers=("two_of_four",), detail=""),
    "low rank": FoundCompression(kind="low rank", layers=("down", "up"), detail="rank 8"),
    "shared weights": FoundCompression(kind="shared weights", layers=("shared", "shared again"), detail=""),
}


def test_structural_kinds_are_kept_from_pytorch_to_integers(canonical, quantized):
    report = compression_report(canonical("mixed")[0])
    for form in ("pairs", "operators", "dynamic"):
        made = statements(tuple(FOUND.values()), report, compression_report(quantized("mixed", form)))
        assert [one.kind for one in made] == list(FOUND)
        assert {(one.onnx, one.artifact) for one in made} == {("kept", "kept")}, made


def test_what_an_artifact_no_longer_shows_is_lost_or_changed(canonical, tmp_path):
    path, _ = canonical("mixed")
    report = compression_report(path)
    graph = read_graph(path)
    values = {item.name: numpy_helper.to_array(item).copy() for item in graph.graph.initializer}
    values["masked.weight"][:50] = 1.0
    values["two_of_four.weight"][:] = 1.0
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    onnx.save(graph, tmp_path / "filled.onnx")
    filled = compression_report(tmp_path / "filled.onnx")
    made = {one.kind: one for one in statements(tuple(FOUND.values()), report, filled)}
    assert (made["pruning masks"].artifact, made["2:4 sparsity"].artifact) == ("changed", "lost")
    assert "zeros became other numbers" in made["pruning masks"].artifact_reason
    assert (made["low rank"].artifact, made["shared weights"].artifact) == ("kept", "kept")


def test_merged_factors_and_copied_weights_are_lost(canonical):
    report = compression_report(canonical("mixed")[0])
    layers = tuple(msgspec.structs.replace(layer, rank=None, shares_with="") for layer in report.layers)
    merged = msgspec.structs.replace(report, layers=layers)
    made = {one.kind: one for one in statements(tuple(FOUND.values()), report, merged)}
    assert (made["low rank"].artifact, made["shared weights"].artifact) == ("lost", "lost")
    made = {one.kind: one for one in statements(tuple(FOUND.values()), merged, merged)}
    assert (made["low rank"].onnx, made["shared weights"].onnx) == ("lost", "lost")


def test_weight_only_integers_behind_a_pair_are_expanded_in_memory_and_packed_ones_are_not(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (16, 64), np.int8)
    constants = {"w": codes, "s": np.full(16, 0.1, np.float32), "z": np.zeros(16, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], name="widen", axis=0),
        helper.make_node("Gemm", ["x", "d"], ["y"], name="product", transB=1),
    ]
    artifact = compression_report(save(nodes, {"x": ["n", 64]}, {"y": ["n", 16]}, constants, tmp_path / "a.onnx"))
    found = FoundCompression(kind="weight-only int8", layers=("product",), detail="torchao")
    (statement,) = statements((found,), artifact, artifact)
    assert (statement.onnx, statement.artifact) == ("kept", "changed")
    assert "8 bits in the file, but expanded to float32 in memory" in statement.artifact_reason
    packed = msgspec.structs.replace(artifact.layers[0], operator="MatMulNBits")
    (statement,) = statements((found,), artifact, msgspec.structs.replace(artifact, layers=(packed,)))
    assert statement.artifact == "kept"


def test_layers_that_a_form_renames_are_found_by_their_weights(canonical):
    report = compression_report(canonical("mixed")[0])
    renamed = tuple(
        msgspec.structs.replace(layer, name=f"{layer.name}/product", weight=f"{layer.weight}/packed")
        for layer in report.layers
        if layer.weight != "plain.weight"
    )
    extra = msgspec.structs.replace(report.layers[-1], name="new", weight="new", pattern="2:4", rank=3)
    made = statements(tuple(FOUND.values()), report, msgspec.structs.replace(report, layers=(*renamed, extra)))
    assert {one.artifact for one in made} == {"kept"}
    assert [one.artifact_reason.rpartition(" in ")[2] for one in made[2:]] == ["2 of 2 layers", "1 of 1 layer"]
    dense = msgspec.structs.replace(renamed[1], pattern="", zero_weights=0)
    made = statements((FOUND["2:4 sparsity"],), report, msgspec.structs.replace(report, layers=(dense, extra)))
    # Another layer with the pattern does not stand in for the one that lost it.
    assert made[0].artifact == "lost"


def test_trained_scales_that_did_not_survive_change_a_kind_with_scales_only(canonical, quantized):
    path, _ = canonical("mixed")
    pairs = compression_report(quantized("mixed", "pairs"))
    found = (FoundCompression(kind="QAT int8", layers=("masked",), detail="qnnpack"), FOUND["low rank"])
    note = "2 scales were re-scaled, by up to 0.4 %"
    trained, low_rank = statements(found, pairs, pairs, [note])
    assert (trained.onnx, trained.artifact, trained.notes) == ("kept", "changed", (note,))
    assert (low_rank.artifact, low_rank.notes) == ("kept", ())
    trained, _ = statements(found, pairs, compression_report(path))
    assert trained.artifact == "lost"
    assert "stored as float32" in trained.artifact_reason
    trained, _ = statements(found, pairs, compression_report(quantized("mixed", "dynamic")))
    assert trained.artifact == "changed"
    not_kept = msgspec.structs.replace(found[0], is_kept=False, note="packed parameters of an unknown operator")
    (trained,) = statements((not_kept,), pairs, pairs)
    assert (trained.onnx, trained.artifact) == ("lost", "lost")
    assert "packed parameters" in trained.notes[0]


# ---------------------------------------------------------------- is it what its label says


def test_a_model_that_is_what_its_label_says_passes(canonical, quantized):
    report = compression_report(canonical("mixed")[0])
    share = sum(layer.zero_weights for layer in report.layers) / sum(layer.weight_count for layer in report.layers)
    demand_declared(Declared(), report, ())
    demand_declared(
        Declared(sparsity=share + 0.009, rank=8, max_parameters=report.parameters, max_macs=report.macs), report, ()
    )
    others = ("masked", "down", "up", "shared", "plain")
    demand_declared(Declared(sparsity=0.5, pattern="2:4", except_layers=others), report, ())
    qat = FoundCompression(kind="QAT int8", layers=("masked",), detail="")
    integers = compression_report(quantized("mixed", "pairs"))
    demand_declared(Declared(qat=True, weight_bits=8, activation_bits=8), integers, (qat,))


def test_a_model_that_is_not_what_its_label_says_is_refused_key_by_key(canonical):
    report = compression_report(canonical("mixed")[0])
    declared = Declared(
        sparsity=0.9,
        pattern="2:4",
        qat=True,
        weight_bits=8,
        activation_bits=8,
        rank=4,
        max_parameters=1000,
        max_macs=1000,
    )
    with pytest.raises(ModelError) as caught:
        demand_declared(declared, report, (FOUND["low rank"],), name="model big")
    text = str(caught.value)
    assert text.startswith("model big is not what its label says: sparsity = 0.9 is declared, but 185,0")
    for expected in (
        'pattern = "2:4" is declared, but 6 of 7 layers that could have it do not (masked, down, up …)',
        "qat = true is declared, but the source carries low rank",
        "weight_bits = 8 is declared, but 7 of 7 layers have weights of up to 32 bits",
        "activation_bits = 8 is declared, but 7 of 7 layers have activations of up to 32 bits",
        "rank = 4 is declared, but the pair of node_linear_2 has rank 8",
        "max_parameters = 1000 is declared, but it has 742,",
        "max_macs = 1000 is declared, but it has 1,099,800 multiply-adds",
    ):
        assert expected in text, text


def test_a_layer_that_a_declaration_leaves_out_must_exist(canonical):
    report = compression_report(canonical("mixed")[0])
    with pytest.raises(ModelError, match=r'has no layer "plane".*did you mean "plain"'):
        demand_declared(Declared(sparsity=0.1, except_layers=("plane",)), report, ())


def save(nodes, inputs, outputs, constants, path):
    """Write a graph by hand: for forms that no exporter of ours makes."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path
