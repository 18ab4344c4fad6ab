"""Low-rank weights stay two small factors: in the program, in the ONNX file and in the graph that the runtime makes."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from edgedeploy.prepare.lower import low_rank  # noqa: E402
from tests.backends.structural_nets import (  # noqa: E402
    LARGE,
    SMALL,
    HandMade,
    images,
    lowered,
    relative,
    run,
    runtime_graph,
    seeded,
    stored_elements,
    to_onnx,
    with_svd,
)


@pytest.fixture(scope="module", params=[SMALL, LARGE], ids=["small", "large"])
def factored(request):
    """A network with truncated SVDs as parametrizations: its module, lowered program, found kinds and ONNX."""
    module = with_svd(request.param, rank=2)
    program, found = lowered(module, images())
    return module, program, found, to_onnx(program)


def dense_elements(module):
    return sum(part.weight.numel() for part in (module.conv, module.conv_2, module.head))


def factor_elements(module):
    return sum(
        2 * (part.weight.shape[0] + part.weight[0].numel()) for part in (module.conv, module.conv_2, module.head)
    )


def test_parametrized_factors_become_two_layers_on_the_activation(factored):
    module, program, found, _ = factored
    assert found["low rank"].layers == ("conv", "conv_2", "head")
    assert "rank 2 of" in found["low rank"].detail
    assert f"{factor_elements(module)} weights instead of {dense_elements(module)}" in found["low rank"].detail
    assert "parametrization" not in found
    assert relative(program.module()(images(3)).detach(), module(images(3))) < 1e-5


def test_neither_the_onnx_file_nor_the_runtime_multiplies_the_factors(factored, tmp_path):
    module, _, _, graph = factored
    rest = sum(item.numel() for name, item in module.named_parameters() if "parametrizations" not in name)
    most = factor_elements(module) + rest + module.norm.num_features * 2 + 100
    assert stored_elements(graph) <= most < dense_elements(module)
    assert stored_elements(runtime_graph(graph, tmp_path)) <= most
    assert relative(run(graph, images(7))[0], module(images(7))) < 1e-5


@pytest.mark.peers
def test_without_the_lowering_the_runtime_multiplies_the_factors(tmp_path):
    module = with_svd(LARGE, rank=2)
    program = torch.export.export(module, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    optimised = runtime_graph(to_onnx(program), tmp_path)
    assert stored_elements(optimised) > dense_elements(module)


@pytest.mark.parametrize("is_decomposed", [False, True])
def test_products_written_by_hand_in_forward_are_split(is_decomposed):
    module = seeded(HandMade, LARGE)
    program, found = lowered(module, images(), is_decomposed=is_decomposed)
    assert len(found["low rank"].layers) == 2
    assert "rank 2 of 600" in found["low rank"].detail
    assert max(item.numel() for name, item in program.state_dict.items() if "factor" in name) == 2 * LARGE
    assert relative(program.module()(images(3)).detach(), module(images(3))) < 1e-5
    # The factors themselves have no reader left and are not stored beside what was made of them.
    assert "u" not in program.state_dict


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(64, 3)), nn.Parameter(torch.randn(3, 64))

    def forward(self, image):
        weight = self.u @ self.v
        inner = image.mean((2, 3)).repeat(1, 16)
        return functional.linear(torch.tanh(functional.linear(inner, weight)), weight)


def test_layers_that_share_a_product_share_its_factors():
    module = seeded(Shared)
    program, found = lowered(module, images())
    assert len(found["low rank"].layers) == 2
    assert sorted(tuple(item.shape) for item in program.state_dict.values()) == [(3, 64), (64, 3)]
    assert relative(program.module()(images(3)).detach(), module(images(3))) < 1e-5


def test_a_product_that_saves_nothing_is_computed_once():
    module = with_svd(SMALL, rank=SMALL)
    program, found = lowered(module, images())
    assert "low rank" not in found or "head" not in found["low rank"].layers
    assert relative(program.module()(images(3)).detach(), module(images(3))) < 1e-5


def test_a_dense_weight_with_a_low_rank_addition_stays_dense():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(4, 64)
            self.a, self.b = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(64, 1))

        def forward(self, image):
            return functional.linear(image.mean((2, 3)), self.base.weight + self.b @ self.a, self.base.bias)

    module = seeded(Lora)
    program, found = lowered(module, images())
    assert set(found) == {"parametrization"}
    assert found["parametrization"].is_kept
    assert {name: tuple(item.shape) for name, item in program.state_dict.items()} == {
        "base.bias": (64,),
        "base.weight.computed": (64, 4),
    }
    assert relative(program.module()(images(3)).detach(), module(images(3))) < 1e-6


def test_a_grouped_convolution_with_factors_is_computed_once_and_said_to_have_grown():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(64, 2)), nn.Parameter(torch.randn(2, 18))

        def forward(self, image):
            return functional.conv2d(image, (self.u @ self.v).view(64, 2, 3, 3), groups=2)

    _, found = lowered(seeded(Grouped), images())
    assert set(found) == {"parametrization"}
    assert not found["parametrization"].is_kept
    assert found["parametrization"].note == f"stored as {64 * 18 * 4} bytes, where the source has {(128 + 36) * 4}"


@pytest.mark.parametrize(
    ("first", "second", "sizes"),
    [
        (lambda: nn.Conv2d(4, 2, 1), lambda: nn.Conv2d(2, 32, 1), "rank 2 of 4: 72 weights instead of 128"),
        (lambda: nn.Conv2d(4, 2, 3), lambda: nn.Conv2d(2, 32, 1), "rank 2 of 32: 136 weights instead of 1152"),
        (lambda: nn.Conv2d(4, 1, 1), lambda: nn.Conv2d(1, 32, 3), "rank 1 of 4: 292 weights instead of 1152"),
        (lambda: nn.Linear(6, 1), lambda: nn.Linear(1, 8), "rank 1 of 6: 14 weights instead of 48"),
    ],
)
def test_layers_that_are_already_a_pair_are_recognised(first, second, sizes):
    module = nn.Sequential(first(), nn.Dropout(0.1), second()).eval()
    program, found = lowered(module, images())
    assert found["low rank"].layers == ("0 + 2",)
    assert found["low rank"].detail == sizes
    assert found["low rank"].lowering == ""
    assert set(program.state_dict) == set(module.state_dict())


@pytest.mark.parametrize(
    "between",
    [nn.ReLU(), nn.BatchNorm2d(2)],
    ids=["relu", "norm"],
)
def test_layers_with_something_between_are_no_pair(between):
    _, found = lowered(nn.Sequential(nn.Conv2d(4, 2, 1), between, nn.Conv2d(2, 32, 1)), images())
    assert found == {}


def test_a_pair_without_a_bottleneck_and_one_that_is_read_twice_are_not_reported():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 32, 1)

        def forward(self, image):
            inner = self.first(image)
            return self.second(inner), inner

    assert lowered(Read(), images())[1] == {}
    assert lowered(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), images())[1] == {}


def test_a_program_without_factors_is_returned_as_it_is():
    program = torch.export.export(nn.Linear(6, 3), (torch.randn(2, 6),))
    assert low_rank.lower_program(program) == (program, ())


@settings(max_examples=12, deadline=None)
@given(
    ins=st.integers(2, 24),
    outs=st.integers(2, 24),
    rank=st.integers(1, 6),
    scale=st.sampled_from([1.0, -0.25, 3.0]),
    form=st.sampled_from(["linear", "matmul", "transposed", "conv"]),
)
def test_splitting_changes_no_value_whatever_the_sizes_and_the_spelling(ins, outs, rank, scale, form):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(outs, rank)), nn.Parameter(torch.randn(rank, ins))

        def forward(self, vector):
            if form == "linear":
                return functional.linear(vector, scale * (self.u @ self.v))
            if form == "matmul":
                return vector @ (self.v.t() @ self.u.t() * scale)
            if form == "transposed":
                return vector @ (self.u @ self.v).transpose(-1, -2) * scale
            return functional.conv1d(vector.unsqueeze(-1), (self.u @ self.v * scale).view(outs, ins, 1)).squeeze(-1)

    torch.manual_seed(ins * outs + rank)
    module = Product()
    program = torch.export.export(module, (torch.randn(3, ins),))
    lower, found = low_rank.lower_program(program)
    assert bool(found) == (rank * (ins + outs) < ins * outs)
    vector = torch.randn(3, ins)
    assert torch.allclose(lower.module()(vector), module(vector), rtol=1e-4, atol=1e-4)
