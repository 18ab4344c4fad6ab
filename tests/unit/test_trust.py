"""What doctor --security says is trusted, and where it sees that somebody else could change it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from edgedeploy import catalogue
from edgedeploy.cli import run
from edgedeploy.lab import bundle, trust
from edgedeploy.records.device import Device, DeviceSettings
from edgedeploy.storage import sha256_file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person with nothing: no keys, no agent, no lab."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    for name in trust.VARIABLES:
        if name not in ("PATH", "LD_LIBRARY_PATH"):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("EDGEDEPLOY_LAB", raising=False)
    return home


def key(path: Path) -> str:
    """Make a key pair; return the words "type base64" of its public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return " ".join(Path(f"{path}.pub").read_text().split()[:2])


def fingerprint(path: Path) -> str:
    said = subprocess.run(["ssh-keygen", "-lf", f"{path}.pub"], check=True, capture_output=True, text=True).stdout
    return said.split()[1]


def parts(found: list[trust.Trust], part: str) -> list[trust.Trust]:
    return [one for one in found if one.part == part]


def test_host_key_is_told_with_file_fingerprint_and_how_it_was_learnt(home, tmp_path):
    line = key(tmp_path / "host")
    ours = tmp_path / "known_hosts"
    ours.write_text(f"board {line}\n")
    (home / ".ssh/known_hosts").write_text(f"other {line}\ngate {line}\n")
    beside = trust.of_device("pi", Device(transport="ssh", host="board", known_hosts=str(ours)))
    (one,) = parts(beside, "host key")
    assert one.what == f"board is ssh-ed25519 {fingerprint(tmp_path / 'host')}"
    assert one.why == f"{ours} says so: you accepted it when the device was added, or wrote it there"
    assert not one.weakness
    (gate,) = parts(trust.of_device("pi", Device(transport="ssh", host="board", jump="gate")), "jump host 1: host key")
    assert "you accepted it with ssh" in gate.why


def test_unknown_host_is_told_as_weak_before_anybody_connects(home):
    found = trust.of_device("pi", Device(transport="ssh", host="board"))
    (one,) = parts(found, "host key")
    assert (one.what, "compare the fingerprint" in one.weakness) == ("none of board is known", True)
    assert parts(found, "login key")[0].what == "none"


@pytest.mark.parametrize(
    ("mode", "word"), [(0o600, ""), (0o644, "others can read"), (0o666, "everybody here can change")]
)
def test_private_key_that_others_can_read_is_named_with_its_mode(mode, word, home, tmp_path):
    key(tmp_path / "mine")
    (tmp_path / "mine").chmod(mode)
    (one,) = parts(trust.of_device("pi", Device(transport="ssh", host="b", key=str(tmp_path / "mine"))), "login key")
    assert fingerprint(tmp_path / "mine") in one.what
    assert bool(one.weakness) == bool(word)
    assert word in one.weakness
    assert (f"mode {mode:04o}" in one.weakness) == bool(word)


def test_key_that_is_not_there_is_told(home, tmp_path):
    found = trust.of_device("pi", Device(transport="ssh", host="b", key=str(tmp_path / "gone")))
    assert parts(found, "login key")[0].weakness == "it does not exist; name another as key in lab.toml"


def test_folder_on_the_way_that_others_may_write_to_is_a_weakness_and_a_sticky_one_is_not(tmp_path):
    open_folder = tmp_path / "open"
    inner = open_folder / "lab.toml"
    open_folder.mkdir()
    inner.write_text("")
    inner.chmod(0o600)
    open_folder.chmod(0o777)
    assert trust.weakness_of(inner) == f"everybody here can change {open_folder} (mode 0777); chmod o-w it"
    open_folder.chmod(0o1777)
    assert trust.weakness_of(inner) == ""
    assert trust.weakness_of(open_folder / "not" / "there") == ""
    link = tmp_path / "link"
    link.symlink_to(inner)
    inner.chmod(0o602)
    assert str(inner) in trust.weakness_of(link)


def test_sudo_labgrid_runtimes_and_leases_are_told(home, tmp_path):
    settings = DeviceSettings(governor="performance", sudo=True)
    device = Device(
        transport="ssh", host="b", settings=settings, runtimes={"onnxruntime": "1.20"}, lease_dir="/run/lab"
    )
    said = {one.part: one for one in trust.of_device("pi", device)}
    assert said["sudo"].what == "`sudo -n` there for: governor performance"
    assert "sudoers" in said["sudo"].weakness
    assert said["runtime"].what == "onnxruntime 1.20"
    assert said["lease"].what == "/run/lab"
    place = trust.of_device("pi", Device(transport="labgrid", place="desk", coordinator="labhost:20408"))
    assert (place[0].part, place[0].what) == ("coordinator", "labhost:20408")
    assert "without TLS" in place[0].weakness


def test_environment_that_changes_trust_is_told_without_passwords(home, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:hunter2@index.example/simple")
    monkeypatch.setenv("LD_PRELOAD", "/tmp/x.so")
    found = {one.what.partition("=")[0]: one for one in catalogue.security(None) if one.part == "environment"}
    assert "hunter2" not in str(found)
    assert found["LD_PRELOAD"].weakness == "unset it, unless it was you who set it"
    assert "HOME" not in found


def test_everything_that_a_device_would_execute_is_told_by_its_digest(home):
    told = {one.part: one for one in catalogue.security(None) if one.part.startswith("runs on devices: ")}
    assert sha256_file(bundle.RUNNER) in told["runs on devices: runner"].what
    assert {"session of fake", "session of onnxruntime", "builder of tensorrt"} <= {
        part.removeprefix("runs on devices: ") for part in told
    }


def test_plugin_is_told_with_the_package_that_brought_it(home, tmp_path, monkeypatch):
    folder = tmp_path / "site"
    (folder / "stranger-1.0.dist-info").mkdir(parents=True)
    (folder / "stranger-1.0.dist-info/METADATA").write_text("Name: stranger\nVersion: 1.0\n")
    (folder / "stranger-1.0.dist-info/entry_points.txt").write_text("[edgedeploy.backends]\nodd = stranger:BACKEND\n")
    monkeypatch.syspath_prepend(str(folder))
    (one,) = parts(catalogue.security(None), "back end odd")
    assert one.what == "stranger:BACKEND of stranger 1.0"
    assert "all your rights" in one.weakness


def test_command_prints_a_document_and_a_table_that_says_what_is_not_protected(home, tmp_path, capsys):
    lab = tmp_path / "lab.toml"
    lab.write_text('format = "edgedeploy.lab/1"\n[devices.pi]\ntransport = "ssh"\nhost = "board"\n')
    lab.chmod(0o666)
    assert run(["doctor", "--security", "--lab", str(lab), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "edgedeploy.security/1"
    assert {one["subject"] for one in document["trusted"]} == {"this machine", "local", "pi"}
    assert any("can lie about every number" in one for one in document["not_protected"])
    (file,) = [one for one in document["trusted"] if one["part"] == "lab file"]
    assert file["weakness"] == f"everybody here can change {lab} (mode 0666); chmod o-w it"
    assert run(["doctor", "--security", "--lab", str(lab)]) == 0
    shown = capsys.readouterr().out
    for words in ("Trusted: this machine", "Trusted: pi", "weaknesses", "Not protected:", "mode 0666"):
        assert words in shown
