"""What an undecided latency needs: blocks, minutes, or a quieter device."""

import math

import pytest
from msgspec.structs import replace

from edgedeploy.judge.effort import blocks_needed, seconds_per_block
from edgedeploy.judge.estimate import units_to_decide
from edgedeploy.judge.gate import judge
from edgedeploy.records.run import Conditions

from .judge_samples import finding_of, normal_effects, policy, runs_with_effects


def timed(run, block_s, start_s=100.0):
    """The same run, its blocks so many seconds apart."""
    visits = tuple(
        replace(
            visit,
            before=Conditions(monotonic_s=start_s + visit.block * block_s),
            after=Conditions(monotonic_s=start_s + visit.block * block_s + 0.8 * block_s),
        )
        for visit in run.visits
    )
    return replace(run, visits=visits)


def finding(effects, text="+5%", block_s=40.0, **looks):
    runs = [timed(run, block_s) for run in runs_with_effects(effects)]
    return finding_of(judge(*runs, policy(latency_p50=text, **looks)), "latency_p50")


def test_blocks_and_minutes_are_told():
    found = finding(normal_effects(21, 0.02, 0.03, 5))
    assert found.decision == "INCONCLUSIVE"
    assert found.needed_units > 0
    assert found.needed_s == pytest.approx(40 * found.needed_units)
    assert f"about {found.needed_units} more A/B blocks (" in found.needed
    assert "min, at 40 s a block)" in found.needed


def test_the_first_look_is_told_in_seconds_too():
    found = finding(normal_effects(21, 0.02, 0.03, 2), block_s=10.0)
    assert (found.needed_units, found.needed_s) == (2, pytest.approx(20.0))


def test_where_the_policy_has_too_few_blocks_a_quieter_device_is_described():
    found = finding(normal_effects(21, 0.02, 0.03, 60), max_blocks=6)
    assert "more than the 6 in all that the policy allows" in found.needed
    assert "run-to-run CV of" in found.needed
    assert 0 < found.needed_spread < 0.03


@pytest.mark.parametrize(("distance", "error_rate", "most"), [(0.03, 0.02, 16), (0.01, 0.001, 40), (0.1, 0.05, 4)])
def test_on_the_quieter_device_the_policys_blocks_are_enough(distance, error_rate, most):
    found = blocks_needed(
        spread=1.0, distance=distance, error_rate=error_rate, counted=4, most=most, block_s=None, level=1.0, runs=2
    )
    assert found.spread is None  # hopeless as it is
    found = blocks_needed(
        spread=4 * distance,
        distance=distance,
        error_rate=error_rate,
        counted=4,
        most=most,
        block_s=None,
        level=1.0,
        runs=2,
    )
    assert units_to_decide(found.spread * 0.999, distance, error_rate) <= most
    assert units_to_decide(found.spread * 1.05, distance, error_rate) > most - 1


def test_an_absolute_margin_describes_the_device_as_a_fraction_too():
    found = finding(normal_effects(21, 0.02, 0.03, 60), "+0.2ms", max_blocks=6)
    assert 0 < found.needed_spread < 0.03


def test_the_time_of_a_block_ignores_a_reboot_and_a_long_pause():
    run = timed(runs_with_effects([0.0] * 8)[0], 30.0)
    assert seconds_per_block(run.visits) == pytest.approx(30.0)
    late = tuple(
        replace(
            visit,
            before=Conditions(monotonic_s=visit.before.monotonic_s + (50_000 if visit.block > 3 else 0)),
            after=Conditions(monotonic_s=visit.after.monotonic_s + (50_000 if visit.block > 3 else 0)),
        )
        for visit in run.visits
    )
    assert seconds_per_block(late) == pytest.approx(30.0)
    assert seconds_per_block(run.visits[:1]) == pytest.approx(24.0)
    assert seconds_per_block(runs_with_effects([0.0] * 8)[0].visits) is None
    assert seconds_per_block(()) is None
    assert not math.isnan(seconds_per_block(run.visits))
