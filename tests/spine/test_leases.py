"""Who has a device, with real agents on this machine: frozen and killed holders, release by force, and the commands.

The slower half of these is in tests/lab/test_leases_under_stress.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgedeploy import cli
from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable, LeaseLost
from edgedeploy.lab import bundle, leases
from edgedeploy.lab.bundle import RUNNER
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.records.device import Device

from .leasing import Bench, becomes, bench_in, start_visit


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from bench_in(tmp_path)


@pytest.fixture
def short_leases(monkeypatch) -> None:
    monkeypatch.setattr(bundle, "LEASE_S", 1.0)


def test_busy_device_is_named_with_its_holder_and_what_to_do(bench):
    with bench.connect():
        with pytest.raises(
            DeviceBusy, match=rf"in use by .*process {os.getpid()}.*ends in \d+ s.*devices release bench"
        ):
            bench.connect(root=str(bench.folder / "other")).__enter__()
        started_s = time.monotonic()
        with pytest.raises(DeviceBusy):
            bench.connect(wait_s=0.6).__enter__()
        assert time.monotonic() - started_s > 0.6


# A person's own may lie in a folder that is closed to others.
PYTHON_OF_ALL = shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin")


@pytest.mark.skipif(os.geteuid() != 0, reason="two users are needed; only root can be both")
@pytest.mark.skipif(PYTHON_OF_ALL is None, reason="no Python here that every user may run")
def test_two_users_share_one_lease():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to others
        Path(folder).chmod(0o755)
        runner = Path(shutil.copy(RUNNER, folder))
        nobody = Path(folder) / "nobody"
        nobody.mkdir()
        os.chown(nobody, 65534, 65534)
        lease_dir = Path(folder) / "lease"

        def agent(root: Path, **options) -> subprocess.Popen[bytes]:
            argv = [PYTHON_OF_ALL, str(runner), "agent", "--root", str(root), "--holder", root.name]
            argv += ["--lease-dir", str(lease_dir)]
            return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", **options)

        def first_words(process: subprocess.Popen[bytes]) -> dict[str, object]:
            return json.loads(process.stdout.readline())

        mine = agent(Path(folder) / "root")
        assert first_words(mine)["lease"]["token"] == 1
        theirs = agent(nobody, user=65534, group=65534)
        assert (first_words(theirs)["event"], theirs.wait(20)) == ("busy", 1)
        theirs.communicate()
        mine.communicate()
        theirs = agent(nobody, user=65534, group=65534)
        assert first_words(theirs)["lease"]["token"] == 2
        mine = agent(Path(folder) / "root")
        assert first_words(mine)["holder"] == "nobody"
        theirs.communicate()
        mine.communicate()


# ------------------------------------------------------------------------------------------------ holders that fail


def test_frozen_holder_loses_the_device_and_all_that_it_started(bench, short_leases):
    with bench.connect() as agent:
        start_visit(bench, agent)
        bench.send("agent", signal.SIGSTOP)
        with bench.connect(root=str(bench.folder / "other"), governor="", wait_s=30) as second:
            assert bench.governor == "ondemand"
            assert len(bench.processes("agent")) == 1
            assert bench.processes("visit") == bench.processes("import time") == []
            with pytest.raises(DeviceUnreachable, match="SIGKILL"):
                agent.conditions()
            second.conditions()


def test_host_that_is_killed_leaves_the_device_as_it_was(bench):
    host = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from tests.spine.leasing import Bench, Board, Device, start_visit
        folder = Path(sys.argv[2])
        device = Device(transport="local", root=str(folder / "root"), lease_dir=str(folder / "lease"))
        bench = Bench(folder, device, Board("bench", str(folder / "board")))
        with bench.connect() as agent:
            start_visit(bench, agent)
            print("there", flush=True)
            sys.stdin.read()
    """
    argv = [sys.executable, "-c", textwrap.dedent(host), str(Path(__file__).parents[2]), str(bench.folder)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"there\n"
    assert bench.governor == "performance"
    process.kill()
    process.communicate()
    assert becomes(lambda: bench.processes() == [])
    assert bench.governor == "ondemand"
    assert bench.lease().state == "free"


# ------------------------------------------------------------------------------------------------ by force


def test_device_taken_by_force_is_restored_and_its_holder_told(bench):
    with bench.connect() as agent:
        start_visit(bench, agent)
        found = bench.lease()
        assert (found.state, found.visits) == ("held", ("dense block 3",))
        with pytest.raises(DeviceBusy, match="its holder has changed meanwhile"):
            leases.release(LocalTransport("bench"), bench.device, found.token - 1)
        released = leases.release(LocalTransport("bench"), bench.device, found.token)
        assert (released.released, released.has_ended, released.state) == (True, True, "free")
        assert bench.governor == "ondemand"
        assert bench.processes("visit") == bench.processes("import time") == []
        with pytest.raises(LeaseLost, match=rf"open in visit 'x'.*by force, by .*process {os.getpid()}"):
            agent.ask("open", visit="x", job={}, timeout_s=1)


# ------------------------------------------------------------------------------------------------ the commands


@pytest.fixture
def lab(bench, monkeypatch) -> Path:
    lab = bench.folder / "lab.toml"
    lab.write_text(
        f'format = "edgedeploy.lab/1"\n[devices.bench]\ntransport = "local"\ntarget = "desk"\nroot = "{bench.device.root}"\n'
        f'lease_dir = "{bench.device.lease_dir}"\n'
    )
    monkeypatch.setenv("EDGEDEPLOY_LAB", str(lab))
    return lab


@pytest.fixture
def call(lab, capsys):
    """Run a command; return its exit code, what it printed and what it said."""

    def run(*words: str) -> tuple[int, str, str]:
        return cli.run(["devices", *words]), *capsys.readouterr()

    return run


@pytest.fixture
def listed(call):
    def run(*words: str) -> dict[str, dict[str, object]]:
        return {one["name"]: one for one in json.loads(call("list", "--json", *words)[1])["devices"]}

    return run


def test_list_says_who_has_what_and_offline_reaches_nothing(bench, call, listed):
    assert listed()["bench"]["state"] == "free"
    assert "held by" not in call("list")[1]
    with bench.connect():
        found = listed()["bench"]
        assert (found["state"], found["problem"]) == ("held", "")
        assert f"process {os.getpid()}" in found["holder"]
        assert "held by" in call("list")[1]
        assert "state" not in listed("--offline")["bench"]
    assert bench.processes() == []


def test_list_says_why_a_device_is_not_reached(lab, listed):
    lab.write_text(lab.read_text() + '[devices.gone]\ntransport = "local"\npython = "no-such-python"\n')
    gone = listed()["gone"]
    assert gone["state"] == "unreachable"
    assert "no-such-python" in gone["problem"]


def test_release_refuses_without_force_and_says_what_would_break(bench, call):
    assert call("release", "bench")[0] == 0  # free
    with bench.connect() as agent:
        start_visit(bench, agent)
        status, _, said = call("release", "bench")
        assert status == 3
        assert re.search(r"held by .* for \d+ s and runs dense block 3; that session would fail", said)
        agent.conditions()
        status, _, said = call("release", "bench", "--force", "--yes")
        assert status == 0
        assert "what ran there has ended, and what was set there is as it was" in said
        with pytest.raises(LeaseLost):
            agent.conditions()


def test_many_devices_are_asked_at_once_and_the_silent_ones_do_not_hold_the_others_up():
    hanging = threading.Event()
    together = threading.Barrier(20)
    free = leases.Lease(token=1, state="free", holder="", held_s=0, expires_s=0, visits=(), queue=())

    def ask(name: str, device: Device) -> leases.Lease:
        if name.startswith("silent"):
            hanging.wait()
        if name.startswith("broken"):
            raise DeviceError("it has no Python\nand more")
        if name.startswith("first"):
            together.wait(30)
        return free

    names = ["silent", *(f"first {number}" for number in range(20)), *(f"broken {number}" for number in range(50))]
    found = leases.survey({name: Device(transport="local") for name in names}, ask, limit_s=2.0)
    hanging.set()
    assert list(found) == names
    assert found["silent"] == leases.Survey(None, "no answer within 2 s")
    assert found["broken 49"] == leases.Survey(None, "it has no Python")
    assert found["first 3"] == leases.Survey(free)
