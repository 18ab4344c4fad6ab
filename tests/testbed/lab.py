"""A lab for a person: one process keeps the devices running until it is told to end, and lab.toml says how to reach them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import hybrid, vm
from .board import Board, wait_until
from .cache import TestbedError, cache, only_one, remove
from .hybrid import Hybrid
from .plain import Plain
from .tools import PLAIN, install
from .vm import Vm

TIERS = ("plain", "hybrid", "vm")
ROOT = Path(__file__).parent.parent.parent
UP_TIMEOUT_S = 900.0  # with everything to be built
DOWN_TIMEOUT_S = 30.0


def folder() -> Path:
    """Return where the lab's file, log and lock are."""
    path = cache() / "lab"
    path.mkdir(exist_ok=True)
    return path


def build(tiers: Sequence[str]) -> None:
    """Make what devices of some tiers need. Raises TestbedError."""
    install(PLAIN)
    if "hybrid" in tiers:
        hybrid.build()
    if "vm" in tiers:
        vm.build()


def up(tiers: Sequence[str]) -> Path:
    """Start the lab, if it does not run yet, and return its lab.toml.

    Raises:
        TestbedError: it did not come up; the text says why.
    """
    build(tiers)
    with only_one("lab-up"):
        if not is_up():
            (folder() / "lab.toml").unlink(missing_ok=True)
            _serve_in_background(tiers)
    return folder() / "lab.toml"


def down() -> bool:
    """End the lab and return whether there was one. Raises TestbedError when it does not end."""
    with only_one("lab-up"):
        if not is_up():
            return False
        os.kill(int((folder() / "owner").read_text()), signal.SIGTERM)
        wait_until(lambda: not is_up(), timeout_s=DOWN_TIMEOUT_S, what=lambda: "the lab does not end")
        return True


def is_up() -> bool:
    """Return whether a process keeps the lab: it holds the lock for as long as it lives."""
    with (folder() / "owner").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def clean() -> None:
    """Delete everything that can be made again from the archives; what runs must be stopped before."""
    with only_one("lab-up"), only_one("tree"), only_one("image"), only_one("snapshot"):
        if is_up():
            raise TestbedError("the lab is up; run: python -m tests.testbed down")
        for name in ("tree-*", "image-*", "*.part", "tree.work"):
            for path in cache().glob(name):
                remove(path)


def status() -> dict[str, object]:
    """Return what is in the cache and whether the lab runs, for `--json` and for people."""
    archives = {path.name: path.stat().st_size for path in sorted((cache() / "archives").glob("*"))}
    return {
        "folder": str(cache()),
        "archives_bytes": archives,
        "hybrid": hybrid.why_not() or "can be started",
        "lab": str(folder() / "lab.toml") if is_up() else "",
    }


def serve(tiers: Sequence[str]) -> None:
    """Keep devices running until SIGTERM; what they are made of must be there."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    with (folder() / "owner").open("r+") as stream, contextlib.ExitStack() as stack:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        boards = [stack.enter_context(board) for board in _boards(tiers)]
        entries = [board.entry(target=target, description=text) for board, target, text in _described(boards)]
        part = folder() / "lab.toml.part"
        part.write_text('format = "edgedeploy.lab/1"\n\n' + "\n".join(entries))
        part.rename(folder() / "lab.toml")
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        (folder() / "lab.toml").unlink()


def _boards(tiers: Sequence[str]) -> list[Board]:
    """Return the devices of some tiers, not yet running."""
    boards: list[Board] = []
    if "plain" in tiers:
        boards += [Plain(name="plain")]
    if "hybrid" in tiers:
        boards += [Hybrid("pi4", name="hybrid"), Hybrid("orin", name="orin")]
    if "vm" in tiers:
        boards += [Vm()]
    return boards


def _described(boards: Sequence[Board]) -> list[tuple[Board, str, str]]:
    """Return each device with its target and what it is."""
    texts = {
        "plain": "sshd of this machine",
        "hybrid": "arm64 Debian under qemu-user, looks like a Raspberry Pi 4",
        "orin": "arm64 Debian under qemu-user, looks like a Jetson Orin Nano",
        "vm": "arm64 virtual machine with its own kernel",
    }
    return [
        (board, "arm64-linux" if "aarch64" in board.capabilities else "x86-64", texts[board.name]) for board in boards
    ]


def _serve_in_background(tiers: Sequence[str]) -> None:
    (folder() / "owner").touch()
    log = folder() / "serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.testbed", "serve", *tiers],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )

    def is_ready() -> bool:
        if process.poll() is not None:
            raise TestbedError(f"the lab does not start: {log.read_text(errors='replace')[-2000:].strip()}")
        return (folder() / "lab.toml").exists()

    wait_until(is_ready, timeout_s=UP_TIMEOUT_S, what=lambda: f"the lab is not up; see {log}")


def as_json(found: dict[str, object]) -> str:
    """Return what was found for a program."""
    return json.dumps(found, indent=2)
