"""Devices of the ring `lab`: aarch64 boards made on this machine, running for as long as a test process does.

They need root and packages of Debian; the first use builds them (2 minutes), later ones start in a second. Where they
cannot be had, tests are skipped and say why; with EDGEDEPLOY_TEST_LAB=require, as continuous integration has it, they fail.
EDGEDEPLOY_TEST_LAB=all runs the long ones too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.testbed import hybrid as hybrids
from tests.testbed.board import Board
from tests.testbed.cache import TestbedError
from tests.testbed.hybrid import Hybrid
from tests.testbed.plain import Plain
from tests.testbed.vm import Vm

HERE = Path(__file__).parent
WANTED = os.environ.get("EDGEDEPLOY_TEST_LAB", "")
Kind = TypeVar("Kind", bound=Board)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)
            # A first use builds everything, and an emulated Python needs seconds to start.
            item.add_marker(pytest.mark.timeout(600))
            if "long" in item.keywords and WANTED != "all":
                item.add_marker(
                    pytest.mark.skip(reason="takes minutes on an emulated processor; make test-lab LAB=all")
                )


def _started(make: Callable[[], Kind]) -> Kind:
    """Start a device, or say why there is none."""
    why = hybrids.why_not()
    try:
        if why:
            raise TestbedError(why)
        board = make()
        board.start()
    except TestbedError as error:
        if WANTED in ("require", "all"):
            raise
        pytest.skip(f"{error} (to see all of it: python -m tests.testbed build)")
    return board


@pytest.fixture(scope="session")
def hybrid() -> Iterator[Hybrid]:
    """Give an aarch64 user space that looks like a Raspberry Pi 4; its user is "pi"."""
    board = _started(Hybrid)
    yield board
    board.stop()


@pytest.fixture(scope="session")
def orin() -> Iterator[Hybrid]:
    """Give an aarch64 user space that looks like a Jetson Orin Nano; its user is root, who may change settings."""
    board = _started(lambda: Hybrid("orin", user="root"))
    yield board
    board.stop()


@pytest.fixture(scope="session")
def vm() -> Iterator[Vm]:
    """Give an aarch64 machine with its own kernel, 1 GiB and one core."""
    machine = _started(Vm)
    yield machine
    machine.stop()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Plain]:
    """Give an sshd of this machine."""
    with Plain(tmp_path / "plain") as board:
        yield board
