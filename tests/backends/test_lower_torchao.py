"""torchao's quantized weights: what was bought is still there after export, whatever the size of the tensor."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx import TensorProto, numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

warnings.filterwarnings("ignore", message=".*Enum subclass.*")
from torchao.quantization import (  # noqa: E402
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor  # noqa: E402
from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig  # noqa: E402

from edgedeploy.errors import ModelError  # noqa: E402
from edgedeploy.prepare.lower.affine_blocks import stored_weights  # noqa: E402
from edgedeploy.prepare.lower.torchao_tensors import lower_module  # noqa: E402
from edgedeploy.prepare.markers import operators, translations  # noqa: E402

SMALL, LARGE = 64, 608
EIGHT_BY_FOUR = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
SCALE = torch.tensor([[0.03]])
# name → configuration, kind, bits of the marker, block, largest error relative to the quantization error.
CONFIGS = {
    "int8": (Int8WeightOnlyConfig(), "weight-only int8", 8, 0, 1e-3),
    "int8 per tensor": (Int8WeightOnlyConfig(granularity=PerTensor()), "weight-only int8", 8, 0, 1e-3),
    "intx 8": (IntxWeightOnlyConfig(weight_dtype=torch.int8), "weight-only int8", 8, 0, 0),
    "intx 4 groups": (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "weight-only int4", 4, 32, 0),
    "intx 4 asymmetric": (
        IntxWeightOnlyConfig(torch.int4, PerGroup(16), MappingType.ASYMMETRIC), "weight-only int4", 4, 16, 0,
    ),
    "intx 2": (IntxWeightOnlyConfig(torch.int2, PerAxis(0)), "weight-only int4", 4, 0, 0),
    "dynamic asymmetric": (
        Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC), "dynamic int8", 8, 0, 1e-3,
    ),
    "dynamic per tensor": (
        Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC, granularity=PerTensor()),
        "dynamic int8", 8, 0, 1e-3,
    ),
    "dynamic 7 bits": (
        Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC, reduce_range=True),
        "dynamic int8", 8, 0, 1e-3,
    ),
    # torchao divides the largest value by 127.5 and every runtime by 127: another grid, as fine.
    "dynamic symmetric": (Int8DynamicActivationInt8WeightConfig(), "dynamic int8", 8, 0, 1.5),
    "8da4w": (EIGHT_BY_FOUR, "int8 activations, int4 weights", 4, 32, 1e-3),
    "8da8w": (Int8DynamicActivationIntxWeightConfig(weight_granularity=PerAxis(0)), "dynamic int8", 8, 0, 1e-3),
    "static": (
        Int8StaticActivationInt8WeightConfig(act_quant_scale=SCALE, granularity=PerTensor()),
        "static int8", 8, 0, 1e-3,
    ),
    "static asymmetric": (
        Int8StaticActivationInt8WeightConfig(
            act_quant_scale=SCALE,
            act_quant_zero_point=torch.tensor([[5]], dtype=torch.int8),
            granularity=[PerTensor(), PerRow()],
            act_mapping_type=MappingType.ASYMMETRIC,
        ),
        "static int8", 8, 0, 1e-3,
    ),
    "float8": (Float8WeightOnlyConfig(), "float8", 8, 0, 0),
    "QAT 8da4w": (QATConfig(EIGHT_BY_FOUR, step="prepare"), "QAT int8", 4, 32, 1e-3),
    "QAT weights": (QATConfig(IntxWeightOnlyConfig(torch.int8), step="prepare"), "QAT int8", 8, 0, 0),
}  # fmt: skip


def mlp(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width)).eval()


def quantized(name, width=SMALL):
    module = mlp(width)
    quantize_(module, CONFIGS[name][0])
    return module


def exported(module, rows=4, **options):
    vector = torch.randn(rows, 64)
    program = torch.export.export(module, (vector,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    written = torch.onnx.export(program, dynamo=True, opset_version=18, external_data=False, verbose=False, **options)
    return written.model_proto.graph


def constants(graph):
    return {item.name: item for item in graph.initializer}


def weight_markers(graph):
    return [node for node in graph.node if node.op_type == "DequantizeWeight"]


def settings_of(node):
    return {item.name: item.i for item in node.attribute}


@pytest.mark.parametrize("name", CONFIGS)
def test_lowered_module_computes_what_torchao_computes(name):
    _, kind, bits, block, allowed = CONFIGS[name]
    original, vector = quantized(name), torch.randn(40, 64)
    with torch.no_grad():
        expected = original(vector)
        lowered, found = lower_module(original)
        error = (lowered(vector) - expected).abs().max()
        rounding = (expected - mlp(SMALL)(vector)).abs().max()
        assert torch.equal(original(vector), expected)
    assert rounding > 0
    assert error <= allowed * rounding
    assert [item.kind for item in found] == [kind]
    assert found[0].layers == ("0", "2")
    stored = lowered[0].weight_stored
    assert stored.layout[1:] == (block, bits)
    assert stored.codes.dtype in {torch.int8, torch.float8_e4m3fn}


def test_symmetric_dynamic_activations_are_noted_as_changed():
    assert "0.4 %" in lower_module(quantized("dynamic symmetric"))[1][0].note
    assert lower_module(quantized("dynamic asymmetric"))[1][0].note == ""


@pytest.mark.parametrize(
    ("name", "width"), [("int8", SMALL), ("int8", LARGE), ("8da4w", SMALL), ("8da4w", LARGE), ("float8", SMALL)]
)
def test_onnx_holds_the_very_integers_at_any_size(name, width):
    original = quantized(name, width)
    graph = exported(lower_module(original)[0], custom_translation_table=translations())
    stored = constants(graph)
    markers = weight_markers(graph)
    wanted = [original[0].weight, original[2].weight]
    assert len(markers) == 2
    for node, weight in zip(markers, wanted, strict=True):
        codes = stored[node.input[0]]
        if name == "float8":
            assert codes.data_type == TensorProto.FLOAT8E4M3FN
            assert codes.raw_data == weight.qdata.view(torch.uint8).numpy().tobytes()
        else:
            assert numpy_helper.to_array(codes).tobytes() == weight.qdata.numpy().tobytes()
        assert numpy_helper.to_array(stored[node.input[1]]).ravel().tolist() == weight.scale.ravel().tolist()
        assert settings_of(node)["bits"] == CONFIGS[name][2]
    # Nothing was folded: no float constant is as large as a weight.
    weights = min(weight.numel() for weight in wanted)
    assert all(numpy_helper.to_array(item).size < weights for item in graph.initializer if item.data_type == 1)
    assert sum(node.op_type == "DynamicQuantize" for node in graph.node) == (2 if name == "8da4w" else 0)


@pytest.mark.peers
def test_plain_exporter_folds_small_int8_weights_to_float32():
    kinds = {item.data_type for item in exported(quantized("int8")).initializer if len(item.dims) == 2}
    assert kinds == {TensorProto.FLOAT}


@pytest.mark.peers
def test_plain_exporter_fails_on_dynamic_int8():
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="_int_mm"):
        exported(quantized("dynamic symmetric"))


@pytest.mark.peers
def test_plain_exporter_loses_that_weights_have_4_bits():
    graph = exported(quantized("8da4w"))
    assert len(graph.node) > 20
    assert not weight_markers(graph)


def test_qat_that_was_converted_and_that_was_not_give_the_same_integers():
    prepared = mlp(SMALL)
    quantize_(prepared, QATConfig(EIGHT_BY_FOUR, step="prepare"))
    converted = copy.deepcopy(prepared)
    quantize_(converted, QATConfig(EIGHT_BY_FOUR, step="convert"))
    first, second = (lower_module(module) for module in (prepared, converted))
    for index in (0, 2):
        assert torch.equal(first[0][index].weight_stored.codes, second[0][index].weight_stored.codes)
        assert torch.equal(first[0][index].weight_stored.scale, second[0][index].weight_stored.scale)
    assert [item.kind for item in (*first[1], *second[1])] == ["QAT int8", "int8 activations, int4 weights"]
    assert type(first[0][0]).__name__ == "Linear"


def test_fake_quantizers_that_are_switched_off_leave_a_float_layer():
    module = mlp(SMALL)
    quantize_(module, QATConfig(EIGHT_BY_FOUR, step="prepare"))
    for part in module.modules():
        if isinstance(part, FakeQuantizedLinear):
            part.weight_fake_quantizer.enabled = part.activation_fake_quantizer.enabled = False
    lowered, found = lower_module(module)
    vector = torch.randn(3, 64)
    assert torch.equal(lowered(vector), mlp(SMALL)(vector))
    assert type(lowered[0]) is nn.Linear
    assert found == ()


def test_embedding_and_its_qat_keep_their_integers():
    for config in (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), QATConfig(
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare"
    )):  # fmt: skip
        torch.manual_seed(0)
        table = nn.Sequential(nn.Embedding(20, 64))
        quantize_(table, config, lambda part, _: isinstance(part, nn.Embedding))
        words = torch.tensor([[1, 7, 19]])
        lowered, found = lower_module(table)
        assert torch.equal(lowered(words), table(words))
        assert lowered[0].weight_stored.layout == (0, 32, 4)
        assert found[0].layers == ("0",)


def test_pointwise_convolution_is_kept_and_a_scale_for_each_kernel_position_refused():
    def net(size):
        module = nn.Sequential(nn.Conv2d(8, 8, size))
        quantize_(module, IntxWeightOnlyConfig(torch.int8), lambda part, _: isinstance(part, nn.Conv2d))
        return module

    module, image = net(1), torch.randn(2, 8, 6, 6)
    lowered, _ = lower_module(module)
    assert torch.allclose(lowered(image), module(image), atol=1e-6)
    with pytest.raises(ModelError, match=r"0.weight has the shape 8x8x3x3 .* one scale per output channel"):
        lower_module(net(3))


def test_tied_weights_are_stored_once():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(module, Int8WeightOnlyConfig())
    module[1].weight = module[0].weight
    lowered, _ = lower_module(module)
    assert lowered[0].weight_stored is lowered[1].weight_stored
    graph = exported(lowered, custom_translation_table=translations())
    assert sum(item.data_type == TensorProto.INT8 for item in graph.initializer) == 1


def test_unwrapped_subclasses_are_wrapped_again_and_read():
    from torchao.utils import unwrap_tensor_subclass

    module, vector = quantized("8da4w"), torch.randn(3, 64)
    expected = module(vector)
    lowered, found = lower_module(unwrap_tensor_subclass(module))
    assert torch.allclose(lowered(vector), expected, atol=1e-6)
    assert found[0].kind == "int8 activations, int4 weights"


def test_half_precision_model_stays_in_half_precision():
    module = mlp(SMALL).to(torch.bfloat16)
    quantize_(module, Int8WeightOnlyConfig())
    vector = torch.randn(3, 64, dtype=torch.bfloat16)
    lowered, _ = lower_module(module)
    assert lowered(vector).dtype == torch.bfloat16
    assert torch.allclose(lowered(vector).float(), module(vector).float(), atol=0.02)
    assert lowered.float()(vector.float()).dtype == torch.float32


def pretend(name):
    """Return a layer whose weight is of a torchao class that cannot be made without a GPU."""

    def dispatch(cls, function, types, given=(), named=None):
        return torch.zeros(8, 8)

    kind = type(
        name, (torch.Tensor,), {"__torch_dispatch__": classmethod(dispatch), "__module__": "torchao.quantization"}
    )
    layer = nn.Linear(8, 8)
    del layer.weight
    layer.weight = torch.Tensor._make_wrapper_subclass(kind, (8, 8), dtype=torch.float32)
    layer._buffers["weight"] = layer.__dict__.pop("weight")
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Int4Tensor", "packed for a GPU's kernel; use IntxWeightOnlyConfig"),
        ("Int4TilePackedTo4dTensor", "packed for a GPU's kernel"),
        ("IntxOpaqueTensor", "packed for this CPU's kernel; leave intx_packing_format"),
        ("Sparse2x4CUTLASSFloat8Tensor", "sparse kernel; give the dense weights"),
        ("NF4Tensor", "no linear grid"),
        ("SomethingNewTensor", "does not know"),
    ],
)
def test_weights_that_cannot_be_read_are_refused_by_name(monkeypatch, name, sentence):
    monkeypatch.setattr("edgedeploy.prepare.lower.private_copy.private_copy", lambda module: module)
    with pytest.raises(ModelError, match=f"weights 0.weight are a torchao {name}, which .*{sentence}"):
        lower_module(pretend(name))


def test_float8_inputs_are_refused():
    module = quantized("float8")
    module[0].weight.act_quant_kwargs = object()
    with pytest.raises(ModelError, match=r"0.weight computes with float8 inputs"):
        lower_module(module)


def test_input_quantized_in_an_unknown_layer_is_refused():
    class Doubled(nn.Linear):
        def forward(self, vector):
            return super().forward(vector) * 2

    module = nn.Sequential(Doubled(64, 32))
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ModelError, match=r"input of a Doubled, and edgedeploy knows that of nn.Linear only"):
        lower_module(module)


def test_float_model_is_returned_as_it_is():
    module = mlp(SMALL)
    assert lower_module(module) == (module, ())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    groups=st.integers(1, 6),
    width=st.integers(1, 5),
    height=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_any_blocks_of_a_matrix_mean_the_same_in_the_marker(rows, groups, width, height, seed):
    from torchao.quantization.quant_primitives import dequantize_affine

    draw = torch.Generator().manual_seed(seed)
    shape = (rows * height, groups * width)
    codes = torch.randint(-128, 128, shape, generator=draw).to(torch.int8)
    scale = torch.rand((rows, groups), generator=draw) + 0.01
    zero = torch.randint(-5, 6, (rows, groups), generator=draw).to(torch.int8)
    stored = stored_weights(codes, (height, width), scale, zero, bits=8, what="w")
    expected = dequantize_affine(codes, (height, width), scale, zero, torch.int8, -128, 127)
    assert torch.equal(operators().dequantize_weight(*stored), expected)
