"""How a time budget is spent: what is decided first, what is never taken away, and what does not fit."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.errors import UsageError
from edgedeploy.judge.margin import margin_from_text
from edgedeploy.judge.noise import MOST_BLOCKS
from edgedeploy.judge.planning import CellNoise, latency_error_rate, policy_of, relative_margin, spend

from .judge_samples import policy

RATE = 0.0125


def cell(name: str = "a", **changes) -> CellNoise:
    plain = CellNoise(
        cell=name, devices=("board",), spread=0.01, seconds_per_block=4.0, setup_s=10.0, margin=0.03, source="test"
    )
    return dataclasses.replace(plain, **changes)


def plan(*cells: CellNoise, minutes: float = 20.0):
    return {one.cell: one for one in spend(cells, 60 * minutes, min_blocks=4, error_rate=RATE)}


def test_quiet_cell_gets_what_it_needs_and_then_more():
    found = plan(cell())["a"]
    assert found.is_enough
    assert found.blocks == MOST_BLOCKS
    assert found.effect < 0.03


def test_budget_decides_as_many_cells_as_possible_before_it_sharpens_one():
    cells = [cell("quiet", spread=0.005), cell("middling", spread=0.02), cell("wild", spread=0.2)]
    found = plan(*cells, minutes=4.0)
    assert [found[name].is_enough for name in ("quiet", "middling", "wild")] == [True, True, False]
    assert found["quiet"].blocks >= 4


def test_rest_goes_to_the_cell_that_lags_furthest_behind():
    found = plan(cell("a", spread=0.01), cell("b", spread=0.02), minutes=6.0)
    assert found["b"].blocks > found["a"].blocks
    assert found["b"].effect == pytest.approx(found["a"].effect, rel=0.6)


def test_cell_without_a_margin_gets_the_first_look_only():
    found = plan(cell("judged"), cell("reported", margin=None))
    assert found["reported"].blocks == 4
    assert found["reported"].is_enough


def test_too_short_a_budget_is_refused_with_what_it_takes():
    with pytest.raises(UsageError, match=r"takes 0\.9 min"):
        plan(cell("a"), cell("b"), minutes=0.5)


def test_devices_work_side_by_side():
    alone = plan(cell("a", spread=0.05), minutes=5.0)["a"].blocks
    both = plan(cell("a", spread=0.05), cell("b", spread=0.05, devices=("other",)), minutes=5.0)
    assert both["a"].blocks == both["b"].blocks == alone


def test_cells_that_share_a_device_through_a_third_are_one_group():
    cells = [cell("a", devices=("x",)), cell("b", devices=("x", "y")), cell("c", devices=("y",))]
    found = plan(*cells, minutes=2.0)
    assert sum(one.seconds for one in found.values()) <= 2 * 120


def test_margin_of_nothing_never_has_enough():
    assert not plan(cell(margin=0.0))["a"].is_enough


noises = st.builds(
    cell,
    spread=st.floats(0.001, 0.3),
    seconds_per_block=st.floats(0.5, 60),
    setup_s=st.floats(0, 30),
    margin=st.sampled_from([None, -0.1, 0.0, 0.01, 0.03, 0.1]),
    devices=st.sampled_from([("x",), ("y",), ("x", "y")]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(noises, min_size=1, max_size=6), st.floats(1, 60))
def test_plan_keeps_to_its_budget_and_to_the_looks(cells, minutes):
    cells = [dataclasses.replace(one, cell=str(place)) for place, one in enumerate(cells)]
    try:
        found = plan(*cells, minutes=minutes)
    except UsageError:
        return
    devices = {device for one in cells for device in one.devices}
    assert sum(one.seconds for one in found.values()) <= len(devices) * minutes * 60 + 1e-6
    assert all(4 <= one.blocks <= MOST_BLOCKS for one in found.values())
    for one in found.values():
        if one.margin is not None and one.is_enough:
            assert math.log1p(one.effect) <= abs(math.log1p(one.margin)) + 1e-9


def test_order_of_the_cells_does_not_decide():
    cells = [cell("a", spread=0.01), cell("b", spread=0.03), cell("c", spread=0.06, seconds_per_block=9.0)]
    plans = [
        {name: one.blocks for name, one in plan(*order, minutes=5.0).items()} for order in itertools.permutations(cells)
    ]
    assert all(one == plans[0] for one in plans)


def test_policy_of_a_cell_has_its_own_last_look():
    rules = policy(latency_p50="+3%")
    assert policy_of(rules, "a") is rules
    planned = type(rules)(margins=rules.margins, blocks={"a": 40})
    assert policy_of(planned, "a").max_blocks == 40
    assert policy_of(planned, "b").max_blocks == 16


def test_error_rate_of_a_cells_latency_is_shared_with_what_is_estimated():
    rules = policy(error_rate=0.06, latency_p50="+3%", peak_memory="+1MiB", artifact_size="+1MiB")
    assert latency_error_rate(rules, 3) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("text", "level_s", "expected"), [("+5%", None, 0.05), ("+1ms", 0.01, 0.1), ("+1ms", None, None)]
)
def test_margin_as_a_fraction(text, level_s, expected):
    assert relative_margin(margin_from_text("latency_p50", text), level_s) == (
        None if expected is None else pytest.approx(expected)
    )
