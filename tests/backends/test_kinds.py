"""Every kind of compressed model, from the real torch calls to an artifact: recognised, kept, and right."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="compressed models come from PyTorch: pip install 'edgedeploy[torch]'")
pytest.importorskip("onnxruntime", reason="artifacts run on ONNX Runtime: pip install 'edgedeploy[onnxruntime]'")

from edgedeploy import pipeline
from edgedeploy.errors import ModelError
from edgedeploy.prepare.graph import Runner
from tests import kinds
from tests.benchmarks.kinds import ROOT, answers, inputs_of

# Kind → the precision that it is built as, and what must be recognised. Where folding depends on size, the large one.
EXPECTED = {
    "pruning masks, large": ("fp32", {"pruning masks"}),
    "pruning masks in a CNN": ("fp32", {"pruning masks"}),
    "torch.ao.pruning": ("fp32", {"parametrization", "unstructured sparsity"}),
    "weight_norm, large": ("fp32", {"parametrization"}),
    "baked sparsity": ("fp32", {"unstructured sparsity"}),
    "2:4 sparsity": ("fp32", {"2:4 sparsity"}),
    "channels removed": ("fp32", set()),
    "low rank, parametrization, large": ("fp32", {"low rank"}),
    "low rank in forward": ("fp32", {"low rank"}),
    "low rank, two layers": ("fp32", {"low rank"}),
    "shared weights, large": ("fp32", {"shared weights"}),
    "dynamic int8, Linear, large": ("int8", {"dynamic int8"}),
    "dynamic int8, LSTM": ("int8", {"dynamic int8"}),
    "dynamic float16, Linear": ("fp16", {"float16"}),
    "eager PTQ, converted": ("int8", {"static int8"}),
    "eager QAT, prepared": ("int8", {"QAT int8"}),
    "FX PTQ, converted": ("int8", {"static int8"}),
    "FX QAT, prepared": ("int8", {"QAT int8"}),
    "PT2E PTQ, XNNPACK": ("int8", {"static int8"}),
    "PT2E PTQ, X86": ("int8", {"static int8"}),
    "PT2E PTQ, Arm": ("int8", {"static int8"}),
    "torchao int8 weight-only, large": ("int8", {"weight-only int8"}),
    "torchao int4 weight-only, large": ("int8", {"weight-only int4"}),
    "torchao int8 dynamic activations": ("int8", {"dynamic int8"}),
    "torchao 8da4w, large": ("int8", {"int8 activations, int4 weights"}),
    "float16": ("fp16", {"float16"}),
    "bfloat16": ("fp16", {"bfloat16"}),
    "bfloat16 autocast": ("fp32", {"autocast"}),
    "distilled student": ("fp32", set()),
    "multi-task, two inputs, dictionary": ("fp32", set()),
}
# Computed in float32 here, which is more exact than the source: changed, and said so.
SHORT = {"float16", "bfloat16", "autocast"}
# Largest error allowed in ratio to the largest output: float32 arithmetic; short floats; codes, of which one is about 1 %.
ALLOWED = {"fp32": 1e-5, "fp16": 1e-2, "int8": 5e-2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(ROOT)
        yield


def compiled(name, precision, **settings):
    inputs = [f"{key}={','.join(map(str, shape))}" for key, shape in kinds.KINDS[name][1].items()]
    return pipeline.compile(f"tests.kinds:{kinds.slug(name)}", inputs=inputs, precision=precision, **settings)


@pytest.mark.parametrize("name", EXPECTED)
def test_kind_is_recognised_kept_and_right(name, place):
    precision, found = EXPECTED[name]
    built = compiled(name, precision)
    statements = built.artifact.compression.statements
    assert {item.kind for item in statements} == found
    assert all(item.onnx == "kept" for item in statements if item.kind not in SHORT), statements
    assert all(item.artifact in ("kept", "changed") for item in statements), statements
    feeds = inputs_of(name)
    actual = Runner(built.file)(feeds).values()
    for made, expected in zip(actual, answers(kinds.make(name), feeds), strict=True):
        error = np.abs(made - expected).max() / np.abs(expected).max()
        assert error <= (5e-2 if "autocast" in found else ALLOWED[precision])


@pytest.mark.parametrize(
    "name", ["PT2E PTQ, XNNPACK", "torchao int8 weight-only, large", "dynamic int8, Linear, large"]
)
def test_integers_are_not_expanded_unless_told(name, place):
    with pytest.raises(ModelError, match=r"would drop its \d+ scales .* build it as int8, or accept .* --allow-loss"):
        compiled(name, "fp32")
    built = compiled(name, "fp32", allow_loss=True)
    assert any(note.startswith("lost: ") for note in built.artifact.notes)
    assert {item.artifact for item in built.artifact.compression.statements} == {"lost"}


def test_halves_are_not_doubled_unless_told(place):
    with pytest.raises(ModelError, match=r"twice the bytes .* build it as fp16"):
        compiled("float16", "fp32")


def test_trained_scales_survive_into_the_runtime(place):
    survival = compiled("PT2E PTQ, XNNPACK", "int8").artifact.survival
    assert survival.largest_relative_change == 0
    assert {fate for entry in survival.entries for fate in entry.stages.values()} <= {"kept", "folded"}


@pytest.mark.parametrize("name", ["eager QAT, prepared", "FX QAT, prepared"])
def test_scales_are_those_that_training_saw(name, place):
    module = kinds.make(name)
    trained = {float(part.weight_fake_quant.scale) for part in module.modules() if hasattr(part, "weight_fake_quant")}
    inputs = [f"{key}={','.join(map(str, shape))}" for key, shape in kinds.KINDS[name][1].items()]
    found = pipeline.inspect(f"tests.kinds:{kinds.slug(name)}", inputs=inputs)
    assert {scale for grid in found.quantization.weights.values() for scale in grid.scales} == trained


def test_table_in_the_documents_has_every_kind():
    rows = (ROOT / "edgedeploy" / "KINDS.md").read_text().splitlines()
    named = [row.split("|")[1].strip() for row in rows if row.startswith("|")][2:]
    assert named == list(kinds.KINDS)
