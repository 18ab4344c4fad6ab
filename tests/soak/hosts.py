"""The hosts of the soak: edgedeploy as a child process that measures a matrix, is killed, and goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .ledger import is_over, planned_release

ROOT = Path(__file__).parents[2]
TARGET = """\
format = "edgedeploy.target/1"
name = "fake-board"
description = "a board that exists only in tests"
[backends.fake]
precisions = ["fp32"]
[conditions]
max_foreign_load = 1000.0
max_temperature_celsius = 1000.0
"""
# Sixteen samples of 64 KiB: a megabyte that goes to the device, and one that comes back.
SAMPLES, WIDTH = 16, 16384
# 320 inferences of a block take a second.
INFERENCE_US = 2500.0
BLOCKS = 3
ANY_CELLS = 3
# Resumes while faults strike; what is pending after them waits for the end.
RESUMES_UNDER_FIRE = 3
# The longest that a host may say nothing: a lost device is waited for for 180 s, and a lease that is not renewed for 60.
MOST_SILENCE_S = 400.0
PASSED, FAILED, ERROR, INCONCLUSIVE, INTERRUPTED = 0, 1, 3, 4, 130


@dataclass
class Host:
    """One edgedeploy process and what it says."""

    words: list[str]
    cwd: Path
    log: Path
    environment: Mapping[str, str]
    allowed: set[int] = field(default_factory=lambda: {PASSED, FAILED, ERROR, INCONCLUSIVE})

    def __post_init__(self) -> None:
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "edgedeploy", *self.words],
                cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=self.environment,
                start_new_session=True,
            )  # fmt: skip
        self._spoke_s, self._size = time.monotonic(), 0
        self.is_frozen = False

    @property
    def pid(self) -> int:
        """Return its process number."""
        return self._process.pid

    @property
    def has_spoken(self) -> bool:
        """Return whether it is past its start."""
        return self.log.stat().st_size > 0

    def is_alive(self) -> bool:
        """Return whether it still runs; one that is silent for too long is ended, and says where it was."""
        if self._process.poll() is not None:
            return False
        size = self.log.stat().st_size
        if size != self._size or self.is_frozen:
            self._spoke_s, self._size = time.monotonic(), size
        if time.monotonic() - self._spoke_s > MOST_SILENCE_S:
            self._process.send_signal(signal.SIGABRT)
            self._process.wait()
        return True

    def send(self, number: signal.Signals) -> None:
        """Send it a signal whose exit code then is no surprise."""
        # A shell shows both as 130: the interpreter itself is what ends when our words are all said.
        self.allowed |= {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGINT: {INTERRUPTED, -signal.SIGINT}}.get(
            number, set()
        )
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        """Wait for its end; one that does not come is brought about, and is a problem."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)
            self._process.wait()

    @property
    def code(self) -> int:
        """Return how it ended."""
        return int(self._process.returncode)

    @property
    def was_ended_early(self) -> bool:
        """Return whether we ended it."""
        return self.code in (-signal.SIGKILL, -signal.SIGINT, INTERRUPTED)

    def problems(self) -> list[str]:
        """Return what is wrong with its end, or with what it said."""
        said = self.log.read_text(errors="replace")
        found = []
        if self.code not in self.allowed:
            found.append(f"{self.log}: edgedeploy {self.words[0]} ended with {self.code}: {said.strip()[-300:]}")
        if "Traceback (most recent call last)" in said:
            found.append(f"{self.log}: a traceback: {said[said.index('Traceback') :].strip()[-600:]}")
        return found


class Campaign:
    """Rounds of one matrix, one after another: each a release file of its own, measured by as many hosts as it takes.

    Args:
        folder: where everything is.
        names: of the devices.
    """

    def __init__(self, folder: Path, names: list[str], seed: int) -> None:
        self.folder, self._names, self._seed = folder, names, seed
        for name in ("cache", "state", "targets", "logs", "rounds", "rival"):
            (folder / name).mkdir()
        (folder / "targets" / "fake-board.toml").write_text(TARGET)
        write_model(folder / "wide.onnx")
        # A run does not go on with other code than it began with, and somebody may edit the checkout meanwhile.
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "edgedeploy", folder / "code" / "edgedeploy", ignore=leave)
        shutil.copytree(ROOT / "targets", folder / "code" / "edgedeploy" / "targets")
        self.results, self.journals = folder / "results", folder / "state" / "journals"
        self.host: Host | None = None
        self.round, self.rounds, self.hosts, self.resumes = folder, 0, 0, 0
        self._resumed = 0
        self.problems: list[str] = []
        self.badly_ended: set[Path] = set()

    def environment(self, own: str = "") -> dict[str, str]:
        """Return what a host sees; another one has cache and state of its own."""
        place = self.folder / own
        return {
            **os.environ,
            "EDGEDEPLOY_CACHE_DIR": str(place / "cache"),
            "EDGEDEPLOY_STATE_DIR": str(place / "state"),
            "EDGEDEPLOY_TARGETS": str(self.folder / "targets"),
            "XDG_CONFIG_HOME": str(place / "config"),
            "PYTHONPATH": str(self.folder / "code"),
            "OMP_NUM_THREADS": "1",
        }

    def command(self, *words: str, own: str = "") -> Host:
        """Start a host."""
        self.hosts += 1
        log = self.folder / "logs" / f"{self.hosts:04}-{words[0]}.log"
        cwd = self.round if not own else self.folder / own
        return Host(list(words), cwd, log, self.environment(own))

    def step(self, *, may_start: bool = True) -> None:
        """See whether the host has ended, and start the next one."""
        was_killed = False
        if self.host is not None:
            if self.host.is_alive():
                return
            self.reap(self.host)
            was_killed, self.host = self.host.was_ended_early, None
        if not may_start:
            return
        journal = self.journal_of(self.round / "edgedeploy.toml") if self.rounds else None
        is_begun = was_killed and journal is None and self._resumed < RESUMES_UNDER_FIRE
        if journal is not None and not is_over(journal) and self._resumed < RESUMES_UNDER_FIRE:
            self.host = self.resume(self.round / "edgedeploy.toml")
        elif is_begun:  # it was killed before it could write down what it was about to do
            self._resumed += 1
            self.host = self.run(self.round / "edgedeploy.toml")
        else:
            self.host = self.next_round()

    def reap(self, host: Host) -> None:
        """Take note of how a host ended."""
        found = host.problems()
        self.problems += found
        self.badly_ended |= {host.log} if found else set()

    def next_round(self) -> Host:
        """Write the next release file and an evaluation set that no device has seen, and measure it."""
        self.rounds += 1
        self._resumed = 0
        self.round = self.folder / "rounds" / f"{self.rounds:04}"
        self.round.mkdir()
        (self.round / "edgedeploy.toml").write_text(self.release())
        images = np.random.default_rng([self._seed, self.rounds]).standard_normal((SAMPLES, WIDTH)).astype(np.float32)
        np.savez(self.round / "evaluation.npz", image=images, labels=np.arange(SAMPLES))
        return self.run(self.round / "edgedeploy.toml")

    def release(self) -> str:
        """Return a release file: some cells for any device and one for each device."""

        def cell(name: str, microseconds: float, device: str) -> str:
            return (
                f'[[cells]]\nname = "{name}"\nmodel = "wide"\ntarget = "fake-board"\nbackend = "fake"\n'
                f'precision = "fp32"\ndevice = "{device}"\nbaseline = "base-{device}"\n'
                f"options = {{ duration_us = {microseconds}, is_idle = true }}\n"
            )

        devices = ["any"] * ANY_CELLS + self._names
        text = 'format = "edgedeploy.release/1"\nname = "soak"\n[models.wide]\nsource = "../../wide.onnx"\n'
        text += '[evaluation]\nset = "evaluation.npz"\nmetric = "top1"\n' + "".join(
            cell(f"base-{device}", INFERENCE_US, device) for device in dict.fromkeys(devices)
        )
        for number, device in enumerate(devices, start=1):
            text += cell(f"cell-{number:02}-{device}", INFERENCE_US + number + 20 * (self.rounds % 50), device)
        return f'{text}[gate]\nbaseline = "base-any"\nmin_blocks = {BLOCKS}\nmax_blocks = {BLOCKS}\n'

    def run(self, release: Path) -> Host:
        """Start a run."""
        lab, results = str(self.folder / "lab.toml"), str(self.results)
        return self.command("run", str(release), "--lab", lab, "--results", results, "--wait", "30s")

    def resume(self, release: Path) -> Host:
        """Go on with a run."""
        self._resumed += 1
        self.resumes += 1
        return self.command("run", "--resume", str(release), "--wait", "90s")

    def resume_named(self, journal: Path) -> Host:
        """Go on with a run by its name."""
        self.resumes += 1
        return self.command("run", "--resume", journal.stem, "--wait", "90s")

    def journal_of(self, release: Path) -> Path | None:
        """Return the newest journal of a release file that is more than a torn line."""
        found = [path for path in self.journals.glob("*.jsonl") if planned_release(path) == str(release.absolute())]
        return max(found, default=None, key=lambda path: path.name)


def is_past_start(host: Host) -> bool:
    """Return whether a host is so far that Ctrl-C ends it in our words and not in the interpreter's."""
    return host.has_spoken and re.search(r"connecting|block", host.log.read_text(errors="replace")) is not None


def write_model(path: Path) -> None:
    """Write a network of one operator on wide samples."""
    import onnx

    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", WIDTH]) for name in ("image", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["y"])], "wide", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
