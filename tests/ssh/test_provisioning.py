"""A runtime reaches a board that has none and no package index: fetched here, packed, sent, tried, used, removed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from edgedeploy import backends, boards, cli
from edgedeploy.backends import session_file
from edgedeploy.backends.fake import FakeBackend
from edgedeploy.errors import DeviceError, ToolchainError
from edgedeploy.lab import bundle, provision, wheels
from edgedeploy.lab.inventory import load_lab, open_transport
from edgedeploy.lab.wheels import platform_of
from edgedeploy.ondevice.runner import read_facts
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.runtime import DeviceRuntime
from tests.testbed.plain import Plain as Sshd
from tests.tiny_wheels import write_wheel

TARGET = """\
format = "edgedeploy.target/1"
name = "tiny-board"
description = "a board that exists only in tests"
[backends.tiny]
precisions = ["fp32"]
[conditions]
max_foreign_load = 1000.0
"""
BENCH = ["bench", "built", "--device", "board", "--visits", "1"]
WORKS = b"import os\n__version__ = %r\nWHERE = os.path.dirname(__file__)\n"


class Tiny(FakeBackend):
    """A plugin whose device half needs a package that no index has."""

    name = "tiny"
    device_runtimes = (DeviceRuntime(distribution="tiny-runtime", module="tiny_runtime", needs=()),)


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """An entry point of a plugin."""

    name: str
    backend: Tiny

    def load(self) -> Tiny:
        return self.backend


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Install a back end as plugins are installed."""
    backend = Tiny()
    half = (
        session_file("fake").read_text().replace('runtime = "fake 1"', 'runtime = "tiny " + tiny_runtime.__version__')
    )
    backend.device_half = tmp_path / "tiny_session.py"
    backend.device_half.write_text(half.replace("import hashlib\n", "import hashlib\n\nimport tiny_runtime\n"))
    known = importlib.metadata.entry_points

    def entry_points(**wanted: str) -> object:
        return [Point("tiny", backend)] if wanted == {"group": backends.ENTRY_POINT_GROUP} else known(**wanted)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return backend


def tiny_wheel(folder: Path, version: str, code: bytes = b"") -> None:
    write_wheel(folder, "tiny-runtime", version, {"tiny_runtime/__init__.py": code or WORKS % version})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a cache in which the first version is packed already: starting pip takes a second each time."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_wheel(folder / "wheels", "1.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.setenv("EDGEDEPLOY_WHEELHOUSE", str(folder / "wheels"))
        here = msgspec.convert(read_facts(), DeviceFacts)
        wheels.make_prefix(Tiny.device_runtimes, platform_of(here))
    return folder / "cache"


@pytest.fixture
def lab(sshd: Sshd, tiny: Tiny, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a lab with one board, and a folder of wheels instead of an index."""
    shutil.copytree(packed, tmp_path / "cache")
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEDEPLOY_WHEELHOUSE", str(tmp_path / "wheels"))
    monkeypatch.setenv("EDGEDEPLOY_TARGETS", str(tmp_path / "targets"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "tiny-board.toml").write_text(TARGET)
    tiny_wheel(tmp_path / "wheels", "1.0")
    path = tmp_path / "lab.toml"
    path.write_text('format = "edgedeploy.lab/1"\n' + sshd.entry(python=sys.executable))
    return path


def provisioned(lab: Path, *asked: str, told: list[str] | None = None, **options: bool) -> boards.Provisioned:
    return boards.provision_device("board", lab, asked, (told if told is not None else []).append, **options)


def root(sshd: Sshd) -> Path:
    return Path(sshd.root)


def test_a_runtime_is_installed_once_and_then_nothing_is_done(lab: Path, sshd: Sshd) -> None:
    told: list[str] = []
    first = provisioned(lab, "tiny")
    (one,) = first.provided
    assert (one.was_missing, one.says, one.runtime.version, one.runtime.distribution) == (
        True,
        "1.0",
        "1.0",
        "tiny-runtime",
    )
    assert first.used == {"tiny": one.runtime.name}
    assert (root(sshd) / "runtimes" / one.runtime.name / "tiny_runtime" / "__init__.py").read_bytes() == WORKS % "1.0"
    assert not [path for path in (root(sshd) / "objects").iterdir() if path.name.endswith(".part")]
    second = provisioned(lab, "tiny", told=told)
    assert [(one.was_missing, one.runtime) for one in second.provided] == [(False, one.runtime)]
    assert not any("sending" in text or "fetching" in text for text in told)


def test_an_artifact_is_measured_with_the_runtime_that_was_provisioned(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx", reason="compiling needs onnx: pip install 'edgedeploy[onnxruntime]'")
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["scores"])],
        "tiny",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    words = ["compile", "m.onnx", "--target", "tiny-board", "--backend", "tiny", "-o", "built", "-O", "duration_us=20"]
    assert cli.run(words) == 0, capsys.readouterr().err

    def benched() -> str:
        capsys.readouterr()
        assert cli.run([*BENCH, "--lab", str(lab), "--json"]) == 0
        return str(json.loads(capsys.readouterr().out)["runtime"])

    capsys.readouterr()
    assert cli.run([*BENCH, "--lab", str(lab), "--json"]) == 3
    complaint = capsys.readouterr()
    assert "edgedeploy devices provision board --runtime tiny" in complaint.err + complaint.out
    provisioned(lab, "tiny")
    assert benched() == "tiny 1.0"
    tiny_wheel(tmp_path / "wheels", "1.10")
    provisioned(lab, "tiny==1.10")
    assert benched() == "tiny 1.10"
    with lab.open("a") as stream:
        stream.write('\n[devices.board.runtimes]\ntiny = "1.0"\n')
    assert benched() == "tiny 1.0"
    assert [one.version for one in provisioned(lab, prune=True).removed] == ["1.10"]
    lab.write_text(lab.read_text().replace('tiny = "1.0"', 'tiny = "7.0"'))
    assert cli.run([*BENCH, "--lab", str(lab)]) == 3
    complaint = capsys.readouterr()
    assert "names tiny 7.0, which is not installed there" in complaint.err
    assert "--runtime tiny==7.0" in complaint.err


def test_versions_lie_side_by_side_and_prune_removes_what_is_not_used(lab: Path, sshd: Sshd, tmp_path: Path) -> None:
    provisioned(lab, "tiny")
    tiny_wheel(tmp_path / "wheels", "1.10")
    tiny_wheel(tmp_path / "wheels", "1.9")
    both = provisioned(lab, "tiny==1.10", "tiny-runtime==1.9")
    assert sorted(one.version for one in both.installed) == ["1.0", "1.10", "1.9"]
    assert [one.version for one in both.installed if one.name in both.used.values()] == ["1.10"]
    pruned = provisioned(lab, prune=True)
    assert sorted(one.version for one in pruned.removed) == ["1.0", "1.9"]
    assert len(list((root(sshd) / "runtimes").iterdir())) == 1


def test_a_request_is_answered_from_the_cache_until_an_upgrade_is_asked_for(lab: Path, tmp_path: Path) -> None:
    provisioned(lab, "tiny")
    tiny_wheel(tmp_path / "wheels", "2.0")
    assert provisioned(lab, "tiny").provided[0].runtime.version == "1.0"
    assert provisioned(lab, "tiny", upgrade=True).provided[0].runtime.version == "2.0"


def test_a_runtime_that_cannot_be_imported_there_is_removed_again_with_advice(
    lab: Path, sshd: Sshd, tmp_path: Path
) -> None:
    broken = {
        b"import absent_thing\n": "absent_thing",
        b"import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n": "not all known to this processor",
        b"raise ImportError('libgomp.so.1: cannot open shared object file')\n": "apt install libgomp1",
    }
    entry = load_lab(lab).devices["board"]
    with open_transport("board", entry) as transport, bundle.connect(transport, entry, device_name="board") as agent:
        for number, (code, said) in enumerate(broken.items()):
            folder = tmp_path / f"broken-{number}"
            folder.mkdir()
            wheel = write_wheel(folder, "tiny-runtime", "6.6", {"tiny_runtime/__init__.py": code})
            prefix = wheels.pack([wheel], Tiny.device_runtimes[0], platform_of(agent.facts), folder)
            with pytest.raises(DeviceError, match=said) as caught:
                provision.install(agent, transport, prefix, folder / "prefix.tar", lambda text: None)
            assert "was removed again" in str(caught.value)
            assert list((root(sshd) / "runtimes").iterdir()) == []
    assert provisioned(lab, "tiny").provided[0].says == "1.0"


def test_a_disk_that_is_too_small_is_said_before_anything_is_sent(
    lab: Path, tiny: Tiny, small_disk: Path, tmp_path: Path
) -> None:
    big = {"tiny_runtime/__init__.py": WORKS % "5", "tiny_runtime/weights.bin": bytes(6 << 20)}
    write_wheel(tmp_path / "wheels", "tiny-runtime", "5.0", big)
    lab.write_text(
        lab.read_text().replace(f'root = "{load_lab(lab).devices["board"].root}"', f'root = "{small_disk}/r"')
    )
    with pytest.raises(DeviceError, match=r"tiny-runtime 5\.0 needs [\d.]+ MiB .* and [\d.]+ MiB are free"):
        provisioned(lab, "tiny==5.0")
    assert not list(small_disk.rglob("runtimes/*"))


def test_a_tar_that_was_damaged_in_the_cache_is_not_sent(lab: Path, tmp_path: Path) -> None:
    entry = load_lab(lab).devices["board"]
    with open_transport("board", entry) as transport, bundle.connect(transport, entry, device_name="board") as agent:
        prefix, tar = wheels.make_prefix(Tiny.device_runtimes, platform_of(agent.facts))
        tar.write_bytes(tar.read_bytes()[:-1] + b"x")
        with pytest.raises(ToolchainError, match="damaged since it was packed"):
            provision.install(agent, transport, prefix, tar, lambda text: None)
        prefix, tar = wheels.make_prefix(Tiny.device_runtimes, platform_of(agent.facts))
        assert provision.install(agent, transport, prefix, tar, lambda text: None) == "1.0"


def test_the_command_lists_installs_and_speaks_json(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["devices", "provision", "board", "--lab", str(lab)]) == 2
    assert "--runtime onnxruntime" in capsys.readouterr().err
    assert cli.run(["devices", "provision", "board", "--runtime", "tiny", "--lab", str(lab), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["provided"][0]["was_missing"]
    assert cli.run(["devices", "provision", "board", "--list", "--lab", str(lab)]) == 0
    printed = capsys.readouterr().out
    assert said["used"]["tiny"] in printed
