"""A device that cannot go on for a reason of its own, such as a full disk, costs no cell: others of its kind step in."""

import os
from pathlib import Path

import pytest

from edgedeploy import pipeline
from edgedeploy.errors import DeviceError
from edgedeploy.lab import health
from edgedeploy.lab.conversation import Agent
from edgedeploy.ondevice import runner

from .small_lab import measure_quickly, write_lab, write_release


@pytest.fixture
def site(model, monkeypatch) -> Path:
    measure_quickly(monkeypatch)
    monkeypatch.setattr(health, "_LOAD_SPAN_S", 0.02)
    return model.parent


@pytest.fixture
def full_disk(monkeypatch):
    """Let device `a` refuse a command as the runner does when its disk is full."""
    ask = Agent.ask
    state = {"at": "have"}

    def asked(self, do, **fields):
        if do == state["at"] and self.root.endswith("/a"):
            error = DeviceError("the device's disk is full")
            error.kind = "disk-full"
            raise error
        return ask(self, do, **fields)

    monkeypatch.setattr(Agent, "ask", asked)
    return state


@pytest.mark.parametrize("command", ["have", "open"])
def test_cell_of_a_device_whose_disk_is_full_is_measured_on_another(site, full_disk, command):
    lab = write_lab(site, ["a", "b"])
    full_disk["at"] = command
    outcome = pipeline.run(write_release(site, {"one": "a", "two": "any"}), lab=lab)
    assert {entry.cell: (entry.state, entry.device) for entry in outcome.verdict.ledger} == {
        "one": ("judged", "b"),
        "two": ("judged", "b"),
    }
    assert "disk is full" in health.quarantined()["a"].why
    assert not outcome.problems


def test_cell_without_another_device_is_pending_and_goes_on_when_there_is_room(site, full_disk):
    lab = write_lab(site, ["a", "b"], b={"target": "another-kind"})
    release = write_release(site, {"one": "a", "two": "b"})
    outcome = pipeline.run(release, lab=lab)
    assert {entry.cell: entry.state for entry in outcome.verdict.ledger} == {"one": "pending", "two": "judged"}
    full_disk["at"] = ""
    outcome = pipeline.run(release, resume="newest")
    assert {entry.cell: entry.state for entry in outcome.verdict.ledger} == {"one": "judged", "two": "judged"}


def test_full_disk_leaves_what_was_there_and_no_half_file(tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    runner.write_whole(str(path), {"a": 1})
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        runner.write_whole(str(path), {"a": 2}, is_synced=True)
    assert path.read_text() == '{"a": 1}'
    assert list(tmp_path.iterdir()) == [path]
