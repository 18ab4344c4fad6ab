"""The lease on a device: one holder at a time, in the order of asking, whatever holders and files do."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.ondevice import runner
from edgedeploy.ondevice.runner import Lease, LeaseLost, Refusal

PROCESSES = multiprocessing.get_context("fork")


class Clock:
    """The boot clock, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(runner, "boot_clock_s", clock)
    return clock


@pytest.fixture
def path(tmp_path) -> str:
    return runner.lease_path(str(tmp_path / "lease"))


def taken(path: str, who: str = "ada", seconds: float = 60.0) -> Lease:
    lease = Lease(path)
    assert lease.take(who, seconds) is None
    return lease


def other(path: str) -> Lease:
    """Return the lease as another process on the device has it."""
    lease = Lease(path)
    lease.pid, lease.start = 1, runner.started_at(1)
    return lease


def test_second_is_told_who_has_it_and_until_when(path, clock):
    ada = taken(path)
    busy = other(path).take("bob", 60.0)
    assert (busy["holder"], busy["expires_s"], busy["state"]) == ("ada", 60.0, "held")
    ada.give_back()
    bob = other(path)
    assert bob.take("bob", 60.0) is None
    assert bob.token == ada.token + 1


def test_who_does_not_renew_loses_it_at_expiry_and_is_fenced(path, clock):
    ada = taken(path)
    clock.now_s += 59.0
    ada.renew()
    clock.now_s += 59.0
    assert other(path).take("bob", 60.0)["state"] == "held"
    clock.now_s += 2.0
    assert other(path).take("bob", 60.0) is None
    for step in (ada.check, ada.renew):
        with pytest.raises(LeaseLost, match=r"not heard of for more than 60 s.*went to bob"):
            step()
    ada.give_back()  # not hers to give
    assert Lease(path).state()["holder"] == "bob"


def test_renewing_late_is_fine_while_nobody_else_came(path, clock):
    ada = taken(path)
    clock.now_s += 600.0
    ada.renew()
    assert Lease(path).state()["expires_s"] == 60.0


def test_clock_on_the_wall_does_not_matter(path, monkeypatch):
    def jumps():
        raise AssertionError("the lease looks at the clock that anybody can set")

    monkeypatch.setattr(runner.time, "time", jumps)
    ada = taken(path)
    ada.renew()
    assert other(path).take("bob", 60.0)["holder"] == "ada"
    assert 0 < Lease(path).state()["expires_s"] <= 60.0


def test_force_fences_the_holder_and_names_who_did_it(path):
    ada = taken(path)
    assert Lease(path).fence(ada.token + 1, "bob@desk") is None  # another holder than the one that was looked at
    ada.check()
    assert Lease(path).fence(ada.token, "bob@desk")["who"] == "ada"
    with pytest.raises(LeaseLost, match="taken from this session by force, by bob@desk"):
        ada.check()


def test_force_says_when_nobody_could_end_what_the_holder_runs(path, monkeypatch):
    monkeypatch.setattr(runner, "WATCH_S", 0.0)
    monkeypatch.setattr(runner, "ENDING_S", 0.1)
    ada = taken(path)
    with ada.guarded() as record:
        record["holder"].update(space="another container")
    lease = Lease(path)
    assert runner.release_by_force(lease, ada.token, "bob") == {"released": True, "has_ended": False}
    assert lease.state()["token"] == ada.token + 1
    assert runner.release_by_force(lease, ada.token, "bob") == {"released": False, "has_ended": False}


def test_process_that_is_no_agent_is_never_killed_however_the_record_calls_it(path, monkeypatch):
    monkeypatch.setattr(runner, "WATCH_S", 0.0)
    monkeypatch.setattr(runner, "ENDING_S", 0.05)
    monkeypatch.setattr(runner.os, "kill", lambda pid, number: pytest.fail("a stranger was killed"))
    ada = taken(path)  # this process: pytest
    assert runner.release_by_force(Lease(path), ada.token, "bob")["has_ended"] is False


def test_holder_that_is_dead_frees_the_device_at_once(path):
    holder = PROCESSES.Process(target=taken, args=(path,))
    holder.start()
    holder.join()
    assert Lease(path).state()["state"] == "free"
    taken(path, "bob")


def test_process_with_the_number_of_a_dead_holder_is_not_the_holder(path, monkeypatch):
    ada = taken(path)
    with Lease(path).guarded() as record:
        record["holder"]["start"] -= 1
    assert Lease(path).state()["state"] == "free"
    with pytest.raises(LeaseLost):
        ada.check()


def test_holder_of_another_container_is_believed_until_its_expiry(path, clock):
    taken(path)
    with Lease(path).guarded() as record:
        record["holder"].update(space="pid:[1]", pid=2**22 + 1, start=0)
    assert other(path).take("bob", 60.0)["state"] == "held"
    clock.now_s += 60.0 + runner.RESTORE_S
    assert other(path).take("bob", 60.0) is None


def test_device_is_not_free_while_a_watchdog_undoes_what_was_set(path, clock):
    lease = Lease(path)
    lease.watchdog = [1, runner.started_at(1)]  # alive
    assert lease.take("ada", 60.0) is None
    with lease.guarded() as record:
        record["holder"]["start"] -= 1  # the agent is dead
    assert other(path).take("bob", 60.0)["state"] == "ending"
    clock.now_s += 60.0 + 16.0  # but not for ever
    assert other(path).take("bob", 60.0) is None


def test_lease_ends_with_a_reboot(path):
    ada = taken(path)
    rebooted = Lease(path)
    rebooted.boot_id = "another"
    assert rebooted.state()["state"] == "free"
    assert rebooted.take("bob", 60.0) is None
    assert rebooted.token > ada.token


def test_deleted_file_is_written_again_by_its_holder(path):
    ada = taken(path)
    Path(path).unlink()
    ada.check()
    ada.renew()
    assert other(path).take("bob", 60.0)["holder"] == "ada"


# ------------------------------------------------------------------------------------------------ the queue


def test_waiters_come_in_the_order_of_asking(path):
    ada, bob, eve = taken(path), other(path), other(path)
    first, second = bob.queue_up("bob"), eve.queue_up("eve")
    places = [eve.take("eve", 60.0, second)[key] for key in ("position", "of")]
    assert places == [2, 2]
    ada.give_back()
    assert other(path).take("mallory", 60.0)["holder"] == "bob, who is first in the queue"
    assert eve.take("eve", 60.0, second)["state"] == "queue"
    assert bob.take("bob", 60.0, first) is None
    assert Lease(path).state()["queue"] == ["eve"]


def test_waiter_that_is_dead_or_frozen_is_passed_over(path, clock):
    ada = taken(path)

    def wait() -> None:
        Lease(path).queue_up("dead")

    process = PROCESSES.Process(target=wait)
    process.start()
    process.join()
    frozen, eve = other(path).queue_up("frozen"), other(path)
    clock.now_s += runner.WAITER_SILENT_S + 1
    ticket = eve.queue_up("eve")
    ada.give_back()
    assert not eve.has_ticket(frozen)
    assert eve.take("eve", 60.0, ticket) is None


def test_queue_has_an_end(path):
    taken(path)
    for number in range(runner.MOST_WAITING):
        other(path).queue_up(f"{number} " + "ü" * 100)
    with pytest.raises(Refusal, match="12 others wait for the device"):
        other(path).queue_up("one more")
    assert len(Path(path).read_bytes()) <= runner.LEASE_BYTES


def _hold_often(path: str, marker: str, rounds: int, said) -> None:
    """Take the device again and again; say when somebody else has it too."""
    for _ in range(rounds):
        lease, ticket = Lease(path), None
        while lease.take("somebody", 60.0, ticket) is not None:
            ticket = lease.queue_up("somebody") if ticket is None else ticket
            time.sleep(0.0005)
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            said.put("two holders")
        else:
            time.sleep(0.0005)
            Path(marker).unlink()
        said.put(lease.token)
        lease.give_back()


def test_there_are_never_two_holders_and_every_holder_has_a_token_of_its_own(path, tmp_path):
    said = PROCESSES.SimpleQueue()
    racers = [PROCESSES.Process(target=_hold_often, args=(path, str(tmp_path / "held"), 8, said)) for _ in range(8)]
    for racer in racers:
        racer.start()
    tokens = [said.get() for _ in range(8 * 8)]
    for racer in racers:
        racer.join()
    assert tokens == sorted(set(tokens))  # told while it was held, hence in order


def test_holder_that_is_killed_while_it_writes_leaves_a_whole_record(path):
    def scribble() -> None:
        lease = taken(path)
        while True:
            lease.renew()

    taken(path).give_back()
    for _ in range(10):
        holder = PROCESSES.Process(target=scribble)
        holder.start()
        deadline_s = time.monotonic() + 10
        while Lease(path).state()["state"] == "free" and time.monotonic() < deadline_s:
            time.sleep(0.001)
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        assert json.loads(Path(path).read_bytes())["token"] > 0
    assert Lease(path).state()["token"] == 11


# ------------------------------------------------------------------------------------------------ the file


def test_everybody_may_write_the_file_and_nobody_else_may_delete_it(tmp_path):
    umask = os.umask(0o077)
    try:
        path = Path(runner.lease_path(str(tmp_path / "new")))
        taken(str(path))
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o1777


def test_place_is_one_that_every_user_may_write(tmp_path, monkeypatch):
    private, gone, shared = tmp_path / "private", tmp_path / "gone", tmp_path / "shared"
    private.mkdir(mode=0o755)
    shared.mkdir()
    monkeypatch.setattr(runner, "LEASE_PLACES", (str(private), str(gone), str(shared)))
    with pytest.raises(Refusal, match=r"none of .*lease_dir"):
        runner.lease_path()
    shared.chmod(0o1777)
    assert runner.lease_path() == str(shared / "edgedeploy.lease")


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc/hostname"), os.mkfifo, os.mkdir])
def test_what_is_not_a_file_of_ours_is_refused(path, make):
    make(Path(path))
    with pytest.raises(Refusal, match="delete it"):
        taken(path)


def test_lock_that_is_never_given_back_is_a_sentence(path, monkeypatch):
    monkeypatch.setattr(runner, "LEASE_LOCK_S", 0.02)
    with Lease(path).guarded(), pytest.raises(Refusal, match=r"has kept .* locked .*fuser"):
        taken(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["token", "tickets", "boot_id", "holder", "queue", "fence", *runner.HOLDER_FIELDS]), inner, max_size=8
    ),
    max_leaves=12,
)  # fmt: skip
HOLDER = {"who": "x", "pid": 1, "start": 1, "space": "", "watchdog": [1, 2], "since_s": 0, "expires_s": 0.0, "grace_s": 1,
          "is_ending": False, "visits": []}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=60)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(list(HOLDER)), json_values, max_size=3).map(
        lambda changes: json.dumps(
            {"token": 1, "tickets": 1, "boot_id": "b", "queue": [], "fence": None, "holder": {**HOLDER, **changes}}
        ).encode()
    )
)
def test_whatever_somebody_writes_into_the_file_the_record_is_one(data):
    record = runner.parse_lease(data, "b")
    holder = record["holder"]
    assert holder is None or (holder["pid"] > 0 and isinstance(holder["who"], str))
    Lease("/nowhere").hindrance(holder)
    assert json.loads(json.dumps(record)) is not None
