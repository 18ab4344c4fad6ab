"""A percentile that the samples cannot support is not given."""

import pytest

from edgedeploy.judge.percentiles import SUPPORT, supported_percentile


@pytest.mark.parametrize(("fraction", "fewest"), SUPPORT.items())
def test_percentiles_need_the_fewest_samples_with_a_bound(fraction, fewest):
    assert fraction**fewest < 0.05 <= fraction ** (fewest - 1)


@pytest.mark.parametrize(("count", "fraction", "expected"), [(58, 0.95, None), (300, 0.95, 285), (300, 0.99, 297)])
def test_percentile_is_the_nearest_rank(count, fraction, expected):
    assert supported_percentile(range(count, 0, -1), fraction) == expected
