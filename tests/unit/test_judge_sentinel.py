"""The sentinel: what is a change of the board, what is its noise, and how often nothing is called a change."""

import math
import random

import pytest
from msgspec.structs import replace

from edgedeploy.judge.sentinel import FALSE_ALARMS, LEAST_SESSIONS, ends_of, judge_sentinel, reading_of, series_before
from edgedeploy.records.passport import Passport, SentinelReading

from .judge_samples import make_visit, run_of


def reading(number: int, start_s: float = 0.001, end_s: float = 0.001, **changes) -> SentinelReading:
    plain = SentinelReading(
        session=f"s{number:03}", started_utc=f"2026-11-22T{number // 60:02}:{number % 60:02}:00Z", device="board",
        cpu_model="core", boot_id="b", backend="onnxruntime", artifact_sha256="5e" * 32, runtime="ort 1",
        start_s=start_s, end_s=end_s,
    )  # fmt: skip
    return replace(plain, **changes)


def quiet(count: int = 10, spread: float = 0.005, seed: int = 1) -> list[SentinelReading]:
    random_ = random.Random(seed)
    return [reading(number, *(0.001 * math.exp(random_.gauss(0, spread)) for _ in range(2))) for number in range(count)]


def passport(cv: float) -> Passport:
    return Passport(
        device="board", started_utc="2026-11-22T00:00:00Z", cpu_model="core", boot_id="b", artifact="sentinel",
        artifact_sha256="5e" * 32, backend="onnxruntime", runtime="ort 1", schedule="", error_rate=0.05, power=0.8,
        level_s=0.001, seconds=60.0, seconds_per_block=3.0, setup_s=5.0, blocks=20, run_to_run_cv=cv, block_spread=cv,
        effect=0.0, low=-0.01, high=0.01, runs=("a", "b"), edgedeploy="0",
    )  # fmt: skip


def test_board_that_slowed_down_in_the_session_is_named():
    found = judge_sentinel(reading(20, 0.001, 0.00125), quiet())
    assert found.board_changed
    assert found.statement.startswith("the board changed, not the model, in this session on board")
    assert found.change_within == pytest.approx(0.25)
    assert found.sessions == 10


def test_board_that_is_slower_than_in_earlier_sessions_is_named():
    found = judge_sentinel(reading(20, 0.0013, 0.0013), quiet())
    assert found.board_changed
    assert "since the sessions before this one" in found.statement
    assert found.change_from_before == pytest.approx(0.3, abs=0.01)


def test_board_that_always_warms_up_in_a_session_does_not_change_by_it():
    warm = [reading(number, 0.001, 0.0011 * (1 + 0.002 * (number % 3))) for number in range(12)]
    assert not judge_sentinel(reading(20, 0.001, 0.0011), warm).board_changed
    assert judge_sentinel(reading(20, 0.001, 0.001), warm).board_changed


def test_small_change_of_a_very_quiet_board_is_no_alarm():
    silent = [reading(number, 0.001, 0.001) for number in range(10)]
    assert not judge_sentinel(reading(20, 0.001, 0.001008), silent).board_changed
    assert judge_sentinel(reading(20, 0.001, 0.00102), silent).board_changed


def test_without_earlier_sessions_the_passport_tells_the_noise_within_one():
    assert judge_sentinel(reading(20, 0.001, 0.0012), [], passport(0.01)).board_changed
    noisy = judge_sentinel(reading(20, 0.001, 0.0012), [], passport(0.10))
    assert not noisy.board_changed
    assert noisy.change_from_before is None
    assert "within the device's noise" in noisy.statement


def test_nothing_is_claimed_where_nothing_is_known():
    found = judge_sentinel(reading(20, 0.001, 0.002), quiet(LEAST_SESSIONS - 1))
    assert not found.board_changed
    assert found.noise_within is None
    assert "not known yet" in found.statement


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "other"}, {"cpu_model": "other"}, {"artifact_sha256": "00" * 32}, {"runtime": "ort 2"},
        {"backend": "tflite"},
    ],
)  # fmt: skip
def test_series_holds_only_what_can_be_compared(changes):
    known = [*quiet(6), *(replace(one, **changes, session=f"x{one.session}") for one in quiet(6))]
    assert len(series_before(reading(20), known)) == 6


def test_session_itself_and_later_ones_are_no_earlier_ones():
    known = [*quiet(6), reading(20, 0.5, 0.5), reading(30, 0.5, 0.5)]
    assert len(series_before(reading(20), known)) == 6


@pytest.mark.parametrize(("shape", "most"), [("normal", 0.01), ("student_t3", 0.03)])
@pytest.mark.parametrize("sessions", [5, 15])
def test_boards_on_which_nothing_happens_raise_as_few_alarms_as_is_said(shape, sessions, most):
    random_ = random.Random(f"{shape} {sessions}")

    def noise() -> float:
        if shape == "normal":
            return random_.gauss(0, 0.02)
        chi = sum(random_.gauss(0, 1) ** 2 for _ in range(3)) / 3
        return 0.02 * random_.gauss(0, 1) / math.sqrt(chi) / math.sqrt(3)

    def one(number: int) -> SentinelReading:
        return reading(number, *(0.001 * math.exp(noise()) for _ in range(2)))

    boards = 1000
    alarms = sum(
        judge_sentinel(one(sessions), [one(number) for number in range(sessions)]).board_changed for _ in range(boards)
    )
    # Three standard errors of 1,000 boards at 3 %: 1.6 points.
    assert alarms / boards <= most + 3 * math.sqrt(most / boards)
    if shape == "normal":
        assert alarms / boards >= FALSE_ALARMS / 3, "a rule that never alarms would pass too"


def test_reading_needs_both_ends_undisturbed():
    both = (make_visit(-1, 0.001), make_visit(6, 0.002))
    run = run_of("candidate", [0.004] * 6, sentinel=both, sentinel_sha256="5e" * 32)
    found = reading_of(run)
    assert (found.start_s, found.end_s) == (0.001, 0.002)
    assert ends_of(both[:1]) is None
    assert ends_of((both[0], make_visit(6, 0.002, dropped="throttled"))) is None
    assert ends_of((both[0], make_visit(6, float("nan")))) is None
    assert reading_of(run_of("candidate", [0.004] * 6)) is None
