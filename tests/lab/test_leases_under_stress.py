"""Who has a device, with real agents on this machine: queues, holders that thaw, fall silent or are killed every way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgedeploy.errors import DeviceUnreachable, LeaseLost
from edgedeploy.lab import bundle, leases
from edgedeploy.lab.bundle import RUNNER
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import LocalTransport
from tests.spine.leasing import GOVERNOR, Bench, becomes, bench_in, start_visit


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from bench_in(tmp_path)


@pytest.fixture
def short_leases(monkeypatch) -> None:
    monkeypatch.setattr(bundle, "LEASE_S", 1.0)


def test_agents_in_a_queue_have_the_device_one_after_another_in_their_order(bench):
    order, inside, waiting = [], [], []

    def work(number: int) -> None:
        said = threading.Event()

        def progress(text: str) -> None:
            waiting.append((number, text))

        with bench.connect(root=str(bench.folder / f"root{number}"), wait_s=60, progress=progress):
            inside.append(number)
            order.append((number, list(inside), bench.governor))
            said.wait(0.05)
            inside.remove(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    with bench.connect():
        for number, worker in enumerate(workers):
            worker.start()
            assert becomes(lambda number=number: len(bench.lease().queue) == number + 1)
        assert becomes(lambda: any("(4th of 4 in the queue)" in text for _, text in waiting))
    for worker in workers:
        worker.join(60)
    assert order == [(number, [number], "performance") for number in range(4)]
    assert f"process {os.getpid()}, since" in waiting[0][1]
    assert bench.governor == "ondemand"
    assert bench.lease().state == "free"


def test_host_that_waits_no_more_leaves_the_queue(bench):
    argv = [sys.executable, str(RUNNER), "agent", "--root", str(bench.folder / "r"), "--wait-s", "60",
            "--lease-dir", bench.device.lease_dir]  # fmt: skip
    with bench.connect():
        waiter = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert json.loads(waiter.stdout.readline())["event"] == "waiting"
        waiter.stdin.close()
        assert waiter.wait(timeout=20) == 0
        waiter.stdout.close()
        assert bench.lease().queue == ()


def test_holder_that_thaws_too_late_can_do_nothing_and_disturbs_nobody(bench, short_leases):
    with bench.connect() as agent:
        start_visit(bench, agent)
        frozen = bench.send("watchdog", signal.SIGSTOP) + bench.send("agent", signal.SIGSTOP)
        with bench.connect(root=str(bench.folder / "other"), governor="powersave", wait_s=30) as second:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)
            with pytest.raises(LeaseLost, match=r"went to .*process \d+"):
                agent.commit("x", "a" * 64)
            with pytest.raises(LeaseLost):
                agent.ask("clean", unused_s=3600, now_s=0.0)
            assert becomes(lambda: bench.processes("visit") == bench.processes("import time") == [])
            assert becomes(lambda: frozen[0] not in bench.processes("watchdog"))
            assert bench.governor == "powersave"
            second.conditions()
    # Who came second found "performance", and leaves it so; the first one's next agent undoes what is its own.
    assert bench.governor == "performance"
    with bench.connect(governor=""):
        assert bench.governor == "ondemand"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_agent_that_is_killed_leaves_the_device_as_it_was(bench, number):
    with bench.connect() as agent:
        start_visit(bench, agent)
        assert bench.governor == "performance"
        bench.send("agent", number)
        with bench.connect(root=str(bench.folder / "other"), governor=""):  # not before all is undone
            assert bench.governor == "ondemand"
            assert len(bench.processes("watchdog")) == 1
            assert bench.processes("visit") == bench.processes("import time") == []
    assert becomes(lambda: bench.processes() == [])


def test_host_that_is_silent_gives_the_device_back_restored(bench, monkeypatch):
    monkeypatch.setattr(bundle, "LEASE_S", 5.0)  # a visit is opened within it also on a busy machine
    monkeypatch.setattr(Agent, "_renew", lambda self, period_s: None)
    with bench.connect() as agent:
        start_visit(bench, agent)
        assert becomes(lambda: bench.lease().state == "free")
        assert bench.governor == "ondemand"
        assert becomes(lambda: bench.processes() == [])
        with pytest.raises(DeviceUnreachable):
            agent.conditions()


def test_host_that_is_heard_keeps_the_device_beyond_its_lease(bench, monkeypatch):
    monkeypatch.setattr(bundle, "LEASE_S", 0.4)
    with bench.connect() as agent:
        deadline_s = time.monotonic() + 1.5
        while time.monotonic() < deadline_s:
            assert bench.lease().state == "held"
        agent.conditions()


def test_watchdog_that_is_killed_is_replaced(bench, short_leases):
    with bench.connect() as agent:
        start_visit(bench, agent)
        killed = bench.send("watchdog", signal.SIGKILL)
        assert becomes(lambda: bench.processes("watchdog") not in ([], killed))
        bench.send("agent", signal.SIGKILL)
        assert becomes(lambda: bench.processes() == [])
        assert bench.governor == "ondemand"


def test_what_nobody_was_left_to_undo_is_undone_by_the_next_agent(bench):
    with bench.connect():
        bench.send("watchdog", signal.SIGKILL)
        bench.send("agent", signal.SIGKILL)
        assert becomes(lambda: bench.processes() == [])
    assert bench.governor == "performance"
    with bench.connect(governor=""):
        assert bench.governor == "ondemand"
    assert not (bench.folder / "root" / "restore.json").exists()


def test_what_somebody_has_changed_since_is_not_undone(bench):
    with bench.connect():
        bench.send("watchdog", signal.SIGKILL)
        bench.send("agent", signal.SIGKILL)
        assert becomes(lambda: bench.processes() == [])
    (bench.folder / "board" / GOVERNOR).write_text("powersave\n")
    with bench.connect(governor=""):
        assert bench.governor == "powersave"


def test_release_of_one_that_has_a_command_running_ends_it_with_the_reason(bench):
    with bench.connect() as agent:
        lease = bench.lease()
        forcing = threading.Thread(target=leases.release, args=(LocalTransport("bench"), bench.device, lease.token))
        forcing.start()
        started_s = time.monotonic()
        with pytest.raises(LeaseLost, match="cool failed: the device was taken"):
            (bench.folder / "board/sys/class/thermal/thermal_zone0").mkdir(parents=True)
            (bench.folder / "board/sys/class/thermal/thermal_zone0/temp").write_text("90000")
            agent.ask("cool", below_celsius=50, cap_s=60)
        assert time.monotonic() - started_s < 30
        forcing.join(30)
