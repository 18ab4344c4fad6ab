"""What a device's noise lets one show: against the normal approximation, and against the gate's own test, simulated."""

import math
import random

import pytest
from msgspec.structs import replace

from edgedeploy.errors import UsageError
from edgedeploy.judge.estimate import units_to_decide
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.noise import MOST_BLOCKS, autocorrelation, blocks_to_decide, drift_of, noise_of, smallest_effect
from edgedeploy.judge.speed import judge_latency, latency_evidence
from edgedeploy.judge.spending import nominal_levels

from .judge_samples import normal_effects, policy, run_of, runs_with_effects

RATE = 0.05 / 3


@pytest.mark.parametrize("blocks", [8, 12, 16, 30])
def test_smallest_effect_of_one_look_is_that_of_the_formula_in_use(blocks):
    effect = smallest_effect(0.02, blocks, min_blocks=blocks, error_rate=RATE)
    assert units_to_decide(0.02, effect, RATE) == pytest.approx(blocks, abs=1)


@pytest.mark.parametrize("blocks", [8, 16])
def test_sequential_test_decides_the_smallest_effect_with_eighty_percent(blocks):
    """The t statistics of many gates at once, against the levels that the gate uses at each look."""
    import numpy as np
    from scipy.special import stdtr

    effect = smallest_effect(0.02, blocks, min_blocks=4, error_rate=RATE)
    effects = np.random.default_rng(blocks).normal(effect, 0.02, (4000, blocks))
    is_decided = np.zeros(len(effects), bool)
    for look, level in zip(range(4, blocks + 1), nominal_levels(4, blocks, RATE), strict=True):
        seen = effects[:, :look]
        t = seen.mean(1) / (seen.std(1, ddof=1) / math.sqrt(look))
        is_decided |= stdtr(look - 1, -t) <= level
    # The earlier looks add a few points to the 80 % of the last one; three standard errors are 2.
    assert 0.78 <= is_decided.mean() <= 0.90


@pytest.mark.parametrize(("sign", "decision"), [(1, "FAIL"), (-1, "PASS")])
def test_gate_itself_decides_what_lies_well_beyond_the_smallest_effect(sign, decision):
    rules = policy(max_blocks=16, latency_p50="+3%")
    distance = 1.8 * smallest_effect(0.02, 16, min_blocks=4, error_rate=RATE)
    for seed in range(10):
        runs = runs_with_effects(normal_effects(seed, math.log1p(0.03) + sign * distance, 0.02))
        evidence = latency_evidence("latency_p50", *runs, rules.margins["latency_p50"])
        assert judge_latency(evidence, rules, error_rate=ErrorRate(RATE, RATE)).decision == decision


def test_level_of_many_looks_is_near_enough_to_the_computed_one():
    """Beyond 16 looks it is not integrated but extrapolated; 3 % of a level are 1 % of an effect."""
    from edgedeploy.judge import noise

    assert noise._last_level(32, 4, RATE) == pytest.approx(nominal_levels(4, 32, RATE)[-1], rel=0.03)


def test_fewer_blocks_than_the_first_look_show_nothing():
    assert smallest_effect(0.01, 3, min_blocks=4, error_rate=0.05) is None


def test_effect_shrinks_with_blocks_and_grows_with_noise_and_strictness():
    def effect(spread=0.01, blocks=16, rate=0.05):
        return smallest_effect(spread, blocks, min_blocks=4, error_rate=rate)

    assert effect(blocks=8) > effect(blocks=16) > effect(blocks=40) > effect(blocks=MOST_BLOCKS + 50)
    assert effect(spread=0.02) == pytest.approx(2 * effect())
    assert effect(rate=0.01) > effect()


@pytest.mark.parametrize("spread", [0.004, 0.01, 0.03])
def test_blocks_to_decide_are_the_fewest_that_do(spread):
    distance = math.log1p(0.03)
    blocks = blocks_to_decide(spread, distance, min_blocks=4, error_rate=RATE)
    assert smallest_effect(spread, blocks, min_blocks=4, error_rate=RATE) <= distance
    if blocks > 4:
        assert smallest_effect(spread, blocks - 1, min_blocks=4, error_rate=RATE) > distance


def test_no_number_of_blocks_decides_on_the_margin_or_under_too_much_noise():
    assert blocks_to_decide(0.01, 0.0, min_blocks=4, error_rate=0.05) is None
    assert blocks_to_decide(0.5, 0.03, min_blocks=4, error_rate=0.05) is None


def test_noise_is_read_from_two_sides_that_are_the_same():
    effects = [0.01, -0.01] * 8
    baseline, candidate = runs_with_effects(effects)
    found = noise_of(baseline, candidate)
    assert found.blocks == 16
    assert found.dropped == 0
    assert found.block_spread == pytest.approx(0.01 * math.sqrt(16 / 15))
    assert found.low < 0 < found.high
    assert found.effect == pytest.approx(0.0, abs=1e-12)
    assert 0 < found.run_to_run_cv < 0.01
    assert found.block_autocorrelation == pytest.approx(-15 / 16)


def test_noise_of_one_block_is_refused_in_a_sentence():
    with pytest.raises(UsageError, match="1 of 1 A/B blocks count"):
        noise_of(*runs_with_effects([0.0]))


def series(seed: int, count: int, alike: float, slope_per_hour: float = 0.0) -> tuple[list[float], list[float]]:
    """Levels every ten seconds: AR(1) noise of 1 % and a slope."""
    random_, value, levels = random.Random(seed), 0.0, []
    for place in range(count):
        value = alike * value + random_.gauss(0, 0.01 * math.sqrt(1 - alike**2))
        levels.append(value + math.log1p(slope_per_hour) * place * 10 / 3600)
    return [10.0 * place for place in range(count)], levels


def test_slope_that_is_there_is_found():
    drift = drift_of(*series(1, 200, 0.0, slope_per_hour=0.10))
    assert drift.low < 0.10 < drift.high
    assert drift.low > 0.05


def test_interval_of_a_slope_is_widened_where_successive_levels_are_alike():
    """Without the correction, 95 % intervals of an AR(1) series with 0.7 hold the true slope in two of three cases."""
    hits = 0
    for seed in range(200):
        drift = drift_of(*series(seed, 100, 0.7))
        hits += drift is not None and drift.low <= 0 <= drift.high
    assert hits >= 0.88 * 200


def test_few_levels_have_neither_slope_nor_autocorrelation():
    assert drift_of(*series(1, 7, 0.0)) is None
    assert autocorrelation([1.0] * 7) is None
    assert autocorrelation([1.0] * 20) is None


def test_dropped_visits_are_no_noise():
    baseline, candidate = runs_with_effects([0.0, 0.01, -0.01, 0.0])
    wild = replace(baseline.visits[0], dropped="throttled")
    baseline = replace(baseline, visits=(wild, *baseline.visits[1:]))
    found = noise_of(baseline, candidate)
    assert (found.blocks, found.dropped) == (3, 1)


def test_levels_are_those_of_the_visits():
    run = run_of("baseline", [0.004, 0.004, 0.005])
    assert noise_of(run, replace(run, side="candidate")).level_s == 0.004
