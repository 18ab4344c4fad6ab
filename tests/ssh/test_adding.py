"""A board becomes a device of the lab: its key is looked at, it is looked at, and lab.toml has it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from edgedeploy import boards, cli
from edgedeploy.errors import DeviceError, DeviceUnreachable, UsageError
from edgedeploy.lab.hostkeys import Stranger
from edgedeploy.lab.inventory import load_lab
from edgedeploy.lab.transport import Completed
from tests.testbed.plain import Plain as Sshd


@pytest.fixture
def lab(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("EDGEDEPLOY_LAB", raising=False)
    return tmp_path / "config" / "lab.toml"


def fingerprint(sshd: Sshd, name: str = "host") -> str:
    shown = subprocess.run(
        ["ssh-keygen", "-lf", f"{sshd.new_key(name)}.pub"], capture_output=True, text=True, check=True
    )
    return shown.stdout.split()[1]


def request(sshd: Sshd, lab: Path, **changes: object) -> boards.AddRequest:
    given: dict[str, object] = {
        "name": "board",
        "address": f"{sshd.user}@127.0.0.1:{sshd.port}",
        "lab": lab,
        "key": str(sshd.key),
        "python": sys.executable,
    }
    return boards.AddRequest(**{**given, **changes})


def nobody(stranger: Stranger) -> bool:
    raise AssertionError(f"nothing should be asked, but {stranger} was")


def quiet(text: str) -> None:
    """Hear progress and say nothing."""


def test_a_stranger_is_shown_and_kept_beside_the_lab_file_when_accepted(sshd: Sshd, lab: Path, home: Path) -> None:
    shown: list[Stranger] = []
    added = boards.add(request(sshd, lab), lambda one: shown.append(one) or True, quiet)  # type: ignore[func-returns-value]
    assert [(one.address, one.fingerprint) for one in shown] == [(f"127.0.0.1:{sshd.port}", fingerprint(sshd))]
    assert [one.reason for one in added.trusted] == ["accepted"]
    assert (lab.parent / "known_hosts").read_text() == sshd.known_hosts.read_text()
    assert not (home / ".ssh").exists()
    device = load_lab(lab).devices["board"]
    assert (device.host, device.port, device.user) == ("127.0.0.1", sshd.port, sshd.user)
    assert device.known_hosts == str(lab.parent / "known_hosts")
    assert added.survey.facts.cores > 0
    assert ("onnxruntime" in added.survey.runtimes) == (importlib.util.find_spec("onnxruntime") is not None)
    again = boards.add(request(sshd, lab, name="again"), nobody, quiet)
    assert [one.reason for one in again.trusted] == ["known"]
    assert (lab.parent / "known_hosts").read_text().count("\n") == 1


def test_a_key_that_is_not_accepted_leaves_nothing_behind(sshd: Sshd, lab: Path) -> None:
    with pytest.raises(DeviceUnreachable, match="was not accepted; nothing was written"):
        boards.add(request(sshd, lab), lambda stranger: False, quiet)
    assert not lab.exists()
    assert not (lab.parent / "known_hosts").exists()


def test_a_fingerprint_is_accepted_for_any_of_the_server_s_keys_and_another_is_refused(sshd: Sshd, lab: Path) -> None:
    ecdsa = sshd.new_key("second", "ecdsa")
    sshd.stop()
    sshd.start(options=f"HostKey {ecdsa}\nSubsystem sftp internal-sftp\n")
    with pytest.raises(DeviceUnreachable, match=r"no host key with the fingerprint SHA256:A{43}.*ecdsa"):
        boards.add(request(sshd, lab, fingerprint="SHA256:" + "A" * 43), nobody, quiet)
    assert not lab.exists()
    added = boards.add(request(sshd, lab, fingerprint=fingerprint(sshd, "second")), nobody, quiet)
    assert [(one.kind, one.reason) for one in added.trusted] == [("ecdsa-sha2-nistp256", "fingerprint")]


def test_what_the_person_s_own_ssh_knows_is_not_asked_for(sshd: Sshd, lab: Path, home: Path) -> None:
    (home / ".ssh").mkdir()
    own = home / ".ssh" / "known_hosts"
    own.write_text(sshd.known_hosts.read_text())
    added = boards.add(request(sshd, lab), nobody, quiet)
    assert [one.reason for one in added.trusted] == ["copied"]
    assert own.read_text() == sshd.known_hosts.read_text()


@pytest.mark.parametrize("where", ["beside the lab file", "in ~/.ssh"])
def test_a_changed_key_is_refused_whatever_is_answered(sshd: Sshd, lab: Path, home: Path, where: str) -> None:
    folder = lab.parent if where == "beside the lab file" else home / ".ssh"
    folder.mkdir()
    (folder / "known_hosts").write_text(sshd.known_hosts.read_text())
    sshd.stop()
    sshd.start("stranger")
    for wanted in ("", fingerprint(sshd, "stranger")):
        with pytest.raises(DeviceUnreachable, match="HAS CHANGED"):
            boards.add(request(sshd, lab, fingerprint=wanted), lambda stranger: True, quiet)
    assert not lab.exists()


def test_a_jump_host_is_asked_about_first_and_then_the_device(sshd: Sshd, second_sshd: Sshd, lab: Path) -> None:
    # One key opens both, as a person's does.
    (second_sshd.folder / "authorized_keys").write_text(Path(f"{sshd.key}.pub").read_text())
    asked: list[str] = []
    jump = f"{second_sshd.user}@127.0.0.1:{second_sshd.port}"
    added = boards.add(request(sshd, lab, jump=jump), lambda one: asked.append(one.address) or True, quiet)  # type: ignore[func-returns-value]
    assert asked == [f"127.0.0.1:{second_sshd.port}", f"127.0.0.1:{sshd.port}"]
    assert load_lab(lab).devices["board"].jump == jump
    assert (lab.parent / "known_hosts").read_text().count("\n") == 2
    assert added.survey.facts.hostname


def test_a_taken_name_is_refused_before_anything_is_reached_and_replaced_on_request(sshd: Sshd, lab: Path) -> None:
    boards.add(request(sshd, lab, fingerprint=fingerprint(sshd)), nobody, quiet)
    with lab.open("a") as stream:
        stream.write('\n[devices.board.settings]\ngovernor = "performance"\n')
    with pytest.raises(UsageError, match="already"):
        boards.add(request(sshd, lab, address="nowhere.invalid"), nobody, quiet)
    boards.add(request(sshd, lab, replace=True, target="arm64-linux"), nobody, quiet)
    device = load_lab(lab).devices["board"]
    assert (device.target, device.settings.governor) == ("arm64-linux", "performance")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "two words"}, "cannot be a device's name"),
        ({"name": "-x"}, "cannot be a device's name"),
        ({"address": "a@b@c:d"}, "not an address"),
        ({"address": "a\nb"}, "the address"),
        ({"target": "raspbery-pi-4"}, 'did you mean "raspberry-pi-4"'),
        ({"fingerprint": "MD5:00"}, "is not a fingerprint"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_reached(
    lab: Path, changes: dict[str, str], said: str
) -> None:
    given = {"name": "b", "address": "h.invalid", "lab": lab, **changes}
    with pytest.raises(UsageError, match=said):
        boards.add(boards.AddRequest(**given), nobody, quiet)  # type: ignore[arg-type]
    assert not lab.exists()


def test_the_command_refuses_to_guess_without_a_terminal_and_says_what_to_do(
    sshd: Sshd, lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["devices", "add", "b", f"{sshd.user}@127.0.0.1:{sshd.port}", "--key", str(sshd.key), "--lab", str(lab)]
    words += ["--python", sys.executable]
    assert cli.run(words) == 3
    assert f"--fingerprint {fingerprint(sshd)}" in capsys.readouterr().err
    assert cli.run([*words, "--yes-if-known"]) == 3
    assert "was not accepted" in capsys.readouterr().err
    assert cli.run([*words, "--fingerprint", fingerprint(sshd), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["survey"]["facts"]["interpreter"]["bits"] == 64
    assert said["host_keys"][0]["reason"] == "fingerprint"
    assert cli.run([*words[:2], "c", *words[3:], "--yes-if-known"]) == 0
    printed = capsys.readouterr()
    assert fingerprint(sshd) in printed.out
    assert "next: edgedeploy devices" in printed.err
    assert cli.run(["devices", "remove", "b", "--lab", str(lab)]) == 0
    assert list(tomllib.loads(lab.read_text())["devices"]) == ["c"]


@pytest.mark.parametrize(
    ("answer", "expected"), [("yes", True), ("y", False), ("no", False), ("the fingerprint", True)]
)
def test_a_person_is_asked_as_ssh_asks(monkeypatch: pytest.MonkeyPatch, answer: str, expected: bool) -> None:
    from edgedeploy.cli import devices

    stranger = Stranger("device 'b'", "127.0.0.1:22", "ssh-ed25519", "SHA256:x")
    monkeypatch.setattr(devices.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "prompt", lambda *_, **__: "SHA256:x" if answer == "the fingerprint" else answer)
    assert devices._ask_about_key(stranger) == expected


class Said:
    """A way to a device on which every command prints the same."""

    label = "device 'b'"

    def __init__(self, stdout: bytes, status: int = 0, stderr: bytes = b"") -> None:
        self._completed = Completed(status, stdout, stderr)

    def run(self, argv: object, *, timeout_s: float, stdin: bytes = b"") -> Completed:
        return self._completed


@pytest.mark.parametrize(
    ("stdout", "expected"),
    [
        (b"python3 3 11\npython3.9 3 9\n", "python3"),
        (b"hello from .bashrc\npython3 3 7\npython3.11 3 11\npython3.8 3 8\n", "python3.11"),
        (b"python3 2 7\n$(rm -rf /) 3 11\npython3.8 3 8\n", "python3.8"),
    ],
)
def test_the_first_interpreter_that_is_new_enough_is_taken(sshd: Sshd, stdout: bytes, expected: str) -> None:
    assert boards.find_python(Said(stdout), sshd.device()) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("stdout", [b"", b"python3 3 7\n", b"\xff\xfe 3 11\n", b"python3 3 99999999999\n"])
def test_no_interpreter_that_is_new_enough_is_a_sentence(sshd: Sshd, stdout: bytes) -> None:
    with pytest.raises(DeviceError, match=r"no Python 3\.8 or newer"):
        boards.find_python(Said(stdout), sshd.device())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (Said(b""), "exit status 0"),
        (Said(b"", 127, b"sh: python3: not found\n"), "python3: not found"),
        (Said(b"{"), "is it really Python"),
        (Said(b'{"facts": 1}'), "not what its protocol allows"),
        (Said(b"[" * 100_000), "is it really Python"),
    ],
)
def test_a_survey_that_is_none_is_a_sentence(sshd: Sshd, said: Said, sentence: str) -> None:
    with pytest.raises(DeviceError, match=sentence):
        boards.take_survey(said, sshd.device())  # type: ignore[arg-type]
