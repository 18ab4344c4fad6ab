"""Zeros stay what they are: masks, parametrizations and sparse tensors become plain weights, and patterns are named."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from torch import nn  # noqa: E402
from torch.ao.pruning import WeightNormSparsifier  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrizations as torch_parametrizations  # noqa: E402
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm  # noqa: E402

from edgedeploy.errors import ModelError  # noqa: E402
from edgedeploy.prepare.lower import (  # noqa: E402
    constant_parameters,
    parametrizations,
    pruning_masks,
    shared_weights,
    sparse_tensors,
)
from edgedeploy.prepare.lower.pruning_masks import is_two_of_four, sparsity  # noqa: E402
from tests.backends.structural_nets import (  # noqa: E402
    LARGE,
    SMALL,
    ConvNet,
    HandMade,
    images,
    lowered,
    masked_everywhere,
    relative,
    run,
    seeded,
    stored_elements,
    to_onnx,
)


def operators(graph):
    return sorted({node.op_type for node in graph.graph.node})


def zeros(graph):
    return sum(int((numpy_helper.to_array(item) == 0).sum()) for item in graph.graph.initializer)


@pytest.mark.parametrize("width", [SMALL, LARGE], ids=["small", "large"])
def test_masks_of_all_sorts_are_baked_and_normalisation_is_folded(width):
    module = masked_everywhere(width)
    reference = module(images(3))
    program, found = lowered(module, images())
    masks = found["pruning masks"]
    assert set(masks.layers) == {"conv.weight", "conv_2.weight", "hidden.weight", "head.weight", "head.bias"}
    assert masks.layers[-1] == "conv_2.weight"
    assert "4 unstructured and 1 structured" in masks.detail
    assert "as large as they were" in masks.note
    assert relative(program.module()(images(3)).detach(), reference) < 1e-6
    graph = to_onnx(program)
    assert operators(graph) == ["Conv", "Gemm", "ReduceMean", "Relu"]
    wanted = sum(int((getattr(part, name) == 0).sum()) for part, name in masked_tensors(module))
    assert zeros(graph) >= wanted > 0
    assert relative(run(graph, images(7))[0], module(images(7))) < 1e-5
    # The person's module keeps its masks: the result is compared with it.
    assert "weight_mask" in dict(module.head.named_buffers())
    assert torch.equal(module(images(3)), reference)


def masked_tensors(module):
    return [
        (part, name.removesuffix("_mask"))
        for part in module.modules()
        for name, _ in part.named_buffers(recurse=False)
        if name.endswith("_mask")
    ]


@pytest.mark.peers
def test_without_the_lowering_a_large_mask_stays_in_the_graph():
    module = masked_everywhere(LARGE)
    program = torch.export.export(module, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert {"Mul", "BatchNormalization"} <= set(operators(to_onnx(program, is_slim=False)))


def test_masks_of_a_recurrent_layer_are_baked():
    module = nn.LSTM(6, 8, batch_first=True).eval()
    prune.l1_unstructured(module, "weight_ih_l0", 0.5)
    sequence = torch.randn(2, 4, 6)
    reference = module(sequence)[0]
    baked, found = pruning_masks.lower_module(module)
    assert found[0].layers == ("weight_ih_l0",)
    assert torch.equal(baked(sequence)[0], reference)
    assert int((baked.weight_ih_l0 == 0).sum()) == 6 * 32 // 2


def test_sparsity_that_is_already_baked_is_recognised_by_its_pattern():
    module = seeded(ConvNet, LARGE)
    with torch.no_grad():
        module.head.weight[:, 0::4] = 0
        module.head.weight[:, 2::4] = 0
        module.conv_2.weight[torch.rand(module.conv_2.weight.shape) < 0.6] = 0
        module.hidden.weight[torch.rand(module.hidden.weight.shape) < 0.1] = 0
    _, found = lowered(module, images())
    assert found["2:4 sparsity"].layers == ("head",)
    assert found["unstructured sparsity"].layers == ("conv_2",)
    assert "60%" in found["unstructured sparsity"].detail
    assert "pruning masks" not in found


def test_a_mask_with_the_2_4_pattern_is_both():
    module = nn.Linear(16, 8)
    mask = torch.ones(8, 16)
    mask[:, 1::2] = 0
    prune.custom_from_mask(module, "weight", mask)
    kinds = {item.kind for item in pruning_masks.lower_module(module)[1]}
    assert kinds == {"pruning masks", "2:4 sparsity"}


def test_a_dense_network_carries_nothing():
    module = seeded(ConvNet)
    for part in (pruning_masks, sparse_tensors, parametrizations):
        assert part.lower_module(module) == (module, ())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 5),
    kernel=st.sampled_from([(), (3,), (3, 3)]),
    kept=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_2_4_means_two_zeros_in_each_four_along_the_inputs(rows, groups, kernel, kept, seed):
    generator = np.random.default_rng(seed)
    shape = (rows, *kernel, groups, 4)
    order = generator.random(shape).argsort(-1)
    values = np.where(order < kept, generator.uniform(0.5, 1, shape), 0).reshape(rows, *kernel, groups * 4)
    weight = torch.from_numpy(np.moveaxis(values, -1, 1).copy())
    assert is_two_of_four(weight) == (kept <= 2)
    kinds = [item.kind for item in sparsity({"layer": weight})]
    assert kinds == {0: [], 1: ["2:4 sparsity"], 2: ["2:4 sparsity"], 3: ["unstructured sparsity"], 4: []}[kept]


def sparsified():
    """Return a network with masks of torch.ao.pruning, 2:4 in its head, still parametrized."""
    module = seeded(ConvNet, LARGE)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(module, [{"tensor_fqn": "head.weight"}])
    sparsifier.step()
    return module


def with_new_weight_norm():
    module = seeded(ConvNet, LARGE)
    torch_parametrizations.weight_norm(module.conv_2)
    torch_parametrizations.spectral_norm(module.head)
    return module.eval()


def with_old_hooks():
    module = seeded(ConvNet, LARGE)
    weight_norm(module.conv_2)
    spectral_norm(module.head)
    return module.eval()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def with_tied_originals():
    """Return two layers that double one shared parameter."""
    module = seeded(ConvNet, LARGE)
    module.other = nn.Linear(LARGE, LARGE)
    module.other.weight = module.head.weight
    for part in (module.head, module.other):
        parametrize.register_parametrization(part, "weight", Doubled())
    module.head, module.other = nn.Sequential(module.head, module.other), None
    return module


@pytest.mark.parametrize(
    ("make", "layers", "detail"),
    [
        (sparsified, ("head.weight",), "FakeSparsity"),
        (with_new_weight_norm, ("conv_2.weight",), "WeightNorm"),
        (with_old_hooks, ("conv_2.weight",), "WeightNorm hook"),
        (with_tied_originals, ("head.0.weight", "head.1.weight"), "Doubled"),
    ],
)
def test_parametrizations_are_computed_once(make, layers, detail):
    module = make()
    reference = module(images(3))
    baked, found = parametrizations.lower_module(module)
    record = next(item for item in found if item.layers == layers)
    assert (record.kind, record.detail) == ("parametrization", detail)
    assert not any(parametrize.is_parametrized(part) for part in baked.modules())
    assert not any(part._forward_pre_hooks for part in baked.modules())
    assert torch.allclose(baked(images(3)), reference, rtol=1e-5, atol=1e-6)
    # The person's module is as it was.
    assert torch.equal(module(images(3)), reference)


def test_masks_of_torch_ao_pruning_are_named_by_their_pattern():
    found = parametrizations.lower_module(sparsified())[1]
    assert [(item.kind, item.layers) for item in found[1:]] == [("2:4 sparsity", ("head",))]


def test_a_parametrization_that_fails_ends_in_a_sentence():
    class Failing(nn.Module):
        def forward(self, weight):
            if getattr(self, "is_broken", False):
                raise RuntimeError("its own words")
            return weight

    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "weight", Failing())
    module.parametrizations.weight[0].is_broken = True
    with pytest.raises(ModelError, match=r"Failing.*its own words.*remove_parametrizations"):
        parametrizations.lower_module(module)


def test_a_mask_multiplied_by_hand_is_computed_once_whatever_its_size():
    module = seeded(HandMade, LARGE)
    program, found = lowered(module, images())
    assert found["pruning masks"].layers == ("masked.weight",)
    graph = to_onnx(program)
    assert "Mul" not in operators(graph)
    assert relative(run(graph, images(7))[0], module(images(7))) < 1e-5


class Standardised(nn.Conv2d):
    """Weight standardisation, as in Big Transfer: arithmetic on the weight in each forward."""

    def forward(self, image):
        spread, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(image, (self.weight - mean) / (spread + 1e-6), self.bias)


@pytest.mark.parametrize("is_decomposed", [False, True])
def test_weight_standardisation_is_computed_once_and_normalisation_folded(is_decomposed):
    module = nn.Sequential(Standardised(4, LARGE, 3), nn.BatchNorm2d(LARGE), nn.ReLU()).eval()
    program, found = lowered(module, images(), is_decomposed=is_decomposed)
    assert found["parametrization"].layers == ("0.weight",)
    graph = to_onnx(program)
    assert operators(graph) == ["Conv", "Relu"]
    assert relative(run(graph, images(7))[0], module(images(7))) < 1e-5


class Buffered(nn.Module):
    """What must not be folded: a buffer that forward changes, random numbers, a weight that is only transposed twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("count", torch.zeros(4))

    def forward(self, vector):
        self.count.add_(1)
        noise = torch.rand_like(self.weight) * 0
        return vector @ self.weight.t() + vector @ self.weight.t() @ noise + self.count * 2


def test_what_changes_or_is_only_viewed_is_left_alone():
    program = torch.export.export(Buffered(), (torch.randn(2, 4),))
    assert constant_parameters.lower_program(program) == (program, ())


def test_a_program_keeps_its_own_tensors_when_its_copy_is_edited():
    module = seeded(HandMade, SMALL)
    program = torch.export.export(module, (images(),))
    before = (str(program.graph), sorted(program.state_dict))
    constant_parameters.lower_program(program)
    assert (str(program.graph), sorted(program.state_dict)) == before


class Coo(nn.Module):
    def __init__(self, layout):
        super().__init__()
        weight = torch.randn(8, 16) * (torch.rand(8, 16) > 0.7)
        self.weight = nn.Parameter(weight.to_sparse(layout=layout), requires_grad=False)

    def forward(self, image):
        return torch.sparse.mm(self.weight, image.mean((2, 3)).repeat(1, 4).t()).t()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_become_dense_weights(layout):
    module = seeded(Coo, layout)
    program, found = lowered(module, images())
    assert found["unstructured sparsity"].layers == ("weight",)
    assert str(layout).removeprefix("torch.") in found["unstructured sparsity"].detail
    graph = to_onnx(program)
    assert stored_elements(graph) == 8 * 16
    assert relative(run(graph, images(7))[0], module(images(7))) < 1e-5
    assert module.weight.layout == layout


def test_semi_structured_tensors_become_dense_weights():
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    weight = torch.randn(32, 64, dtype=torch.float16)
    weight[:, 0::4] = 0
    weight[:, 3::4] = 0
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    module = nn.Linear(64, 32).half()
    # What to_sparse_semi_structured makes, which checks that it is on a GPU first.
    tensor = SparseSemiStructuredTensorCUTLASS(
        weight.shape, packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )
    module.weight = nn.Parameter(tensor, requires_grad=False)
    lower, found = sparse_tensors.lower_module(module)
    assert [(item.kind, item.layers) for item in found] == [("2:4 sparsity", ("weight",))]
    assert type(lower.weight.data) is torch.Tensor
    assert torch.equal(lower.weight, weight)


def test_a_semi_structured_weight_that_cannot_be_read_here_ends_in_a_sentence():
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    module = nn.Linear(64, 32)
    tensor = SparseSemiStructuredTensorCUSPARSELT(
        torch.Size([32, 64]),
        packed=torch.zeros(32 * 36, dtype=torch.float16),
        meta=None,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )
    module.weight = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(
        ModelError, match=r"weight \(SparseSemiStructuredTensorCUSPARSELT\) cannot be made dense.*to_dense"
    ):
        sparse_tensors.lower_module(module)


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, and a layer that is called twice."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.mix = nn.Linear(width, width)
        self.again = nn.Linear(width, width)
        self.again.weight = self.mix.weight
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(functional.relu(self.again(functional.relu(self.mix(self.mix(self.table(tokens)))))))


@pytest.mark.parametrize("width", [SMALL, LARGE], ids=["small", "large"])
def test_shared_weights_are_stored_once(width):
    module = seeded(Tied, width)
    tokens = torch.arange(15).reshape(3, 5)
    _, groups = shared_weights.lower_module(module)
    assert {group.layers for group in groups} == {("table", "head"), ("mix", "again")}
    assert f"one tensor used in 2 places, {50 * width} weights saved" in {group.detail for group in groups}
    program, _ = lowered(module, tokens)
    graph = to_onnx(program)
    assert stored_elements(graph) == width * width + 2 * width + 50 * width
    assert "Transpose" not in operators(graph)
    assert relative(run(graph, tokens)[0], module(tokens)) < 1e-5


def test_a_layer_that_is_registered_in_two_places_shares_its_weights():
    layer = nn.Linear(4, 4)
    _, (found,) = shared_weights.lower_module(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert found.layers == ("a", "b.0")
    assert "16 weights saved" in found.detail
    assert shared_weights.lower_module(nn.Sequential(nn.Linear(4, 4)))[1] == ()
