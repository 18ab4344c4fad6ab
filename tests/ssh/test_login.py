"""Getting in, and every way of not getting in."""

from __future__ import annotations

import getpass
import re
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgedeploy.errors import DeviceUnreachable
from edgedeploy.lab.ssh import SshTransport

if TYPE_CHECKING:
    from conftest import Sshd

SHORT = {"connect_timeout_s": 1.0}


def refusal(transport: SshTransport) -> str:
    with pytest.raises(DeviceUnreachable) as caught, transport:
        pass
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fingerprint(key: Path) -> str:
    said = subprocess.run(["ssh-keygen", "-lf", f"{key}.pub"], capture_output=True, text=True, check=True).stdout
    return said.split()[1]


def test_known_host_with_the_right_key_lets_us_in(sshd: Sshd) -> None:
    with sshd.transport() as transport:
        assert transport.run(["id", "-un"], timeout_s=20).stdout.decode().strip() == getpass.getuser()
        assert transport.label == f"device 'board' (ssh {getpass.getuser()}@127.0.0.1:{sshd.port})"


def test_unknown_host_is_refused_with_its_fingerprint_and_the_command_that_accepts_it(sshd: Sshd) -> None:
    sshd.known_hosts.unlink()
    said = refusal(sshd.transport())
    assert fingerprint(sshd.folder / "host") in said
    assert "ssh-ed25519" in said
    command = said.split("accept it with: ")[1]
    subprocess.run(["sh", "-c", command], check=True)
    with sshd.transport():
        pass


def test_command_that_accepts_a_host_makes_the_ssh_folder_where_there_is_none(sshd: Sshd, home: Path) -> None:
    said = refusal(sshd.transport(known_hosts=""))
    subprocess.run(["sh", "-c", said.split("accept it with: ")[1]], check=True)
    assert (home / ".ssh" / "known_hosts").stat().st_size > 0
    with sshd.transport(known_hosts=""):
        pass


def test_changed_host_key_is_refused_loudly_with_both_fingerprints(sshd: Sshd) -> None:
    sshd.stop()
    sshd.start("otherhost")
    said = refusal(sshd.transport())
    assert "HAS CHANGED" in said
    assert fingerprint(sshd.folder / "host") in said
    assert fingerprint(sshd.new_key("otherhost")) in said
    subprocess.run(["sh", "-c", said.split("then run: ")[1]], check=True, capture_output=True)
    with sshd.transport():
        pass


def test_revoked_host_key_is_refused_although_it_is_known(sshd: Sshd) -> None:
    with sshd.known_hosts.open("a") as stream:
        stream.write(f"@revoked * {(sshd.folder / 'host.pub').read_text()}")
    assert "@revoked" in refusal(sshd.transport())


def test_hashed_known_hosts_are_understood(sshd: Sshd) -> None:
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", sshd.known_hosts], check=True, capture_output=True)
    assert sshd.known_hosts.read_text().startswith("|1|")
    with sshd.transport():
        pass


def test_wrong_key_names_the_key_that_was_tried(sshd: Sshd) -> None:
    stranger = sshd.new_key("stranger")
    said = refusal(sshd.transport(key=str(stranger)))
    assert str(stranger) in said
    assert fingerprint(stranger) in said
    assert "authorized_keys" in said


def test_wrong_user_is_named(sshd: Sshd) -> None:
    assert "'nobody-at-all'" in refusal(sshd.transport(user="nobody-at-all"))


def test_missing_key_file_is_named(sshd: Sshd) -> None:
    assert "/nowhere/key (no such file)" in refusal(sshd.transport(key="/nowhere/key"))


def test_key_file_that_is_no_key_is_named(sshd: Sshd) -> None:
    said = refusal(sshd.transport(key=str(sshd.known_hosts)))
    assert f"{sshd.known_hosts} (not a private key" in said


def test_locked_key_says_how_to_unlock_it(sshd: Sshd) -> None:
    locked = sshd.new_key("locked", passphrase="a secret")
    assert f"ssh-add {locked}" in refusal(sshd.transport(key=str(locked)))


def test_no_key_at_all_is_said(sshd: Sshd) -> None:
    assert "no key in the agent and none in ~/.ssh" in refusal(sshd.transport(key=""))


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_usual_key_files_are_found_without_being_named(sshd: Sshd, home: Path, kind: str) -> None:
    (home / ".ssh").mkdir()
    key = sshd.new_key(f"id_{kind}", kind).rename(home / ".ssh" / f"id_{kind}")
    (sshd.folder / "authorized_keys").write_text((sshd.folder / f"id_{kind}.pub").read_text())
    assert key.exists()
    with sshd.transport(key=""):
        pass


@pytest.mark.parametrize("named", [True, False])
def test_agent_unlocks_a_locked_key(sshd: Sshd, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    locked = sshd.new_key("locked")
    (sshd.folder / "authorized_keys").write_text(locked.with_suffix(".pub").read_text())
    agent = subprocess.run(["ssh-agent", "-c"], capture_output=True, text=True, check=True).stdout
    socket_path, number = re.findall(r"setenv \w+ ([^;]+);", agent)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", socket_path)
        subprocess.run(["ssh-add", "-q", locked], check=True)
        subprocess.run(["ssh-keygen", "-q", "-p", "-N", "a secret", "-P", "", "-f", locked], check=True)
        with sshd.transport(key=str(locked) if named else ""):
            pass
    finally:
        subprocess.run(["kill", number], check=True)


def test_refused_port_is_one_sentence(sshd: Sshd) -> None:
    sshd.stop()
    assert "refused the connection" in refusal(sshd.transport())


def test_name_that_does_not_resolve_is_one_sentence(sshd: Sshd) -> None:
    assert "'no-such-host.invalid' does not resolve" in refusal(sshd.transport(host="no-such-host.invalid"))


def test_frozen_server_runs_into_the_time_limit(sshd: Sshd) -> None:
    sshd.freeze()
    started_s = time.monotonic()
    assert "no SSH greeting within 1 s" in refusal(sshd.transport(**SHORT))
    assert time.monotonic() - started_s < 15


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no SSH greeting"),
        (b"SSH-2.0-Silent\r\n", "did not finish the key exchange within 1 s"),
    ],
)
def test_port_of_something_else_is_told_from_a_silent_one(sshd: Sshd, greeting: bytes, expected: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport = sshd.transport(port=listener.getsockname()[1], **SHORT)

        def answer() -> None:
            stream, _ = listener.accept()
            stream.sendall(greeting)
            streams.append(stream)

        streams: list[socket.socket] = []
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        assert expected in refusal(transport)
        thread.join()
        streams[0].close()


def test_port_that_hangs_up_at_once_is_one_sentence(sshd: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hang_up = threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True)
        hang_up.start()
        assert "closed the connection without an SSH greeting" in refusal(
            sshd.transport(port=listener.getsockname()[1])
        )
        hang_up.join()


def test_nothing_is_printed_by_background_threads(sshd: Sshd, capfd: pytest.CaptureFixture[str]) -> None:
    sshd.freeze()
    refusal(sshd.transport(**SHORT))
    sshd.thaw()
    with pytest.raises(DeviceUnreachable), sshd.transport() as transport:
        sshd.cut()
        transport.run(["true"], timeout_s=10)
    assert "Traceback" not in capfd.readouterr().err


def test_jump_host_is_passed_through(sshd: Sshd, second_sshd: Sshd) -> None:
    trust_each_other(sshd, second_sshd)
    jump = f"{getpass.getuser()}@127.0.0.1:{second_sshd.port}"
    with sshd.transport(jump=jump) as transport:
        assert f"via {jump}" in transport.label
        assert second_sshd.own_sessions()
        assert transport.run(["echo", "far"], timeout_s=20).stdout == b"far\n"
    second_sshd.stop()
    assert "the jump host" in refusal(sshd.transport(jump=jump))


def test_jump_host_must_be_known_too(sshd: Sshd, second_sshd: Sshd) -> None:
    said = refusal(sshd.transport(jump=f"127.0.0.1:{second_sshd.port}"))
    assert said.startswith("the jump host")
    assert fingerprint(second_sshd.folder / "host") in said


def test_device_behind_a_jump_host_must_be_known_too(sshd: Sshd, second_sshd: Sshd) -> None:
    trust_each_other(sshd, second_sshd)
    second_sshd.accept("host")
    said = refusal(sshd.transport(jump=f"127.0.0.1:{second_sshd.port}", known_hosts=str(second_sshd.known_hosts)))
    assert said.startswith("device 'board'")
    assert fingerprint(sshd.folder / "host") in said


def test_device_that_the_jump_host_cannot_reach_is_named(sshd: Sshd, second_sshd: Sshd) -> None:
    trust_each_other(sshd, second_sshd)
    sshd.stop()
    said = refusal(sshd.transport(jump=f"127.0.0.1:{second_sshd.port}"))
    assert "through the jump host, which says 'Connect failed'" in said


def test_alias_of_the_ssh_configuration_is_enough(sshd: Sshd, second_sshd: Sshd, home: Path) -> None:
    trust_each_other(sshd, second_sshd)
    (home / ".ssh").mkdir()
    (home / ".ssh" / "more").write_text(f"Host gate\n  HostName 127.0.0.1\n  Port {second_sshd.port}\n")
    (home / ".ssh" / "config").write_text(
        f"""Include more
Host board-alias
    HostName 127.0.0.1
    Port {sshd.port}
    ProxyJump gate
    HostKeyAlias the-board
Host *
    User {getpass.getuser()}
    IdentityFile {sshd.new_key("client")}
    UserKnownHostsFile {sshd.known_hosts}
"""
    )
    alias = {"host": "board-alias", "port": 0, "user": "", "key": "", "known_hosts": ""}
    assert "the-board" in refusal(sshd.transport(**alias))
    sshd.known_hosts.write_text(sshd.known_hosts.read_text().replace(f"[127.0.0.1]:{sshd.port}", "the-board"))
    with sshd.transport(**alias) as transport:
        assert second_sshd.own_sessions()
        assert transport.run(["echo", "in"], timeout_s=20).stdout == b"in\n"


def trust_each_other(sshd: Sshd, second: Sshd) -> None:
    """Let the first server's client key and known hosts do for the second server as well."""
    (second.folder / "authorized_keys").write_text((sshd.folder / "authorized_keys").read_text())
    sshd.known_hosts.write_text(sshd.known_hosts.read_text() + second.known_hosts.read_text())
