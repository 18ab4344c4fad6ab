"""Which devices exist, and what is wrong with an entry."""

from pathlib import Path

import pytest

from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.lab import inventory
from edgedeploy.lab.ssh import SshTransport
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.records.device import Lab

HEAD = 'format = "edgedeploy.lab/1"\n'


@pytest.fixture(autouse=True)
def no_lab_of_the_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("EDGEDEPLOY_LAB", raising=False)


def load(folder: Path, text: str) -> Lab:
    path = folder / "lab.toml"
    path.write_text(HEAD + text)
    return inventory.load_lab(path)


def test_flag_wins_over_environment_over_the_persons_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inventory.lab_path(None) == tmp_path / "config" / "edgedeploy" / "lab.toml"
    for name in ("named.toml", "flag.toml"):
        (tmp_path / name).write_text(HEAD)
    monkeypatch.setenv("EDGEDEPLOY_LAB", str(tmp_path / "named.toml"))
    assert inventory.lab_path(None) == tmp_path / "named.toml"
    assert inventory.lab_path(tmp_path / "flag.toml") == tmp_path / "flag.toml"


def test_named_file_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DocumentError, match=r"flag\.toml does not exist"):
        inventory.lab_path(tmp_path / "flag.toml")
    monkeypatch.setenv("EDGEDEPLOY_LAB", str(tmp_path / "named.toml"))
    with pytest.raises(DocumentError, match=r"named\.toml \(named by EDGEDEPLOY_LAB\) does not exist"):
        inventory.lab_path(None)


def test_without_a_file_there_is_this_machine(tmp_path: Path) -> None:
    lab = inventory.load_lab(inventory.lab_path(None))
    assert list(lab.devices) == ["local"]
    assert isinstance(inventory.open_transport("local", inventory.device(lab, "local")), LocalTransport)


def test_local_is_there_beside_others_and_may_be_described(tmp_path: Path) -> None:
    lab = load(tmp_path, '[devices.pi]\ntransport = "ssh"\nhost = "pi.example"\n')
    assert sorted(lab.devices) == ["local", "pi"]
    lab = load(tmp_path, '[devices.local]\ntransport = "local"\npython = "/opt/python"\n')
    assert inventory.device(lab, "local").python == "/opt/python"


def test_ssh_device_opens_the_way_over_ssh(tmp_path: Path) -> None:
    lab = load(tmp_path, '[devices.pi]\ntransport = "ssh"\nhost = "pi.example"\nuser = "alice"\nport = 2200\n')
    transport = inventory.open_transport("pi", inventory.device(lab, "pi"))
    assert isinstance(transport, SshTransport)
    assert transport.label == "device 'pi' (ssh alice@pi.example:2200)"


def test_unknown_device_names_the_likely_one(tmp_path: Path) -> None:
    lab = load(tmp_path, '[devices.orin-2]\ntransport = "ssh"\nhost = "x"\n')
    with pytest.raises(UsageError, match=r'no device \'orin2\' in the lab; did you mean "orin-2"\?'):
        inventory.device(lab, "orin2")


def test_files_are_relative_to_the_lab_file(tmp_path: Path) -> None:
    lab = load(tmp_path, '[devices.pi]\ntransport = "ssh"\nhost = "x"\nkey = "keys/pi"\nknown_hosts = "~/hosts"\n')
    entry = lab.devices["pi"]
    assert (entry.key, entry.known_hosts) == (str(tmp_path / "keys" / "pi"), str(tmp_path / "hosts"))


@pytest.mark.parametrize(
    ("entry", "line", "reason"),
    [
        ('transport = "ssh"', 2, "needs host"),
        ('transport = "ssh"\nhost = ""', 4, "needs host"),
        ('transport = "local"\nhost = "x"', 4, 'is transport = "ssh" meant'),
        ('transport = "ssh"\nhost = "x"\nport = 70000', 5, "70000 is not a port"),
        ('transport = "ssh"\nhost = "x"\ntimeout_s = 0', 5, "above 0"),
        ('transport = "ssh"\nhost = "x"\nroot = "~/here"', 5, "leave out the ~/"),
        ('transport = "ssh"\nhots = "x"', 4, 'unknown key "hots"'),
        ('transport = "serial"', 3, "serial"),
    ],
)
def test_wrong_entry_is_refused_with_file_and_line(tmp_path: Path, entry: str, line: int, reason: str) -> None:
    with pytest.raises(DocumentError) as caught:
        load(tmp_path, f"[devices.pi]\n{entry}\n")
    assert f"{tmp_path / 'lab.toml'}, line {line}" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('governor = "performance; reboot"', "is no governor"),
        ('cpu_affinity = "4-"', 'cores are meant, such as "4-7"'),
        ("power_mode = -1", "the number that nvpmodel -m takes"),
        ("start_below_celsius = nan", "no temperature"),
        ("cooling_cap_s = inf", "seconds from 0 to 3000"),
    ],
)
def test_setting_that_cannot_be_meant_is_refused(tmp_path: Path, line: str, text: str) -> None:
    with pytest.raises(DocumentError, match=text):
        load(tmp_path, f'[devices.bench]\ntransport = "local"\n[devices.bench.settings]\n{line}\n')


def test_local_cannot_be_another_machine(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="'local' is always this machine"):
        load(tmp_path, '[devices.local]\ntransport = "ssh"\nhost = "x"\n')


def test_name_that_would_be_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="letters, digits"):
        load(tmp_path, '[devices."../x"]\ntransport = "local"\n')
