"""Quantized ONNX, as PyTorch and ONNX Runtime write it, becomes clean fp32 and a record that gives the source back."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnxruntime.quantization import QuantFormat, QuantType  # noqa: E402

from edgedeploy.errors import FidelityError, ModelError  # noqa: E402
from edgedeploy.prepare.graph import Runner, view  # noqa: E402
from edgedeploy.prepare.markers import DOMAIN, operators, translations  # noqa: E402
from edgedeploy.prepare.source.absorb import absorb, short_float_weights  # noqa: E402
from edgedeploy.prepare.source.protect import protect, release  # noqa: E402
from edgedeploy.records.quantization import DynamicActivation, Grid  # noqa: E402

from .quantized_sources import (  # noqa: E402
    Cnn,
    Mlp,
    exported,
    onnxruntime_dynamic,
    onnxruntime_static,
    plain_form,
    pt2e,
    rows,
    seeded,
)

IMAGE, VECTOR = (4, 3, 8, 8), (4, 12)
FLOAT, UINT8, INT8 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8


@pytest.fixture(scope="module")
def float_cnn():
    return exported(seeded(Cnn), torch.from_numpy(rows(IMAGE)))


@pytest.fixture(scope="module")
def float_mlp():
    return exported(seeded(Mlp), torch.from_numpy(rows(VECTOR)))


@pytest.fixture(scope="module")
def pt2e_cnn():
    return pt2e(seeded(Cnn), IMAGE)


@pytest.fixture(scope="module")
def pt2e_mlp():
    return pt2e(seeded(Mlp), VECTOR)


@pytest.fixture(scope="module")
def qdq_cnn(float_cnn, tmp_path_factory):
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    return onnxruntime_static(float_cnn, IMAGE, tmp_path_factory.mktemp("qdq"), per_channel=True, **kinds)


@pytest.fixture(scope="module")
def qoperator_cnn(float_cnn, tmp_path_factory):
    # Seven bits, so that ONNX Runtime's kernels do not saturate on x86 without VNNI and are a reference.
    return onnxruntime_static(
        float_cnn,
        IMAGE,
        tmp_path_factory.mktemp("qoperator"),
        quant_format=QuantFormat.QOperator,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
    )


def run(model, seed=7, shape=None):
    value = model.graph.input[0]
    size = shape or [item.dim_value or 4 for item in value.type.tensor_type.shape.dim]
    return list(Runner(model.SerializeToString(), is_optimized=False)({value.name: rows(size, seed)}).values())


def graph_of(nodes, inputs, outputs, constants, opset=21):
    """Return a model written by hand; `inputs` and `outputs` are name → (type, shape)."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
        [helper.make_tensor_value_info(name, *what) for name, what in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    domains = {"": opset} | {node.domain: 1 for node in nodes if node.domain}
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()], ir_version=10
    )


def demand_clean(model, opset_domains=("",)):
    onnx.checker.check_model(model)
    assert {item.domain for item in model.opset_import} <= set(opset_domains)
    names = {node.op_type for node in model.graph.node}
    assert not [name for name in names if "Quantize" in name or name.startswith("Q") or name.endswith("Integer")]
    kinds = {value.dtype for value in view(model.graph).constants.values() if value.ndim > 1}
    assert kinds <= {np.dtype(np.float32)}


@pytest.mark.parametrize("name", ["pt2e_cnn", "pt2e_mlp", "qdq_cnn"])
def test_canonical_pair_gives_a_qdq_source_back_bit_for_bit(name, request):
    source = request.getfixturevalue(name)
    clean, record = absorb(source)
    demand_clean(clean)
    assert [value.name for value in clean.graph.output] == [value.name for value in source.graph.output]
    for was, now in zip(run(source), run(plain_form(clean, record)), strict=True):
        np.testing.assert_array_equal(was, now)
    # The float graph computes the same network: no absorbed activation is missing.
    for was, now in zip(run(source), run(clean), strict=True):
        assert np.abs(was - now).max() < 0.1 * np.abs(was).max()


def test_canonical_pair_gives_a_qoperator_source_back_to_one_step_of_its_output(qoperator_cnn):
    clean, record = absorb(qoperator_cnn)
    demand_clean(clean)
    last = [values.grid.scale for values in record.activations.values()][-1]
    given, got = run(qoperator_cnn)[0], run(plain_form(clean, record))[0]
    codes = np.abs(np.rint(given / last) - np.rint(got / last))
    assert codes.max() <= 1
    assert (codes > 0).mean() <= 0.1
    assert np.abs(given - run(clean)[0]).max() < 0.1 * np.abs(given).max()


def test_weights_hold_exactly_what_the_codes_stand_for(pt2e_mlp, qdq_cnn):
    for source in (pt2e_mlp, qdq_cnn):
        clean, record = absorb(source)
        seen, was = view(clean.graph), view(source.graph)
        stored = [
            (was.constants[node.input[0]], was.constants[node.input[1]])
            for node in source.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in was.constants
        ]
        wanted = [codes.astype(np.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1)) for codes, scale in stored]
        for name, grid in record.weights.items():
            value = seen.constants[name]
            assert (grid.bits, grid.axis, grid.origin) == (8, 0, "trained")
            assert any(value.shape == item.shape and (value == item).all() for item in wanted)
            codes = value / np.asarray(grid.scales, np.float32).reshape(-1, *[1] * (value.ndim - 1))
            assert np.abs(codes - np.rint(codes)).max() < 1e-4
    assert any(np.prod(value.shape) > 512 * 512 for value in view(absorb(pt2e_mlp)[0].graph).constants.values())


def test_float_graph_is_returned_as_it_is(float_cnn):
    clean, record = absorb(float_cnn)
    assert clean is float_cnn
    assert record is None


def test_source_is_not_changed(qoperator_cnn):
    before = qoperator_cnn.SerializeToString(deterministic=True)
    absorb(qoperator_cnn)
    assert qoperator_cnn.SerializeToString(deterministic=True) == before


def test_relu_that_saturation_replaced_is_put_back(float_cnn, qdq_cnn):
    count = sum(node.op_type in ("Relu", "Clip") for node in float_cnn.graph.node)
    assert not any(node.op_type in ("Relu", "Clip") for node in qdq_cnn.graph.node)
    clean, _ = absorb(qdq_cnn)
    assert sum(node.op_type in ("Relu", "Clip") for node in clean.graph.node) == count == 2
    # Without them the numbers would be another network's.
    for node in clean.graph.node:
        if node.op_type in ("Relu", "Clip"):
            node.op_type = "Identity"
            del node.input[1:]
    assert np.abs(run(clean)[0] - run(qdq_cnn)[0]).max() > 0.1 * np.abs(run(qdq_cnn)[0]).max()


def test_biases_of_integers_are_named(qdq_cnn, qoperator_cnn):
    for source in (qdq_cnn, qoperator_cnn):
        clean, record = absorb(source)
        constants = view(clean.graph).constants
        assert len(record.bias_codes) == 4
        assert all(constants[name].dtype == np.float32 and constants[name].ndim == 1 for name in record.bias_codes)


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8], ids=["int8", "uint8"])
def test_dynamic_quantization_is_a_record_beside_the_weights(float_mlp, tmp_path, kind):
    source = onnxruntime_dynamic(float_mlp, tmp_path, weight_type=kind, reduce_range=True)
    clean, record = absorb(source)
    demand_clean(clean)
    assert set(record.dynamic) == set(record.weights)
    assert len(record.weights) == 2
    assert set(record.dynamic.values()) == {DynamicActivation(bits=8, symmetric=False, per_token=False)}
    assert all(bool(grid.zero_points) == (kind == QuantType.QUInt8) for grid in record.weights.values())
    # What is left out is the rounding of activations to 8 bits.
    given, got = run(source)[0], run(clean)[0]
    assert 0 < np.abs(given - got).max() < 0.03 * np.abs(given).max()


def test_dynamically_quantized_convolutions_and_their_biases_are_read(float_cnn, tmp_path):
    source = onnxruntime_dynamic(float_cnn, tmp_path, weight_type=QuantType.QUInt8, reduce_range=True)
    clean, record = absorb(source)
    demand_clean(clean)
    assert sum(node.op_type == "Conv" for node in clean.graph.node) == 3
    assert len(record.dynamic) == 4
    given, got = run(source)[0], run(clean)[0]
    assert 0 < np.abs(given - got).max() < 0.05 * np.abs(given).max()


class Mixture(torch.nn.Module):
    """The operators that ONNX Runtime has an integer form of, apart from those of `Cnn`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        one = self.first(x)
        other = torch.nn.functional.leaky_relu(self.second(x), 0.1)
        gated = one * torch.sigmoid(one)
        joined = torch.nn.functional.avg_pool2d(torch.cat([gated, other], 1), 2)
        return torch.softmax(torch.where(joined > 0, joined, -joined).transpose(1, 3), -1)


def test_every_integer_operator_that_onnxruntime_writes_is_read(tmp_path):
    model = exported(seeded(Mixture), torch.from_numpy(rows(IMAGE)))
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "reduce_range": True}
    operators = ["Conv", "Mul", "Sigmoid", "LeakyRelu", "Concat", "AveragePool", "Transpose", "Softmax", "Where"]
    source = onnxruntime_static(
        model,
        IMAGE,
        tmp_path,
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=operators,
        extra_options={"ForceQuantizeNoInputCheck": True},
        **kinds,
    )
    written = {node.op_type for node in source.graph.node}
    assert {f"QLinear{kind}" for kind in operators if kind != "Transpose"} <= written
    clean, record = absorb(source)
    demand_clean(clean)
    assert len(record.weights) == 2
    given, got = run(source)[0], run(plain_form(clean, record))[0]
    step = list(record.activations.values())[-1].grid.scale
    assert np.abs(np.rint(given / step) - np.rint(got / step)).max() <= 2


def optimised(model, folder):
    """Return what ONNX Runtime's own optimiser makes of a model: its fused integer operators."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def test_what_onnxruntime_has_fused_is_read_too(qdq_cnn, float_mlp, tmp_path):
    static = optimised(qdq_cnn, tmp_path)
    assert {"QLinearConv", "QLinearAdd", "QGemm"} <= {node.op_type for node in static.graph.node}
    clean, record = absorb(static)
    demand_clean(clean)
    np.testing.assert_array_equal(run(plain_form(clean, record))[0], run(plain_form(*absorb(qdq_cnn)))[0])
    dynamic = onnxruntime_dynamic(float_mlp, tmp_path)
    fused = optimised(dynamic, tmp_path)
    assert "DynamicQuantizeMatMul" in {node.op_type for node in fused.graph.node}
    clean, record = absorb(fused)
    demand_clean(clean)
    assert len(record.dynamic) == 2
    np.testing.assert_allclose(run(clean)[0], run(absorb(dynamic)[0])[0], atol=1e-5)


class Sequence(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = torch.nn.LSTM(6, 8, batch_first=False)

    def forward(self, x):
        return self.recurrent(x)[0]


@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamically_quantized_lstm_is_an_lstm_again(tmp_path, per_channel):
    module = seeded(Sequence)
    program = torch.onnx.export(module, (torch.zeros(5, 2, 6),), dynamo=True, verbose=False)
    source = onnxruntime_dynamic(
        program.model_proto,
        tmp_path,
        op_types_to_quantize=["LSTM"],
        reduce_range=True,
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
    )
    assert any(node.op_type == "DynamicQuantizeLSTM" for node in source.graph.node)
    clean, record = absorb(source)
    demand_clean(clean)
    assert len(record.dynamic) == len(record.weights) == 2
    assert {grid.axis for grid in record.weights.values()} == {1 if per_channel else None}
    given, got = run(source, shape=(5, 2, 6))[0], run(clean, shape=(5, 2, 6))[0]
    assert np.abs(given - got).max() < 0.05 * np.abs(given).max()


class Products(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(12, 600) / 4)
        self.second = torch.nn.Parameter(torch.randn(600, 600) / 25)

    def forward(self, x):
        return torch.relu(x @ self.first) @ self.second


@pytest.mark.parametrize(
    ("bits", "symmetric", "block"), [(4, True, 32), (4, False, 32), (8, True, 128), (8, False, 16)]
)
def test_packed_weights_in_blocks_are_unpacked_exactly(bits, symmetric, block):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = exported(seeded(Products), torch.from_numpy(rows(VECTOR)))
    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=block, is_symmetric=symmetric)
    quantizer.process()
    source = quantizer.model.model
    assert sum(node.op_type == "MatMulNBits" for node in source.graph.node) == 2
    clean, record = absorb(source)
    demand_clean(clean)
    assert {(grid.bits, grid.block, grid.axis) for grid in record.weights.values()} == {(bits, block, 1)}
    assert not record.activations
    np.testing.assert_allclose(run(clean)[0], run(source)[0], rtol=1e-3, atol=1e-4)


class Marked(torch.nn.Module):
    """What the lowerings write: weights of codes, a weight with a fake-quantizer, activations of both kinds."""

    def __init__(self, width):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randint(-127, 128, (width, 12), generator=generator, dtype=torch.int8))
        self.register_buffer("scale", torch.rand(width, generator=generator) / 500 + 1e-3)
        self.register_buffer("nibbles", torch.randint(-8, 8, (width, width), generator=generator, dtype=torch.int8))
        self.register_buffer("blocks", torch.rand(width, width // 4, generator=generator) / 100 + 1e-3)
        self.weight = torch.nn.Parameter(torch.randn(3, width, generator=generator))
        self.register_buffer("short", torch.randn(3, 3, generator=generator).bfloat16())

    def forward(self, x):
        mark = operators()
        zeros = torch.zeros(self.scale.shape[0], dtype=torch.int32)
        one, nought = torch.tensor(0.05), torch.tensor(3, dtype=torch.int32)
        first = mark.dequantize_weight(self.codes, self.scale, zeros, 0, 0, 8)
        x = mark.fake_quantize(x, one, nought, -1, -128, 127)
        x = torch.relu(x @ first.T)
        x = mark.dynamic_quantize(x, 8, True, True)
        points = torch.zeros_like(self.blocks, dtype=torch.int32)
        x = x @ mark.dequantize_weight(self.nibbles, self.blocks, points, 0, 4, 4).T
        last = mark.fake_quantize(
            self.weight, torch.tensor([0.02, 0.03, 0.04]), torch.zeros(3, dtype=torch.int32), 0, -63, 63
        )
        x = x @ last.T
        single = torch.ones(())
        return x @ mark.dequantize_weight(self.short, single, torch.zeros((), dtype=torch.int32), -1, 0, 16)


@pytest.mark.parametrize("width", [16, 640], ids=["small", "large"])
def test_markers_are_read_on_both_sides_of_the_folding_limits(width):
    module = Marked(width).eval()
    source = exported(module, torch.from_numpy(rows(VECTOR)), custom_translation_table=translations(), opset_version=18)
    assert sum(node.domain == DOMAIN for node in source.graph.node) == 6
    clean, record = absorb(source)
    demand_clean(clean)
    grids = {(grid.bits, grid.axis, grid.block, grid.storage) for grid in record.weights.values()}
    assert grids == {(8, 1, 0, "integer"), (4, 0, 4, "integer"), (7, 0, 0, "integer"), (16, None, 0, "bfloat16")}
    assert list(record.dynamic.values()) == [DynamicActivation(bits=8, symmetric=True, per_token=True)]
    assert record.weights[next(iter(record.dynamic))].bits == 4
    assert [values.grid for values in record.activations.values()] == [
        Grid(scale=float(np.float32(0.05)), zero_point=3, low_code=-128, high_code=127)
    ]
    constants = view(clean.graph).constants
    mark = operators()
    points = torch.zeros(module.blocks.shape, dtype=torch.int32)
    wanted = {
        (8, 0): module.codes.float() * module.scale[:, None],
        (4, 0): mark.dequantize_weight(module.nibbles, module.blocks, points, 0, 4, 4),
        (16, None): module.short.float(),
    }
    for name, grid in record.weights.items():
        if (grid.bits, grid.axis) in wanted:
            np.testing.assert_array_equal(constants[name], wanted[grid.bits, grid.axis].numpy())


def test_float_weights_behind_a_quantizer_become_what_it_rounds_them_to():
    weight = rows((4, 3), 1)
    scale = np.array([0.01, 0.02, 0.03, 0.04], np.float32)
    source = graph_of(
        [
            helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["r"], axis=0),
            helper.make_node("Gemm", ["x", "r"], ["y"], transB=1),
        ],
        {"x": (FLOAT, ["n", 3])},
        {"y": (FLOAT, ["n", 4])},
        {"w": weight, "s": scale, "z": np.zeros(4, np.int8)},
    )
    clean, record = absorb(source)
    demand_clean(clean)
    np.testing.assert_array_equal(run(clean)[0], run(source)[0])
    assert [grid.scales for grid in record.weights.values()] == [tuple(float(item) for item in scale)]


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_four_bit_weights_are_read(axis):
    import ml_dtypes

    codes = np.random.default_rng(0).integers(-8, 8, (8, 6)).astype(ml_dtypes.int4)
    scale = (rows((4, 6) if axis == 0 else (8, 3), 1) ** 2 + 0.01).astype(np.float32)
    source = graph_of(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["r"], axis=axis, block_size=2),
            helper.make_node("MatMul", ["x", "r"], ["y"]),
        ],
        {"x": (FLOAT, ["n", 8])},
        {"y": (FLOAT, ["n", 6])},
        {"w": codes, "s": scale},
    )
    clean, record = absorb(source)
    demand_clean(clean)
    np.testing.assert_array_equal(run(clean)[0], run(source)[0])
    (grid,) = record.weights.values()
    assert (grid.bits, grid.axis, grid.block) == (4, 1 - axis, 2)
    np.testing.assert_array_equal(
        np.reshape(np.float32(grid.scales), (6, 4) if axis == 0 else (8, 3)), scale.T if axis == 0 else scale
    )


def test_half_precision_scales_are_widened_and_the_interface_stays():
    codes = np.random.default_rng(0).integers(-127, 128, (4, 3)).astype(np.int8)
    half = TensorProto.FLOAT16
    source = graph_of(
        [
            helper.make_node("QuantizeLinear", ["x", "a", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "a", "z"], ["xr"]),
            helper.make_node("DequantizeLinear", ["w", "s"], ["r"], axis=0),
            helper.make_node("Gemm", ["xr", "r"], ["y"], transB=1),
        ],
        {"x": (half, [4, 3])},
        {"y": (half, [4, 4])},
        {"w": codes, "s": np.float16([0.01, 0.02, 0.03, 0.04]), "a": np.float16(0.05), "z": np.int8(0)},
    )
    clean, record = absorb(source)
    demand_clean(clean)
    assert [item.type.tensor_type.elem_type for item in (*clean.graph.input, *clean.graph.output)] == [half, half]
    inputs = {"x": rows((4, 3)).astype(np.float16)}
    given, got = (ReferenceEvaluator(model).run(None, inputs)[0] for model in (source, plain_form(clean, record)))
    np.testing.assert_allclose(got.astype(np.float32), given.astype(np.float32), rtol=2e-3, atol=2e-3)
    assert [values.grid.scale for values in record.activations.values()] == [float(np.float16(0.05))]


def pair(name, scale, tensor, made, domain=""):
    return [
        helper.make_node("QuantizeLinear", [tensor, scale, "z"], [f"{name}q"], domain=domain),
        helper.make_node("DequantizeLinear", [f"{name}q", scale, "z"], [made], domain=domain),
    ]


SMALL = {"s": np.float32(0.02), "t": np.float32(0.05), "z": np.int8(0), "w": rows((3, 3), 3)}


def test_tensor_that_is_read_quantized_and_as_float_gets_a_branch():
    source = graph_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            *pair("h", "s", "h", "r"),
            helper.make_node("MatMul", ["r", "w"], ["a"]),
            helper.make_node("Add", ["a", "h"], ["y"]),
        ],
        {"x": (FLOAT, [4, 3])},
        {"y": (FLOAT, [4, 3])},
        SMALL,
    )
    clean, record = absorb(source)
    demand_clean(clean)
    assert list(record.activations) == ["h/quantized"]
    np.testing.assert_array_equal(run(plain_form(clean, record))[0], run(source)[0])


def test_requantization_keeps_both_grids():
    source = graph_of(
        [*pair("a", "t", "x", "b"), *pair("c", "s", "b", "d"), helper.make_node("MatMul", ["d", "w"], ["y"])],
        {"x": (FLOAT, [4, 3])},
        {"y": (FLOAT, [4, 3])},
        SMALL,
    )
    clean, record = absorb(source)
    demand_clean(clean)
    assert [values.grid.scale for values in record.activations.values()] == [
        float(np.float32(0.05)),
        float(np.float32(0.02)),
    ]
    np.testing.assert_array_equal(run(plain_form(clean, record))[0], run(source)[0])


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_tensor_with_two_grids_and_output_of_a_pair_keep_their_values(domain):
    source = graph_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            *pair("a", "s", "h", "b", domain),
            *pair("c", "t", "h", "d", domain),
            helper.make_node("Add", ["b", "d"], ["e"]),
            *pair("e", "t", "e", "y", domain),
        ],
        {"x": (FLOAT, [4, 3])},
        {"y": (FLOAT, [4, 3]), "d": (FLOAT, [4, 3])},
        SMALL,
    )
    clean, record = absorb(source)
    demand_clean(clean)
    for was, now in zip(run(source), run(plain_form(clean, record)), strict=True):
        np.testing.assert_array_equal(was, now)


def test_integer_inputs_and_outputs_stay_integers():
    source = graph_of(
        [
            helper.make_node("DequantizeLinear", ["x", "s", "u"], ["r"]),
            helper.make_node("MatMul", ["r", "w"], ["h"]),
            helper.make_node("QuantizeLinear", ["h", "t", "z"], ["q"]),
            helper.make_node("Reshape", ["q", "shape"], ["y"]),
        ],
        {"x": (UINT8, [4, 3])},
        {"y": (INT8, [12])},
        SMALL | {"u": np.uint8(128), "shape": np.array([-1])},
    )
    clean, _ = absorb(source)
    demand_clean(clean)
    inputs = {"x": np.random.default_rng(0).integers(0, 256, (4, 3)).astype(np.uint8)}
    given, got = (Runner(model.SerializeToString(), is_optimized=False)(inputs)["y"] for model in (source, clean))
    np.testing.assert_array_equal(given, got)


def test_integers_that_are_moved_padded_and_joined_keep_their_grid():
    source = graph_of(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "five"], ["q"]),
            helper.make_node("MaxPool", ["q"], ["m"], kernel_shape=[2, 2]),
            helper.make_node("Pad", ["m", "pads", "five"], ["p"]),
            helper.make_node("Transpose", ["p"], ["t"], perm=[0, 1, 3, 2]),
            helper.make_node("Concat", ["p", "t"], ["c"], axis=1),
            helper.make_node("DequantizeLinear", ["c", "s", "five"], ["y"]),
        ],
        {"x": (FLOAT, [2, 1, 4, 4])},
        {"y": (FLOAT, [2, 2, 5, 5])},
        {"s": np.float32(0.02), "five": np.int8(5), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    )
    clean, record = absorb(source)
    demand_clean(clean)
    assert {values.grid.zero_point for values in record.activations.values()} == {5}
    np.testing.assert_array_equal(run(plain_form(clean, record))[0], run(source)[0])


def test_weights_that_nodes_share_stay_shared():
    codes = np.arange(-4, 5, dtype=np.int8).reshape(3, 3)
    source = graph_of(
        [
            helper.make_node("DequantizeLinear", ["c", "s"], ["v"]),
            helper.make_node("DequantizeLinear", ["c", "s"], ["w"]),
            helper.make_node("MatMul", ["x", "v"], ["h"]),
            helper.make_node("MatMul", ["h", "w"], ["y"]),
        ],
        {"x": (FLOAT, [4, 3])},
        {"y": (FLOAT, [4, 3])},
        {"c": codes, "s": np.float32(0.1)},
    )
    clean, record = absorb(source)
    assert len(record.weights) == len(clean.graph.initializer) == 1


def test_sixteen_bit_activations_are_read(float_cnn, tmp_path):
    source = onnxruntime_static(
        float_cnn,
        IMAGE,
        tmp_path,
        activation_type=QuantType.QInt16,
        weight_type=QuantType.QInt8,
        extra_options={"UseQDQContribOps": True},
    )
    clean, record = absorb(source)
    demand_clean(clean)
    assert {values.grid.low_code for values in record.activations.values()} == {-32768}
    np.testing.assert_allclose(run(clean)[0], run(source)[0], atol=1e-3)


@given(
    low=st.floats(-8, 0),
    high=st.floats(0.1, 12),
    kind=st.sampled_from([np.int8, np.uint8]),
)
@settings(max_examples=30, deadline=None)
def test_the_float_graph_never_leaves_a_grid_that_had_no_negative_values(low, high, kind):
    codes = np.iinfo(kind)
    scale = np.float32((high - low) / 255)
    zero = kind(np.clip(round(codes.min - low / float(scale)), codes.min, codes.max))
    source = graph_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        {"x": (FLOAT, [4, 3])},
        {"y": (FLOAT, [4, 3])},
        {"w": rows((3, 3), 3), "s": scale, "z": zero},
    )
    clean, record = absorb(source)
    (values,) = record.activations.values()
    assert (values.grid.zero_point, values.grid.low_code) == (int(zero), codes.min)
    answer = run(clean)[0]
    if int(zero) == codes.min:
        assert answer.min() >= 0
        assert {node.op_type for node in clean.graph.node} & {"Relu", "Clip"}
    else:
        assert {node.op_type for node in clean.graph.node} == {"MatMul"}
    np.testing.assert_array_equal(run(plain_form(clean, record))[0], run(source)[0])


# What cannot be read


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [helper.make_node("QAttention", ["x", "w"], ["y"], domain="com.microsoft", name="att")],
            "'att' .QAttention. cannot be read",
        ),
        (
            [
                helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                helper.make_node("ReduceMax", ["q"], ["m"], name="top", keepdims=0),
                helper.make_node("DequantizeLinear", ["m", "s", "z"], ["y"]),
            ],
            "'top' .ReduceMax. cannot be read: it computes on integers",
        ),
        (
            [
                helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "t", "z"], ["y"], name="other"),
            ],
            "'other' .DequantizeLinear. cannot be read: its scale or zero-point differs",
        ),
        (
            [
                helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
                helper.make_node("QuantizeLinear", ["x", "m", "z"], ["q"], name="live"),
                helper.make_node("DequantizeLinear", ["q", "m", "z"], ["y"]),
            ],
            "'live' .QuantizeLinear. cannot be read: its input 'm' is not a constant",
        ),
        (
            [
                helper.make_node("QuantizeLinear", ["x", "each", "zs"], ["q"], name="channels"),
                helper.make_node("DequantizeLinear", ["q", "each", "zs"], ["y"]),
            ],
            "'channels' .QuantizeLinear. cannot be read: an activation with several scales",
        ),
        (
            [
                helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "p", "o"]),
                helper.make_node("MatMulInteger", ["q", "c", "o"], ["m"], name="raw"),
                helper.make_node("Cast", ["m"], ["y"], to=FLOAT),
            ],
            "'raw' .MatMulInteger. cannot be read: its sums are not multiplied",
        ),
        (
            [
                helper.make_node("DynamicQuantize", ["x"], ["d"], domain=DOMAIN, bits=8, symmetric=1, per_token=1),
                helper.make_node("Exp", ["d"], ["y"], name="e"),
            ],
            "node 'e' .Exp. reads an activation that is quantized in each inference",
        ),
    ],
)
def test_what_is_not_understood_is_named(nodes, message):
    more = {"each": np.float32([0.1, 0.2, 0.3]), "zs": np.zeros(3, np.int8), "c": np.ones((3, 3), np.int8)}
    source = graph_of(nodes, {"x": (FLOAT, [4, 3])}, {"y": (FLOAT, None)}, SMALL | more)
    with pytest.raises(ModelError, match=message):
        absorb(source)


def test_quantization_inside_a_branch_is_named():
    inner = [*pair("a", "s", "x", "b")]
    inner[0].name = "deep"
    body = helper.make_graph(inner, "then", [], [helper.make_tensor_value_info("b", FLOAT, [4, 3])])
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["i"])], "else", [], [helper.make_tensor_value_info("i", FLOAT, [4, 3])]
    )
    choice = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other, name="choice")
    source = graph_of([choice], {"x": (FLOAT, [4, 3])}, {"y": (FLOAT, [4, 3])}, SMALL | {"c": np.bool_(1)})
    with pytest.raises(ModelError, match=r"'deep' .QuantizeLinear. quantizes inside a branch or loop .choice."):
        absorb(source)


# Through simplification


def slimmed(model):
    import onnxslim

    return onnxslim.slim(model)


@pytest.mark.parametrize("name", ["pt2e_cnn", "pt2e_mlp", "qdq_cnn", "qoperator_cnn"])
def test_names_and_weights_survive_simplification(name, request):
    clean, record = absorb(request.getfixturevalue(name))
    simpler, moved = release(slimmed(protect(clean, record)), record, clean)
    onnx.checker.check_model(simpler)
    assert [value.name for value in simpler.graph.output] == [value.name for value in clean.graph.output]
    assert moved.activations == record.activations
    assert len(moved.weights) == len(record.weights)
    for before, after in zip(run(plain_form(clean, record)), run(plain_form(simpler, moved)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_scales_follow_weights_that_simplification_transposes(float_mlp, tmp_path):
    codes = np.random.default_rng(0).integers(-127, 128, (5, 3)).astype(np.int8)
    scale = np.arange(1, 6, dtype=np.float32) / 64
    source = graph_of(
        [
            helper.make_node("DequantizeLinear", ["c", "s"], ["w"], axis=0),
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ],
        {"x": (FLOAT, [4, 3])},
        {"y": (FLOAT, [4, 5])},
        {"c": codes, "s": scale},
        opset=18,
    )
    clean, record = absorb(source)
    simpler, moved = release(slimmed(protect(clean, record)), record, clean)
    assert [node.op_type for node in simpler.graph.node] == ["MatMul"]
    ((name, grid),) = moved.weights.items()
    assert grid.axis == 1
    assert grid.scales == tuple(float(item) for item in scale)
    np.testing.assert_array_equal(view(simpler.graph).constants[name], (codes * scale[:, None]).T)


def test_normalisation_that_is_folded_into_weights_multiplies_their_scales():
    codes = np.random.default_rng(0).integers(-127, 128, (4, 2, 3, 3)).astype(np.int8)
    codes[1] = 0
    constants = {"c": codes, "s": np.float32(0.01), "mean": rows((4,), 1), "gain": rows((4,), 2), "b": rows((4,), 3)}
    source = graph_of(
        [
            helper.make_node("DequantizeLinear", ["c", "s"], ["w"]),
            helper.make_node("Conv", ["x", "w"], ["h"]),
            helper.make_node("BatchNormalization", ["h", "gain", "b", "mean", "variance"], ["y"]),
        ],
        {"x": (FLOAT, [2, 2, 5, 5])},
        {"y": (FLOAT, [2, 4, 3, 3])},
        constants | {"variance": np.float32([1, 2, 3, 4])},
        opset=18,
    )
    clean, record = absorb(source)
    simpler, moved = release(slimmed(protect(clean, record)), record, clean)
    assert [node.op_type for node in simpler.graph.node] == ["Conv"]
    ((name, grid),) = moved.weights.items()
    assert grid.axis == 0
    assert all(scale > 0 for scale in grid.scales)
    stored = view(simpler.graph).constants[name]
    now = np.abs(stored / np.float32(grid.scales).reshape(-1, 1, 1, 1))
    np.testing.assert_allclose(now, np.abs(codes), atol=1e-4)
    np.testing.assert_allclose(run(simpler)[0], run(source)[0], rtol=1e-4, atol=1e-5)


def test_lost_tensor_and_changed_weights_are_errors(pt2e_cnn):
    clean, record = absorb(pt2e_cnn)
    changed = onnx.ModelProto()
    changed.CopyFrom(protect(clean, record))
    name = next(iter(record.weights))
    for item in changed.graph.initializer:
        if item.name == name:
            item.CopyFrom(numpy_helper.from_array(rows(numpy_helper.to_array(item).shape), name))
    with pytest.raises(FidelityError, match=f"changed the quantized weights '{name}'"):
        release(changed, record, clean)
    renamed = onnx.ModelProto()
    renamed.CopyFrom(clean)
    lost = list(record.activations)[1]
    for node in renamed.graph.node:
        for names in (node.input, node.output):
            names[:] = ["other" if item == lost else item for item in names]
    with pytest.raises(FidelityError, match=f"removed the quantized tensor '{lost}'"):
        release(renamed, record, clean)


# Short floats


def test_weights_that_a_short_float_holds_are_found():
    exact = rows((4, 4)).astype(np.float16).astype(np.float32)
    brain = torch.from_numpy(rows((4, 4), 1) * np.float32(1e6)).bfloat16().float().numpy()
    huge = np.full((2, 2), 1e6, np.float32)
    nodes = [helper.make_node("Sum", ["half", "brain", "full", "huge", "flat"], ["y"])]
    constants = {"half": exact, "brain": brain, "full": rows((4, 4), 2), "huge": huge, "flat": exact[0]}
    model = graph_of(nodes, {}, {"y": (FLOAT, None)}, constants)
    assert set(short_float_weights(model, "float16")) == {"half"}
    found = short_float_weights(model, "bfloat16")
    assert set(found) == {"brain"}
    assert (found["brain"].bits, found["brain"].storage, found["brain"].scales) == (16, "bfloat16", ())
