"""What tests of faults share: a device whose link can be spoilt at any stage, one command, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import edgedeploy.cli
from edgedeploy import measure, pipeline
from edgedeploy.lab import bundle
from edgedeploy.lab.visits import Schedule
from edgedeploy.results import load_run
from edgedeploy.storage import sha256_file
from tests.testbed.badlink import BadLink
from tests.testbed.plain import Plain

# A lease that nobody renews ends after this time, so that a test can wait for it.
LEASE_S = 4.0
# A device that was lost in the middle is waited for this long.
RECONNECT_S = 3.0
QUICK = Schedule(
    bursts_per_visit=2, samples_per_burst=3, warm_up_window=2, warm_up_cap_s=0.05, memory_inferences=2, open_timeout_s=8.0,
    burst_timeout_s=8.0, outputs_timeout_s=6.0,
)  # fmt: skip
SAMPLES, WIDTH = 16, 16384
TARGET = """\
format = "edgedeploy.target/1"
name = "fake-board"
description = "a board that exists only in tests"
[backends.fake]
precisions = ["fp32"]
[conditions]
max_foreign_load = 1000.0
"""
# What marks the beginning of each stage in the progress of a command.
STAGES = {
    "connect": "connecting",
    "upload": "sending what is missing",
    "download": "computing the evaluation set's outputs",
    "visit": "block 2 of",
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    said: str
    seconds: float


class _Talk(io.StringIO):
    """A stderr that acts on what it is told."""

    def __init__(self, listeners: list[tuple[str, Callable[[], None]]]) -> None:
        super().__init__()
        self._listeners = listeners

    def write(self, text: str) -> int:
        for listener in [one for one in self._listeners if one[0] in text]:
            self._listeners.remove(listener)
            listener[1]()
        return super().write(text)


class Workshop:
    """Artifacts of the fake back end, an evaluation set whose outputs take a megabyte, and the run of a sound device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._built: dict[tuple[tuple[str, object], ...], Path] = {}
        (folder / "targets").mkdir()
        (folder / "targets" / "fake-board.toml").write_text(TARGET)
        onnx = pytest.importorskip("onnx", reason="compiling needs onnx: pip install 'edgedeploy[onnxruntime]'")
        helper, kind = onnx.helper, onnx.TensorProto.FLOAT
        values = [helper.make_tensor_value_info(name, kind, ["batch", WIDTH]) for name in ("image", "scores")]
        graph = helper.make_graph([helper.make_node("Relu", ["image"], ["scores"])], "wide", values[:1], values[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, folder / "wide.onnx")
        self.evaluation = folder / "evaluation.npz"
        images = np.random.default_rng(0).standard_normal((SAMPLES, WIDTH)).astype(np.float32)
        np.savez(self.evaluation, image=images, labels=np.arange(SAMPLES))

    def artifact(self, **options: object) -> Path:
        """Return an artifact of the fake runtime with some options; each is compiled once."""
        key = tuple(sorted(options.items()))
        if key not in self._built:
            name = f"artifact-{len(self._built)}"
            built = pipeline.compile(
                self.folder / "wide.onnx",
                target="fake-board",
                backend="fake",
                options={"duration_us": 20_000.0, **options},
                output=self.folder / name,
                name=name,
            )
            self._built[key] = built.folder
        return self._built[key]


class Place:
    """A device behind a link, and a person who measures on it.

    Attributes:
        artifact: what is measured.
        arguments: further ones of the command.
    """

    def __init__(self, folder: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.workshop, self.monkeypatch = folder, workshop, monkeypatch
        self.board = Plain(folder / "board")
        self.link = BadLink(self.board.port)
        self.results = folder / "results"
        self.artifact = workshop.artifact()
        self.changes: dict[str, object] = {"python": sys.executable, "timeout_s": 3.0, "connect_timeout_s": 2.0}
        self.closing = contextlib.ExitStack()
        self._listeners: list[tuple[str, Callable[[], None]]] = []
        self._watchers: list[threading.Thread] = []

    def write_lab(self) -> Path:
        """Write the lab file: the device as it is reached through the link."""
        path = self.folder / "lab.toml"
        fields = {**self.link.settings(self.board), **self.changes}
        path.write_text('format = "edgedeploy.lab/1"\n' + self.board.entry(**fields))
        return path

    def at(self, stage: str, act: Callable[[], None]) -> None:
        """Act when a stage begins."""
        self._listeners.append((STAGES[stage], act))

    def during_visit(self, act: Callable[[], None]) -> None:
        """Act while the process of the second block's visit is alive."""

        def watch() -> None:
            deadline_s = time.monotonic() + 20.0
            while time.monotonic() < deadline_s:
                if self.processes("visit"):
                    act()
                    return
                time.sleep(0.005)

        def start() -> None:
            self._watchers.append(threading.Thread(target=watch, daemon=True))
            self._watchers[-1].start()

        self.at("visit", start)

    def run(self, *arguments: str) -> Ended:
        """Run a command of edgedeploy as a person would type it, and return how it ended."""
        talk = _Talk(self._listeners)
        started_s = time.monotonic()
        with contextlib.redirect_stderr(talk), contextlib.redirect_stdout(io.StringIO()):
            code = edgedeploy.cli.run([*arguments, "--lab", str(self.folder / "lab.toml")])
        for watcher in self._watchers:
            watcher.join()
        return Ended(code, talk.getvalue(), time.monotonic() - started_s)

    def bench(self) -> Ended:
        """Measure the artifact on the device."""
        given = ["--device", "board", "--visits", "3", "--evaluation", str(self.workshop.evaluation)]
        return self.run("bench", str(self.artifact), *given, "--results", str(self.results))

    def processes(self, role: str = "") -> list[int]:
        """Return the processes on the device that are ours: all, or those of one role of the runner."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):  # the process ended meanwhile
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if self.board.root.encode() in b" ".join(words) and (not role or role.encode() in words):
                        found.append(int(entry.name))
        return found

    def signal(self, role: str, number: int) -> None:
        """Send a signal to the runner's processes of a role."""
        for process in self.processes(role):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def runs(self) -> dict[str, bytes]:
        """Return every file of the results."""
        return {str(path): path.read_bytes() for path in self.results.rglob("*") if path.is_file()}

    def mend(self) -> None:
        """Take the cause away: the link works, the server runs and is known."""
        self.link.close()
        self.link = BadLink(self.board.port)
        if self.board.sshd is not None:
            self.board.thaw()

    def close(self) -> None:
        self.link.close()
        self.board.stop()
        self.closing.close()


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong, and what must come of it.

    Attributes:
        name: of the test, and in FAULTS.md.
        arrange: makes it go wrong.
        says: what the person reads: a pattern that stderr has.
        code: the exit code; 0 where the fault is survived.
        options: of the artifact.
        device: changes of the device's entry.
        keeps: whether what was measured before is kept in a run of its own.
        mends: what takes the cause away, beside the link's end.
        within_s: the longest that the command may take, on a machine that does other things too.
    """

    name: str
    arrange: Callable[[Place], None]
    says: str
    code: int = 3
    options: Mapping[str, object] = field(default_factory=dict)
    device: Mapping[str, object] = field(default_factory=dict)
    keeps: bool = False
    mends: Callable[[Place], None] = lambda place: None
    within_s: float = 60.0


@contextlib.contextmanager
def stage_set(tmp_path: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Give a place whose device works, with times that a test can wait for."""
    monkeypatch.setattr(measure, "_usual_schedule", lambda sides: QUICK)
    monkeypatch.setattr(measure, "MEMORY_VISITS", 1)
    monkeypatch.setitem(measure.MeasureRequest.__init__.__kwdefaults__, "reconnect_s", RECONNECT_S)
    monkeypatch.setattr(bundle, "LEASE_S", LEASE_S)
    place = Place(tmp_path, workshop, monkeypatch)
    try:
        place.board.start()
        yield place
    finally:
        place.close()


def suffer(fault: Fault, place: Place) -> Ended:
    """Let a fault happen during a measurement, and demand everything that must hold whatever the fault."""
    place.changes.update(fault.device)
    place.artifact = place.workshop.artifact(**fault.options)
    place.results.mkdir()
    earlier = place.results / "runs" / "fake-board" / "wide" / "earlier.json"
    earlier.parent.mkdir(parents=True)
    shutil.copy(place.workshop.folder / "sound.json", earlier)
    before = place.runs()
    place.write_lab()
    fault.arrange(place)
    ended = place.bench()
    assert ended.code == fault.code, f"{ended.code}: {ended.said}"
    assert re.search(fault.says, ended.said, re.DOTALL), ended.said
    assert "Traceback" not in ended.said
    assert ended.seconds < fault.within_s
    demand_nothing_lost(place, before, 1 if fault.keeps or not fault.code else 0)
    place.mend()
    fault.mends(place)
    demand_device_restored(place)
    return ended


def demand_nothing_lost(place: Place, before: Mapping[str, bytes], more: int) -> None:
    """Demand that earlier results are what they were, that new ones are whole, and that no half file lies anywhere."""
    after = place.runs()
    assert {path: after.get(path) for path in before} == dict(before)
    added = [Path(path) for path in after if path not in before]
    assert len(added) == more, added
    for path in added:
        run = load_run(path)
        assert run.outputs is not None or any(visit.bursts for visit in run.visits)
    kept = [place.results, Path(os.environ["EDGEDEPLOY_CACHE_DIR"]), Path(os.environ["EDGEDEPLOY_STATE_DIR"])]
    halves = [path for folder in kept for path in folder.rglob("*") if re.search(r"\.part|\.tmp|\.fetch-", path.name)]
    assert not halves


def demand_device_restored(place: Place, within_s: float = 20.0) -> None:
    """Demand that no process of ours is left, that objects are what they are called, and that the device is free."""
    deadline_s = time.monotonic() + within_s
    while (left := place.processes()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    told = [Path(f"/proc/{number}/cmdline").read_bytes() for number in left if Path(f"/proc/{number}").exists()]
    assert not told
    root = Path(place.board.root)
    for path in (root / "objects").glob("*"):
        assert not re.fullmatch(r"[0-9a-f]{64}", path.name) or sha256_file(path) == path.name, "half an object"
    assert not (root / "restore.json").exists(), "settings were not put back"
    changes = {**place.link.settings(place.board), "python": sys.executable, "timeout_s": 10.0}
    device = place.board.device(**changes)
    with place.board.transport(**changes) as transport, bundle.connect(transport, device, device_name="board") as agent:
        assert agent.facts.cores > 0


# ------------------------------------------------------------------------------------------------ what can be arranged

Arrangement = Callable[[Place], object]


def lost_for_good(place: Place) -> None:
    """End the connection and let no other one through."""
    place.link.refuse()
    place.link.cut("fin")


def slow(place: Place) -> None:
    place.link.delay_s, place.link.rate = 0.03, 4e6


def when_outputs_come(act: Callable[[Place], None]) -> Arrangement:
    """Act once when a part of the outputs has come through the link."""

    def arrange(place: Place) -> None:
        done = threading.Event()
        place.closing.callback(done.set)

        def watch(begun: int) -> None:
            while not done.wait(0.001):
                if place.link.bytes_down > begun + 200_000:
                    act(place)
                    return

        def start() -> None:
            threading.Thread(target=watch, args=(place.link.bytes_down,), daemon=True).start()

        place.at("download", start)

    return arrange


def restarted(**settings: str) -> Arrangement:
    """Let the SSH server run with other settings; without any, with the usual ones."""

    def arrange(place: Place) -> None:
        place.board.stop()
        place.board.start(**settings)

    return arrange


def entry(change: Callable[[Place], Mapping[str, object]]) -> Arrangement:
    """Change the device's entry in the lab file."""

    def arrange(place: Place) -> None:
        place.changes.update(change(place))
        place.write_lab()

    return arrange


def killed(role: str, number: signal.Signals) -> Arrangement:
    """Send a signal to a process of the runner while a visit runs."""
    return lambda place: place.during_visit(lambda: place.signal(role, number))


def nothing(place: Place) -> None:
    """Leave it to the artifact's options or the entry."""


def root_on(options: str) -> Arrangement:
    """Let the device keep its files on a file system of its own."""

    def arrange(place: Place) -> None:
        disk = place.folder / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs here: {tried.stderr.strip()}")
        place.closing.callback(subprocess.run, ["umount", "-l", str(disk)], check=True)
        place.board.root = str(disk / "root")
        place.write_lab()

    return arrange


def another_root(place: Place) -> None:
    place.board.root = str(place.folder / "another-root")


def empty_file(place: Place) -> str:
    path = place.folder / "empty"
    path.write_text("")
    return str(path)


def program(place: Place, text: str) -> str:
    """Return a shell script on the device."""
    path = place.folder / "python3"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def python_of_another_time(place: Place) -> str:
    """Return a Python whose clock is ten years behind."""
    site = place.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() - 3.2e8\n")
    return program(place, f'PYTHONPATH="{site}" exec "{sys.executable}" "$@"')


# ------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Give artifacts and a run of them on a sound device, which counts as an earlier result."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "EDGEDEPLOY_TARGETS": folder / "targets",
            "EDGEDEPLOY_CACHE_DIR": folder / "cache",
            "EDGEDEPLOY_STATE_DIR": folder / "state",
            "XDG_CONFIG_HOME": folder / "config",
            "HOME": folder,
        }.items():
            patch.setenv(name, str(value))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        made = Workshop(folder)
        with pytest.MonkeyPatch.context() as short, stage_set(tmp_path_factory.mktemp("sound"), made, short) as place:
            place.write_lab()
            ended = place.bench()
            assert ended.code == 0, ended.said
            (run,) = place.results.rglob("*.json")
            shutil.copy(run, folder / "sound.json")
        yield made


@pytest.fixture
def place(tmp_path: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Give a device that works, until a fault is arranged."""
    with stage_set(tmp_path, workshop, monkeypatch) as made:
        yield made
