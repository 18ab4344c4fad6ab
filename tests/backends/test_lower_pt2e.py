"""PT2E and fake quantization: every grid and every integer of the source is in the lowered program and in its ONNX."""

import functools
import json
import warnings
import zipfile

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
from onnx import TensorProto, numpy_helper  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

warnings.filterwarnings("ignore", message=".*Enum subclass.*")
from torchao.quantization.pt2e.fake_quantize import FakeQuantize  # noqa: E402
from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import (  # noqa: E402
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as arm  # noqa: E402
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: E402
from torchao.testing.pt2e._xnnpack_quantizer import (  # noqa: E402
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)

from edgedeploy.errors import ModelError, UntrustedPickle  # noqa: E402
from edgedeploy.prepare.archive import load_archive  # noqa: E402
from edgedeploy.prepare.lower.pt2e import lower_module, lower_program  # noqa: E402
from edgedeploy.prepare.markers import operators, translations  # noqa: E402

SMALL, LARGE = 16, 600
MARKERS = operators()


class Net(nn.Module):
    """A convolution, a sum that is read twice, and linear layers on both sides of the exporter's folding limits."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Linear(8, width)
        self.second = nn.Linear(width, width)

    def forward(self, image):
        stem = functional.relu(self.stem(image))
        pooled = (stem + stem * 0.5).mean((2, 3))
        return self.second(functional.relu(self.first(pooled)))


class SymmetricQuantizer(Quantizer):
    """Quantize linear layers as a training for TensorRT would: every zero-point 0, the bias in int32."""

    def annotate(self, model):
        fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver)
        spec = QuantizationSpec(
            dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=torch.per_tensor_symmetric,
            observer_or_fake_quant_ctr=fake,
        )  # fmt: skip
        for node in model.graph.nodes:
            if node.target is not torch.ops.aten.linear.default:
                continue
            given, weight, bias = node.args
            derived = DerivedQuantizationSpec(
                derived_from=[(given, node), (weight, node)],
                derive_qparams_fn=self._product,
                dtype=torch.int32,
                quant_min=-(2**31),
                quant_max=2**31 - 1,
                qscheme=torch.per_tensor_symmetric,
            )
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map={given: spec, weight: spec, bias: derived}, _annotated=True
            )
        return model

    @staticmethod
    def _product(observers):
        scales = [observer.calculate_qparams()[0] for observer in observers]
        return scales[0] * scales[1], torch.zeros(1, dtype=torch.int32)

    def validate(self, model):
        pass


def xnnpack(**options):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **options))


QUANTIZERS = {
    "xnnpack": (prepare_pt2e, xnnpack),
    "xnnpack QAT": (prepare_qat_pt2e, functools.partial(xnnpack, is_qat=True)),
    "xnnpack dynamic": (prepare_pt2e, functools.partial(xnnpack, is_dynamic=True)),
    "x86": (
        prepare_pt2e,
        lambda: x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config()),
    ),
    "x86 dynamic": (
        prepare_pt2e,
        lambda: x86.X86InductorQuantizer().set_global(
            x86.get_default_x86_inductor_quantization_config(is_dynamic=True, reduce_range=True)
        ),
    ),
    "arm QAT": (
        prepare_qat_pt2e,
        lambda: arm.ArmInductorQuantizer().set_global(arm.get_default_arm_inductor_quantization_config(is_qat=True)),
    ),
    "symmetric QAT": (prepare_qat_pt2e, SymmetricQuantizer),
}


def image(rows=4, seed=1):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prepared(name, width=SMALL):
    torch.manual_seed(0)
    prepare, quantizer = QUANTIZERS[name]
    captured = torch.export.export(
        Net(width).eval(), (image(),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    graph = prepare(captured, quantizer())
    for seed in range(3):
        graph(image(seed=seed))
    return graph


@functools.cache
def converted(name, width=SMALL):
    return convert_pt2e(prepared(name, width))


def program_of(module, example=None):
    example = image() if example is None else example
    return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def onnx_of(program, **options):
    written = torch.onnx.export(program, dynamo=True, opset_version=18, external_data=False, verbose=False, **options)
    return written.model_proto.graph


def calls(program, target):
    return [node for node in program.graph.nodes if node.target is target.default]


def stored(program, node):
    """Return the tensor that a placeholder stands for."""
    return program.state_dict[{**program.graph_signature.inputs_to_parameters}[node.name]]


@pytest.mark.parametrize(
    ("name", "kind", "weights", "grids", "dynamic"),
    [
        ("xnnpack", "static int8", 3, 7, 0),
        ("xnnpack QAT", "static int8", 3, 7, 0),
        ("xnnpack dynamic", "dynamic int8", 2, 0, 2),
        ("x86", "static int8", 3, 3, 0),
        ("x86 dynamic", "dynamic int8", 3, 0, 3),
        ("arm QAT", "static int8", 3, 3, 0),
        ("symmetric QAT", "static int8", 2, 2, 0),
    ],
)
def test_lowered_program_computes_what_was_converted(name, kind, weights, grids, dynamic):
    program = program_of(converted(name))
    before = str(program.graph)
    lowered, found = lower_program(program)
    with torch.no_grad():
        expected = converted(name)(image(100, 9))
        error = (lowered.module()(image(100, 9)) - expected).abs()
    # The marker divides by the step, as ONNX does, and torch multiplies by 1 / step: ties may take the other code.
    assert (error > 1e-6).float().mean() < 0.02
    assert error.max() < 0.05 * expected.abs().max()
    assert [item.kind for item in found] == [kind]
    assert len(calls(lowered, MARKERS.dequantize_weight)) == weights == len(found[0].layers)
    assert len(calls(lowered, MARKERS.fake_quantize)) == grids
    assert len(calls(lowered, MARKERS.dynamic_quantize)) == dynamic
    assert not any("quantized_decomposed" in str(node.target) for node in lowered.graph.nodes)
    assert str(program.graph) == before
    assert lower_program(lowered) == (lowered, ())


def test_integers_and_grids_are_the_very_ones_of_the_source():
    graph = converted("xnnpack")
    lowered, _ = lower_program(program_of(graph))
    integers = [value for name, value in graph.named_buffers() if value.dtype == torch.int8 and value.ndim > 1]
    markers = calls(lowered, MARKERS.dequantize_weight)
    assert sorted(stored(lowered, node.args[0]).flatten().tolist() for node in markers) == sorted(
        value.flatten().tolist() for value in integers
    )
    assert all(node.args[3:] == (0, 0, 8) for node in markers)
    trained = {
        (node.args[1], node.args[2], node.args[3], node.args[4])
        for node in graph.graph.nodes
        if node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default
    }
    kept = {
        (stored(lowered, node.args[1]).item(), stored(lowered, node.args[2]).item(), *node.args[4:])
        for node in calls(lowered, MARKERS.fake_quantize)
    }
    wanted = {(torch.tensor(scale).item(), *rest) for scale, *rest in trained}
    assert kept == wanted


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_onnx_keeps_integers_at_any_size(width):
    module = converted("xnnpack dynamic", width)
    lowered, _ = lower_program(program_of(module))
    graph = onnx_of(lowered, custom_translation_table=translations())
    names = [node.input[0] for node in graph.node if node.op_type == "DequantizeWeight"]
    constants = {item.name: item for item in graph.initializer}
    assert len(names) == 2
    shapes = sorted(tuple(constants[name].dims) for name in names)
    assert shapes == [(width, 8), (width, width)]
    assert all(constants[name].data_type == TensorProto.INT8 for name in names)
    integers = {value.numpy().tobytes() for _, value in module.named_buffers() if value.dtype == torch.int8}
    assert {numpy_helper.to_array(constants[name]).tobytes() for name in names} == integers
    assert sum(node.op_type == "DynamicQuantize" for node in graph.node) == 2


def test_symmetric_qat_has_no_zero_point_and_its_trained_scales_and_biases_in_onnx():
    module = converted("symmetric QAT", LARGE)
    program = program_of(module)
    lowered, _ = lower_program(program)
    graph = onnx_of(lowered, custom_translation_table=translations())
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    marked = [node for node in graph.node if node.domain == "edgedeploy"]
    assert len(marked) == 4
    assert all(not constants[node.input[2]].any() for node in marked)
    trained = {
        torch.tensor(node.args[1]).item()
        for node in program.graph.nodes
        if "dequantize_per_tensor" in str(node.target) and node.args[5] == torch.int8
    }
    assert {constants[node.input[1]].item() for node in marked} == trained
    # int32 biases are exact in float32 here, and the scale of input times weight gives back their codes.
    biases = [
        (program.state_dict.get(program.graph_signature.inputs_to_buffers.get(node.args[0].name)), node.args[1])
        for node in program.graph.nodes
        if "dequantize_per_tensor" in str(node.target) and node.args[5] == torch.int32
    ]
    assert len(biases) == 2
    vectors = [value for value in constants.values() if value.ndim == 1 and value.size == LARGE]
    for codes, scale in biases:
        again = [(vector.astype("float64") / scale).round().tolist() for vector in vectors]
        assert codes.tolist() in again


def test_prepared_graph_is_converted_and_known_to_be_trained():
    module, found = lower_module(prepared("arm QAT"))
    _, later = lower_program(program_of(module))
    assert torch.equal(module(image()), converted("arm QAT")(image()))
    assert found == ()
    assert [item.kind for item in later] == ["QAT int8"]


def test_prepared_graph_inside_a_module_is_converted_in_its_place():
    wrapper = nn.Sequential(prepared("x86 dynamic"), nn.ReLU())
    module, _ = lower_module(wrapper)
    assert type(module) is nn.Sequential
    assert torch.equal(module(image()), functional.relu(converted("x86 dynamic")(image())))


def test_prepared_graph_that_saw_no_sample_is_refused():
    captured = torch.export.export(Net(SMALL).eval(), (image(),)).module()
    with pytest.raises(ModelError, match="observer activation_post_process_0 has seen no sample; run calibration"):
        lower_module(prepare_pt2e(captured, xnnpack()))


def test_float_module_and_program_are_returned_as_they_are():
    module = Net(SMALL).eval()
    assert lower_module(module) == (module, ())
    program = program_of(module)
    assert lower_program(program) == (program, ())


# ---- .pt2


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    torch.export.save(program_of(converted("xnnpack")), path)
    return path


def test_saved_program_is_lowered_like_the_module(archive):
    lowered, found = lower_program(load_archive(archive, trust_pickle=False))
    same, _ = lower_program(program_of(converted("xnnpack")))
    assert torch.equal(lowered.module()(image()), same.module()(image()))
    assert [item.kind for item in found] == ["static int8"]
    assert len(found[0].layers) == 3


@pytest.mark.parametrize(
    "target", ["torch.ops.aten.from_file.default", "torch.ops.torchao.swizzle_mm.default", "torch.ops.torchao.__x__"]
)
def test_operator_that_is_more_than_arithmetic_is_refused(tmp_path, archive, target):
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("models/model.json"):
                program = json.loads(data)
                program["graph_module"]["graph"]["nodes"][0]["target"] = target
                data = json.dumps(program).encode()
            new.writestr(name, data)
    with pytest.raises(UntrustedPickle, match=r"none of PyTorch's own"):
        load_archive(tmp_path / "bad.pt2", trust_pickle=False)


def test_weights_of_a_tensor_class_in_a_pt2_are_refused_as_pickled(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = nn.Sequential(nn.Linear(16, 16)).eval()
    quantize_(module, Int8WeightOnlyConfig())
    program = program_of(module, torch.randn(4, 16))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(UntrustedPickle, match="is pickled"):
        load_archive(tmp_path / "m.pt2", trust_pickle=False)
    with pytest.raises(ModelError, match="name the Python factory of the quantized model instead"):
        lower_program(program)


def test_integers_of_a_tensor_class_are_read_out_of_a_program():
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    module = nn.Sequential(nn.Linear(64, 32)).eval()
    quantize_(module, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))
    vector = torch.randn(4, 64)
    lowered, found = lower_program(program_of(module, vector))
    assert torch.equal(lowered.module()(vector), module(vector))
    (marker,) = calls(lowered, MARKERS.dequantize_weight)
    assert marker.args[3:] == (0, 32, 4)
    assert torch.equal(stored(lowered, marker.args[0]), module[0].weight.qdata)
    assert found[0].kind == "int8 activations, int4 weights"


# ---- fake quantization of aten


class Fake(nn.Module):
    def __init__(self, width, *, low=-127):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(width, width)
        self.low = low
        self.register_buffer("step", torch.rand(width) * 0.001 + 0.0005)
        self.register_buffer("zero", torch.zeros(width, dtype=torch.int32))
        self.register_buffer("input_step", torch.tensor([0.05]))
        self.register_buffer("input_zero", torch.tensor([3], dtype=torch.int32))

    def forward(self, vector):
        vector = torch.fake_quantize_per_tensor_affine(vector, self.input_step, self.input_zero, -128, 127)
        weight = torch.fake_quantize_per_channel_affine(self.inner.weight, self.step, self.zero, 0, self.low, 127)
        hidden = functional.linear(vector, weight, self.inner.bias)
        return torch.fake_quantize_per_tensor_affine(hidden, 0.02, 0, -128, 127)


def fake_program(width, **options):
    module = Fake(width, **options).eval()
    lower_module(module)
    return module, program_of(module, torch.randn(4, width))


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_fake_quantized_weights_become_the_integers_that_they_stand_for(width):
    module, program = fake_program(width)
    lowered, found = lower_program(program)
    vector = torch.randn(5, width)
    # Both round x / scale, but torch multiplies by 1 / scale: a value between two codes may take the other one.
    error = (lowered.module()(vector) - module(vector)).abs()
    assert (error > 1e-6).float().mean() < 0.001
    assert found[0].kind == "QAT int8"
    (marker,) = calls(lowered, MARKERS.dequantize_weight)
    weight = torch.fake_quantize_per_channel_affine(module.inner.weight, module.step, module.zero, 0, -127, 127)
    codes, scale, zero = (stored(lowered, node) for node in marker.args[:3])
    assert codes.dtype == torch.int8
    assert torch.equal(MARKERS.dequantize_weight(codes, scale, zero, *marker.args[3:]), weight)
    graph = onnx_of(lowered, custom_translation_table=translations())
    kinds = [item.data_type for item in graph.initializer if len(item.dims) == 2]
    assert kinds == [TensorProto.INT8]
    assert sum(node.op_type == "FakeQuantize" for node in graph.node) == 2


@pytest.mark.peers
def test_plain_exporter_fails_on_weights_between_minus_127_and_127():
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"Got \(-127, 127\)"):
        onnx_of(fake_program(SMALL)[1])


@pytest.mark.peers
def test_plain_exporter_leaves_fake_quantized_weights_in_float32():
    graph = onnx_of(fake_program(LARGE, low=-128)[1])
    assert [item.data_type for item in graph.initializer if len(item.dims) == 2] == [TensorProto.FLOAT]


def test_grids_of_four_bits_are_marked_so():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, vector):
            weight = torch.fake_quantize_per_tensor_affine(self.inner.weight, 0.05, 8, 0, 15)
            return functional.linear(vector, weight)

    module = Narrow()
    lower_module(module)
    lowered, found = lower_program(program_of(module, torch.randn(4, 16)))
    (marker,) = calls(lowered, MARKERS.dequantize_weight)
    assert marker.args[3:] == (-1, 0, 4)
    assert found[0].detail == "per-tensor symmetric 4-bit weights"
    vector = torch.randn(3, 16)
    assert torch.allclose(lowered.module()(vector), module(vector), atol=1e-6)


# ---- what no marker means


def test_integers_that_are_computed_with_are_refused():
    class Sums(nn.Module):
        def forward(self, vector):
            codes = torch.ops.quantized_decomposed.quantize_per_tensor(vector, 0.1, 0, -128, 127, torch.int8)
            return torch.ops.quantized_decomposed.dequantize_per_tensor(codes + codes, 0.1, 0, -128, 127, torch.int8)

    with pytest.raises(ModelError, match=r"dequantize_per_tensor .* come from add, which computes with integers"):
        lower_program(program_of(Sums(), torch.randn(4, 16)))


def test_integers_that_leave_the_program_are_refused():
    class Codes(nn.Module):
        def forward(self, vector):
            return torch.ops.quantized_decomposed.quantize_per_tensor(vector, 0.1, 0, -128, 127, torch.int8)

    with pytest.raises(ModelError, match="no dequantize operator that edgedeploy knows"):
        lower_program(program_of(Codes(), torch.randn(4, 16)))


def test_integers_read_on_another_grid_are_refused():
    class Rescaled(nn.Module):
        def forward(self, vector):
            codes = torch.ops.quantized_decomposed.quantize_per_tensor(vector, 0.1, 0, -128, 127, torch.int8)
            return torch.ops.quantized_decomposed.dequantize_per_tensor(codes, 0.2, 0, -128, 127, torch.int8)

    with pytest.raises(ModelError, match="on another grid"):
        lower_program(program_of(Rescaled(), torch.randn(4, 16)))
