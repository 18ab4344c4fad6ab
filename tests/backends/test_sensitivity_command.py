"""`edgedeploy sensitivity` from a real network, and `compile -Q budget_db` that takes its rows."""

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed here")
pytest.importorskip("onnxscript", reason="onnxscript is not installed here")

import torch
from torch import nn

from edgedeploy.cli import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with an ONNX model, one of whose layers is far noisier than the others, and a calibration set."""
    folder = tmp_path_factory.mktemp("sensitivity")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    with torch.no_grad():
        module[0].weight[0], module[0].bias[0] = 0, -1
        module[2].weight[:, 0] = 300
    image = torch.zeros(2, 3, 8, 8)
    program = torch.onnx.export(
        module, (image,), dynamo=True, input_names=["image"], dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    program.save(str(folder / "uneven.onnx"))
    np.savez(folder / "cal.npz", image=np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32))
    return folder


@pytest.fixture(autouse=True)
def own_cache(folder, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
    monkeypatch.chdir(folder)


def test_rows_say_what_each_layer_gains_and_costs(capsys):
    code = run(["sensitivity", "uneven.onnx", "--calibration", "cal.npz", "-Q", "max_float_layers=2", "--json", "-q"])
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "edgedeploy.sensitivity/1"
    first, second = found["steps"][:2]
    assert first["left"] == []
    assert found["layers"][0]["node"] in second["left"]
    assert second["gain_db"] == pytest.approx(second["sqnr_db"] - first["sqnr_db"])
    assert second["gain_db"] > 6
    assert all(step["latency_ratio"] > 0 for step in found["steps"])
    assert "measured here" in found["timing"]


def test_other_machines_are_not_timed_here(capsys):
    arguments = ["sensitivity", "uneven.onnx", "--calibration", "cal.npz", "-Q", "max_float_layers=1", "-q"]
    assert run([*arguments, "--target", "raspberry-pi-5"]) == 0
    shown = capsys.readouterr().out
    assert "left in float" in shown
    assert "measured here" not in shown
    assert "not measured" in shown


def test_target_without_rules_is_named(capsys):
    assert run(["sensitivity", "uneven.onnx", "--calibration", "cal.npz", "--backend", "fake"]) == 2
    assert "has no int8 rules for back end 'fake'" in capsys.readouterr().err


def test_compile_prints_and_notes_the_layers_that_a_budget_leaves(capsys, folder):
    arguments = ["compile", "uneven.onnx", "--precision", "int8", "--calibration", "cal.npz", "-o", "out"]
    assert run([*arguments, "-Q", "budget_db=30"]) == 0
    told = capsys.readouterr()
    assert "layers stay float for 30 dB on calibration samples" in told.err
    assert "stay float for 30 dB" in " ".join(told.out.split())
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert any("stay float for 30 dB" in note for note in manifest["notes"])
