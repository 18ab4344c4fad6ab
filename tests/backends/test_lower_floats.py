"""Short floats and autocast become float32 with the same weights, so that ONNX Runtime's CPU takes every operator."""

import io

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from edgedeploy.prepare.lower import half_floats  # noqa: E402
from edgedeploy.prepare.markers import operators  # noqa: E402
from tests.backends.structural_nets import (  # noqa: E402
    LARGE,
    SMALL,
    ConvNet,
    images,
    lowered,
    relative,
    run,
    seeded,
    to_onnx,
)

# Rounding of intermediate results in the source: 11 and 8 bits, over a few layers.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHORT = [torch.float16, torch.bfloat16]


def only_float32(program):
    return all(
        getattr(node.meta.get("val"), "dtype", None) not in SHORT
        and not any(
            argument in SHORT for argument in [*node.args, *node.kwargs.values()] if isinstance(argument, torch.dtype)
        )
        for node in program.graph.nodes
    )


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float16, SMALL), (torch.bfloat16, SMALL), (torch.bfloat16, LARGE)], ids=str
)
def test_a_short_module_becomes_float32_with_exactly_its_weights(dtype, width):
    module = seeded(ConvNet, width).to(dtype)
    assert half_floats.float_dtype(module) == dtype
    program, found = lowered(module, images())
    record = found[str(dtype).removeprefix("torch.")]
    assert record.layers == ("conv", "norm", "conv_2", "norm_2", "hidden", "head")
    assert all(torch.equal(program.state_dict[name], item.float()) for name, item in module.named_parameters())
    graph = to_onnx(program)
    assert {item.data_type for item in graph.graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    answer = run(graph, images(7))[0]
    # To the letter what these weights give in float32, and the source up to its own rounding.
    exact = ConvNet(width).eval()
    exact.load_state_dict(module.state_dict())
    assert relative(answer, exact(images(7))) < 1e-5
    assert relative(answer, module(images(7).to(dtype))) < TOLERANCE[dtype]
    assert module.conv.weight.dtype == dtype


class Mixed(nn.Module):
    """A short backbone behind casts of its own, a float32 head, and a constant that is no parameter."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(4, 8, 3).half()
        self.head = nn.Linear(8, 3)
        self.offset = torch.full((8,), 0.1, dtype=torch.float16)

    def forward(self, image):
        inner = self.backbone(image.half()).mean((2, 3)) + self.offset
        inner = inner + torch.zeros(8, dtype=torch.float16)
        return self.head(inner.to(torch.float32))


def test_casts_in_forward_of_a_mixed_module_do_nothing_any_more():
    module = seeded(Mixed)
    assert half_floats.float_dtype(module) is None
    program, found = lowered(module, images())
    assert found["float16"].layers == ("Mixed", "backbone")
    assert only_float32(program)
    assert relative(program.module()(images(3)).detach(), module(images(3))) < 1e-3


def test_tied_short_weights_stay_tied():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    module[1].weight = module[0].weight
    lower, found = half_floats.lower_module(module)
    assert lower[1].weight is lower[0].weight
    assert lower[0].weight.dtype == torch.float32
    assert found[0].layers == ("0", "1")


def test_a_short_program_from_a_file_takes_float32():
    module = seeded(ConvNet).half()
    file = io.BytesIO()
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(module, (images().half(),), dynamic_shapes=({0: batch},)), file)
    file.seek(0)
    program, found = half_floats.lower_program(torch.export.load(file))
    assert set(found[0].layers) == {"conv", "norm", "conv_2", "norm_2", "hidden", "head"}
    assert only_float32(program)
    answer = program.module()(images(9))
    assert answer.dtype == torch.float32
    assert relative(answer.detach(), module(images(9).half())) < TOLERANCE[torch.float16]


class Autocast(nn.Module):
    """Regions inside regions: autocast, no_grad, autocast switched off; float32 weights throughout."""

    def __init__(self, dtype, width=SMALL):
        super().__init__()
        self.dtype = dtype
        self.conv = nn.Conv2d(4, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.exact = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, image):
        with torch.autocast("cpu", dtype=self.dtype):
            inner = functional.relu(self.norm(self.conv(image)))
            with torch.no_grad():
                gate = inner.mean((2, 3))
            with torch.autocast("cpu", enabled=False):
                gate = self.exact(gate.float())
            logits = self.head(gate)
        return logits, inner.float()


@pytest.mark.parametrize("is_decomposed", [False, True], ids=["regions", "casts"])
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_autocast_is_taken_out_of_the_program(dtype, is_decomposed):
    module = seeded(Autocast, dtype)
    assert half_floats.float_dtype(module) is None
    program, found = lowered(module, images(), is_decomposed=is_decomposed)
    assert str(dtype).removeprefix("torch.") in found["autocast"].detail
    if not is_decomposed:
        assert found["autocast"].layers == ("conv", "head")
    assert len(found["autocast"].layers) == 2
    assert only_float32(program)
    assert not any("wrap_with" in str(node.target) for node in program.graph.nodes)
    for answer, reference in zip(program.module()(images(3)), module(images(3)), strict=True):
        assert relative(answer.detach(), reference) < TOLERANCE[dtype]


def test_an_autocast_network_runs_on_the_runtime_with_normalisation_folded():
    module = seeded(Autocast, torch.bfloat16, LARGE)
    program, _ = lowered(module, images())
    graph = to_onnx(program)
    assert {"BatchNormalization", "Cast"}.isdisjoint(node.op_type for node in graph.graph.node)
    logits, inner = run(graph, images(7))
    reference = module(images(7))
    assert relative(logits, reference[0]) < TOLERANCE[torch.bfloat16]
    assert relative(inner, reference[1]) < TOLERANCE[torch.bfloat16]


class Region(nn.Module):
    """Returns what a region makes, and the same tensor twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0]))

    def forward(self, vector):
        with torch.no_grad():
            inner = functional.linear(vector, self.layer.weight * self.mask)
        return {"inner": inner, "again": inner}


def test_regions_without_autocast_are_opened_and_what_is_constant_in_them_is_found():
    module = Region().eval()
    program = torch.export.export(module, (torch.randn(2, 4),))
    assert any("wrap_with_set_grad" in str(node.target) for node in program.graph.nodes)
    lower, found = half_floats.lower_program(program)
    assert found == ()
    assert not any("wrap_with" in str(node.target) for node in lower.graph.nodes)
    vector = torch.randn(2, 4)
    answer = lower.module()(vector)
    assert torch.equal(answer["inner"], module(vector)["inner"])
    assert torch.equal(answer["again"], answer["inner"])
    # The program that was given is as it was.
    assert any("wrap_with_set_grad" in str(node.target) for node in program.graph.nodes)


class Coded(nn.Module):
    """Weights that a lowering stores as float16 codes, beside a float32 layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 4).half())
        self.layer = nn.Linear(4, 4)

    def forward(self, vector):
        weight = operators().dequantize_weight(self.codes, torch.ones(1), torch.zeros(1, dtype=torch.int32), -1, 0, 16)
        return functional.linear(self.layer(vector), weight)


def test_codes_that_a_marker_reads_stay_short():
    program = torch.export.export(Coded(), (torch.randn(2, 4),))
    lower, found = half_floats.lower_program(program)
    assert found == ()
    assert lower.state_dict["codes"].dtype == torch.float16


def test_float32_networks_are_returned_as_they_are():
    module = seeded(ConvNet)
    assert half_floats.float_dtype(module) is None
    assert half_floats.lower_module(module) == (module, ())
    program = torch.export.export(module, (images(),))
    assert half_floats.lower_program(program) == (program, ())
