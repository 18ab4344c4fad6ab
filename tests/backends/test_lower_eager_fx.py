"""Static quantization of torch.ao, eager and FX: lowered, it computes the same codes and exports with its own scales."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
import torch.ao.nn.quantized as nnq  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.ao.quantization import (  # noqa: E402
    DeQuantStub,
    QuantStub,
    convert,
    get_default_qat_qconfig,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import prepare_fx  # noqa: E402

from edgedeploy.errors import ModelError  # noqa: E402
from edgedeploy.prepare.lower import eager_quantized, fx_quantized, packed, static_layers  # noqa: E402
from tests.backends.quantized_nets import (  # noqa: E402
    Eager,
    Functions,
    Norms,
    eager_ptq,
    eager_qat,
    everywhere,
    fx_ptq,
    fx_qat,
    images,
    markers,
    onnx_with_markers,
    reduced_range,
    seeded,
)

PART = {"eager": eager_quantized, "fx": fx_quantized}
# onednn's kernels saturate on x86 without VNNI unless one bit stays free; QAT grids take all 8.
MADE = {
    "eager PTQ, x86": ("eager", lambda: eager_ptq(seeded(Eager).fused(), "x86")),
    "eager PTQ, qnnpack": ("eager", lambda: eager_ptq(seeded(Eager).fused(), "qnnpack")),
    "eager PTQ, onednn": ("eager", lambda: eager_ptq(seeded(Eager).fused(), "onednn", reduced_range())),
    "eager QAT, fbgemm": ("eager", lambda: eager_qat(seeded(Eager).train().fused(is_qat=True), "fbgemm")),
    "eager QAT, qnnpack": ("eager", lambda: eager_qat(seeded(Eager).train().fused(is_qat=True), "qnnpack")),
    "FX PTQ, x86": ("fx", lambda: fx_ptq(seeded(Functions), "x86")),
    "FX PTQ, qnnpack": ("fx", lambda: fx_ptq(seeded(Functions), "qnnpack")),
    "FX PTQ, onednn": ("fx", lambda: fx_ptq(seeded(Functions), "onednn", everywhere(reduced_range()))),
    "FX QAT, fbgemm": ("fx", lambda: fx_qat(seeded(Functions), "fbgemm")),
    "FX QAT, qnnpack": ("fx", lambda: fx_qat(seeded(Functions), "qnnpack")),
}


@pytest.fixture(scope="module")
def made():
    """Return a function from a name to its prepared and converted module, made once."""
    kept = {}

    def pair_of(name):
        if name not in kept:
            kept[name] = MADE[name][1]()
        return kept[name]

    return pair_of


def lowered(part, module):
    return PART[part].lower_module(copy.deepcopy(module))


def answers(module, x):
    with torch.no_grad():
        return module(x)


def apart(got, wanted, step):
    """Return how many codes the values of two float tensors on one grid lie apart."""
    return ((got - wanted) / step).abs().round()


def final_step(module, name):
    """Return the scale of the grid that an output of a converted model lies on: the least distance of its values."""
    values = torch.unique(answers(module, images(256))[name].double())
    return float(values.diff().min())


@pytest.mark.parametrize("name", list(MADE))
def test_lowered_model_computes_the_converted_ones_codes(made, name):
    part = MADE[name][0]
    converted = made(name)[1]
    module, found = lowered(part, converted)
    x = images(64, seed=9)
    got, wanted = answers(module, x), answers(converted, x)
    for key in ("logits", "stem") if part == "fx" else ("logits",):
        codes = apart(got[key], wanted[key], final_step(converted, key))
        # A rounded tie in an average or a sum in another order moves one code; it is counted here where it ends up.
        assert codes.max() <= 2, key
        assert (codes > 0).float().mean() < (0.3 if part == "eager" else 0.02), key
    if part == "eager":  # float arithmetic after dequantization is not rounded to any grid
        torch.testing.assert_close(got["chances"], got["logits"].softmax(-1))
        assert len(found[0].layers) == 10
    assert [each.kind for each in found] == ["static int8"]
    assert all(each.is_kept for each in found)


@pytest.mark.parametrize("name", list(MADE))
def test_prepared_model_is_converted_and_computes_the_same(made, name):
    part = MADE[name][0]
    prepared, converted = made(name)
    torch.backends.quantized.engine = name.split(", ")[1]
    module, found = lowered(part, prepared)
    again, _ = lowered(part, converted)
    x = images(8, seed=9)
    got, wanted = answers(module, x), answers(again, x)
    if "QAT" in name:  # torch's own conversion takes scales that are up to 0.4 % others than those that training saw
        for key, value in wanted.items():
            noise = (got[key] - value).square().sum() / value.square().sum()
            assert noise < 0.01, key
    else:
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert found[0].kind == ("QAT int8" if "QAT" in name else "static int8")
    assert "converted by us" in found[0].detail
    assert ("per-tensor" if "qnnpack" in name else "per-channel") in found[0].detail


@pytest.mark.parametrize(
    ("network", "engine", "qconfig"),
    [
        (Eager, "fbgemm", reduced_range()),
        (Eager, "qnnpack", reduced_range(False)),
        (Norms, "fbgemm", reduced_range(False)),
        (Norms, "qnnpack", reduced_range(False)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:8],
)
def test_each_layer_gives_the_codes_of_its_packed_one(network, engine, qconfig):
    """Fed with the packed layer's own input, so that nothing adds up."""
    module = seeded(network)
    converted = eager_ptq(module.fused() if network is Eager else module, engine, qconfig)[1]
    replaced, found = lowered("eager", converted)
    compared = {}

    def compare(path):
        def hook(part, given, answer):
            packed._enter(part, given)
            try:
                put = [
                    packed.on_grid(x.dequantize(), packed.Grid(x.q_scale(), x.q_zero_point(), x.dtype))
                    if x.is_quantized
                    else x
                    for x in given
                ]
                got = replaced.get_submodule(path)(*put)
            finally:
                packed._leave(part, given, answer)
            compared[path] = apart(got, answer.dequantize(), answer.q_scale())

        return hook

    watched = [path for path in found[0].layers if not isinstance(converted.get_submodule(path), nnq.QFunctional)]
    for path in [*watched, *(["pool"] if network is Eager else ["batch_relu.1"])]:
        converted.get_submodule(path).register_forward_hook(compare(path))
    answers(converted, images(32, seed=9))
    assert set(watched) < set(compared)
    for path, codes in compared.items():
        # Averages of codes end in ties, which torch rounds after it added the zero-point.
        is_average = path == "pool"
        assert codes.max() <= 1, path
        assert (codes > 0).float().mean() <= (0.15 if is_average else 2e-3), path


@pytest.mark.parametrize("width", [16, 600], ids=["small", "large"])
def test_onnx_carries_exactly_the_trained_scales_and_integers(width):
    """600: on the far side of both folding limits of the exporter, 8,192 elements in and 512 * 512 out."""
    converted = eager_ptq(seeded(Eager, width).fused(), "x86")[1]
    with pytest.raises(Exception):  # noqa: B017  # torch raises what it happens to meet in packed parameters
        onnx_with_markers(copy.deepcopy(converted), images(3))
    module, found = lowered("eager", converted)
    graph = onnx_with_markers(module, images(3))
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    packed_ones = {path: part for path, part in converted.named_modules() if callable(getattr(part, "weight", None))}
    stored = markers(graph, "DequantizeWeight")
    assert len(stored) == len(packed_ones) == 4
    for part, (codes, scale, zero_point) in zip(packed_ones.values(), stored, strict=True):
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, part.weight().int_repr().numpy())
        np.testing.assert_array_equal(scale, part.weight().q_per_channel_scales().float().numpy())
        assert not zero_point.any()
    grids = {(float(scale[0]), int(zero_point[0])) for _, scale, zero_point in markers(graph, "FakeQuantize")}
    for path in found[0].layers:
        part = converted.get_submodule(path)
        assert (np.float32(part.scale).item(), int(part.zero_point)) in grids, path
    assert not [each for each in graph.graph.initializer if len(each.dims) > 1 and each.data_type == 1]


def test_fx_onnx_carries_its_scales_also_of_functions_and_shared_layers():
    converted = fx_ptq(seeded(Functions, 600), "x86")[1]
    with pytest.raises(Exception):  # noqa: B017  # torch raises what it happens to meet in packed parameters
        onnx_with_markers(copy.deepcopy(converted), images(3))
    scales = {
        np.float32(value).item() for name, value in converted.named_buffers() if "scale" in name and value.numel() == 1
    }
    module, found = lowered("fx", converted)
    assert "twice" in found[0].layers
    graph = onnx_with_markers(module, images(3))
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert scales <= {float(scale[0]) for _, scale, _ in markers(graph, "FakeQuantize")}
    shapes = [codes.shape for codes, _, _ in markers(graph, "DequantizeWeight")]
    assert {(600, 600), (8, 8, 1, 1), (8, 8, 3, 3), (600, 8)} <= set(shapes)
    assert sum(list(each.dims) == [8, 8, 3, 3] for each in graph.graph.initializer) == 1


def test_graph_module_inside_of_a_float_model_is_found(made):
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.head = inner, nn.Linear(16, 3)

        def forward(self, image):
            return self.head(self.inner(image)["logits"])

    model = Around(made("FX PTQ, x86")[1]).eval()
    module, found = fx_quantized.lower_module(copy.deepcopy(model))
    assert all(name.startswith("inner.") for name in found[0].layers)
    x = images(8, seed=9)
    assert (answers(module, x) - answers(model, x)).abs().max() < 0.05 * answers(model, x).abs().max()
    torch.export.export(module, (images(3),))


def test_grids_are_followed_through_any_control_flow():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant, self.conv = QuantStub(), DeQuantStub(), nn.Conv2d(3, 4, 1)

        def forward(self, image):
            x = self.conv(self.quant(image))
            for part in x.chunk(2, 1):
                x = part if part.shape[1] > 3 else x.mean((2, 3), keepdim=True)
            return self.dequant(torch.sigmoid(x)), self.dequant(x)

    converted = eager_ptq(seeded(Branch), "x86")[1]
    module, _ = lowered("eager", converted)
    (sigmoid, mean), wanted = answers(module, images(8)), answers(converted, images(8))
    assert torch.equal(sigmoid, (sigmoid * 256).round() / 256)
    torch.testing.assert_close(sigmoid, wanted[0], rtol=0, atol=1.01 / 256)
    steps = mean / converted.conv.scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", list(PART.values()))
def test_float_model_is_returned_as_it_is(part):
    model = seeded(Eager)
    assert part.lower_module(model) == (model, ())


def test_what_is_not_calibrated_is_refused_with_the_names_of_observers():
    with pytest.raises(ModelError, match=r"have seen no data: .*quant.* calibration samples"):
        module = seeded(Eager).fused()
        module.qconfig = get_default_qconfig("x86")
        eager_quantized.lower_module(prepare(module))
    with pytest.raises(ModelError, match="have seen no data"):
        module = seeded(Eager).train().fused(is_qat=True)
        module.qconfig = get_default_qat_qconfig("x86")
        eager_quantized.lower_module(prepare_qat(module).eval())
    with pytest.raises(ModelError, match="have seen no data"):
        fx_quantized.lower_module(prepare_fx(seeded(Functions), get_default_qconfig_mapping("x86"), (images(),)))


class Stubbed(nn.Module):
    """One layer between stubs, called in a way that the test chooses."""

    def __init__(self, layer, call=lambda layer, x: layer(x)):
        super().__init__()
        self.quant, self.layer, self.dequant, self.call = QuantStub(), layer, DeQuantStub(), call

    def forward(self, x):
        return self.dequant(self.call(self.layer, self.quant(x)))


def test_layers_without_a_form_are_refused_by_name():
    torch.backends.quantized.engine = "fbgemm"
    model = nn.Sequential(nnq.Embedding(10, 4))
    with pytest.raises(ModelError, match=r"Embedding of torch.ao \(0\).*leave it in float"):
        eager_quantized.lower_module(model)


def test_conversion_that_fails_ends_in_a_sentence():
    torch.backends.quantized.engine = "fbgemm"
    model = Stubbed(nn.ConvTranspose2d(3, 4, 2)).eval()
    model.qconfig = get_default_qconfig("fbgemm")
    model.layer.qconfig = get_default_qconfig("qnnpack")
    prepared = prepare(model)
    prepared(images())
    prepared.layer.qconfig = get_default_qconfig("fbgemm")
    with pytest.raises(ModelError, match=r"convert fails on it: .*leave the layer at fault in float"):
        eager_quantized.lower_module(prepared)


def test_operators_called_by_hand_are_refused_by_name():
    add = torch.ops.quantized.add
    model = Stubbed(nn.Conv2d(3, 3, 1), lambda layer, x: add(layer(x), x, 0.1, 3)).eval()
    model.qconfig = get_default_qconfig("fbgemm")
    prepared = prepare(model)
    for observer in (prepared.quant, prepared.layer):  # the operator refuses the float tensors of calibration
        observer.activation_post_process(images())
    module, _ = eager_quantized.lower_module(convert(prepared))
    with pytest.raises(ModelError, match=r"forward calls torch.ops.quantized.add itself"):
        module(images())


def test_activations_of_two_types_are_refused():
    with pytest.raises(ModelError, match=r"torch.qint8 and torch.quint8 in one model"):
        static_layers.activation_dtype({torch.qint8, torch.quint8})


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    axis=st.integers(-1, 3),
    scale=st.floats(1e-6, 10),
    zero_point=st.integers(-128, 127),
    seed=st.integers(0, 1000),
)
def test_weights_are_exactly_what_torch_dequantizes(shape, axis, scale, zero_point, seed):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draw) * scale * 100
    if 0 <= axis < len(shape):
        scales = scale * (torch.rand(shape[axis], generator=draw) + 0.5).double()
        stored = torch.quantize_per_channel(values, scales, torch.full((shape[axis],), zero_point), axis, torch.qint8)
    else:
        stored = torch.quantize_per_tensor(values, scale, zero_point, torch.qint8)
    torch.testing.assert_close(packed.Weight(stored)(), stored.dequantize(), rtol=2e-7, atol=0)


@settings(max_examples=80, deadline=None)
@given(
    number=st.floats(-40, 40).filter(lambda value: abs(value) > 1e-3),
    scale=st.floats(0.01, 2),
    zero_point=st.integers(0, 255),
    name=st.sampled_from(["add_scalar", "add_scalar_relu", "mul_scalar", "mul_scalar_relu"]),
)
def test_numbers_shift_and_stretch_the_grid_as_torchs_kernels_do(number, scale, zero_point, name):
    torch.backends.quantized.engine = "fbgemm"
    stored = torch.quantize_per_tensor(torch.linspace(-10, 10, 100), scale, zero_point, torch.quint8)
    wanted = getattr(torch.ops.quantized, name)(stored, number)
    packed._enter(None, ())
    try:
        x = packed.on_grid(stored.dequantize(), packed.Grid(scale, zero_point, torch.quint8))
        got = static_layers.Scalar(name)(x, number)
        grid = packed.grid_of(got)
    finally:
        packed._leave(None, (), ())
    assert (grid.step, grid.zero) == (pytest.approx(wanted.q_scale(), rel=1e-6), wanted.q_zero_point())
    assert apart(got, wanted.dequantize(), wanted.q_scale()).max() <= 1


class _Clamped(nn.Module):
    """A ReLU6 that qnnpack does not fuse, a convolution written as a function, and a linear layer behind a flatten."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = _WrittenOut(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, 5)
        self.clamp = nn.ReLU6()
        self.swish = nn.Hardswish()

    def forward(self, image):
        inner = self.swish(self.second(self.clamp(self.first(image))))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(inner, 4), 1))


class _WrittenOut(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.fixture(scope="module")
def clamped(tmp_path_factory):
    """Return what becomes of such a network, from FX to the form for ONNX Runtime."""
    from edgedeploy.prepare.dataset import random_samples
    from edgedeploy.prepare.emission.emit import emit
    from edgedeploy.prepare.export import export
    from edgedeploy.prepare.load import Loaded
    from edgedeploy.prepare.source.inherit import inherited_table
    from edgedeploy.records.model import TensorSpec
    from edgedeploy.records.target import QuantizationRules

    folder = tmp_path_factory.mktemp("clamped")
    _, converted = fx_ptq(seeded(_Clamped), "qnnpack")
    inputs = (TensorSpec(name="image", dtype="float32", shape=("n", *images(1).shape[1:])),)
    samples = random_samples(inputs, 16, seed=0)
    loaded = Loaded(kind="module", program=converted, source="clamped", weights_sha256="")
    model = export(loaded, inputs, samples, folder / "m.onnx")
    rules = QuantizationRules(activation_dtype="uint8", activation_symmetric=False)
    emit(model, inherited_table(model, rules), rules, samples, folder / "q.onnx")
    return model, inherited_table(model, rules), folder / "q.onnx"


def test_clamp_that_integers_cannot_replace_leaves_the_layer_before_it_on_integers(clamped):
    from edgedeploy.backends.onnxruntime import BACKEND

    report = BACKEND.inspect(clamped[2])
    assert report.expanded == ()
    assert sum(name.startswith(("QLinearConv", "QGemm")) for name in report.quantized) == 3


def test_scales_around_a_hard_swish_are_found_in_the_runtimes_graph(clamped):
    from edgedeploy.backends.onnxruntime import BACKEND
    from edgedeploy.prepare.source.survival import demand_survival, trace

    model, table, path = clamped
    demand_survival(trace(model.quantization, table, path, BACKEND.inspect(path)))


def test_qnnpack_clamps_channels_last_tensors_as_row_major_ones():
    from edgedeploy.prepare.plain_torch import plain_torch

    torch.backends.quantized.engine = "qnnpack"
    x = torch.quantize_per_tensor(images(2), 0.05, 128, torch.quint8).contiguous(memory_format=torch.channels_last)
    with plain_torch():
        clamped = nn.functional.relu6(x)
    assert torch.equal(clamped.dequantize(), nn.functional.relu6(x.dequantize()))
