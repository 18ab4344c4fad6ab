"""What each choice of a quantization policy does to exported networks: statistics, roundings, equalization, plans."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed here")
pytest.importorskip("onnxscript", reason="onnxscript is not installed here")

import torch
from torch import nn

from edgedeploy.errors import ModelError, UsageError
from edgedeploy.prepare.dataset import Samples, random_samples
from edgedeploy.prepare.emission.emit import emit
from edgedeploy.prepare.export import export
from edgedeploy.prepare.fidelity import compare
from edgedeploy.prepare.graph import Runner, read_graph, view
from edgedeploy.prepare.grid import rounded
from edgedeploy.prepare.load import Loaded
from edgedeploy.prepare.ptq import statistics as statistics_module
from edgedeploy.prepare.ptq.equalize import equalize
from edgedeploy.prepare.ptq.quantize import quantize
from edgedeploy.prepare.ptq.quantized_set import quantized_set
from edgedeploy.prepare.ptq.rounding import input_moments, row_places
from edgedeploy.prepare.ptq.sensitivity import curve, plan, sensitivities, without
from edgedeploy.prepare.ptq.statistics import statistics, thinned
from edgedeploy.prepare.simplify import simplify
from edgedeploy.records.model import TensorSpec
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.target import QuantizationRules

ASYMMETRIC = QuantizationRules(activation_dtype="int8", activation_symmetric=False)
SYMMETRIC = QuantizationRules(activation_dtype="int8", activation_symmetric=True)
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 12, 12))
NEAREST = QuantizationPolicy(rounding="nearest")
CHOSEN = QuantizationPolicy()


class Network(nn.Module):
    """Residual blocks between linear bottlenecks whose channels differ a hundredfold, and a head on both sides of limits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.expand = nn.Conv2d(8, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project = nn.Conv2d(24, 8, 1)
        # 600 * 600: beyond the exporter's folding limits, as every other weight here is within them.
        self.wide = nn.Linear(8, 600)
        self.head = nn.Linear(600, 600)

    def forward(self, image):
        stem = self.stem(image)
        inner = nn.functional.relu6(self.depthwise(nn.functional.relu6(self.expand(stem))))
        pooled = nn.functional.adaptive_avg_pool2d(stem + self.project(inner), 1).flatten(1)
        return self.head(nn.functional.relu(self.wide(pooled)))


def network():
    torch.manual_seed(0)
    module = Network().eval()
    with torch.no_grad():
        uneven = torch.logspace(-2, 0, 8)
        for layer in (module.stem, module.project):
            layer.weight.mul_(uneven[:, None, None, None])
            layer.bias.mul_(uneven)
        for layer in (module.expand, module.wide):
            layer.weight.div_(uneven.reshape(1, -1, *[1] * (layer.weight.ndim - 2)))
    return module


def correlated(count, seed):
    """Return images whose pixels go together and have a mean, as those of photographs do."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 3, 3, 3)).repeat(4, axis=2).repeat(4, axis=3)
    images = (coarse + 0.1 * rng.standard_normal((count, 3, 12, 12)) + 0.5).astype(np.float32)
    return Samples(f"correlated {seed}", f"correlated {count} {seed}", count, None, {"image": images}, {})


@pytest.fixture(scope="module")
def samples():
    return correlated(48, 0)


@pytest.fixture(scope="module")
def model(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    exported = export(Loaded("module", "network", network()), [IMAGE], samples, folder / "e.onnx")
    return simplify(exported, samples, folder / "s.onnx")


@pytest.fixture(scope="module")
def tables(model, samples):
    return {policy.rounding: quantize(model, samples, ASYMMETRIC, policy) for policy in (NEAREST, CHOSEN)}


def sqnr_db(model, table, rules, seed, folder):
    form = emit(model, table, rules, correlated(16, 0), folder / "q.onnx").model
    runs = Runner(Path(model.path)), Runner(Path(form.path), is_optimized=False)
    other = correlated(64, seed)
    fidelity = compare(*runs, other.batches(model.inputs), names=("fp32", "int8"), sample_source="other")
    return fidelity.outputs[0].sqnr_db


def test_statistics_count_what_onnx_runtime_computes(model, samples):
    relu = next(node.output[0] for node in read_graph(Path(model.path)).graph.node if node.op_type == "Relu")
    found = statistics(model, samples, ["image", relu])
    images = samples.arrays["image"]
    assert found["image"].low == pytest.approx(images.min())
    assert found["image"].high == pytest.approx(images.max())
    assert found["image"].counts.sum() + found["image"].zeros == images.size
    assert found[relu].low == 0
    assert found[relu].zeros > 0


def test_large_tensors_are_thinned_out_evenly(model, samples, monkeypatch):
    monkeypatch.setattr(statistics_module, "_VALUES_OF_A_SAMPLE", (100, 100))
    few = statistics(model, samples, ["image"])["image"]
    monkeypatch.undo()
    all_of_them = statistics(model, samples, ["image"])["image"]
    assert few.counts.sum() <= 100 * samples.count
    share = [np.cumsum(item.counts) / item.counts.sum() for item in (few, all_of_them)]
    assert np.abs(share[0] - share[1]).max() < 0.05


def test_statistics_come_from_the_cache_and_are_the_same(tmp_path, model, samples, monkeypatch):
    first = statistics(model, samples, ["image"], cache=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 1
    monkeypatch.setattr(statistics_module, "extremes", None)  # calibrating again would call it
    second = statistics(model, samples, ["image"], cache=tmp_path)
    np.testing.assert_array_equal(first["image"].counts, second["image"].counts)
    assert (first["image"].low, first["image"].high) == (second["image"].low, second["image"].high)


def test_cache_of_other_samples_is_not_used(tmp_path, model, samples):
    statistics(model, samples, ["image"], cache=tmp_path)
    statistics(model, correlated(48, 1), ["image"], cache=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 2


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_damaged_cache_is_made_again(tmp_path, model, samples, damage):
    first = statistics(model, samples, ["image"], cache=tmp_path)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:200] if damage is None else damage)
    again = statistics(model, samples, ["image"], cache=tmp_path)
    np.testing.assert_array_equal(first["image"].counts, again["image"].counts)


def test_thinned_samples_are_spread_over_the_whole_set(samples):
    some = thinned(samples, 5)
    assert some.count == len(some.arrays["image"]) == 5
    np.testing.assert_array_equal(some.arrays["image"][-1], samples.arrays["image"][38])
    assert some.sha256 != samples.sha256
    assert thinned(samples, 100) is samples


@pytest.mark.parametrize("operator", ["stem", "depthwise", "expand", "head"])
def test_moments_are_those_of_what_a_channel_reads(model, samples, operator):
    seen = view(read_graph(Path(model.path)).graph)
    module = network()
    inputs = {}
    layer = getattr(module, operator)
    layer.register_forward_hook(lambda _, given, __: inputs.update(x=given[0].detach()))
    module(torch.from_numpy(samples.arrays["image"]))
    x = inputs["x"]
    if isinstance(layer, nn.Conv2d):
        unfolded = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
        columns = unfolded.permute(1, 0, 2).reshape(layer.groups, -1, unfolded.shape[0] * unfolded.shape[2])
    else:
        columns = x.T[None]
    expected = torch.einsum("gip,gjp->gij", columns, columns) / columns.shape[2]
    nodes = [node for node in seen.graph.node if node.op_type in ("Conv", "Gemm")]
    order = [name for name, part in module.named_children()]
    node = nodes[order.index(operator)]
    found = input_moments(model, samples, [node], seen)[node.name]
    np.testing.assert_allclose(found.products, expected.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.means, columns.mean(2).numpy(), rtol=1e-3, atol=1e-5)


def test_chosen_roundings_are_neighbours_and_lose_less_of_every_layer(model, samples, tables):
    seen = view(read_graph(Path(model.path)).graph)
    chosen = quantized_set(seen, rounds_products=False)
    moments = input_moments(model, samples, chosen.weighted, seen)
    for node in chosen.weighted:
        name = node.input[1]
        weight, found = seen.constants[name], moments[node.name]
        covariance = found.products - found.means[:, :, None] * found.means[:, None, :]
        lost = []
        for rounding in ("nearest", "adaround"):
            error = (rounded(weight, tables[rounding].weights[name]) - weight).ravel()[row_places(node, weight)]
            lost.append(float(((error @ covariance) * error).sum()))
        assert lost[1] < lost[0], node.name
        grid = tables["adaround"].weights[name]
        steps = np.asarray(grid.scales).reshape(-1, *[1] * (weight.ndim - 1))
        codes = rounded(weight, grid) / steps
        inside = np.abs(weight / steps) <= 127
        assert np.abs(codes - weight / steps)[inside].max() < 1.001


@pytest.mark.parametrize("longest", [3, 12])
def test_long_channels_are_treated_in_parts(model, samples, tables, monkeypatch, longest, tmp_path):
    monkeypatch.setattr("edgedeploy.prepare.ptq.rounding._LONGEST", longest)
    monkeypatch.setattr("edgedeploy.prepare.ptq.rounding._TURN_BYTES", 10_000)
    table = quantize(model, samples, ASYMMETRIC, CHOSEN)
    assert table.weights != tables["adaround"].weights
    whole, in_parts = (sqnr_db(model, item, ASYMMETRIC, 7, tmp_path) for item in (tables["adaround"], table))
    assert in_parts > whole - 1


def test_chosen_roundings_bring_unseen_samples_closer(model, tables, tmp_path):
    plain, better = (sqnr_db(model, tables[name], ASYMMETRIC, 7, tmp_path) for name in ("nearest", "adaround"))
    assert better > plain


def test_equalized_model_computes_the_same_with_even_channels(model, samples, tmp_path):
    even = equalize(model, samples, tmp_path / "even.onnx")
    assert even.sha256 != model.sha256
    assert even.fidelity[-1].candidate == "equalized fp32 ONNX"
    runs = Runner(Path(model.path)), Runner(Path(even.path))
    batch = correlated(8, 3).batch(0, 8)
    before, after = (next(iter(run(batch).values())) for run in runs)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    tables = [quantize(item, samples, SYMMETRIC) for item in (model, even)]
    plain, better = (
        sqnr_db(item, table, SYMMETRIC, 7, tmp_path) for item, table in zip((model, even), tables, strict=True)
    )
    assert better > plain + 3


def test_few_samples_do_not_make_channels_leave_their_range_on_others(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 640), nn.ReLU(), nn.Linear(640, 640), nn.ReLU(), nn.Linear(640, 5)).eval()
    spec = TensorSpec(name="vector", dtype="float32", shape=("batch", 12))
    few, others = random_samples([spec], 64, 0), random_samples([spec], 256, 1)
    exported = export(Loaded("module", "mlp", module), [spec], few, tmp_path / "e.onnx")
    plain = simplify(exported, few, tmp_path / "s.onnx")
    even = equalize(plain, few, tmp_path / "even.onnx")
    assert even.sha256 != plain.sha256
    found = []
    for item in (plain, even):
        form = emit(item, quantize(item, few, ASYMMETRIC, NEAREST), ASYMMETRIC, few, tmp_path / "q.onnx").model
        runs = Runner(Path(plain.path)), Runner(Path(form.path), is_optimized=False)
        fidelity = compare(*runs, others.batches([spec]), names=("fp32", "int8"), sample_source="others")
        found.append(fidelity.outputs[0].sqnr_db)
    assert found[1] > found[0] - 1


def test_model_with_nothing_to_equalize_is_left_alone(samples, tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3))
    exported = export(Loaded("module", "sigmoid", module.eval()), [IMAGE], samples, tmp_path / "e.onnx")
    assert equalize(exported, samples, tmp_path / "even.onnx") is exported
    assert not (tmp_path / "even.onnx").exists()


def test_channels_do_not_grow_through_a_clip(model, samples, tmp_path):
    even = equalize(model, samples, tmp_path / "even.onnx")
    before, after = (view(read_graph(Path(item.path)).graph) for item in (model, even))
    depthwise = [
        next(
            n
            for n in item.graph.node
            if n.op_type == "Conv"
            and n.input[1] in item.constants
            and item.constants[n.input[1]].shape == (24, 1, 3, 3)
        )
        for item in (before, after)
    ]
    weights = [item.constants[node.input[1]] for item, node in zip((before, after), depthwise, strict=True)]
    np.testing.assert_array_equal(*weights)


def test_layer_left_in_float_keeps_its_bias_and_strands_what_feeds_only_it(model, tables):
    seen = view(read_graph(Path(model.path)).graph)
    by_shape = {seen.constants[n.input[1]].shape: n for n in seen.graph.node if n.op_type == "Conv"}
    depthwise, expand = by_shape[24, 1, 3, 3], by_shape[24, 8, 1, 1]
    kept = without(tables["nearest"], seen, [depthwise.name])
    assert not {depthwise.name, expand.name} & set(kept.nodes)
    for node in (depthwise, expand):
        assert node.input[1] not in kept.weights
        assert node.input[2] not in kept.bias_deltas
    assert len(tables["nearest"].weights) - len(kept.weights) == 2
    assert not {expand.output[0], depthwise.input[0]} & set(kept.activations)


def test_layer_before_an_operator_that_is_never_quantized_stays_quantized(samples, tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    exported = export(Loaded("module", "sigmoid", module), [IMAGE], samples, tmp_path / "e.onnx")
    table = quantize(exported, samples, ASYMMETRIC)
    seen = view(read_graph(Path(exported.path)).graph)
    first, second, third = (node.name for node in seen.graph.node if node.op_type == "Conv")
    kept = without(table, seen, [third])
    assert first in kept.nodes
    assert not {second, third} & set(kept.nodes)


def test_float_layers_of_the_policy_stay_float_and_unknown_ones_are_named(model, samples):
    seen = view(read_graph(Path(model.path)).graph)
    last = [node.name for node in seen.graph.node if node.op_type == "Gemm"][-1]
    table = quantize(model, samples, ASYMMETRIC, QuantizationPolicy(float_layers=(last,)))
    assert last not in table.nodes
    with pytest.raises(UsageError, match=f"float_layers names '{last}x', which the model does not have; did you mean"):
        quantize(model, samples, ASYMMETRIC, QuantizationPolicy(float_layers=(f"{last}x",)))


def test_excluded_operators_stay_float(model, samples):
    rules = msgspec.structs.replace(ASYMMETRIC, excluded_operators=("Gemm",))
    table = quantize(model, samples, rules)
    seen = view(read_graph(Path(model.path)).graph)
    assert not {node.name for node in seen.graph.node if node.op_type == "Gemm"} & set(table.nodes)


def test_most_sensitive_layer_is_the_one_that_was_made_so(samples, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    with torch.no_grad():  # one weight of each channel is far larger than those that matter, and reads a dead channel
        module[0].weight[0], module[0].bias[0] = 0, -1
        module[2].weight[:, 0] = 300
    exported = export(Loaded("module", "uneven", module), [IMAGE], samples, tmp_path / "e.onnx")
    uneven = simplify(exported, samples, tmp_path / "s.onnx")
    table = quantize(uneven, samples, ASYMMETRIC, QuantizationPolicy(bias_correction=False, rounding="nearest"))
    layers = sensitivities(uneven, table, samples, ASYMMETRIC)
    convolutions = [node.name for node in read_graph(Path(uneven.path)).graph.node if node.op_type == "Conv"]
    assert layers[0].node == convolutions[1]
    assert layers[0].sqnr_db < layers[1].sqnr_db - 10
    found = plan(uneven, table, samples, ASYMMETRIC, budget_db=30, most=3)
    assert convolutions[1] in found.chosen.float_nodes
    assert found.curve[0].float_nodes == ()
    assert found.curve[0].sqnr_db < 30 <= found.chosen.sqnr_db
    assert found.curve[0].size_bytes < found.chosen.size_bytes


def test_budget_decides_what_is_left_in_float(model, samples, tables, tmp_path):
    met = plan(model, tables["nearest"], samples, ASYMMETRIC, budget_db=1, most=0)
    assert met.chosen.float_nodes == ()
    budget = met.chosen.sqnr_db + 1
    said = []
    policy = QuantizationPolicy(rounding="nearest", budget_db=budget)
    table = quantize(model, samples, ASYMMETRIC, policy, progress=said.append)
    (note,) = [text for text in said if "stay float" in text]
    left = {node for node in tables["nearest"].nodes if f" {node}" in note} & set(note.replace(",", " ").split())
    assert left
    assert not left & set(table.nodes)
    assert f"({met.chosen.sqnr_db:.1f} dB without" in note
    assert 0 < len(table.weights) < len(tables["nearest"].weights)
    assert sqnr_db(model, table, ASYMMETRIC, 7, tmp_path) > sqnr_db(model, tables["nearest"], ASYMMETRIC, 7, tmp_path)


def test_layer_whose_weights_are_the_model_is_the_last_to_stay_float(samples, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(),
        nn.Linear(400, 700),
    ).eval()  # fmt: skip
    with torch.no_grad():  # the head is the noisiest: a step of its grid is as large as most of its weights
        module[6].weight[:, 0] = 40 * module[6].weight.std()
    exported = export(Loaded("module", "headed", module), [IMAGE], samples, tmp_path / "e.onnx")
    headed = simplify(exported, samples, tmp_path / "s.onnx")
    table = quantize(headed, samples, ASYMMETRIC, NEAREST)
    (head,) = [node.name for node in read_graph(Path(headed.path)).graph.node if node.op_type == "Gemm"]
    found = curve(headed, table, samples, ASYMMETRIC, until_db=None, most=4)
    assert found.layers[0].node == head
    # Four bytes a weight instead of one; no scale for each channel, and none for each integer of the bias.
    assert found.layers[0].float_bytes == 3 * 400 * 700 - 2 * 4 * 700
    assert [head in point.float_nodes for point in found.points] == [False] * (len(found.points) - 1) + [True]
    assert [len(point.float_nodes) for point in found.points] == sorted({len(p.float_nodes) for p in found.points})


def test_curve_ends_where_a_budget_is_met_or_no_more_layers_may_stay_float(model, samples, tables):
    ends = {
        (until, most): curve(model, tables["nearest"], samples, ASYMMETRIC, until_db=until, most=most).points
        for until, most in ((None, 0), (1.0, 6), (None, 2))
    }
    assert len(ends[None, 0]) == len(ends[1.0, 6]) == 1
    assert len(ends[None, 2]) > 1
    assert len(ends[None, 2][-1].float_nodes) <= 2


def test_budget_that_cannot_be_met_says_what_was_reached(model, samples):
    with pytest.raises(
        ModelError, match=r"does not reach 90 dB on calibration samples with 1 layers in float .*0: \d+"
    ):
        quantize(model, samples, ASYMMETRIC, QuantizationPolicy(budget_db=90, max_float_layers=1))


class Attention(nn.Module):
    """Products of three axes, which have no bias of their own: nothing can be corrected or equalized."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(12, width) for _ in range(3))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 12)

    def forward(self, sequence):
        scores = self.query(sequence) @ self.key(sequence).transpose(1, 2) / 8
        return sequence + self.out(self.norm(torch.softmax(scores, -1) @ self.value(sequence)))


@pytest.mark.parametrize("width", [24, 1024])  # 12,288 weights are more than the exporter folds
def test_defaults_quantize_a_model_without_a_single_bias(width, tmp_path):
    torch.manual_seed(0)
    spec = TensorSpec(name="sequence", dtype="float32", shape=("batch", 6, 12))
    some = random_samples([spec], 24, 0)
    exported = export(Loaded("module", "attention", Attention(width).eval()), [spec], some, tmp_path / "e.onnx")
    attention = simplify(exported, some, tmp_path / "s.onnx")
    assert equalize(attention, some, tmp_path / "even.onnx") is attention
    table = quantize(attention, some, ASYMMETRIC)
    assert len(table.weights) == 4
    assert table.bias_deltas == {}
    form = emit(attention, table, ASYMMETRIC, some, tmp_path / "q.onnx").model
    assert form.fidelity[-1].outputs[0].sqnr_db > 30


def test_same_inputs_give_the_same_table(model, samples, tables):
    assert quantize(model, samples, ASYMMETRIC, CHOSEN) == tables["adaround"]


def test_what_looks_wrong_about_the_samples_is_told(model, samples):
    said = []
    quantize(model, thinned(samples, 4), ASYMMETRIC, progress=said.append)
    assert said[0].startswith("note: correlated 0 has only 4 samples")
