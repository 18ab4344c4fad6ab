"""The runner as a real process on this machine, with the fake runtime, and everything that can go wrong with it."""

from __future__ import annotations

import ast
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgedeploy.backends import fake
from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable, TransferError, VisitFailed
from edgedeploy.lab import transport as transport_module
from edgedeploy.lab.bundle import RUNNER, connect, ship
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.lab.visits import Schedule, Side, compute_outputs, measure_block, measure_memory
from edgedeploy.records.device import Device
from edgedeploy.storage import sha256_bytes, sha256_file

SESSION = Path(fake.__file__).with_name("session.py")
PACKAGE = Path(transport_module.__file__).parent.parent
# However the machine is loaded, warm-up is two windows: tests count inferences to know where one goes wrong.
QUICK = Schedule(bursts_per_visit=3, samples_per_burst=4, lead_in=1, warm_up_window=2, warm_up_tolerance=1e9)
ARTIFACT = {
    "format": "edgedeploy.fake/1",
    "model_sha256": "",
    "inputs": {"x": ["float32", "batch", 4]},
    "outputs": {"y": ["float32", "batch", 10]},
    "operators": {},
    "options": {
        **{name: field.default for name, field in fake.Options.__dataclass_fields__.items()},
        "duration_us": 20,
    },
}


@dataclass(frozen=True)
class Bench:
    """A device on this machine with an artifact ready to ship."""

    folder: Path
    device: Device
    transport: LocalTransport
    files: dict[str, Path]
    side: Side

    @property
    def objects(self) -> Path:
        return Path(self.device.root) / "objects"

    def connect(self):
        return connect(self.transport, self.device, device_name="bench")

    def add(self, name: str, content: bytes) -> str:
        """Make a file that the next `ship` sends; return its digest."""
        (self.folder / name).write_bytes(content)
        self.files[sha256_bytes(content)] = self.folder / name
        return sha256_bytes(content)

    def session(self, body: str) -> Side:
        """Return a side with a session of its own."""
        return replace(self.side, session_sha256=self.add("session.py", textwrap.dedent(body).encode()))

    def processes(self) -> list[int]:
        """Return the processes that have this bench's directory in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            except (FileNotFoundError, ProcessLookupError):
                continue
            if self.device.root.encode() in words and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found

    def visits(self) -> list[int]:
        return [pid for pid in self.processes() if b"\0visit\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def agents(self) -> list[int]:
        return [pid for pid in self.processes() if b"\0agent\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def watchdogs(self) -> list[int]:
        return [pid for pid in self.processes() if b"\0watchdog\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def has_ended(pids: list[int]) -> bool:
    """Wait for processes to end, without polling."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([descriptor], [], [], 10.0)
        os.close(descriptor)
        if not ended:
            return False
    return True


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    samples = np.random.default_rng(0).random((7, 4), dtype=np.float32)
    save_file({"x": samples}, tmp_path / "inputs")
    (tmp_path / "artifact").write_text(json.dumps(ARTIFACT))
    paths = [tmp_path / "artifact", tmp_path / "inputs", SESSION]
    artifact, inputs, session = map(sha256_file, paths)
    return Bench(
        tmp_path,
        Device(transport="local", root=str(tmp_path / "root"), timeout_s=20.0),
        LocalTransport("bench"),
        {sha256_file(path): path for path in paths},
        Side("dense", artifact, session, {}, inputs, batch=2),
    )


def block(agent: Agent, *sides: Side, schedule: Schedule = QUICK):
    return measure_block(agent, sides, schedule, block=0, seed=0)


# ------------------------------------------------------------------------------------------------ what the files are


@pytest.mark.parametrize("path", [RUNNER, *sorted((PACKAGE / "backends").glob("*/session.py"))], ids=str)
def test_what_runs_on_the_device_parses_as_python_3_8(path):
    ast.parse(path.read_text(), feature_version=(3, 8))


def test_runner_imports_only_the_standard_library():
    tree = ast.walk(ast.parse(RUNNER.read_text()))
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in imports if isinstance(node, ast.ImportFrom)]
    assert names
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


# ------------------------------------------------------------------------------------------------ measuring


def test_two_sides_are_measured_interleaved_and_leave_no_process(bench):
    with bench.connect() as agent:
        assert set(ship(agent, bench.transport, bench.files)) == set(bench.files)
        assert ship(agent, bench.transport, bench.files) == ()
        slow = replace(bench.side, cell="slow", options={"duration_us": 2000})
        dense, slower = block(agent, bench.side, slow)
        started = bench.processes()
        assert sorted(started) == sorted(bench.agents() + bench.watchdogs())
    assert has_ended(started)
    assert [burst.pair for burst in dense.visit.bursts] == [burst.pair for burst in slower.visit.bursts] == [0, 1, 2]
    assert [len(burst.samples_s) for burst in dense.visit.bursts] == [4, 4, 4]
    assert min(slower.visit.bursts[0].samples_s) >= 2000e-6
    assert (dense.runtime, dense.boundary.batch, dense.boundary.threads) == ("fake 1", 2, 1)
    assert {dense.visit.position, slower.visit.position} == {0, 1}
    assert dense.visit.is_steady
    assert len(dense.visit.warm_up_samples_s) == 4
    assert dense.visit.load_s > 0
    assert dense.visit.before.monotonic_s < dense.visit.after.monotonic_s
    assert dense.visit.before.own_core_s == 0.0
    assert dense.visit.dropped == ""


def test_one_side_alone_is_measured(bench):
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        (visit,) = block(agent, bench.side)
    assert sum(len(burst.samples_s) for burst in visit.visit.bursts) == 12


def test_warm_up_that_never_settles_ends_at_its_cap_and_says_so(bench):
    schedule = replace(QUICK, warm_up_tolerance=-1.0, warm_up_cap_s=0.05)
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        (visit,) = block(agent, bench.side, schedule=schedule)
    assert not visit.visit.is_steady
    assert len(visit.visit.warm_up_samples_s) > 4


def test_default_schedule_supports_a_95th_percentile():
    assert Schedule().bursts_per_visit * Schedule().samples_per_burst >= 59


def test_memory_is_the_high_water_mark_of_a_process_of_its_own(bench):
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        small = measure_memory(agent, bench.side, replace(QUICK, memory_inferences=8))
        leaking = replace(bench.side, options={"leak_bytes": 4_000_000})
        large = measure_memory(agent, leaking, replace(QUICK, memory_inferences=8))
        assert bench.visits() == []
    assert 0 < small.import_rss_bytes <= small.peak_rss_bytes
    assert large.peak_rss_bytes - small.peak_rss_bytes > 25_000_000


def test_outputs_of_all_samples_come_back_whole_with_a_short_last_batch(bench):
    target = bench.folder / "fetched" / "outputs.safetensors"
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        answer = compute_outputs(agent, bench.transport, bench.side, target)
        assert list((Path(bench.device.root) / "outputs").iterdir()) == []
    scores, samples = load_file(target)["y"], load_file(bench.folder / "inputs")["x"]
    assert answer.samples == 7
    assert answer.is_repeatable
    assert answer.sha256 == sha256_file(target)
    assert scores.shape == (7, 10)
    assert list(scores.argmax(axis=1)) == [sum(sample.tobytes()) % 10 for sample in samples]


def test_outputs_that_differ_from_time_to_time_are_reported(bench):
    side = bench.session("""
        import struct
        class Session:
            runtime, count = "moody 1", 0
            def __init__(self, artifact, options): pass
            def __enter__(self): return self
            def __exit__(self, *exc): pass
            def boundary(self):
                return {"threads": 1, "includes_input_copy": False, "includes_output_copy": False, "detail": ""}
            def bind(self, inputs): self.batch = inputs["x"][2][0]
            def infer(self): self.count += 1
            def outputs(self): return {"y": (struct.pack("<2f", self.count, 0), "float32", [self.batch])}
    """)
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        answer = compute_outputs(agent, bench.transport, side, bench.folder / "out")
    assert answer.is_repeatable is False


def test_noise_on_descriptor_1_does_not_disturb_the_protocol(bench):
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        (visit,) = block(agent, replace(bench.side, options={"print_noise": True}))
    assert len(visit.visit.bursts) == 3


def test_runner_works_under_python_3_8(bench):
    python = os.environ.get("EDGEDEPLOY_TEST_PYTHON38") or shutil.which("python3.8")
    version = [python, "-c", "import sys; print(sys.version_info[:2])"] if python else ["false"]
    if subprocess.run(version, capture_output=True, check=False).stdout.strip() != b"(3, 8)":
        pytest.skip("no working python3.8 on PATH or in EDGEDEPLOY_TEST_PYTHON38")
    device = msgspec.structs.replace(bench.device, python=python)
    with connect(bench.transport, device, device_name="old") as agent:
        assert agent.facts.python.startswith("3.8.")
        ship(agent, bench.transport, bench.files)
        (visit,) = block(agent, bench.side)
        compute_outputs(agent, bench.transport, bench.side, bench.folder / "out")
        measure_memory(agent, bench.side)
    assert len(visit.visit.bursts) == 3


# ------------------------------------------------------------------------------------------------ visits that fail


def test_child_that_crashes_is_reported_with_signal_and_last_lines_and_the_others_bursts_are_kept(bench):
    bad = replace(bench.side, cell="bad", options={"crash_after": 60, "print_noise": True})
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        with pytest.raises(VisitFailed) as caught:
            block(agent, bench.side, bad, schedule=replace(QUICK, bursts_per_visit=20))
        assert bench.visits() == []
        block(agent, bench.side)  # the device is well
    assert caught.value.kind == "died"
    for part in ("device 'bench'", "bad block 0", "SIGSEGV", "printed from C"):
        assert part in str(caught.value)
    kept = {item.side.cell: item.visit for item in caught.value.measured}
    assert kept["dense"].bursts
    assert "SIGSEGV" in kept["dense"].dropped


def test_child_killed_between_bursts_is_reported(bench):
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        job = {"session": bench.side.session_sha256, "artifact": bench.side.artifact_sha256,
               "inputs": bench.side.inputs_sha256, "options": {}, "batch": 1,
               "warm_up": {"window": 1, "tolerance": 9.0, "cap_s": 1.0}}  # fmt: skip
        agent.ask("open", visit="v", job=job, timeout_s=20)
        (child,) = bench.visits()
        os.kill(child, signal.SIGKILL)
        with pytest.raises(
            VisitFailed, match=r"bursts in visit 'v' failed: visit 'v': .*killed by SIGKILL.*out-of-memory"
        ):
            agent.ask("bursts", visits=["v"], count=1, lead_in=0, timeout_s=20)
        with pytest.raises(VisitFailed, match="no open visit 'v'"):
            agent.ask("bursts", visits=["v"], count=1, lead_in=0, timeout_s=20)


def test_hanging_child_is_killed_at_its_time_limit(bench):
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        with pytest.raises(VisitFailed, match=r"no answer within 0\.3 s") as caught:
            block(agent, replace(bench.side, options={"hang_after": 7}), schedule=replace(QUICK, burst_timeout_s=0.3))
        assert caught.value.kind == "timeout"
        assert bench.visits() == []


def test_missing_runtime_names_interpreter_module_and_remedy(bench):
    with bench.connect() as agent:
        side = bench.session("import no_such_runtime\n")
        ship(agent, bench.transport, bench.files)
        with pytest.raises(VisitFailed) as caught:
            block(agent, side)
    assert caught.value.kind == "missing-runtime"
    for part in (sys.executable, "no module 'no_such_runtime'", "lab.toml"):
        assert part in str(caught.value)


def test_runtime_that_does_not_load_is_reported_with_its_text(bench):
    with bench.connect() as agent:
        side = bench.session("raise ImportError('libgomp.so.1: cannot open shared object file')\n")
        ship(agent, bench.transport, bench.files)
        with pytest.raises(VisitFailed, match="cannot load the runtime: ImportError: libgomp"):
            block(agent, side)


def test_runtime_that_says_itself_what_to_do_is_not_given_other_advice(bench):
    with bench.connect() as agent:
        side = bench.session(
            "error = ImportError('no driver; install one')\nerror.says_what_to_do = True\nraise error\n"
        )
        ship(agent, bench.transport, bench.files)
        with pytest.raises(VisitFailed, match=r"cannot load the runtime: no driver; install one$"):
            block(agent, side)


def test_corrupt_artifact_is_reported_with_the_runtimes_text(bench):
    with bench.connect() as agent:
        side = replace(bench.side, artifact_sha256=bench.add("bad", b'{"format": "something else"}'))
        ship(agent, bench.transport, bench.files)
        with pytest.raises(VisitFailed, match="not an artifact of the fake runtime") as caught:
            block(agent, side)
    assert caught.value.kind == "bad-artifact"


def safetensors(folder: Path, **tensors) -> bytes:
    save_file(tensors, folder / "tensors")
    return (folder / "tensors").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"x": np.zeros((3, 5), np.float32)}, r"does not take these inputs: .*\[2, 5\]"),
        ({"x": np.zeros((3, 4), np.int8)}, "does not take these inputs: .*int8"),
        ({"z": np.zeros((3, 4), np.float32)}, r"does not take these inputs: .*\['z'\]"),
        ({"x": np.full((3, 4), np.nan, np.float32)}, "'x' holds NaN in its samples 0 to 1"),
        ({"x": np.full((3, 4), np.nan, np.float16)}, "'x' holds NaN"),
        ({"x": np.zeros((3, 4), np.float32), "z": np.zeros((2, 4), np.float32)}, r"same number of samples.*\[2, 3\]"),
        ({"x": np.zeros((0, 4), np.float32)}, "at least 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(bench, tensors, text):
    side = replace(bench.side, inputs_sha256=bench.add("bad", safetensors(bench.folder, **tensors)))
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        with pytest.raises(VisitFailed, match=text) as caught:
            block(agent, side)
    assert caught.value.kind == "bad-input"


def test_session_that_was_not_shipped_is_named(bench):
    with (
        bench.connect() as agent,
        pytest.raises(VisitFailed, match=f"{bench.side.session_sha256} is not on the list of files") as caught,
    ):
        block(agent, bench.side)
    assert caught.value.kind == "not-allowed"


# ------------------------------------------------------------------------------------------------ files


def test_corrupt_object_is_sent_again(bench):
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        (bench.objects / bench.side.artifact_sha256).write_bytes(b"rot")
        assert ship(agent, bench.transport, bench.files) == (bench.side.artifact_sha256,)
        block(agent, bench.side)


@pytest.mark.parametrize("left", [b"", bytes(5000)], ids=["nothing", "zeros"])
def test_a_compiled_runner_that_a_power_cut_left_without_its_bytes_is_compiled_again(bench, left):
    with bench.connect():
        pass
    (compiled,) = (Path(bench.device.root) / "compiled").iterdir()
    whole = compiled.read_bytes()
    compiled.write_bytes(left)
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        assert block(agent, bench.side)
    assert compiled.read_bytes() == whole
    assert [path.name for path in compiled.parent.iterdir()] == [compiled.name]


def test_upload_that_was_cut_off_is_refused_and_deleted(bench):
    class Cut(LocalTransport):
        def put(self, local, remote, *, offset=0):
            super().put(local, remote, offset=offset)
            os.truncate(remote, 10)

    with bench.connect() as agent:
        with pytest.raises(TransferError, match=r"arrived as something else \(10 bytes"):
            ship(agent, Cut("bench"), bench.files)
        assert [path.name for path in bench.objects.iterdir()] == [sha256_file(RUNNER)]


def test_part_names_cannot_leave_the_directory(bench):
    (bench.folder / "victim").write_text("x")
    with bench.connect() as agent, pytest.raises(TransferError, match="not the name of the part of"):
        agent.commit("../../victim", "a" * 64)
    assert (bench.folder / "victim").exists()


def test_full_disk_is_a_sentence_and_leaves_nothing(bench):
    full = bench.folder / "full"
    full.symlink_to("/dev/full")

    class Full(LocalTransport):
        def put(self, local, remote, *, offset=0):
            super().put(local, str(full))

    with bench.connect() as agent, pytest.raises(TransferError, match="the disk there is full"):
        ship(agent, Full("bench"), bench.files)
    assert [path.name for path in bench.objects.iterdir()] == [sha256_file(RUNNER)]


def test_root_is_private_and_old_parts_are_swept(bench):
    bench.objects.mkdir(parents=True)
    old, new = (bench.objects / f"{'a' * 64}.part-{number}" for number in (1, 2))
    old.touch()
    new.touch()
    os.utime(old, (1.0, 1.0))
    with bench.connect():
        assert stat.S_IMODE(Path(bench.device.root).stat().st_mode) == 0o700
        assert not old.exists()
        assert new.exists()


# ------------------------------------------------------------------------------------------------ starting and ending


def test_second_lease_is_refused_with_the_holders_name_until_the_first_ends(bench):
    with (
        bench.connect(),
        pytest.raises(DeviceBusy, match=rf"in use by .*process {os.getpid()}, since"),
        bench.connect(),
    ):
        pass
    with bench.connect():
        pass


@pytest.mark.parametrize("content", [b"", b"print('nonsense')", RUNNER.read_bytes() + b"\n# changed\n"])
def test_runner_that_was_changed_on_the_device_is_replaced(bench, content):
    bench.objects.mkdir(parents=True)
    runner = bench.objects / sha256_file(RUNNER)
    runner.write_bytes(content)
    with bench.connect() as agent:
        assert agent.runner_sha256 == sha256_file(RUNNER)
    assert sorted(bench.objects.iterdir()) == [runner]


def test_device_without_python_is_a_sentence(bench):
    device = msgspec.structs.replace(bench.device, python="python-that-is-not-there")
    with (
        pytest.raises(DeviceError, match=r"has no python-that-is-not-there; install Python 3\.8 or newer"),
        connect(bench.transport, device, device_name="bench"),
    ):
        pass


def test_device_with_an_old_python_is_a_sentence(bench):
    python = bench.folder / "python3.6"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 3 6\n')
    python.chmod(0o755)
    device = msgspec.structs.replace(bench.device, python=str(python))
    with (
        pytest.raises(DeviceError, match=r"Python 3\.6, too old for the runner"),
        connect(bench.transport, device, device_name="bench"),
    ):
        pass


def test_root_that_cannot_be_made_is_a_sentence(bench):
    Path(bench.device.root).write_text("a file")
    with pytest.raises(TransferError, match=r"device 'bench' .*cannot write"), bench.connect():
        pass


@pytest.mark.parametrize(("number", "told"), [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGTERM, "status 143")])
def test_killed_agent_takes_its_visits_along_and_frees_the_device(bench, number, told):
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        started = []

        class Killing(Agent):
            def ask(self, do, **fields):
                if do == "bursts":
                    started.extend(bench.processes())
                    os.kill(*bench.agents(), number)
                return super().ask(do, **fields)

        agent.__class__ = Killing
        with pytest.raises(DeviceUnreachable, match=told) as caught:
            block(agent, bench.side)
        assert "burst" in str(caught.value)
        assert [item.visit.bursts for item in caught.value.measured] == [()]
        assert len(started) == 3  # agent, visit and watchdog
        assert has_ended(started)
    with bench.connect():
        pass


def test_frozen_agent_is_noticed_by_its_silence(bench, monkeypatch):
    monkeypatch.setattr(transport_module, "FAREWELL_S", 0.1)
    device = msgspec.structs.replace(bench.device, timeout_s=3.0)
    with connect(bench.transport, device, device_name="bench") as agent:
        agents = bench.agents()
        os.kill(*agents, signal.SIGSTOP)
        with pytest.raises(DeviceUnreachable, match=r"fell silent during conditions.*3 s"):
            agent.conditions()
    assert has_ended(agents)


def test_nothing_lives_on_when_the_host_is_killed_during_a_burst(bench):
    host = """
        import sys
        from pathlib import Path
        from edgedeploy.lab.bundle import connect, ship
        from edgedeploy.lab.transport import LocalTransport
        from edgedeploy.lab.visits import Schedule, Side, measure_block
        from edgedeploy.records.device import Device
        root, artifact, session, inputs, *paths = sys.argv[1:]
        transport = LocalTransport("bench")
        with connect(transport, Device(transport="local", root=root), device_name="bench") as agent:
            ship(agent, transport, dict(zip((artifact, session, inputs), map(Path, paths))))
            print("hanging", flush=True)
            side = Side("hang", artifact, session, {"hang_after": 1}, inputs)
            measure_block(agent, [side], Schedule(), block=0, seed=0)
    """
    side = bench.side
    digests = [side.artifact_sha256, side.session_sha256, side.inputs_sha256]
    argv = [sys.executable, "-c", textwrap.dedent(host), bench.device.root, *digests]
    argv += [str(bench.files[digest]) for digest in digests]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
    assert process.stdout is not None
    assert process.stdout.readline() == b"hanging\n"
    deadline_s = time.monotonic() + 20
    while not bench.visits() and time.monotonic() < deadline_s:
        select.select([], [], [], 0.01)
    started = bench.agents() + bench.visits() + bench.watchdogs()
    assert len(started) == 3
    process.kill()
    process.wait()
    process.stdout.close()
    assert has_ended(started)


def test_agent_gives_the_device_back_when_its_host_is_silent_for_too_long(bench):
    argv = [
        sys.executable,
        str(RUNNER),
        "agent",
        "--root",
        bench.device.root,
        "--lease-s",
        "0.2",
        "--lease-dir",
        bench.device.root,
    ]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
        assert agent.wait(timeout=20) == 0
    with bench.connect():
        pass


def test_command_that_does_not_end_is_killed_with_what_it_started(bench):
    with pytest.raises(DeviceUnreachable, match=r"sh did not end within 0\.2 s"):
        bench.transport.run(["sh", "-c", f"sleep 1000 # {bench.device.root}"], timeout_s=0.2)
    assert has_ended(bench.processes())


def test_command_is_run_without_a_shell(bench):
    done = bench.transport.run([sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b; $HOME"], timeout_s=20)
    assert (done.status, done.stdout) == (0, b"['a b; $HOME']\n")
