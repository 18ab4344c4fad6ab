"""Targets: the shipped ones are well-formed, and `host` becomes what a machine is."""

import pytest

from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.records.target import load_target, target_files

SHIPPED = {"host", "x86-64", "x86-64-vnni", "arm64-linux", "raspberry-pi-4", "raspberry-pi-5", "jetson-orin"}
NVIDIA = {
    "jetson-agx-xavier",
    "jetson-orin-nano-8gb",
    "jetson-agx-orin",
    "jetson-agx-thor",
    "nvidia-rtx",
    "nvidia-dgpu",
}


@pytest.fixture(autouse=True)
def no_own_targets(monkeypatch, tmp_path):
    monkeypatch.delenv("EDGEDEPLOY_TARGETS", raising=False)
    monkeypatch.chdir(tmp_path)


def test_shipped_targets_are_all_there():
    assert set(target_files()) == SHIPPED | NVIDIA


@pytest.mark.parametrize("name", sorted(SHIPPED - {"host"}))
def test_shipped_target_gives_int8_rules_with_a_reason(name):
    target = load_target(name, machine="", isa=())
    assert set(target.backends["onnxruntime"].precisions) == {"fp32", "fp16", "int8"}
    assert "onnxruntime" in target.quantization
    for rules in target.quantization.values():
        assert len(rules.why.strip()) > 80


def test_tensorrt_rules_are_symmetric_with_a_float_bias():
    rules = load_target("jetson-orin", machine="", isa=()).quantization["tensorrt"]
    assert (rules.activation_dtype, rules.activation_symmetric, rules.bias) == ("int8", True, "float32")
    assert (rules.residual_add, rules.clamps) == ("skip", "kept")
    assert (rules.weight_only, rules.dynamic) == ("refused", "refused")


@pytest.mark.parametrize("name", ["arm64-linux", "raspberry-pi-4", "raspberry-pi-5", "x86-64", "x86-64-vnni"])
def test_tflite_rules_are_those_of_its_specification(name):
    rules = load_target(name, machine="", isa=()).quantization["tflite"]
    assert (rules.activation_dtype, rules.activation_symmetric, rules.weight_bits) == ("int8", False, 8)
    # Its converter makes the int32 biases, and what it converts is the float model, whole.
    assert (rules.bias, rules.clamps, rules.product_outputs) == ("float32", "kept", "integer")
    assert rules.weight_per_channel


@pytest.mark.parametrize("name", ["arm64-linux", "raspberry-pi-4", "raspberry-pi-5", "x86-64", "x86-64-vnni"])
def test_mnn_rules_leave_the_float_model_whole(name):
    rules = load_target(name, machine="", isa=()).quantization["mnn"]
    assert (rules.activation_symmetric, rules.bias, rules.clamps) == (True, "float32", "kept")


@pytest.mark.parametrize(
    ("machine", "isa", "expected"),
    [
        ("x86_64", {"avx2", "avx512_vnni"}, "x86-64-vnni"),
        ("x86_64", {"avx2", "avx_vnni"}, "x86-64-vnni"),
        ("x86_64", {"avx2"}, "x86-64"),
        ("aarch64", {"asimd"}, "arm64-linux"),
    ],
)
def test_host_becomes_what_the_machine_is(machine, isa, expected):
    assert load_target("host", machine=machine, isa=isa).name == expected


def test_machine_without_a_rule_is_a_sentence():
    with pytest.raises(UsageError, match=r"fits this machine \(s390x\)"):
        load_target("host", machine="s390x", isa=())


def test_unknown_target_names_the_likely_one():
    with pytest.raises(UsageError, match='did you mean "raspberry-pi-5"'):
        load_target("raspbery-pi-5", machine="", isa=())


def test_own_target_goes_before_a_shipped_one(tmp_path, monkeypatch):
    (tmp_path / "x86-64.toml").write_text('format = "edgedeploy.target/1"\nname = "x86-64"\ndescription = "mine"\n')
    monkeypatch.setenv("EDGEDEPLOY_TARGETS", str(tmp_path))
    assert load_target("x86-64", machine="", isa=()).description == "mine"


def test_name_that_differs_from_the_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text('format = "edgedeploy.target/1"\nname = "b"\ndescription = ""\n')
    monkeypatch.setenv("EDGEDEPLOY_TARGETS", str(tmp_path))
    with pytest.raises(DocumentError, match="line 2: the name"):
        load_target("a", machine="", isa=())
