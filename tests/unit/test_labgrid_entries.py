"""Entries of lab.toml that are places of labgrid."""

from pathlib import Path

import pytest

from edgedeploy.errors import DocumentError, ToolchainError, UsageError
from edgedeploy.lab import inventory, labgrid
from edgedeploy.lab.bundle import device_python, device_root
from edgedeploy.lab.places import PlaceTransport
from edgedeploy.records.device import Lab

FORMAT = 'format = "edgedeploy.lab/1"\n'
HEAD = FORMAT + 'labgrid_coordinator = "lab.example:20408"\n'


def load(folder: Path, text: str) -> Lab:
    path = folder / "lab.toml"
    path.write_text(text)
    return inventory.load_lab(path)


def test_device_that_is_a_place_knows_its_coordinator(tmp_path: Path) -> None:
    entries = '[devices.pi]\ntransport = "labgrid"\nplace = "pi-1"\n'
    entries += '[devices.far]\ntransport = "labgrid"\nplace = "x"\ncoordinator = "elsewhere"\n'
    lab = load(tmp_path, HEAD + entries)
    assert lab.devices["far"].coordinator == "elsewhere"
    transport = inventory.open_transport("pi", lab.devices["pi"])
    assert isinstance(transport, PlaceTransport)
    assert transport.label == "device 'pi' (place 'pi-1' of the labgrid coordinator lab.example:20408)"


def test_device_that_is_a_place_keeps_its_files_where_one_behind_ssh_does(tmp_path: Path) -> None:
    entry = load(tmp_path, HEAD + '[devices.pi]\ntransport = "labgrid"\nplace = "pi-1"\n').devices["pi"]
    assert (device_root(entry), device_python(entry)) == (".cache/edgedeploy", "python3")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEAD + '[devices.pi]\ntransport = "labgrid"\n', "needs place = the name of a place"),
        (
            FORMAT + '[devices.pi]\ntransport = "labgrid"\nplace = "a"\n',
            "line 4: the place 'a' needs labgrid_coordinator",
        ),
        (
            HEAD + '[devices.pi]\ntransport = "ssh"\nhost = "a"\nplace = "a"\n',
            'line 6: place means nothing .* is "labgrid"',
        ),
        (HEAD + '[devices.pi]\ntransport = "local"\ncoordinator = "a"\n', "line 5: coordinator means nothing"),
        (HEAD + '[devices.pi]\ntransport = "labgrid"\nplaec = "a"\n', 'did you mean "place"'),
    ],
)
def test_entry_that_cannot_be_meant_is_named_by_its_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        load(tmp_path, text)


def test_without_labgrid_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("labgrid", "labgrid.remote", "labgrid.remote.generated"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ToolchainError, match=r"pip install 'edgedeploy\[labgrid\]'"):
        labgrid.Coordinator("127.0.0.1:1").places()


def test_places_of_a_lab_file_without_a_coordinator_are_a_usage_error(tmp_path: Path) -> None:
    from edgedeploy import catalogue

    load(tmp_path, FORMAT)
    with pytest.raises(UsageError, match="names no labgrid coordinator"):
        catalogue.places(tmp_path / "lab.toml")
