"""A sensitivity curve on a terminal: fits its width, one row a step, says where latency comes from."""

import msgspec
import pytest

from edgedeploy.records.sensitivity import LayerSensitivity, Sensitivity, SensitivityStep
from edgedeploy.render.sensitivity import sensitivity_text


def _step(left, sqnr_db, gain_db, ratio):
    return SensitivityStep(left=left, sqnr_db=sqnr_db, gain_db=gain_db, size_bytes=5_054_953, latency_ratio=ratio)


FOUND = Sensitivity(
    model="mobile",
    target="x86-64-vnni",
    backend="onnxruntime",
    calibration="photographs",
    samples=1870,
    method="mse activations",
    fp32_bytes=18_543_921,
    layers=(LayerSensitivity(node="node_Conv_882", sqnr_db=31.0, float_bytes=864),),
    steps=(
        _step((), 24.54, 0.0, 0.512),
        _step(("node_Conv_881", "node_Conv_882"), 27.32, 2.78, 0.559),
        _step(("node_[bold]Conv",), 27.1, -0.22, 0.6),
    ),
    timing="measured here with ONNX Runtime",
)


def test_each_step_is_a_row_with_gain_size_and_ratio():
    shown = sensitivity_text(FOUND, color=False, width=None)
    rows = [line.split() for line in shown.splitlines()]
    assert ["none", "24.5", "dB", "4.82", "MiB", "0.51x"] in rows
    assert "+ node_Conv_881, node_Conv_882   27.3 dB   +2.8 dB   4.82 MiB   0.56x" in shown
    assert "-0.2 dB" in shown
    assert "On 1,870 samples of photographs: mse activations." in shown
    assert "fp32 takes 17.7 MiB" in shown


def test_names_are_text_and_no_markup():
    assert "node_[bold]Conv" in sensitivity_text(FOUND, color=True, width=120)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_fits_the_terminal(width):
    assert max(map(len, sensitivity_text(FOUND, color=False, width=width).splitlines())) <= width


def test_without_timing_there_is_no_empty_column():
    steps = tuple(msgspec.structs.replace(step, latency_ratio=None) for step in FOUND.steps)
    other = msgspec.structs.replace(FOUND, steps=steps, timing="not measured, since pi with onnxruntime is elsewhere")
    shown = sensitivity_text(other, color=False, width=None)
    assert "latency to fp32" not in shown
    assert "Latency: not measured, since pi with onnxruntime is elsewhere." in shown
