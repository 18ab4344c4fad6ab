"""A verification on a terminal: fits its width, says what the figures mean, hides nothing."""

import msgspec
import pytest

from edgedeploy.records.model import Fidelity, OutputFidelity
from edgedeploy.records.verification import (
    Form,
    LayerComparison,
    LayerError,
    MetricValues,
    PairedScores,
    Verification,
)
from edgedeploy.render.verification import verification_text


def _output(name, ratio, agreement):
    return OutputFidelity(
        output=name, max_abs=0.402, max_relative=0.0261, cosine=0.999878, sqnr_db=ratio, argmax_agreement=agreement
    )


def _pair(reference, candidate, ratio):
    outputs = (_output("logits", ratio, 0.9976), _output("features", None, None))
    return Fidelity(reference=reference, candidate=candidate, samples=2500, sample_source="made", outputs=outputs)


FOUND = Verification(
    subject="build/int8",
    samples=2500,
    sample_source="fashion-mnist",
    is_synthetic=False,
    forms=(
        Form(name="PyTorch", detail="package.module:factory, as it was given, in eager mode"),
        Form(name="fp32 ONNX", detail="the canonical form, in float32"),
        Form(name="artifact", detail="a name that is long enough to be wrapped on a narrow terminal, " * 2),
    ),
    fidelity=(_pair("PyTorch", "fp32 ONNX", 133.2), _pair("PyTorch", "artifact", 35.94)),
    metrics=(
        MetricValues(
            metric="top1@logits",
            outputs=("logits",),
            larger_is_better=True,
            values={"PyTorch": 0.92, "fp32 ONNX": 0.92, "artifact": 0.9188},
            pairs=(
                PairedScores(reference="PyTorch", candidate="fp32 ONNX", lost=0, gained=0),
                PairedScores(reference="PyTorch", candidate="artifact", lost=4, gained=1),
            ),
        ),
        MetricValues(
            metric="mypackage.scoring:error",
            outputs=("logits",),
            larger_is_better=False,
            values={"PyTorch": 0.1, "fp32 ONNX": 0.1, "artifact": 0.125},
        ),
    ),
    layers=LayerComparison(
        reference="fp32 ONNX",
        candidate="artifact",
        samples=32,
        layers=(
            LayerError(tensor="stem", operator="Conv", max_abs=0.1, sqnr_db=44.3, drop_db=5.7),
            LayerError(tensor="relu", operator="Relu", max_abs=0.1, sqnr_db=35.5, drop_db=8.8),
            LayerError(tensor="view", operator="Reshape", max_abs=0.0, sqnr_db=None, drop_db=0.0),
        ),
        not_compared=2,
        jump="relu",
    ),
    unmet=("top1@logits is 0.9188 in the artifact and 0.92 in PyTorch; a loss of 0.1pt is allowed",),
    notes=("a note that a reader must see, and that is longer than one line of a terminal is wide, so that it wraps",),
    edgedeploy="0",
)


def test_figures_of_every_pair_metric_and_layer_are_shown():
    text = verification_text(FOUND, color=False, width=100)
    for shown in ("fp32 ONNX against PyTorch", "artifact against PyTorch", "35.9 dB", "exact", "99.76 %", "0.9188"):
        assert shown in text
    (row,) = [line.split() for line in text.splitlines() if line.split()[:2] == ["artifact", "0.9188"]]
    assert row[-3:] == ["-0.0012", "4", "1"]
    assert "2,500 samples of fashion-mnist" in text
    assert "mypackage.scoring:error (smaller is better)" in text


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_line_is_wider_than_the_terminal_and_no_name_is_cut(width):
    text = verification_text(FOUND, color=False, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "mypackage.scoring:error" in text
    assert "\x1b" not in text
    assert "…" not in text


def test_the_jump_is_named_and_defined():
    text = verification_text(FOUND, color=False, width=200)
    assert "The error jumps at 'relu' (Relu): 35.5 dB, 8.8 dB below what it is computed from." in text
    assert "Drop: how much lower" in text
    assert "2 tensors of the fp32 ONNX have no counterpart" in text
    calm = msgspec.structs.replace(FOUND, layers=msgspec.structs.replace(FOUND.layers, jump=""))
    assert "jumps nowhere" in verification_text(calm, color=False, width=200)


def test_unmet_limits_come_last_and_only_when_there_are_some():
    assert verification_text(FOUND, color=False, width=200).splitlines()[-2] == "Not met"
    assert "Not met" not in verification_text(msgspec.structs.replace(FOUND, unmet=()), color=False, width=200)


def test_names_cannot_speak_to_the_terminal():
    forged = msgspec.structs.replace(FOUND, subject="\x1b[2Jwiped", notes=("\x1b[31mred",))
    assert "\x1b" not in verification_text(forged, color=False, width=80)
