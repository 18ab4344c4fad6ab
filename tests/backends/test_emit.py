"""The forms that emit writes by a target's rules: what is stored how, what they compute, and what is refused."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from torch import nn  # noqa: E402

from edgedeploy.backends.onnxruntime import BACKEND  # noqa: E402
from edgedeploy.errors import ModelError  # noqa: E402
from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.emission.activations import clamps_nothing  # noqa: E402
from edgedeploy.prepare.emission.emit import emit, shorten  # noqa: E402
from edgedeploy.prepare.export import export  # noqa: E402
from edgedeploy.prepare.graph import Runner, attributes, read_graph, view  # noqa: E402
from edgedeploy.prepare.grid import ActivationGrid  # noqa: E402
from edgedeploy.prepare.load import Loaded, load  # noqa: E402
from edgedeploy.prepare.ptq.quantize import quantize  # noqa: E402
from edgedeploy.prepare.simplify import simplify  # noqa: E402
from edgedeploy.records.model import TensorSpec  # noqa: E402
from edgedeploy.records.quantization import (  # noqa: E402
    ActivationRange,
    DynamicActivation,
    Grid,
    QuantizationTable,
    WeightQuantization,
)
from edgedeploy.records.target import QuantizationRules, load_target  # noqa: E402

HERE = Path(__file__).parent
IMAGE = [TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))]
VECTOR = [TensorSpec(name="vector", dtype="float32", shape=("batch", 12))]
SEQUENCE = [TensorSpec(name="sequence", dtype="float32", shape=("batch", 5, 12))]
ONNXRUNTIME = QuantizationRules(
    activation_dtype="uint8", activation_symmetric=False, weight_only="MatMulNBits", dynamic="DynamicQuantizeLinear"
)
NARROW = msgspec.structs.replace(ONNXRUNTIME, weight_bits=7)
TENSORRT = load_target("jetson-orin", machine="aarch64", isa=()).quantization["tensorrt"]
TFLITE = load_target("arm64-linux", machine="aarch64", isa=()).quantization["tflite"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 20, bidirectional=True, batch_first=True)

    def forward(self, sequence):
        return self.lstm(sequence)[0]


def tiny(name):
    return load(f"tiny_nets:{name}", None, base=HERE).program


def canonical(module, specs, folder):
    """Return a module's simplified fp32 model, and samples."""
    samples = random_samples(specs, 24, 0)
    model = export(Loaded("module", "made", module.eval()), specs, samples, folder / "e.onnx")
    return simplify(model, samples, folder / "s.onnx"), samples


def onto_grid(layer, *, bits=8, block=0, zero_point=0):
    """Put a linear layer's weights on a grid by torch's own fake quantization; return its scales, one a row or block."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with torch.no_grad():
        rows = layer.weight.reshape(-1, block or layer.weight.shape[1])
        scales = rows.abs().amax(1) / high
        points = torch.full(scales.shape, zero_point, dtype=torch.int32)
        layer.weight.copy_(
            torch.fake_quantize_per_channel_affine(rows, scales, points, 0, low, high).reshape(layer.weight.shape)
        )
    return tuple(scales.tolist())


def table_of(model, weights, **more):
    blank = {"nodes": (), "activations": {}, "dynamic": {}} | more
    return QuantizationTable(
        model_sha256=model.sha256,
        calibration="",
        calibration_sha256="",
        samples=0,
        method="made",
        weights=weights,
        **blank,
    )


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    return canonical(tiny("residual"), IMAGE, tmp_path_factory.mktemp("residual"))


@pytest.fixture(scope="module", params=["small", "large"])
def integer_mlp(request, tmp_path_factory):
    """An MLP below or beyond the exporter's folding limits, its weights on 8-bit grids; and those grids."""
    module = tiny("small_mlp") if request.param == "small" else tiny("large_mlp")
    grids = {
        f"{name}.weight": WeightQuantization(axis=0, scales=onto_grid(getattr(module, name)), origin="trained")
        for name in ("first", "second")
    }
    model, samples = canonical(module, VECTOR, tmp_path_factory.mktemp("mlp"))
    assert set(grids) <= set(view(read_graph(Path(model.path)).graph).constants)
    return model, samples, grids


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    torch.manual_seed(0)
    module = Recurrent()
    scales = {}
    with torch.no_grad():
        for name, weight in module.lstm.named_parameters():
            if name.startswith("weight"):
                kind = name.split("_")[1]
                step = scales.setdefault(kind, float(np.float32(0.3 / 127)))
                weight.copy_(torch.fake_quantize_per_tensor_affine(weight, step, 0, -128, 127))
    model, samples = canonical(module, SEQUENCE, tmp_path_factory.mktemp("lstm"))
    (lstm,) = [node for node in read_graph(Path(model.path)).graph.node if node.op_type == "LSTM"]
    grids = {
        lstm.input[index]: WeightQuantization(axis=None, scales=(scales[kind],), origin="trained")
        for index, kind in ((1, "ih"), (2, "hh"))
    }
    return model, samples, grids


def graph_of(form):
    return read_graph(Path(form.path)).graph


def sqnr(record):
    return min(float("inf") if output.sqnr_db is None else output.sqnr_db for output in record.outputs)


def answers(path, samples, *, is_optimized):
    return Runner(Path(path), is_optimized=is_optimized)(samples.batch(0, 8))


# What each runtime's parser demands.


def test_tensorrt_form_is_what_its_parser_asserts(tmp_path, residual):
    model, samples = residual
    table = quantize(model, samples, TENSORRT)
    emitted = emit(model, table, TENSORRT, samples, tmp_path / "q.onnx")
    graph = graph_of(emitted.model)
    seen = view(graph)
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    # One tensor is not rounded: the branch of the residual sum that ends in a convolution.
    assert len([node for node in pairs if node.op_type == "QuantizeLinear"]) == len(table.activations) - 1
    for node in pairs:
        assert len(node.input) == 3
        zero_point, scale = seen.constants[node.input[2]], seen.constants[node.input[1]]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        assert scale.dtype == np.float32
        if scale.ndim:
            assert attributes(node)["axis"] == 0
    assert np.uint8 not in {value.dtype.type for value in seen.constants.values()}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 5
    for node in layers:
        assert seen.constants[node.input[2]].dtype == np.float32
    assert {node.op_type for node in graph.node if node.domain} == set()
    assert emitted.notes == ()


def test_only_the_skip_branch_of_a_residual_sum_is_rounded_for_tensorrt(tmp_path, residual):
    model, samples = residual
    form = emit(model, quantize(model, samples, TENSORRT), TENSORRT, samples, tmp_path / "q.onnx").model
    seen = view(graph_of(form))
    (add,) = [node for node in seen.graph.node if node.op_type == "Add"]
    assert sorted(seen.producers[name].op_type for name in add.input) == ["Conv", "DequantizeLinear"]


def test_relu6_within_which_the_grid_lies_is_left_out_without_changing_a_code(tmp_path, residual):
    model, samples = residual
    table = quantize(model, samples, TFLITE)
    # Activations that reach 6 as trained networks' do, so that the grid ends where the clamp does.
    clamped = {node.output[0] for node in graph_of(model).node if node.op_type == "Clip"}
    reaching = {
        name: msgspec.structs.replace(values, low=0.0, high=6.0) if name in clamped else values
        for name, values in table.activations.items()
    }
    table = msgspec.structs.replace(table, activations=reaching)
    kept = emit(model, table, TFLITE, samples, tmp_path / "k.onnx").model
    absorbed = emit(
        model, table, msgspec.structs.replace(TFLITE, clamps="absorbed"), samples, tmp_path / "a.onnx"
    ).model
    assert [node.op_type for node in graph_of(kept).node].count("Clip") == len(clamped) == 3
    assert [node.op_type for node in graph_of(absorbed).node].count("Clip") == 0
    both = [answers(form.path, samples, is_optimized=False)["output"] for form in (kept, absorbed)]
    np.testing.assert_array_equal(*both)


@given(
    bounds=st.tuples(st.floats(-8, 0), st.floats(0.1, 8)),
    scale=st.floats(0.001, 0.1),
    zero_point=st.integers(-128, 127),
    values=st.lists(st.floats(-50, 50), min_size=1),
)
def test_clamp_that_is_called_superfluous_changes_no_code(bounds, scale, zero_point, values):
    grid = ActivationGrid(float(np.float32(scale)), zero_point, np.dtype(np.int8))

    def codes(numbers):
        return np.clip(np.rint(numbers / np.float32(grid.scale)) + zero_point, -128, 127)

    numbers = np.asarray([*values, *bounds], np.float32)
    low, high = np.float32(bounds)
    if clamps_nothing((low, high), grid):
        np.testing.assert_array_equal(codes(np.clip(numbers, low, high)), codes(numbers))
    else:
        far = np.asarray([-1e6, 1e6], np.float32)
        assert (codes(np.clip(far, low, high)) != codes(far)).any()


@pytest.mark.parametrize(
    ("rules", "integers", "floats"),
    [(ONNXRUNTIME, 7, 0), (NARROW, 7, 0), (TFLITE, 7, 0), (TENSORRT, 1, 5)],
    ids=["vnni", "avx2", "tflite", "tensorrt"],
)
def test_fused_and_float_operators_are_counted_in_the_runtimes_own_graph(tmp_path, residual, rules, integers, floats):
    model, samples = residual
    form = emit(model, quantize(model, samples, rules), rules, samples, tmp_path / "q.onnx").model
    report = BACKEND.inspect(Path(form.path))
    # 4 convolutions, a sum, a pool, a product. TensorRT's clamps and float biases keep ONNX Runtime from fusing them;
    # its sum is not between two rounded tensors and becomes a part of a float convolution.
    assert (len(report.quantized), len(report.float_islands)) == (integers, floats)


def test_excluded_operator_computes_in_float(tmp_path, residual):
    model, samples = residual
    (pool,) = [node for node in graph_of(model).node if "Pool" in node.op_type or "Mean" in node.op_type]
    rules = msgspec.structs.replace(ONNXRUNTIME, excluded_operators=(pool.op_type,))
    form = emit(model, quantize(model, samples, rules), rules, samples, tmp_path / "q.onnx").model
    report = BACKEND.inspect(Path(form.path))
    # It reads what was not rounded, so that what makes it stays float too.
    assert [label.split()[0] for label in report.float_islands] == ["Add", pool.op_type]
    assert [label.split()[0] for label in report.quantized] == ["QLinearConv"] * 4 + ["QGemm"]


# Trained numbers.


def trained(model, samples, rules, grid):
    """Return a calibrated table in which the first activation behind a layer has a trained grid."""
    table = quantize(model, samples, rules)
    name = next(node.output[0] for node in graph_of(model).node if node.op_type == "Clip")
    own = msgspec.structs.replace(table.activations[name], origin="trained", grid=grid)
    return msgspec.structs.replace(table, activations=table.activations | {name: own}), name


def test_trained_scale_reaches_the_runtimes_own_graph(tmp_path, residual):
    model, samples = residual
    scale = float(np.float32(0.0173))
    table, name = trained(model, samples, ONNXRUNTIME, Grid(scale=scale, zero_point=0, low_code=0, high_code=255))
    emitted = emit(model, table, ONNXRUNTIME, samples, tmp_path / "q.onnx")
    scales = BACKEND.inspect(Path(emitted.model.path)).scales
    assert scales[name] == (scale,)
    assert set(scales) >= {*table.activations, *table.weights}
    assert emitted.notes == ()


def test_asymmetric_trained_grid_is_refused_where_symmetric_is_demanded(tmp_path, residual):
    model, samples = residual
    grid = Grid(scale=0.02, zero_point=40, low_code=0, high_code=255)
    table, name = trained(model, samples, TENSORRT, grid)
    with pytest.raises(ModelError, match=rf"trained grids of '{name}' do not fit symmetric int8 .*--allow-loss"):
        emit(model, table, TENSORRT, samples, tmp_path / "q.onnx")
    (note,) = emit(model, table, TENSORRT, samples, tmp_path / "q.onnx", allow_change=True).notes
    assert "would be scaled anew, by up to" in note


def test_weights_that_do_not_lie_on_their_trained_grid_are_refused(tmp_path, integer_mlp):
    model, samples, grids = integer_mlp
    off = {
        name: msgspec.structs.replace(grid, scales=tuple(1.3 * scale for scale in grid.scales))
        for name, grid in grids.items()
    }
    with pytest.raises(ModelError, match=r"'first\.weight' do not lie on the grid that came with them"):
        emit(model, table_of(model, off), ONNXRUNTIME, samples, tmp_path / "q.onnx")


def test_trained_8_bit_weights_do_not_saturate_where_the_target_takes_7(tmp_path, integer_mlp):
    model, samples, grids = integer_mlp
    table = msgspec.structs.replace(quantize(model, samples, ONNXRUNTIME), weights=grids)
    emitted = emit(model, table, NARROW, samples, tmp_path / "q.onnx")
    codes = view(graph_of(emitted.model)).constants["second.weight/integers"]
    assert codes.dtype == np.uint8
    assert codes.max() > 128 + 64
    (note,) = emitted.notes
    assert note.startswith(
        "the weights 'first.weight' and 'second.weight' have trained codes beyond 64, whose products"
    )
    wide = emit(model, table, ONNXRUNTIME, samples, tmp_path / "w.onnx")
    assert view(graph_of(wide.model)).constants["second.weight/integers"].dtype == np.int8
    as_written = [answers(form.model.path, samples, is_optimized=False)["output"] for form in (emitted, wide)]
    np.testing.assert_array_equal(*as_written)


def test_trained_scales_per_channel_are_not_silently_merged(tmp_path, integer_mlp):
    model, samples, grids = integer_mlp
    rules = msgspec.structs.replace(ONNXRUNTIME, weight_per_channel=False)
    table = msgspec.structs.replace(quantize(model, samples, ONNXRUNTIME), weights=grids)
    with pytest.raises(ModelError, match="this target wants one in all"):
        emit(model, table, rules, samples, tmp_path / "q.onnx")
    form = emit(model, table, rules, samples, tmp_path / "q.onnx", allow_change=True).model
    assert view(graph_of(form)).constants["second.weight/scale"].shape == ()


# Weights alone.


def test_8_bit_weights_stay_small_in_the_runtimes_memory(tmp_path, integer_mlp):
    model, samples, grids = integer_mlp
    emitted = emit(model, table_of(model, grids), ONNXRUNTIME, samples, tmp_path / "q.onnx")
    report = BACKEND.inspect(Path(emitted.model.path))
    assert report.operators["MatMulNBits"] == 2
    assert report.expanded == ()
    # The kernel rounds activations to int8 in blocks; the weights are exact.
    assert sqnr(emitted.model.fidelity[-1]) > 38
    (note,) = emitted.notes
    assert note.startswith("the runtime rounds what it multiplies with the 8-bit weights 'first.weight' and 'second.")
    weights = {name: len(set(report.scales[name])) for name in grids}
    assert weights == {name: len(set(grid.scales)) for name, grid in grids.items()}


def test_weights_that_are_dequantized_are_exact_and_reported_as_expanded(tmp_path, integer_mlp):
    model, samples, grids = integer_mlp
    emitted = emit(model, table_of(model, grids), TFLITE, samples, tmp_path / "q.onnx")
    assert sqnr(emitted.model.fidelity[-2]) > 120
    assert Path(emitted.model.path).stat().st_size < Path(model.path).stat().st_size
    assert set(BACKEND.inspect(Path(emitted.model.path)).expanded) == set(grids)


def test_weight_only_is_refused_where_the_engine_would_expand_it(tmp_path, integer_mlp):
    model, samples, grids = integer_mlp
    with pytest.raises(ModelError, match=r"8-bit weights 'first\.weight' belong to a node that computes in float"):
        emit(model, table_of(model, grids), TENSORRT, samples, tmp_path / "q.onnx")
    emitted = emit(model, table_of(model, grids), TENSORRT, samples, tmp_path / "q.onnx", allow_change=True)
    assert len(emitted.notes) == 1
    assert emitted.model.compression.initializer_bytes == model.compression.initializer_bytes


def test_4_bit_weights_without_a_packed_form_are_stored_in_bytes_with_the_same_values(tmp_path):
    module = tiny("large_mlp")
    # MatMulNBits has no blocks of 40 nor of a divisor of it; 12 columns are a torn block of 16.
    coarse = onto_grid(module.second, bits=4, block=40, zero_point=-3)
    fine = onto_grid(module.first, bits=4, zero_point=-3)
    grids = {
        name: WeightQuantization(
            bits=4, axis=0, block=block, scales=scales, zero_points=(-3,) * len(scales), origin="trained"
        )
        for name, block, scales in (("second.weight", 40, coarse), ("first.weight", 0, fine))
    }
    model, samples = canonical(module, VECTOR, tmp_path)
    with pytest.raises(ModelError, match=r"4-bit weights 'second\.weight' have no packed form here"):
        emit(model, table_of(model, grids), ONNXRUNTIME, samples, tmp_path / "q.onnx")
    emitted = emit(model, table_of(model, grids), ONNXRUNTIME, samples, tmp_path / "q.onnx", allow_change=True)
    assert sqnr(emitted.model.fidelity[-2]) > 110
    (packed,) = [node for node in graph_of(emitted.model).node if node.op_type == "MatMulNBits"]
    assert attributes(packed)["bits"] == 4


@pytest.mark.parametrize(("block", "zero_point", "written"), [(48, 0, 16), (48, -3, 16), (32, -3, 32)])
def test_4_bit_blocks_are_repeated_or_kept_as_the_operator_takes_them(tmp_path, block, zero_point, written):
    torch.manual_seed(0)
    layer = nn.Linear(block * 9, 40)
    scales = onto_grid(layer, bits=4, block=block, zero_point=zero_point)
    grid = WeightQuantization(
        bits=4, axis=0, block=block, scales=scales, origin="trained",
        zero_points=(zero_point,) * len(scales) if zero_point else (),
    )  # fmt: skip
    specs = [TensorSpec(name="vector", dtype="float32", shape=("batch", block * 9))]
    model, samples = canonical(layer, specs, tmp_path)
    emitted = emit(model, table_of(model, {"weight": grid}), ONNXRUNTIME, samples, tmp_path / "q.onnx")
    assert emitted.notes == ()
    assert sqnr(emitted.model.fidelity[-1]) > 110
    (packed,) = [node for node in graph_of(emitted.model).node if node.op_type == "MatMulNBits"]
    assert attributes(packed)["block_size"] == written
    assert Path(emitted.model.path).stat().st_size < Path(model.path).stat().st_size / 3


# Activations that are rounded in each inference.


def dynamic(grids, **how):
    return {name: DynamicActivation(**{"symmetric": False, "per_token": False} | how) for name in grids}


def test_dynamic_product_becomes_one_integer_operator(tmp_path, integer_mlp):
    model, samples, grids = integer_mlp
    table = table_of(model, grids, dynamic=dynamic(grids))
    emitted = emit(model, table, ONNXRUNTIME, samples, tmp_path / "q.onnx")
    report = BACKEND.inspect(Path(emitted.model.path))
    assert report.operators["DynamicQuantizeMatMul"] == 2
    assert [label.split()[0] for label in report.float_islands] == ["Relu"]
    assert report.expanded == ()
    assert sqnr(emitted.model.fidelity[-2]) > 30
    assert sqnr(emitted.model.fidelity[-1]) == pytest.approx(sqnr(emitted.model.fidelity[-2]), abs=0.5)
    assert emitted.notes == ()
    assert report.scales["second.weight"] == pytest.approx(grids["second.weight"].scales)


def test_dynamic_weights_do_not_saturate_where_the_target_takes_7_bits(tmp_path, integer_mlp):
    model, samples, grids = integer_mlp
    table = table_of(model, grids, dynamic=dynamic(grids, per_token=True))
    emitted = emit(model, table, NARROW, samples, tmp_path / "q.onnx")
    assert view(graph_of(emitted.model)).constants["second.weight/integers"].dtype == np.uint8
    assert sqnr(emitted.model.fidelity[-1]) > 30
    assert [note for note in emitted.notes if "per token; ONNX Runtime rounds them per tensor" in note]


def test_dynamic_is_refused_where_the_target_has_no_form(tmp_path, integer_mlp):
    model, samples, grids = integer_mlp
    table = table_of(model, grids, dynamic=dynamic(grids))
    with pytest.raises(ModelError, match="rounded in each inference, which this target has no form for"):
        emit(model, table, TFLITE, samples, tmp_path / "q.onnx")


def test_4_bit_weights_with_dynamic_activations_are_computed_on_integers(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(128, 40)
    grid = WeightQuantization(bits=4, axis=0, block=32, scales=onto_grid(layer, bits=4, block=32), origin="trained")
    specs = [TensorSpec(name="vector", dtype="float32", shape=("batch", 128))]
    model, samples = canonical(layer, specs, tmp_path)
    table = table_of(model, {"weight": grid}, dynamic=dynamic(["weight"], per_token=True))
    emitted = emit(model, table, ONNXRUNTIME, samples, tmp_path / "q.onnx")
    (packed,) = [node for node in graph_of(emitted.model).node if node.op_type == "MatMulNBits"]
    assert attributes(packed)["accuracy_level"] == 4
    assert 35 < sqnr(emitted.model.fidelity[-1]) < 80


def test_dynamic_lstm_runs_on_integers(tmp_path, recurrent):
    model, samples, grids = recurrent
    table = table_of(model, grids, dynamic=dynamic(grids))
    for rules in (ONNXRUNTIME, NARROW):
        emitted = emit(model, table, rules, samples, tmp_path / "q.onnx")
        report = BACKEND.inspect(Path(emitted.model.path))
        assert report.operators["DynamicQuantizeLSTM"] == 1
        assert report.expanded == ()
        assert set(grids) <= set(report.scales)
        assert sqnr(emitted.model.fidelity[-1]) > 30


def test_half_of_a_dynamic_lstm_is_refused(tmp_path, recurrent):
    model, samples, grids = recurrent
    (first, *_) = grids
    table = table_of(model, {first: grids[first]}, dynamic=dynamic([first]))
    with pytest.raises(ModelError, match="which no operator does for a LSTM with these scales"):
        emit(model, table, ONNXRUNTIME, samples, tmp_path / "q.onnx")


# Short floats.


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_short_floats_take_half_the_file(tmp_path, integer_mlp, storage):
    model, samples, _ = integer_mlp
    emitted = shorten(model, storage, tmp_path / "h.onnx", samples)
    weights = model.compression.initializer_bytes
    assert emitted.model.compression.initializer_bytes < 0.6 * weights
    assert sqnr(emitted.model.fidelity[-1]) > {"float16": 60, "bfloat16": 40}[storage]
    assert set(BACKEND.inspect(Path(emitted.model.path)).expanded) == {"first.weight", "second.weight"}
    assert "half the bytes" in emitted.notes[0]


@pytest.mark.parametrize(("reach", "lowest"), [("full", -128), ("narrow", -127)])
def test_trained_integers_of_minus_128_move_one_step_where_kernels_do_not_take_them(tmp_path, reach, lowest):
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(-128, -116).reshape(3, 4) / 64)
    model, samples = canonical(layer, [TensorSpec(name="v", dtype="float32", shape=("batch", 4))], tmp_path)
    ranged = ActivationRange(
        low=-1.0, high=1.0, origin="trained", grid=Grid(scale=1 / 127, zero_point=0, low_code=-127, high_code=127)
    )
    (node,) = [node for node in read_graph(Path(model.path)).graph.node if node.op_type == "Gemm"]
    weight = node.input[1]
    table = QuantizationTable(
        model_sha256=model.sha256, calibration="", calibration_sha256="", samples=0, method="QAT", nodes=(node.name,),
        activations={"v": ranged}, weights={weight: WeightQuantization(axis=None, scales=(1 / 64,), origin="trained")},
    )  # fmt: skip
    rules = QuantizationRules(activation_dtype="int8", activation_symmetric=True, bias="float32", weight_range=reach)
    emitted = emit(model, table, rules, samples, tmp_path / "q.onnx")
    constants = view(read_graph(Path(emitted.model.path)).graph).constants
    (codes,) = [value for value in constants.values() if value.dtype == np.int8 and value.ndim == 2]
    assert codes.min() == lowest
    assert bool([note for note in emitted.notes if "became -127" in note]) == (reach == "narrow")


def test_weight_beyond_float16_stays_float32_and_is_named(tmp_path):
    """Masks of attention are such constants."""
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        layers[0].weight[0, 0] = 1e6
    model, samples = canonical(layers, [TensorSpec(name="v", dtype="float32", shape=("batch", 4))], tmp_path)
    emitted = shorten(model, "float16", tmp_path / "h.onnx", samples)
    assert [note for note in emitted.notes if "0.weight: kept in float32, values beyond 6.55e+04" in note]
    constants = view(read_graph(Path(emitted.model.path)).graph).constants
    assert {value.dtype.name for value in constants.values() if value.ndim > 1} == {"float32", "float16"}


def test_8_bit_floats_need_a_newer_opset(tmp_path, integer_mlp):
    model, samples, _ = integer_mlp
    grid = WeightQuantization(axis=None, scales=(0.01,), storage="float8e4m3fn", origin="trained")
    with pytest.raises(ModelError, match="need opset 19, the model has 18"):
        emit(model, table_of(model, {"first.weight": grid}), ONNXRUNTIME, samples, tmp_path / "q.onnx")
