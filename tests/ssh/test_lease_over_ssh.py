"""A device behind a link that dies without a word: it is given back, restored, within the time of a lease."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgedeploy.errors import DeviceError, DeviceUnreachable
from edgedeploy.lab import bundle, leases
from edgedeploy.records.device import Device, DeviceSettings
from tests.testbed.plain import Plain

GOVERNOR = "sys/devices/system/cpu/cpufreq/policy0/scaling_governor"
LEASE_S = 2.0


class Board:
    """A device behind SSH whose /sys is a folder."""

    def __init__(self, sshd: Plain, folder: Path) -> None:
        self.sshd, self.governor_file = sshd, folder / "board" / GOVERNOR
        self.governor_file.parent.mkdir(parents=True)
        self.governor_file.write_text("ondemand\n")
        # The device's Python, which tells the agent where /sys is.
        self.python = folder / "python"
        self.python.write_text(
            f'#!/bin/sh\ncase " $* " in *" agent "*) set -- "$@" --sysroot {folder / "board"};; esac\n'
            f'exec {sys.executable} "$@"\n'
        )
        self.python.chmod(0o755)

    def device(self, **changes: object) -> Device:
        settings = DeviceSettings(governor="performance")
        return self.sshd.device(**{"python": str(self.python), "settings": settings, "timeout_s": 3.0, **changes})

    @property
    def governor(self) -> str:
        return self.governor_file.read_text().strip()


def becomes(fact: Callable[[], bool], within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while not fact():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def board(sshd: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(bundle, "LEASE_S", LEASE_S)
    return Board(sshd, tmp_path)


def state_of(board: Board) -> leases.Lease:
    with board.sshd.transport() as transport:
        return leases.read(transport, board.device())


def test_cut_link_gives_the_device_back_as_it_was(board: Board) -> None:
    with board.sshd.transport() as transport, bundle.connect(transport, board.device(), device_name="board") as agent:
        assert board.governor == "performance"
        assert state_of(board).state == "held"
        board.sshd.cut()
        assert becomes(lambda: board.governor == "ondemand", 10 * LEASE_S)
        with pytest.raises(DeviceUnreachable):
            agent.conditions()
    assert becomes(lambda: state_of(board).state == "free", 10 * LEASE_S)


def test_link_that_falls_silent_gives_the_device_back_as_it_was(board: Board) -> None:
    with board.sshd.transport() as transport, bundle.connect(transport, board.device(), device_name="board") as agent:
        board.sshd.freeze()
        try:
            assert becomes(lambda: board.governor == "ondemand", 10 * LEASE_S)
        finally:
            board.sshd.thaw()
        assert becomes(lambda: state_of(board).state == "free", 10 * LEASE_S)
        with pytest.raises(DeviceError):
            agent.conditions()
