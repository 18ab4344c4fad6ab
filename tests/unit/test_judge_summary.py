import pytest
from msgspec.structs import replace

from edgedeploy.judge.summary import SUPPORT, summary
from edgedeploy.records.run import Burst

from .judge_samples import make_visit, memory_of, run_of


def run_with_samples(count):
    samples_s = tuple(float(number) for number in range(1, count + 1))
    visit = replace(make_visit(0, 1.0), bursts=(Burst(pair=0, samples_s=samples_s),))
    return run_of("single", [], visits=(visit,))


@pytest.mark.parametrize(("fraction", "fewest"), SUPPORT.items())
def test_percentiles_need_the_fewest_samples_with_a_bound(fraction, fewest):
    assert fraction**fewest < 0.05 <= fraction ** (fewest - 1)


def test_unsupported_percentiles_are_not_given():
    figures = summary(run_with_samples(58))
    assert (figures.p50_s, figures.p95_s) == (29.5, None)
    figures = summary(run_with_samples(300))
    assert (figures.p95_s, figures.p99_s, figures.p999_s) == (285.0, 297.0, None)


def test_dropped_visits_are_counted_and_left_out():
    run = run_of("single", [0.004, 0.005], memory=memory_of(10, 30, 20))
    run = replace(run, visits=(*run.visits, make_visit(2, 9.0, dropped="throttled")))
    figures = summary(run)
    assert (figures.visits, figures.dropped_visits, figures.samples) == (2, 1, 120)
    assert figures.visit_medians_s == (0.004, 0.005)
    assert figures.min_s == 0.004
    assert figures.mad_s == pytest.approx(0.0005)
    assert (figures.load_s, figures.first_inference_s, figures.peak_rss_bytes) == (0.03, 0.01, 20)


def test_an_empty_run_has_no_figures():
    figures = summary(run_of("single", []))
    assert (figures.p50_s, figures.min_s, figures.mad_s, figures.load_s, figures.peak_rss_bytes) == (None,) * 5
    assert figures.visit_medians_s == ()
