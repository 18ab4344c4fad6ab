"""Profiles of TensorRT, whose layers are known from what the inspector said when the engine was built."""

import json

import msgspec

from edgedeploy.backends.trt_layers import layers_from_inspector
from edgedeploy.explain import described_layers
from edgedeploy.judge.layer_difference import speed_explanation
from tests.unit.explanation_samples import profile, whole_differences_s

from .inspector_texts import DETAILED_10, DETAILED_85, NAMES_ONLY


def timed(text, levels_s, *, suffix=""):
    """The layers that an inspector described, as a profiler of TensorRT's tells them: name, "", seconds."""
    layers = layers_from_inspector(text)
    named = described_layers(layers, [(layer.name + suffix, "") for layer in layers])
    assert len(named) == len(levels_s)
    return [
        msgspec.structs.replace(
            layer, passes_s=tuple(level_s * (1 + 0.01 * ((place + step) % 3 - 1)) for step in range(8))
        )
        for place, (layer, level_s) in enumerate(zip(named, levels_s, strict=True))
    ]


def fell_back(text):
    """The same engine with its second convolution in half floats, and a copy in another layout before it."""
    said = json.loads(text)
    second = said["Layers"][2]
    second["Inputs"] = [{**second["Inputs"][0], "Format/Datatype": "Half"}]
    copied = {
        "Name": "Reformatting CopyNode for Input Tensor 0 to /c2/Conv", "LayerType": "Reformat",
        "Inputs": [{**second["Inputs"][0]}], "Outputs": [{**second["Inputs"][0]}], "Metadata": "",
    }  # fmt: skip
    said["Layers"].insert(2, copied)
    return json.dumps(said)


def test_a_convolution_that_fell_back_to_half_floats_is_named_before_the_copy_that_it_needs():
    before = timed(DETAILED_10, [1e-5, 1e-4, 1e-4, 2e-5, 1e-5])
    after = timed(fell_back(DETAILED_10), [1e-5, 1e-4, 3e-5, 2.4e-4, 2e-5, 1e-5])
    baseline, candidate = profile("int8", before), profile("mixed", after)
    found = speed_explanation(baseline, candidate, whole_differences_s(baseline, candidate))
    first, second, *_ = found.causes
    assert first.text.startswith(
        "/c2/Conv + /Add + /r2/Relu runs in fp16 in the candidate, in int8 in the baseline: +1"
    )
    assert second.kind == "layouts"
    assert first.is_proven
    assert second.is_proven


def test_two_versions_of_tensorrt_meet_at_the_models_nodes():
    before, after = timed(DETAILED_85, [1e-5] * 5), timed(DETAILED_10, [1e-5] * 5)
    found = speed_explanation(profile("8.5", before), profile("10", after), [])
    for node in ("/c1/Conv", "/c2/Conv", "/fc/Gemm"):
        (group,) = [group for group in found.groups if group.role == "compute" and node in group.nodes]
        assert group.baseline_layers
        assert group.candidate_layers
    roundings = [group for group in found.groups if group.role == "convert"]
    assert roundings


def test_a_profiles_number_behind_a_name_is_overlooked():
    plain, numbered = timed(DETAILED_10, [1e-5] * 5), timed(DETAILED_10, [1e-5] * 5, suffix=" [profile 1]")
    assert [layer.nodes for layer in plain] == [layer.nodes for layer in numbered]


def test_an_engine_that_was_built_with_few_words_is_aligned_by_the_names_that_it_joins():
    named = described_layers(
        layers_from_inspector(NAMES_ONLY), [(layer.name, "") for layer in layers_from_inspector(NAMES_ONLY)]
    )
    assert "/c1/Conv" in named[1].nodes
    assert named[3].role == "layout"


def test_a_layer_that_nobody_described_is_kept_with_its_own_name():
    (layer,) = described_layers((), [("new kernel", "")])
    assert (layer.name, layer.nodes, layer.role) == ("new kernel", (), "compute")
