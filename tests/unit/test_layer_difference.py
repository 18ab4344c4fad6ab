"""Layers of two profiles are brought together through the model's nodes, and the known cause is named first."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.judge.layer_difference import align, speed_explanation
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.explanation import ProfiledLayer

from .explanation_samples import layer, profile, whole_differences_s


def explained(before, after, **named):
    baseline, candidate = profile("a", before), profile("b", after)
    return speed_explanation(baseline, candidate, whole_differences_s(baseline, candidate), **named)


def plain(**changes):
    """Five convolutions on integers; a name given with seconds takes another time, or is another layer."""
    levels = {"conv1": 1e-3, "conv2": 2e-3, "conv3": 1e-3, "conv4": 5e-4, "fc": 1e-4}
    return [
        changes[name]
        if isinstance(changes.get(name), ProfiledLayer)
        else layer(name, changes.get(name, level), seed=seed)
        for seed, (name, level) in enumerate(levels.items())
    ]


# ---------------------------------------------------------------- alignment

NODES = st.integers(0, 9).map("n{}".format)
LAYERS = st.lists(
    st.builds(
        ProfiledLayer,
        name=st.sampled_from(("", "x", "y", "z")),
        kind=st.sampled_from(("Conv", "Relu")),
        role=st.sampled_from(("compute", "compute", "convert", "layout")),
        nodes=st.lists(NODES, max_size=3).map(tuple),
        tensors=st.lists(NODES, max_size=2).map(tuple),
        passes_s=st.lists(st.floats(1e-6, 1e-2), min_size=3, max_size=3).map(tuple),
    ),
    max_size=12,
)


@given(LAYERS, LAYERS)
def test_every_layer_of_both_sides_is_in_exactly_one_group(before, after):
    groups = align(before, after)
    assert sorted(place for group in groups for place in group.baseline) == list(range(len(before)))
    assert sorted(place for group in groups for place in group.candidate) == list(range(len(after)))
    assert all(group.baseline or group.candidate for group in groups)


@given(LAYERS, LAYERS)
def test_layers_that_share_a_node_are_in_one_group_and_roles_do_not_mix(before, after):
    place_of = {}
    for number, group in enumerate(align(before, after)):
        members = [before[one] for one in group.baseline] + [after[one] for one in group.candidate]
        assert {one.role for one in members} == {group.role}
        for one in members:
            for node in one.nodes:
                assert place_of.setdefault((one.role, node), number) == number


@settings(deadline=None)  # the first example imports scipy
@given(LAYERS.filter(bool), LAYERS.filter(bool))
def test_the_groups_add_up_to_the_difference_of_the_sums(before, after):
    found = speed_explanation(profile("a", before), profile("b", after), [])
    sums = [math.fsum(one.passes_s[number] for one in side) for side in (before, after) for number in range(3)]
    expected = sum(sums[3:]) / 3 - sum(sums[:3]) / 3
    assert math.isclose(math.fsum(group.difference_s for group in found.groups), expected, abs_tol=1e-12)
    assert math.isclose(found.layers.seconds, expected, abs_tol=1e-12)


def test_what_is_fused_on_one_side_meets_its_parts_on_the_other():
    before = [layer("conv", 1e-3, nodes=("conv", "add", "relu"))]
    after = [layer("conv", 8e-4), layer("add", 2e-4, kind="Add"), layer("relu", 1e-4, kind="Relu")]
    (group,) = align(before, after)
    assert (group.baseline, group.candidate) == ((0,), (0, 1, 2))


def test_layers_of_two_runtimes_meet_by_the_tensors_that_they_make():
    before = [layer("node_conv", 1e-3, tensors=("conv_out",))]
    after = [layer("conv_out", 1e-3, nodes=(), tensors=("conv_out",))]
    assert len(align(before, after)) == 1


def test_a_layer_without_nodes_meets_only_its_like():
    before = [layer("lut", 1e-3, nodes=(), kind="Lookup"), layer("", 1e-3, nodes=())]
    after = [layer("lut", 1e-3, nodes=(), kind="Lookup"), layer("", 1e-3, nodes=())]
    assert len(align(before, after)) == 3  # nothing says that the two nameless ones are the same


# ---------------------------------------------------------------- causes


def test_a_layer_that_fell_back_to_float_is_named_first():
    found = explained(plain(), plain(conv2=layer("conv2", 6e-3, precision="fp32"), fc=1.1e-4))
    first = found.causes[0]
    assert first.kind == "precision"
    assert first.text.startswith("conv2 runs in fp32 in the candidate, in int8 in the baseline: +3.9")
    assert first.is_proven
    assert 0.95 < first.share < 1.05
    assert found.groups[0].name == "conv2"


def test_a_convolution_made_wider_is_named_first_with_its_work():
    macs = ({"conv1": 100, "conv2": 100, "conv3": 100}, {"conv1": 100, "conv2": 100, "conv3": 200})
    found = explained(plain(), plain(conv3=2e-3), macs=macs)
    assert found.causes[0].kind == "work"
    assert found.causes[0].text.startswith("conv3 has 2 times the multiply-adds of the baseline: +1")


def test_a_lost_fusion_is_named_with_its_parts():
    before = [layer("conv", 1e-3, nodes=("conv", "relu")), layer("fc", 1e-4)]
    after = [layer("conv", 1e-3), layer("relu", 5e-4, kind="Relu"), layer("fc", 1e-4)]
    found = explained(before, after)
    assert found.causes[0].kind == "fusion"
    assert "conv + relu is no longer fused: 2 layers in the candidate, 1 in the baseline" in found.causes[0].text


@pytest.mark.parametrize(
    ("role", "kind", "says"),
    [("convert", "conversions", "3 conversions of numbers"), ("layout", "layouts", "3 copies into another layout")],
)
def test_what_a_runtime_adds_by_itself_is_one_cause(role, kind, says):
    added = [layer(f"extra{number}", 4e-4, nodes=(), kind="Reorder", role=role) for number in range(3)]
    found = explained(plain(), [*plain(), *added])
    assert found.causes[0].kind == kind
    assert f"the candidate has {says}, the baseline none" in found.causes[0].text
    assert found.causes[0].groups == tuple(place for place, group in enumerate(found.groups) if group.role == role)
    assert found.causes[0].difference.seconds == pytest.approx(1.2e-3, rel=0.05)


def test_many_layers_that_changed_alike_are_one_cause():
    after = [layer(one.name, one.passes_s[0] * 2, precision="fp32") for one in plain()]
    found = explained(plain(), after)
    assert found.causes[0].text.startswith("5 groups of layers run in fp32 in the candidate, in int8 in the baseline")
    assert "conv2 most" in found.causes[0].text
    assert len(found.causes) == 1


def test_a_layer_that_only_one_side_has_is_named():
    found = explained(plain(), [*plain(), layer("head", 2e-3)])
    assert found.causes[0].kind == "appeared"
    assert found.causes[0].text.startswith("head is only in the candidate: +2")


def test_of_a_faster_candidate_the_causes_are_what_made_it_faster():
    found = explained(plain(), plain(conv2=5e-4, conv3=1.3e-3))
    assert found.causes[0].text.startswith("conv2 takes another time with the same kernel: -1.")
    assert "conv3" in found.counteracting


def test_without_a_difference_nothing_is_proven():
    found = explained(plain(), [replace(one, passes_s=tuple(reversed(one.passes_s))) for one in plain()])
    assert not any(group.is_proven for group in found.groups)
    assert not any(cause.is_proven for cause in found.causes)
    assert all("not proven" in cause.text for cause in found.causes)


def test_one_pass_gives_differences_without_intervals():
    before = [replace(one, passes_s=one.passes_s[:1]) for one in plain()]
    after = [replace(one, passes_s=one.passes_s[:1]) for one in plain(conv1=2e-3)]
    found = explained(before, after)
    assert found.groups[0].name == "conv1"
    assert (found.groups[0].low_s, found.groups[0].p, found.groups[0].is_proven) == (None, None, False)


def test_the_chance_of_a_false_alarm_among_all_groups_is_held():
    """Fifty layers that do not differ, 80 times: within 5 % of the families something is called different."""
    alarms = 0
    for seed in range(80):
        before = [layer(f"l{number}", 1e-3, seed=f"a{seed}") for number in range(50)]
        after = [layer(f"l{number}", 1e-3, seed=f"b{seed}") for number in range(50)]
        alarms += any(group.is_proven for group in explained(before, after).groups)
    assert alarms <= 10  # 4 expected; more than 10 in 3 of 1,000 samples of a right rule


def test_equal_readings_of_a_coarse_clock_prove_nothing_below_its_step():
    """ONNX Runtime tells whole microseconds: eight times "3" and eight times "4" may be 3.49 and 3.51."""
    before = [ProfiledLayer(name="fc", nodes=("fc",), passes_s=(3e-6,) * 8)]
    after = [ProfiledLayer(name="fc", nodes=("fc",), passes_s=(4e-6,) * 8)]
    (group,) = explained(before, after).groups
    assert group.low_s < 5e-7
    far = [ProfiledLayer(name="fc", nodes=("fc",), passes_s=(9e-6,) * 8)]
    assert explained(before, far).groups[0].is_proven


# ---------------------------------------------------------------- the sum and the whole


def test_layers_that_agree_with_the_whole_say_so_and_watching_is_told():
    before, after = plain(), plain(conv2=4e-3)
    baseline, candidate = profile("a", before, overhead_s=2e-4), profile("b", after, overhead_s=2e-4)
    found = speed_explanation(baseline, candidate, whole_differences_s(baseline, candidate))
    assert found.agrees is True
    assert found.baseline_overhead_s == pytest.approx(2e-4, abs=1e-4)
    assert found.notes == ()


def test_layers_that_do_not_agree_with_the_whole_are_a_note():
    before, after = plain(), plain(conv2=4e-3)
    baseline, candidate = profile("a", before), profile("b", after, overhead_s=1.5e-3)
    found = speed_explanation(baseline, candidate, whole_differences_s(baseline, candidate))
    assert found.agrees is False
    assert "watching does not cost both sides the same" in found.notes[0]


# ---------------------------------------------------------------- nothing was timed


def test_where_no_layer_can_be_timed_what_is_known_is_told_untimed():
    reports = (
        LayerReport(operators={}, quantized=("CONV_2D conv1", "CONV_2D conv2"), float_islands=()),
        LayerReport(operators={}, quantized=("CONV_2D conv1",), float_islands=("CONV_2D conv2",)),
    )
    macs = ({"conv1": 10, "conv2": 1000, "fc": 5}, {"conv1": 10, "conv2": 1000, "fc": 10})
    found = speed_explanation(
        profile("a", [layer("x", 1e-3)]),
        replace(profile("b", [layer("x", 1e-3)]), layers=(), not_available="LiteRT does not say"),
        [1e-3, 1.1e-3, 0.9e-3],
        macs=macs,
        reports=reports,
    )
    assert found.causes[0].text == "conv2 computes in float in the candidate, on integers in the baseline (not timed)"
    assert found.causes[1].text == "fc has 2 times the multiply-adds of the baseline (not timed)"
    assert found.whole.seconds == pytest.approx(1e-3)
    assert found.groups == ()
