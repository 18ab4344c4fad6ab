"""Integer arithmetic: requantization against rational numbers, sums of products against PyTorch and Python integers."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.prepare.integer_operators import (
    Scaled,
    Window,
    clamped,
    convolution,
    fixed_point_factor,
    fixed_point_product,
    product,
    quantized,
    requantized,
    saturated,
    stored,
    window,
    window_counts,
    window_maxima,
    window_sums,
    wrapped,
)

SCALES = st.floats(2.0**-20, 2.0**4, width=32)
# Scales of few bits make ties, which are where rounding is decided.
ROUND_SCALES = st.builds(lambda k, e: float(k * 2.0**e), st.integers(1, 7), st.integers(-8, 0))
SUMS = st.integers(-(2**31), 2**31 - 1)
DTYPES = st.sampled_from([np.int8, np.uint8, np.int16])


def scaled(integers, scale, divisor=1, **more):
    return Scaled(
        integers=np.asarray(integers, np.int64),
        scale=np.asarray(scale, np.float64),
        divisor=np.asarray(divisor, np.int64),
        dtype=np.dtype(np.float32),
        is_stored=False,
        **more,
    )


def as_code(real_steps, zero_point, dtype):
    """Return a rational number of steps as a code, in whole-number arithmetic."""
    limits = np.iinfo(dtype)
    return min(max(round(real_steps) + int(zero_point), int(limits.min)), int(limits.max))


@settings(max_examples=300, deadline=None)
@given(
    sums=st.lists(st.one_of(SUMS, st.integers(-2000, 2000)), min_size=1, max_size=20),
    scales=st.one_of(st.tuples(SCALES, SCALES, SCALES), st.tuples(ROUND_SCALES, ROUND_SCALES, ROUND_SCALES)),
    divisor=st.integers(1, 64),
    dtype=DTYPES,
    data=st.data(),
)
def test_exact_requantization_is_the_rational_number_rounded_half_to_even(sums, scales, divisor, dtype, data):
    zero_point = np.asarray(data.draw(st.integers(np.iinfo(dtype).min, np.iinfo(dtype).max)), dtype)
    first, second, out = (np.float32(scale) for scale in scales)
    value = scaled(sums, np.float64(first) * np.float64(second), divisor)
    got = requantized(value, np.asarray(out), zero_point, np.dtype(dtype))
    ratio = Fraction(float(first)) * Fraction(float(second)) / Fraction(float(out)) / divisor
    assert got.tolist() == [as_code(total * ratio, zero_point, dtype) for total in sums]
    assert got.dtype == dtype


@pytest.mark.parametrize(
    ("integers", "numerator", "denominator"),
    [
        (1394977317, 8166243173584357.0, 1.2449971576236363e23),
        (1202875018, 6951868936363463.0, 8.94356093257951e22),
        (1441041518, 8177877389701123.0, 2.3569321695345567e25),
    ],
)
def test_quotient_beside_a_half_is_decided_by_the_rational_number(integers, numerator, denominator):
    expected = round(Fraction(integers) * Fraction(numerator) / Fraction(denominator))
    assert np.rint(integers * numerator / denominator) != expected, "float64 gets it right, so it is no test"
    got = requantized(scaled([integers], numerator), np.asarray(denominator), np.asarray(0), np.dtype(np.int8))
    assert got.tolist() == [expected]


@settings(max_examples=100, deadline=None)
@given(sums=st.lists(SUMS, min_size=1, max_size=20), low=st.floats(-50, 50), width=st.floats(0, 50), out=SCALES)
def test_clamp_of_codes_is_the_clamp_of_values(sums, low, width, out):
    value = clamped(scaled(sums, 1e-7), low, low + width)
    step = np.float32(out)
    got = requantized(value, np.asarray(step), np.asarray(3, np.int8), np.dtype(np.int8))
    reals = np.clip(np.asarray(sums, np.float64) * 1e-7, low, low + width)
    assert got.tolist() == saturated(np.rint(reals / np.float64(step)), np.asarray(3), np.dtype(np.int8)).tolist()


def test_clamps_follow_each_other_as_numpy_clips():
    values = scaled(np.arange(-20, 20), 0.5)
    reals = values.reals()
    for first in [(-3.3, 4.1), (0.0, np.inf), (2.0, 2.0), (0.0, 6.0), (-np.inf, -1.0)]:
        for second in [(0.0, np.inf), (0.0, 2.2), (-8.0, 1.0), (5.0, 6.0)]:
            twice = clamped(clamped(values, *first), *second)
            np.testing.assert_array_equal(twice.reals(), np.clip(np.clip(reals, *first), *second))


@settings(max_examples=200, deadline=None)
@given(sums=st.lists(SUMS, min_size=1, max_size=10), first=SCALES, second=SCALES, out=SCALES)
def test_float32_requantization_is_within_its_own_rounding_of_exact(sums, first, second, out):
    value = scaled(sums, np.float64(np.float32(first)) * np.float64(np.float32(second)))
    arguments = np.asarray(np.float32(out)), np.asarray(0, np.int16), np.dtype(np.int16)
    exact, got = requantized(value, *arguments), requantized(value, *arguments, "float32")
    # Four roundings of 2**-24 each, on at most 2**15 steps.
    assert np.abs(exact.astype(int) - got.astype(int)).max() <= 1


def gemmlowp(value, multiplier, exponent):
    """MultiplyByQuantizedMultiplier in Python integers, statement by statement."""
    left, right = max(exponent, 0), max(-exponent, 0)
    shifted = min(max(value << left, -(2**31)), 2**31 - 1)
    doubled = shifted * multiplier
    nudged = doubled + (2**30 if doubled >= 0 else 1 - 2**30)
    high = abs(nudged) // 2**31 * (1 if nudged >= 0 else -1)
    mask = (1 << right) - 1
    threshold = (mask >> 1) + (1 if high < 0 else 0)
    return (high >> right) + (1 if (high & mask) > threshold else 0)


@settings(max_examples=300, deadline=None)
@given(value=SUMS, factor=st.floats(2.0**-34, 2.0**12))
def test_fixed_point_product_is_that_of_tflite(value, factor):
    multiplier, exponent = fixed_point_factor(np.asarray(factor))
    assert multiplier == 0 or 2**30 <= multiplier < 2**31
    if multiplier:
        assert abs(float(multiplier) * 2.0 ** (int(exponent) - 31) / factor - 1) <= 2.0**-31
    got = int(fixed_point_product(np.asarray(value), multiplier, exponent))
    assert got == gemmlowp(value, int(multiplier), int(exponent))


@settings(max_examples=200, deadline=None)
@given(value=st.integers(-(2**24), 2**24), factor=st.floats(2.0**-24, 0.99))
def test_fixed_point_product_is_within_one_of_exact(value, factor):
    got = int(fixed_point_product(np.asarray(value), *fixed_point_factor(np.asarray(factor))))
    assert abs(got - Fraction(factor) * value) <= 1


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1))
def test_accumulator_wraps_as_int32_and_counts_what_did_not_fit(sums):
    held, overflows = wrapped(np.asarray(sums, np.int64))
    assert held.tolist() == np.asarray(sums, np.int64).astype(np.int32).tolist()
    assert overflows == sum(not -(2**31) <= total < 2**31 for total in sums)


@pytest.mark.parametrize("depth", [3, 700, 70_000])
def test_product_is_exact_at_every_depth(depth):
    # 700 taps leave float32's 24 bits, 70,000 leave int32.
    left = np.full((2, depth), 255)
    right = np.full((depth, 3), -255)
    left[0, 0] = 254
    expected = [[-255 * (255 * depth - 1)] * 3, [-255 * 255 * depth] * 3]
    assert product(left, right).tolist() == expected


def test_product_of_large_integers_falls_back_to_integers():
    assert product(np.asarray([[2**31, 1]]), np.asarray([[2**31 - 1], [1]])).tolist() == [[2**31 * (2**31 - 1) + 1]]


@settings(max_examples=60, deadline=None)
@given(
    spatial=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    depth=st.integers(1, 2),
    per_group=st.integers(1, 2),
    data=st.data(),
)
def test_convolution_is_that_of_torch(spatial, groups, depth, per_group, data):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    kernel = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    strides = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    dilations = [data.draw(st.integers(1, 2)) for _ in range(spatial)]
    pads = [data.draw(st.integers(0, 2)) for _ in range(spatial)]
    sizes = [data.draw(st.integers(5, 7)) for _ in range(spatial)]
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    values = rng.integers(-255, 256, (2, groups * depth, *sizes))
    weight = rng.integers(-128, 128, (groups * per_group, depth, *kernel))
    move = window({"strides": strides, "dilations": dilations, "pads": pads + pads}, sizes, kernel)
    got = convolution(values, weight, move, groups)
    run = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[spatial - 1]
    expected = run(
        torch.from_numpy(values).double(),
        torch.from_numpy(weight).double(),
        stride=strides,
        padding=pads,
        dilation=dilations,
        groups=groups,
    )
    assert got.tolist() == expected.long().tolist()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(4, 9), kernel=st.integers(1, 4), stride=st.integers(1, 3), ceil=st.booleans(), data=st.data())
def test_pools_are_those_of_torch(size, kernel, stride, ceil, data):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pad, count_padding = data.draw(st.integers(0, kernel // 2)), data.draw(st.booleans())
    values = np.random.default_rng(size).integers(-128, 128, (2, 3, size, size))
    move = window({"strides": [stride] * 2, "pads": [pad] * 4, "ceil_mode": int(ceil)}, (size, size), (kernel, kernel))
    reals = torch.from_numpy(values).double()
    arguments = {"kernel_size": kernel, "stride": stride, "padding": pad, "ceil_mode": ceil}
    maxima = torch.nn.functional.max_pool2d(reals, **arguments)
    assert window_maxima(values, move).tolist() == maxima.long().tolist()
    means = torch.nn.functional.avg_pool2d(reals, **arguments, count_include_pad=count_padding)
    counts = window_counts((size, size), move, include_padding=count_padding)
    np.testing.assert_allclose(window_sums(values, move) / counts, means.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mode", "before", "after"), [(b"SAME_UPPER", 1, 2), (b"SAME_LOWER", 2, 1), (b"VALID", 0, 0)])
def test_automatic_padding_puts_the_odd_position_where_its_name_says(mode, before, after):
    move = window({"auto_pad": mode, "strides": [2], "dilations": [2]}, (9,), (3,))
    even = window({"auto_pad": mode, "strides": [2], "pads": [9, 9]}, (8,), (5,))
    assert move == Window((3,), (2,), (2,), *([(2,), (2,)] if mode != b"VALID" else [(0,), (0,)]), (0,))
    assert (even.before, even.after) == ((before,), (after,))


def test_codes_of_each_channel_lose_their_own_zero_point():
    codes = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    value = stored(codes, np.asarray([1, 2, 4], np.float32), np.asarray([1, 2, 3], np.uint8), axis=-2)
    expected = (codes.astype(float) - np.array([1, 2, 3])[:, None]) * np.array([1, 2, 4])[:, None]
    np.testing.assert_array_equal(value.reals(), expected)
    assert value.is_stored


def test_floats_beyond_every_integer_saturate():
    values = np.asarray([np.inf, -np.inf, 3e38, -3e38, 2.5, 3.5], np.float32)
    got = quantized(values, np.asarray(1, np.float32), np.asarray(-7, np.int8), np.dtype(np.int8))
    assert got.tolist() == [127, -128, 127, -128, -5, -3]
