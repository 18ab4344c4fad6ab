"""Where a device's entry and OpenSSH's configuration lead."""

import getpass
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.errors import DocumentError, ToolchainError, UsageError
from edgedeploy.lab.ssh_config import Hop, parse_address, route
from edgedeploy.records.device import Device


@pytest.fixture
def ssh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".ssh"
    folder.mkdir()
    return folder


def way(folder: Path, text: str, **device: object) -> tuple[Hop, ...]:
    (folder / "config").write_text(text)
    return route(Device(transport="ssh", **{"host": "board", **device}))


def test_without_any_configuration_defaults_hold(ssh_folder: Path) -> None:
    (hop,) = route(Device(transport="ssh", host="Board"))
    assert (hop.host, hop.port, hop.user, hop.keys) == ("Board", 22, getpass.getuser(), ())
    assert hop.host_key_name == "board"
    assert hop.known_hosts == (ssh_folder / "known_hosts", Path("/etc/ssh/ssh_known_hosts"))


def test_configuration_fills_what_the_lab_leaves_out(ssh_folder: Path) -> None:
    (hop,) = way(
        ssh_folder,
        "Host board\n HostName 10.1.2.3\n Port 2200\n User alice\n IdentityFile ~/.ssh/a\n IdentityFile ~/.ssh/b\n"
        " UserKnownHostsFile ~/.ssh/lab_hosts\n",
    )
    assert (hop.host, hop.port, hop.user) == ("10.1.2.3", 2200, "alice")
    assert hop.host_key_name == "[10.1.2.3]:2200"
    assert hop.keys == (ssh_folder / "a", ssh_folder / "b")
    assert hop.known_hosts[0] == ssh_folder / "lab_hosts"


def test_lab_wins_over_the_configuration(ssh_folder: Path) -> None:
    (hop,) = way(
        ssh_folder,
        "Host board\n Port 2200\n User alice\n IdentityFile ~/.ssh/a\n UserKnownHostsFile ~/.ssh/lab_hosts\n",
        port=22,
        user="bob",
        key="/k",
        known_hosts="/h",
    )
    assert (hop.port, hop.user, hop.keys, hop.known_hosts) == (22, "bob", (Path("/k"),), (Path("/h"),))


def test_host_key_alias_is_the_name_in_known_hosts(ssh_folder: Path) -> None:
    (hop,) = way(ssh_folder, "Host board\n Port 2200\n HostKeyAlias my-board\n")
    assert hop.host_key_name == "my-board"


@pytest.mark.parametrize("value", ["/dev/null", "none"])
def test_check_of_host_keys_cannot_be_switched_off(ssh_folder: Path, value: str) -> None:
    (hop,) = way(ssh_folder, f"Host *\n StrictHostKeyChecking no\n UserKnownHostsFile {value}\n")
    assert hop.known_hosts[0] == ssh_folder / "known_hosts"


def test_jump_hosts_come_in_order_with_their_own_settings(ssh_folder: Path) -> None:
    hops = way(
        ssh_folder,
        "Host board\n ProxyJump gate,carol@inner:2222\n"
        "Host gate\n HostName gate.example\n User gus\n ProxyJump outer\n",
    )
    assert [str(hop) for hop in hops] == [
        f"{getpass.getuser()}@outer:22",
        "gus@gate.example:22",
        "carol@inner:2222",
        f"{getpass.getuser()}@board:22",
    ]


def test_jump_of_the_lab_wins_and_shares_key_and_known_hosts(ssh_folder: Path) -> None:
    jump, last = way(ssh_folder, "Host board\n ProxyJump gate\n", jump="bob@other:2200", key="/k", known_hosts="/h")
    assert str(jump) == "bob@other:2200"
    assert (jump.keys, jump.known_hosts) == (last.keys, last.known_hosts) == ((Path("/k"),), (Path("/h"),))


def test_jump_none_goes_straight(ssh_folder: Path) -> None:
    assert len(way(ssh_folder, "Host *\n ProxyJump gate\n", jump="none")) == 1


def test_jump_through_itself_is_refused(ssh_folder: Path) -> None:
    with pytest.raises(DocumentError, match="does one jump through itself"):
        way(ssh_folder, "Host *\n ProxyJump gate\n")


def test_includes_are_followed(ssh_folder: Path) -> None:
    (ssh_folder / "lab.d").mkdir()
    (ssh_folder / "lab.d" / "1").write_text("Host other\n User wrong\nHost board\n User alice\n")
    (hop,) = way(ssh_folder, "Include lab.d/*\nPort 2200\nHost *\n User late\n")
    assert (hop.user, hop.port) == ("alice", 2200)


def test_include_inside_a_block_holds_only_there(ssh_folder: Path) -> None:
    (ssh_folder / "only-user").write_text("User alice\n")
    text = "Host {}\n Include only-user\n Port 2200\nHost *\n User late\n"
    (hop,) = way(ssh_folder, text.format("board"))
    assert (hop.user, hop.port) == ("alice", 2200)
    (hop,) = way(ssh_folder, text.format("other"))
    assert (hop.user, hop.port) == ("late", 22)


def test_blocks_inside_an_including_block_are_refused_not_misread(ssh_folder: Path) -> None:
    (ssh_folder / "blocks").write_text("Host board\n User alice\n")
    with pytest.raises(DocumentError, match=r"config, line 2 includes .*blocks inside the block 'Host other'"):
        way(ssh_folder, "Host other\n Include blocks\n")


def test_file_that_includes_itself_is_refused(ssh_folder: Path) -> None:
    with pytest.raises(DocumentError, match="does a file include itself"):
        way(ssh_folder, "Include config\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Host board\n ProxyCommand nc %h %p\n", "ProxyCommand for board"),
        ("Host board\n Port ssh\n", "the port 'ssh'"),
        ("Host board\n Port\n", "not a configuration that ssh would accept"),
    ],
)
def test_what_cannot_be_honoured_is_a_sentence(ssh_folder: Path, text: str, expected: str) -> None:
    with pytest.raises(DocumentError, match=expected):
        way(ssh_folder, text)


@pytest.mark.parametrize("jump", ["a b:c", "user@", "host:port", "[::1"])
def test_jump_that_is_no_address_is_refused(ssh_folder: Path, jump: str) -> None:
    with pytest.raises(UsageError, match="not an address"):
        way(ssh_folder, "", jump=jump)


def test_missing_ssh_library_says_what_to_install(ssh_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(ToolchainError, match=r"pip install 'edgedeploy\[ssh\]'"):
        way(ssh_folder, "")


_WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789.-_", min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(user=st.just("") | _WORD, host=_WORD | st.ip_addresses(v=6).map(str), port=st.integers(0, 65535))
def test_addresses_are_parsed_as_they_are_written(user: str, host: str, port: int) -> None:
    bracketed = f"[{host}]" if ":" in host else host
    text = f"{user}@{bracketed}" if user else bracketed
    assert parse_address(f"{text}:{port}" if port else text) == (user, host, port)
