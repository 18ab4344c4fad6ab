"""lab.toml is edited as text: whatever a person wrote stays, and what was written parses to what was meant."""

from __future__ import annotations

import tempfile
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.lab.entries import add_entry, entry_text, read_entry, remove_entry
from edgedeploy.records.device import Device, DeviceSettings

WRITTEN = """\
# The lab of the third floor.
format = "edgedeploy.lab/1"   # do not touch

# desk 1
[devices.pi]
transport = "ssh"
host = "10.0.0.1"  # by the window
# it needs a fan
python = "python3.9"

[devices.pi.settings]
governor = "performance"

# desk 2
[devices."orin.2"]
host = 'orin'
transport = "ssh"
description = '''
[devices.pi]
# not a table
'''
# the end
"""
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)
DEVICES = st.builds(
    Device,
    transport=st.just("ssh"),
    host=TEXTS,
    port=st.integers(0, 65535),
    user=TEXTS,
    key=TEXTS,
    description=TEXTS,
    timeout_s=st.floats(0.001, 1e6),
    runtimes=st.dictionaries(TEXTS, TEXTS, max_size=3),
    settings=st.builds(DeviceSettings, governor=TEXTS, power_mode=st.none() | st.integers(0, 9), sudo=st.booleans()),
)


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    path = tmp_path / "lab.toml"
    path.write_text(WRITTEN)
    return path


def parsed(path: Path) -> dict[str, object]:
    found: dict[str, object] = tomllib.loads(path.read_text())["devices"]
    return found


@given(name=NAMES, device=DEVICES)
def test_whatever_an_entry_says_it_parses_to_just_that(name: str, device: Device) -> None:
    tables = tomllib.loads(entry_text(name, device))["devices"]
    assert list(tables) == [name]
    assert msgspec.convert(tables[name], Device) == device


@settings(max_examples=50)
@given(name=NAMES, device=DEVICES, newline=st.sampled_from(["\n", "\r\n"]))
def test_adding_keeps_every_byte_and_removing_takes_it_all_back(name: str, device: Device, newline: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, written = Path(folder) / "lab.toml", WRITTEN.replace("\n", newline).encode()
        path.write_bytes(written)
        if name in ("pi", "orin.2"):
            with pytest.raises(UsageError, match="already"):
                add_entry(path, name, device)
            return
        add_entry(path, name, device)
        assert path.read_bytes().startswith(written)
        assert path.read_bytes().count(b"\n") == path.read_bytes().count(newline.encode())
        assert read_entry(path, name) == device
        remove_entry(path, name)
        assert path.read_bytes().rstrip() == written.rstrip()


def test_the_first_device_makes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config" / "lab.toml"
    add_entry(path, "pi", Device(transport="ssh", host="h"))
    assert path.read_text() == 'format = "edgedeploy.lab/1"\n\n[devices.pi]\ntransport = "ssh"\nhost = "h"\n'


def test_removing_takes_the_device_s_tables_and_comments_and_nothing_else(lab: Path) -> None:
    remove_entry(lab, "pi")
    assert lab.read_text() == (
        '# The lab of the third floor.\nformat = "edgedeploy.lab/1"   # do not touch\n\n# desk 1\n\n# desk 2\n'
        + WRITTEN[WRITTEN.index('[devices."orin.2"]') :]
    )


def test_replacing_keeps_the_comments_and_the_others(lab: Path) -> None:
    others = parsed(lab)["orin.2"]
    device = Device(transport="ssh", host="10.0.0.9")
    with pytest.raises(UsageError, match="--replace"):
        add_entry(lab, "pi", device)
    add_entry(lab, "pi", device, replace=True)
    assert read_entry(lab, "pi") == device
    assert parsed(lab)["orin.2"] == others
    for comment in ("# The lab of the third floor.", "# do not touch", "# it needs a fan", "# desk 2", "# the end"):
        assert lab.read_text().count(comment) == 1


@pytest.mark.parametrize(
    "written",
    [
        'devices = { pi = { transport = "ssh", host = "a" } }\n',
        'devices.pi.transport = "ssh"\ndevices.pi.host = "a"\n',
        '[devices]\npi = { transport = "ssh", host = "a" }\n',
        '[devices]\npi.transport = "ssh"\npi.host = "a"\n',
    ],
)
def test_what_cannot_be_edited_is_said_and_left_alone(tmp_path: Path, written: str) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(f'format = "edgedeploy.lab/1"\n{written}')
    before = path.read_bytes()
    with pytest.raises(DocumentError, match="cannot edit"):
        remove_entry(path, "pi")
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["lab.toml"]


def test_a_malformed_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text('format = "edgedeploy.lab/1"\n[devices.pi\n')
    with pytest.raises(DocumentError, match="not valid TOML"):
        add_entry(path, "x", Device(transport="ssh", host="h"))
    assert path.read_text().endswith("[devices.pi\n")


def test_permissions_and_links_stay(lab: Path, tmp_path: Path) -> None:
    lab.chmod(0o600)
    link = tmp_path / "elsewhere" / "lab.toml"
    link.parent.mkdir()
    link.symlink_to(lab)
    add_entry(link, "x", Device(transport="ssh", host="h"))
    assert link.is_symlink()
    assert lab.stat().st_mode & 0o777 == 0o600
    assert "x" in parsed(lab)


def test_a_device_that_is_not_there_cannot_be_removed(lab: Path) -> None:
    with pytest.raises(UsageError, match=r"no device 'p1' \(it has: orin\.2, pi\)"):
        remove_entry(lab, "p1")
