"""A thousand devices in one lab file, fifty of them out of reach: every command ends in time and names the fifty."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgedeploy.cli import run
from edgedeploy.lab import inventory, leases
from tests.testbed.board import free_port
from tests.testbed.plain import SFTP, Plain

CONNECT_TIMEOUT_S = 3.0
# Not the person's .bashrc, which bash reads under sshd at the first level: it may take longer than all the rest.
OPTIONS = f"{SFTP}SetEnv SHLVL=1\n"
# What a device answers that is asked for its lease. Its own work is done elsewhere than here, at no cost to this machine.
LEASE = '{"event":"lease","token":1,"state":"free","holder":"","held_s":0,"expires_s":0,"visits":[],"queue":[],"path":"/run"}'


class Silent:
    """A port that takes connections and never says a word."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    with Plain(tmp_path_factory.mktemp("thousand") / "board") as plain:
        plain.stop()
        plain.start(options=OPTIONS)
        yield plain


@pytest.fixture(scope="module")
def silent() -> Iterator[Silent]:
    port = Silent()
    yield port
    port.close()


def entry(board: Plain, name: str, port: int = 0) -> str:
    """Give a device of its own folder and lease behind the board's server, or behind another port."""
    known = board.folder / "known_hosts_of_all"
    root = board.folder / name
    return (
        f'[devices.{name}]\ntransport = "ssh"\nhost = "127.0.0.1"\nport = {port or board.port}\nuser = "{board.user}"\n'
        f'key = "{board.key}"\nknown_hosts = "{known}"\nroot = "{root}"\nlease_dir = "{root}-lease"\n'
        f"connect_timeout_s = {CONNECT_TIMEOUT_S}\n\n"
    )


def lab_of(folder: Path, board: Plain, silent: Silent, *, alive: int, unreachable: int) -> tuple[Path, list[str]]:
    """Write a lab file with the unreachable spread among the others; return it and their names."""
    kind, key = Path(f"{board.new_key('host')}.pub").read_text().split()[:2]
    closed = free_port()
    ports = (board.port, closed, silent.port)
    (board.folder / "known_hosts_of_all").write_text("".join(f"[127.0.0.1]:{port} {kind} {key}\n" for port in ports))
    every = (alive + unreachable) // unreachable
    text, dead = 'format = "edgedeploy.lab/1"\n\n', []
    for number in range(alive + unreachable):
        name = f"board-{number:04d}"
        if number % every == every // 2 and len(dead) < unreachable:
            text += entry(board, name, closed if len(dead) % 2 else silent.port)
            dead.append(name)
        else:
            text += entry(board, name)
            (board.folder / f"{name}-lease").mkdir(exist_ok=True)
    path = folder / "lab.toml"
    path.write_text(text)
    return path, dead


def test_lab_file_of_a_thousand_devices_is_read_in_a_moment(board, silent, tmp_path):
    path, _ = lab_of(tmp_path, board, silent, alive=950, unreachable=50)
    started_s = time.process_time()
    lab = inventory.load_lab(path)
    assert len(lab.devices) == 1001
    assert time.process_time() - started_s < 5.0


def test_list_of_a_thousand_names_the_fifty_that_are_out_of_reach(board, silent, tmp_path, capsys):
    path, dead = lab_of(tmp_path, board, silent, alive=950, unreachable=50)
    board.stop()
    board.start(options=f"{OPTIONS}ForceCommand printf '%s\\n' '{LEASE}'\n")
    started_s = time.monotonic()
    try:
        assert run(["devices", "list", "--lab", str(path), "--json"]) == 0
    finally:
        took_s = time.monotonic() - started_s
        board.stop()
        board.start(options=OPTIONS)
    said = {one["name"]: one for one in json.loads(capsys.readouterr().out)["devices"]}
    assert len(said) == 1001
    late = {name for name, one in said.items() if one["problem"].startswith("no answer within")}
    assert {name for name, one in said.items() if one["state"] == "unreachable"} == {*dead, *late}
    # Each of the fifty is told by what is wrong with it, and a slow machine may not get round to all of the others.
    assert all("refused the connection" in said[name]["problem"] for name in dead[1::2] if name not in late)
    assert all("sent no SSH greeting" in said[name]["problem"] for name in dead[::2] if name not in late)
    assert {one["state"] for name, one in said.items() if name not in {*dead, *late, "local"}} == {"free"}
    assert took_s < 120.0
    print(f"\ndevices list of 1,000 (50 out of reach): {took_s:.1f} s, {len(late)} not reached in time")


def test_check_reaches_the_others_while_fifty_do_not_answer(board, silent, tmp_path, capsys):
    path, dead = lab_of(tmp_path, board, silent, alive=30, unreachable=50)
    names = [name for name in inventory.load_lab(path).devices if name != "local"]
    started_s = time.monotonic()
    assert run(["devices", "check", *names, "--lab", str(path), "--json", "-q"]) == 3
    took_s = time.monotonic() - started_s
    said = {one["name"]: one for one in json.loads(capsys.readouterr().out)["devices"]}
    assert list(said) == names
    assert {name for name, one in said.items() if not one["reached"]} == {*dead}
    assert all(one["facts"]["cores"] >= 1 for name, one in said.items() if name not in dead)
    # One after another the silent ones alone would take longer than all of it.
    print(f"\ndevices check of 80 (50 out of reach): {took_s:.1f} s, {leases.AT_ONCE} at a time")


def test_unknown_device_among_a_thousand_is_refused_before_any_is_reached(board, silent, tmp_path, capsys):
    path, _ = lab_of(tmp_path, board, silent, alive=950, unreachable=50)
    board.stop()  # nobody could answer
    try:
        assert run(["devices", "check", "board-0001", "bord-0002", "--lab", str(path), "-q"]) == 2
    finally:
        board.start(options=OPTIONS)
    assert "there is no device 'bord-0002' in the lab; did you mean \"board-0002\"?" in capsys.readouterr().err


def test_device_that_is_written_twice_in_a_thousand_is_told_with_its_line(board, silent, tmp_path, capsys):
    path, _ = lab_of(tmp_path, board, silent, alive=950, unreachable=50)
    text = path.read_text()
    path.write_text(text + entry(board, "board-0500"))
    assert run(["devices", "list", "--lab", str(path)]) == 2
    told = capsys.readouterr().err
    assert f"{path} is not valid TOML" in told
    assert f"line {text.count(chr(10)) + 1}" in told
