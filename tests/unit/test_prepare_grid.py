"""Integer grids: what every range and weight must satisfy."""

import base64

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgedeploy.errors import DocumentError
from edgedeploy.prepare.grid import (
    activation_grid,
    bias_integers,
    integers,
    largest_weight,
    rounded,
    rounding_bits,
    rounding_text,
    weight_scales,
)
from edgedeploy.records.quantization import ActivationRange, WeightQuantization
from edgedeploy.records.target import QuantizationRules

RULES = [
    QuantizationRules(activation_dtype=dtype, activation_symmetric=symmetric)
    for dtype in ("int8", "uint8")
    for symmetric in (False, True)
]
WEIGHTS = arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32))


@pytest.mark.parametrize("rules", RULES)
@settings(max_examples=50, deadline=None)
@given(low=st.floats(-1e4, 1e4), width=st.floats(0, 1e4))
def test_grid_holds_zero_exactly_and_the_range_within_half_a_step(rules, low, width):
    grid = activation_grid(ActivationRange(low=low, high=low + width, origin="calibrated"), rules)
    limits = np.iinfo(grid.dtype)
    assert limits.min <= grid.zero_point <= limits.max
    assert grid.scale > 0
    if rules.activation_symmetric:
        assert grid.zero_point == (0 if rules.activation_dtype == "int8" else 128)
    smallest, largest = (grid.scale * (edge - grid.zero_point) for edge in (int(limits.min), int(limits.max)))
    slack = grid.scale * (0.5 + 1e-3)
    assert smallest <= min(low, 0) + slack
    assert largest >= max(low + width, 0) - slack


@settings(max_examples=50, deadline=None)
@given(weight=WEIGHTS, bits=st.sampled_from([7, 8]), axis=st.sampled_from([0, 1, None]))
def test_rounded_weights_are_within_half_a_step_and_symmetric(weight, bits, axis):
    scales = weight_scales(weight, axis=axis, bits=bits, bias=None, input_scale=1.0)
    grid = WeightQuantization(bits=bits, axis=axis, scales=tuple(map(float, scales)), origin="max-abs")
    steps = scales.reshape([-1 if index == axis else 1 for index in range(2)]) if axis is not None else scales[0]
    assert np.abs(integers(weight, grid).astype(int)).max() <= largest_weight(bits)
    assert (np.abs(rounded(weight, grid) - weight) <= 0.5001 * steps).all()
    np.testing.assert_array_equal(integers(-weight, grid), -integers(weight, grid))


@settings(max_examples=50, deadline=None)
@given(weight=WEIGHTS, size=st.floats(1e-6, 1e6))
def test_bias_of_a_dead_channel_still_fits(weight, size):
    weight = weight.copy()
    weight[0] = 1e-20
    bias = np.array([size, -size, size], np.float32)
    scales = weight_scales(weight, axis=0, bits=8, bias=bias, input_scale=1e-4)
    grid = WeightQuantization(axis=0, scales=tuple(map(float, scales)), origin="max-abs")
    stored = bias_integers(bias, 1e-4, grid)
    assert np.abs(stored.astype(np.int64)).max() <= 2**30 + 2**8
    assert stored * np.float64(1e-4) * scales == pytest.approx(bias, rel=1e-5, abs=1e-4 * float(scales.max()))


@settings(max_examples=50, deadline=None)
@given(bits=arrays(np.bool_, st.tuples(st.integers(1, 5), st.integers(1, 7))))
def test_roundings_survive_being_written(bits):
    np.testing.assert_array_equal(rounding_bits(rounding_text(bits), bits.shape), bits)


@settings(max_examples=50, deadline=None)
@given(weight=WEIGHTS, is_up=arrays(np.bool_, (3, 4)))
def test_chosen_roundings_are_honoured(weight, is_up):
    scales = weight_scales(weight, axis=0, bits=8, bias=None, input_scale=1.0)
    grid = WeightQuantization(axis=0, scales=tuple(map(float, scales)), origin="mse", rounding=rounding_text(is_up))
    expected = np.clip(np.floor(weight / scales[:, None]) + is_up, -127, 127)
    np.testing.assert_array_equal(integers(weight, grid), expected)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40) | st.binary(max_size=40).map(lambda data: base64.b64encode(data).decode()))
def test_damaged_roundings_are_refused(text):
    with pytest.raises(
        DocumentError, match=r"rounding of weights in a quantization table is damaged|one rounding for each"
    ):
        rounding_bits(text, (64, 64, 3, 3))


@pytest.mark.parametrize("count", [8, 800])
def test_roundings_of_other_weights_are_refused(count):
    with pytest.raises(DocumentError, match="than one rounding for each of 80 weights"):
        rounding_bits(rounding_text(np.ones(count, np.bool_)), (8, 10))
