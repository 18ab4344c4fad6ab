"""Ranges of activations: what each way of choosing keeps and gives up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.prepare.grid import activation_grid
from edgedeploy.prepare.ptq.ranges import activation_range, percentile, squared_error
from edgedeploy.prepare.ptq.statistics import BINS, Statistics, histogram, stride
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.target import QuantizationRules

ASYMMETRIC = QuantizationRules(activation_dtype="uint8", activation_symmetric=False)
SYMMETRIC = QuantizationRules(activation_dtype="int8", activation_symmetric=True)
WAYS = ("mse", "min-max", "percentile", "entropy")


def seen(values):
    values = np.asarray(values, np.float32)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    counts, zeros = histogram(values, low, high)
    return Statistics(low, high, counts, zeros)


def lost(values, chosen, rules):
    """Return what rounding values to the grid of a range really loses."""
    grid = activation_grid(chosen, rules)
    limits = np.iinfo(grid.dtype)
    codes = np.clip(np.rint(values / grid.scale) + grid.zero_point, limits.min, limits.max)
    return float((((codes - grid.zero_point) * grid.scale - values) ** 2).sum())


@pytest.mark.parametrize("rules", [ASYMMETRIC, SYMMETRIC], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-5, 5), size=st.floats(1e-6, 1e6))
def test_range_holds_zero_and_never_exceeds_what_was_seen(way, rules, seed, shift, size):
    values = (np.random.default_rng(seed).standard_normal(500) + shift) * size
    statistics = seen(values)
    chosen = activation_range(statistics, rules, QuantizationPolicy(ranges=way))
    assert statistics.low <= chosen.low <= 0 <= chosen.high <= statistics.high
    assert chosen.high > chosen.low
    assert chosen.origin == "calibrated"


@pytest.mark.parametrize("way", WAYS)
def test_tensor_that_is_always_zero_has_an_empty_range(way):
    chosen = activation_range(seen(np.zeros(10)), ASYMMETRIC, QuantizationPolicy(ranges=way))
    assert (chosen.low, chosen.high) == (0, 0)


def test_min_max_keeps_the_extremes():
    chosen = activation_range(seen([-1.5, 0.25, 7]), ASYMMETRIC, QuantizationPolicy(ranges="min-max"))
    assert (chosen.low, chosen.high) == (-1.5, 7)


@pytest.mark.parametrize("rules", [ASYMMETRIC, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_mse_loses_less_than_the_extremes_where_a_few_values_are_far_out(rules):
    values = np.append(np.random.default_rng(0).standard_normal(1_000_000), [-5.5, 30.0])
    statistics = seen(values)
    best, whole = (activation_range(statistics, rules, QuantizationPolicy(ranges=way)) for way in ("mse", "min-max"))
    assert lost(values, best, rules) < 0.7 * lost(values, whole, rules)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), part=st.floats(0.3, 1.0))
def test_predicted_loss_is_the_real_loss(seed, part):
    values = np.random.default_rng(seed).laplace(size=20_000)
    statistics = seen(values)
    chosen = activation_range(statistics, ASYMMETRIC, QuantizationPolicy(ranges="min-max"))
    low, high = np.array([chosen.low * part]), np.array([chosen.high * part])
    predicted = float(squared_error(statistics, low, high, (high - low) / 255)[0])
    clipped = type(chosen)(low=float(low[0]), high=float(high[0]), origin="calibrated")
    assert predicted == pytest.approx(lost(values, clipped, ASYMMETRIC), rel=0.1)


def test_mse_of_a_relu_ignores_its_zeros():
    values = np.abs(np.random.default_rng(0).standard_normal(5_000))
    few, many = seen(values), seen(np.append(values, np.zeros(500_000)))
    ranges = [activation_range(item, ASYMMETRIC, QuantizationPolicy()) for item in (few, many)]
    assert ranges[0] == ranges[1]


def test_percentile_is_that_of_the_magnitudes():
    values = np.random.default_rng(0).standard_normal(50_000)
    statistics = seen(values)
    width = (statistics.high - statistics.low) / BINS
    for percent in (50, 99, 99.9):
        assert percentile(statistics, percent) == pytest.approx(np.percentile(np.abs(values), percent), abs=2 * width)
    chosen = activation_range(statistics, SYMMETRIC, QuantizationPolicy(ranges="percentile", percentile=99))
    assert chosen.high == pytest.approx(-chosen.low) == pytest.approx(2.576, abs=0.05)


def test_entropy_cuts_a_long_tail_and_keeps_an_even_spread():
    rng = np.random.default_rng(0)
    tail = activation_range(
        seen(np.append(rng.standard_normal(200_000), 60.0)), SYMMETRIC, QuantizationPolicy(ranges="entropy")
    )
    assert 3 < tail.high < 15
    even = activation_range(seen(rng.uniform(0, 6, 200_000)), ASYMMETRIC, QuantizationPolicy(ranges="entropy"))
    assert even.high > 5.7


@given(values=st.integers(1, 10**7), wanted=st.integers(1, 20_000))
def test_stride_leaves_few_values_and_prefers_no_channel(values, wanted):
    step = stride(values, wanted)
    assert -(-values // step) <= wanted
    assert np.gcd(step, values) == 1


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50))
def test_histogram_counts_every_value_once(values):
    statistics = seen(values)
    if statistics.high > statistics.low:
        assert statistics.counts.sum() + statistics.zeros == len(values)
    assert statistics.zeros == sum(value == 0 for value in values)
