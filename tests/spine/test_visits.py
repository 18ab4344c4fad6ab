"""The order of a block's bursts and visits, and when a visit's number does not count. No process is started here."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedeploy.errors import DeviceUnreachable, VisitFailed
from edgedeploy.lab.visits import Schedule, Side, load_of_others, mark, measure_block
from edgedeploy.records.run import Conditions, Visit
from edgedeploy.records.target import ConditionLimits

A, B = (Side(name, name * 64, "5" * 64, {}, "1" * 64) for name in "ab")
OPENED = {
    "runtime": "r", "load_s": 0.1, "first_inference_ns": 5, "warm_up_ns": [4, 3], "is_steady": True,
    "boundary": {"threads": 1, "includes_input_copy": False, "includes_output_copy": False, "detail": "", "batch": 1},
}  # fmt: skip


class ScriptedAgent:
    """An agent that answers at once and writes down what it was asked: "open a", "burst b" ..."""

    label = "device 'board'"

    def __init__(self, fail_at: str = "", error: Exception | None = None, fail_after: int = 0) -> None:
        self.asked: list[str] = []
        self.fail_after = fail_after
        self.fail_at, self.error = fail_at, error

    def ask(self, do, *, visit="", **fields):
        steps = [f"burst {name[:1]}" for name in fields["visits"]] if do == "bursts" else [f"{do} {visit[:1]}"]
        for step in steps:
            self.asked.append(step)
            if self.error is not None and step == self.fail_at and self.asked.count(step) > self.fail_after:
                raise self.error
        return OPENED if do == "open" else {"samples_ns": [[7] * fields.get("count", 0) for _ in steps]}

    def cool(self):
        return None

    def conditions(self, visits=()):
        now = Conditions(monotonic_s=float(len(self.asked)), busy_core_s=2.0 * len(self.asked))
        return {"": now, **{visit: msgspec.structs.replace(now, own_core_s=1.0) for visit in visits}}

    def order(self, do: str) -> str:
        return "".join(step[-1] for step in self.asked if step.startswith(do))


def measure(agent, *sides, block=0, seed=0, **changes):
    return measure_block(agent, sides, replace(Schedule(), **changes), block=block, seed=seed)


@given(seed=st.integers(), block=st.integers(0, 50), bursts=st.integers(1, 9))
def test_bursts_alternate_in_abba_or_baab_order(seed, block, bursts):
    agent = ScriptedAgent()
    measure(agent, A, B, block=block, seed=seed, bursts_per_visit=bursts)
    order = agent.order("burst")
    pairs = [order[start : start + 2] for start in range(0, 2 * bursts, 2)]
    assert set(pairs) <= {"ab", "ba"}
    for first, second in zip(pairs[::2], pairs[1::2], strict=False):
        assert first == second[::-1]


@given(seed=st.integers(), turn=st.integers(0, 50))
def test_whole_visits_alternate_over_two_blocks(seed, turn):
    agent = ScriptedAgent()
    for block in (2 * turn, 2 * turn + 1):
        measure(agent, A, B, block=block, seed=seed, interleave="visits")
    assert agent.order("open") in ("abba", "baab")


def test_both_orders_occur():
    agent = ScriptedAgent()
    for block in range(20):
        measure(agent, A, B, block=block)
    pairs = [agent.order("burst")[start : start + 4] for start in range(0, 20 * 16, 4)]
    assert set(pairs) == {"abba", "baab"}


def test_interleaved_bursts_keep_both_processes_alive():
    agent = ScriptedAgent()
    measure(agent, A, B, bursts_per_visit=2)
    assert [step.split()[0] for step in agent.asked] == ["open"] * 2 + ["burst"] * 4 + ["close"] * 2


def test_interleaved_visits_keep_one_process_alive():
    agent = ScriptedAgent()
    measure(agent, A, B, bursts_per_visit=2, interleave="visits")
    assert [step.split()[0] for step in agent.asked] == ["open", "burst", "burst", "close"] * 2


@given(seed=st.integers(), block=st.integers(0, 9), interleave=st.sampled_from(["bursts", "visits"]))
def test_records_come_back_in_the_order_of_the_sides_with_paired_bursts(seed, block, interleave):
    measured = measure(ScriptedAgent(), A, B, block=block, seed=seed, interleave=interleave)
    assert [item.side.cell for item in measured] == ["a", "b"]
    assert {item.visit.position for item in measured} == {0, 1}
    for item in measured:
        assert item.visit.block == block
        assert [burst.pair for burst in item.visit.bursts] == list(range(8))
        assert item.visit.bursts[0].samples_s == (7e-9,) * 10


def test_failed_visit_keeps_the_bursts_so_far_and_closes_the_other():
    agent = ScriptedAgent("burst b", VisitFailed("b died\nlast line", kind="died"), fail_after=12)
    with pytest.raises(VisitFailed) as caught:
        measure(agent, A, B, bursts_per_visit=20)
    kept = {item.side.cell: item.visit for item in caught.value.measured}
    assert {visit.dropped for visit in kept.values()} == {"b died"}
    assert len(kept["a"].bursts) == len(kept["b"].bursts) == 10  # what the device had answered by then
    assert "close a" in agent.asked


def test_failed_second_visit_drops_the_finished_first_of_its_block():
    failing = (
        "a" if measure(agent := ScriptedAgent(), A, B, interleave="visits") and agent.order("open") == "ba" else "b"
    )
    with pytest.raises(VisitFailed) as caught:
        measure(ScriptedAgent(f"open {failing}", VisitFailed("no")), A, B, interleave="visits")
    (kept,) = caught.value.measured
    assert kept.side.cell != failing
    assert len(kept.visit.bursts) == 8
    assert kept.visit.dropped == "no"


def test_lost_device_keeps_its_error_class_and_what_was_measured():
    with pytest.raises(DeviceUnreachable) as caught:
        measure(ScriptedAgent("close a", DeviceUnreachable("gone")), A)
    assert [len(item.visit.bursts) for item in caught.value.measured] == [8]


def at(time_s: float, busy: float | None = None, own: float | None = None, **more) -> Conditions:
    return Conditions(monotonic_s=time_s, busy_core_s=busy, own_core_s=own, **more)


def test_load_of_others_is_what_remains_of_the_busy_time():
    assert load_of_others(at(10, 100), [at(12, 105, 1), at(12, 105, 2)]) == pytest.approx(1.0)


def test_load_of_others_is_never_negative():
    assert load_of_others(at(10, 100), [at(11, 100.9, 0.95)]) == 0.0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (at(10, None), at(12, 105, 1)),
        (at(10, 100), at(12, None, 1)),
        (at(10, 100), at(12, 105, None)),
        (at(10, 100), at(10.1, 105, 0)),
    ],
)
def test_load_of_others_is_not_available_without_its_parts_or_in_too_short_a_time(before, after):
    assert load_of_others(before, [after]) is None


def visit(**changes) -> Visit:
    plain = Visit(
        block=0, position=0, load_s=1.0, first_inference_s=1.0, warm_up_samples_s=(), is_steady=True, bursts=(),
        before=at(0), after=at(1),
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"foreign_load": 0.5}, ""),
        ({"foreign_load": 0.75}, "other processes used more than 0.5 cores"),
        ({"before": at(0, throttled=True)}, "the device was throttled"),
        ({"after": at(0, throttled=True), "before": at(0, throttled=False)}, "the device was throttled"),
        ({"after": at(0, temperatures_celsius={"cpu": 80.0, "gpu": 81.5})}, "gpu was hotter than 80 °C"),
        ({"before": at(0, temperatures_celsius={"cpu": 90.0}), "after": at(0, temperatures_celsius={"cpu": 60.0})},
         "cpu was hotter than 80 °C"),
        ({"after": at(0, temperatures_celsius={"cpu": 60.0})}, ""),
        ({"dropped": "it died", "foreign_load": 1.0}, "it died; other processes used more than 0.5 cores"),
    ],
)  # fmt: skip
def test_visit_is_dropped_for_what_disturbed_it(changes, reason):
    assert mark(visit(**changes), ConditionLimits()).dropped == reason


def test_slow_block_ends_at_its_cap_once_the_95th_percentile_is_supported():
    (measured,) = measure(ScriptedAgent(), A, bursts_per_visit=160, samples_per_burst=1, bursts_cap_s=-1.0)
    assert len(measured.visit.bursts) == 60
