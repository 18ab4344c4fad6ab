"""The targets with an NVIDIA GPU: one int8 form for all, as its parser demands it, and the processor beside it."""

import pytest

from edgedeploy.records.target import is_target, load_target, target_files

JETSONS = ["jetson-orin", "jetson-agx-xavier", "jetson-agx-orin", "jetson-orin-nano-8gb", "jetson-agx-thor"]
ALL = [*JETSONS, "nvidia-dgpu"]
# What /proc/cpuinfo says, as far as targets look at it.
CARMEL = {"fp", "asimd", "crc32", "atomics", "fphp", "asimdhp", "asimdrdm", "dcpop"}
CORTEX_A78AE = CARMEL | {"asimddp", "lrcpc"}
NEOVERSE_V3AE = CORTEX_A78AE | {"i8mm", "bf16", "sve2"}


@pytest.fixture(autouse=True)
def no_own_targets(monkeypatch, tmp_path):
    monkeypatch.delenv("EDGEDEPLOY_TARGETS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", sorted(target_files()))
def test_every_shipped_target_loads_and_says_what_it_is(name):
    target = load_target(name, machine="x86_64", isa={"avx2"})
    assert len(target.description) > 20
    assert all(rules.why.strip() for rules in target.quantization.values())
    assert set(target.backends) <= set(target.quantization)


@pytest.mark.parametrize("name", ALL)
def test_int8_form_is_what_tensorrt_8_5_asserts(name):
    target = load_target(name, machine="", isa=())
    rules = target.quantization["tensorrt"]
    assert (rules.activation_dtype, rules.activation_symmetric, rules.weight_bits) == ("int8", True, 8)
    assert (rules.weight_per_channel, rules.bias) == (True, "float32")
    assert (rules.residual_add, rules.clamps) == ("skip", "kept")
    assert (rules.weight_only, rules.dynamic) == ("refused", "refused")
    assert set(target.backends["tensorrt"].precisions) == {"fp32", "fp16", "int8"}


def test_form_is_one_so_that_one_quantization_serves_every_board():
    forms = set()
    for name in ALL:
        rules = load_target(name, machine="", isa=()).quantization["tensorrt"]
        forms.add(tuple(getattr(rules, field) for field in rules.__struct_fields__ if field != "why"))
    assert len(forms) == 1


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        ("jetson-agx-xavier", CARMEL),
        ("jetson-orin", CORTEX_A78AE),
        ("jetson-agx-orin", CORTEX_A78AE),
        ("jetson-orin-nano-8gb", CORTEX_A78AE),
        ("jetson-agx-thor", NEOVERSE_V3AE),
    ],
)
def test_processor_of_a_jetson_is_its_targets(name, isa):
    assert is_target(load_target(name, machine="", isa=()), machine="aarch64", isa=isa)


def test_xavier_is_no_orin_and_orin_is_no_thor():
    assert not is_target(load_target("jetson-agx-orin", machine="", isa=()), machine="aarch64", isa=CARMEL)
    assert not is_target(load_target("jetson-agx-thor", machine="", isa=()), machine="aarch64", isa=CORTEX_A78AE)


def test_options_of_the_targets_are_options_of_the_back_end():
    import dataclasses

    from edgedeploy.backends import backend

    known = {field.name for field in dataclasses.fields(backend("tensorrt").options)}
    for name in ALL:
        assert set(load_target(name, machine="", isa=()).backends["tensorrt"].options) <= known
