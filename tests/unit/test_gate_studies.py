"""What the studies of the gate rest on: other tools' rules, stretched visits, and the ledger of what was measured."""

import math

import pytest
from msgspec.structs import replace
from scipy.stats import t, ttest_ind

from edgedeploy.records.run import Burst, Visit
from tests.benchmarks import gate_rules
from tests.benchmarks.gate_replays import stretched
from tests.benchmarks.ledger import Ledger

from .judge_samples import make_visit


def visits(*levels_s: float, dropped: str = "") -> list[Visit]:
    """Return a visit around each level, with thirty samples that lie within 1 % of it."""
    spread = [1 + 0.01 * math.sin(number) for number in range(30)]
    return [
        replace(
            make_visit(block, level, dropped=dropped),
            bursts=(Burst(pair=0, samples_s=tuple(level * one for one in spread)),),
        )
        for block, level in enumerate(levels_s)
    ]


@pytest.mark.parametrize("change", [-0.02, 0.0, 0.004, 0.02])
def test_pyperfs_rule_is_students_pooled_test_at_its_rounded_quantile(change):
    old = visits(1.0, 1.01, 0.99, 1.02)
    new = visits(*(level * (1 + change) for level in (1.01, 0.99, 1.0, 1.01)))
    values = [gate_rules._values(side) for side in (new, old)]
    known = ttest_ind(*values, equal_var=True)
    limit = gate_rules._PYPERF_T[len(values[0]) + len(values[1]) - 2]
    assert limit == pytest.approx(t.ppf(0.975, known.df), abs=6e-4)
    assert gate_rules.pyperf_on_values(old, new) == (known.statistic >= limit)


def test_rules_see_what_counts_on_both_sides_alone():
    old, new = visits(1.0, 1.0, 1.0), visits(1.2, 1.2, 1.2)
    assert all(gate_rules.alarms(old, old, new).values())
    assert not any(gate_rules.alarms(old, old, old).values())
    disturbed = visits(9.0, dropped="another process used a core")
    assert not any(gate_rules.alarms(old, old, [*disturbed, *old[1:]]).values())
    assert gate_rules.alarms(old[:1], old, disturbed) is None
    assert gate_rules.alarms(old, disturbed, new) is None


def test_a_stretched_visit_is_farther_from_the_middle_and_slower_by_the_exact_share():
    (visit,) = visits(1.1)
    (level,) = gate_rules.medians([visit])
    (got,) = gate_rules.medians([stretched(visit, 0.0, 2.0, 0.05, 3)])
    assert got == pytest.approx(level**2 * 1.05)
    assert stretched(visit, 0.0, 1.0, 0.0, 3).block == 3


def test_a_torn_line_of_a_ledger_is_read_over_and_cut_off(tmp_path):
    ledger = Ledger(tmp_path / "some" / "ledger.jsonl", "one")
    assert ledger.read() == []
    ledger.append({"gate": 1})
    with ledger.path.open("a") as stream:
        stream.write('{"gate": ')
    assert [one["gate"] for one in ledger.read()] == [1]
    ledger.append({"gate": 2})
    assert [one["gate"] for one in ledger.read()] == [1, 2]


def test_outcomes_of_another_machine_are_not_counted_as_this_ones(tmp_path):
    one, other = (Ledger(tmp_path / "ledger.jsonl", machine) for machine in ("one", "other"))
    one.append({"gate": 1})
    other.append({"gate": 2})
    assert [found["gate"] for found in one.read()] == [1]
    assert [found["gate"] for found in other.read()] == [2]
