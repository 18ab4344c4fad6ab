"""The command line takes a release file to a verdict on a device behind a real SSH server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import edgedeploy.cli

if TYPE_CHECKING:
    from conftest import Sshd

onnx = pytest.importorskip("onnx", reason="compiling needs onnx: pip install 'edgedeploy[onnxruntime]'")
pytest.importorskip("onnxruntime", reason="the device needs ONNX Runtime: pip install 'edgedeploy[onnxruntime]'")

TARGET = """\
format = "edgedeploy.target/1"
name = "board"
description = "this machine, as if it were another"
[backends.onnxruntime]
precisions = ["fp32"]
[conditions]
max_foreign_load = 1000.0
"""

CELL = """
[[cells]]
name = "{name}"
model = "{model}"
target = "board"
backend = "onnxruntime"
precision = "fp32"
device = "desk"
"""

RELEASE = f"""\
format = "edgedeploy.release/1"
name = "over-ssh"
[models.long]
source = "long.onnx"
[models.short]
source = "short.onnx"
{CELL.format(name="shipped", model="long")}
{CELL.format(name="candidate", model="short")}
[gate]
baseline = "shipped"
[gate.margins]
latency_p50 = "+20%"
artifact_size = "+0%"
"""


def _chain(path: Path, layers: int) -> None:
    """Write a chain of equal matrix products: n of them cost n times one."""
    import numpy as np

    helper = onnx.helper
    weights = [
        onnx.numpy_helper.from_array(np.eye(256, dtype=np.float32) * (1.0 + layer), f"weight_{layer}")
        for layer in range(layers)
    ]
    nodes = [
        helper.make_node("MatMul", [f"x{layer}", f"weight_{layer}"], [f"x{layer + 1}"], f"product_{layer}")
        for layer in range(layers)
    ]
    shape = [64, 256]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{layers}", onnx.TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


@pytest.fixture
def place(tmp_path, sshd: Sshd, monkeypatch) -> Path:
    folder = tmp_path / "place"
    (folder / "targets").mkdir(parents=True)
    (folder / "targets" / "board.toml").write_text(TARGET)
    (folder / "release.toml").write_text(RELEASE)
    _chain(folder / "long.onnx", 6)
    _chain(folder / "short.onnx", 2)
    device = sshd.device(python=sys.executable, root=str(tmp_path / "board"))
    (folder / "lab.toml").write_text(
        'format = "edgedeploy.lab/1"\n[devices.desk]\n'
        + "".join(
            f"{key} = {json.dumps(value)}\n"
            for key, value in {
                "transport": "ssh",
                "host": device.host,
                "port": device.port,
                "user": device.user,
                "key": device.key,
                "known_hosts": device.known_hosts,
                "python": device.python,
                "root": device.root,
            }.items()
        )
    )
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEDEPLOY_LAB", "lab.toml")
    return folder


def test_release_file_to_verdict_on_a_device_behind_ssh(place, capsys):
    assert edgedeploy.cli.run(["run", "release.toml", "--quiet", "--json"]) == 0, capsys.readouterr().err
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["cells"][0]["device"] == "desk"
    assert verdict["decision"] == "PASS"
    assert list((place.parent / "board" / "objects").glob("*.part*")) == []


def test_devices_check_says_what_is_behind_ssh(place, capsys):
    assert edgedeploy.cli.run(["devices", "check", "desk", "--quiet", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["reached"]
    assert device["facts"]["cores"] >= 1


def test_lost_sshd_is_exit_code_3_with_a_sentence(place, sshd: Sshd, capsys):
    sshd.stop()
    assert edgedeploy.cli.run(["run", "release.toml", "--quiet"]) == 3
    told = capsys.readouterr().err
    assert "desk" in told
    assert "refused" in told
    assert "Traceback" not in told
