import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.arguments import margins_from_texts
from edgedeploy.errors import UsageError
from edgedeploy.judge.margin import margin_from_text
from edgedeploy.records.verdict import Margin


@pytest.mark.parametrize(
    ("metric", "text", "kind", "value"),
    [
        ("latency_p50", "+5%", "relative", 0.05),
        ("latency_p95", "+0.5ms", "absolute", 0.0005),
        ("latency_p50", "-20%", "relative", -0.2),
        ("accuracy", "-0.5pt", "points", 0.005),
        ("accuracy", "0.5pt", "points", 0.005),
        ("accuracy", "0pt", "points", 0.0),
        ("accuracy", "+5%", "relative", 0.05),
        ("accuracy", "+0.01", "absolute", 0.01),
        ("artifact_size", "+1MiB", "absolute", 2**20),
        ("peak_memory", " +5 % ", "relative", 0.05),
    ],
)
def test_margin_is_read_in_si_units_as_allowed_worsening(metric, text, kind, value):
    margin = margin_from_text(metric, text)
    assert (margin.kind, margin.value, margin.text) == (kind, pytest.approx(value), text.strip())


@pytest.mark.parametrize(
    ("metric", "text", "says"),
    [
        ("latency_p50", "+1MiB", "write for example"),
        ("latency_p50", "5", "write for example"),
        ("latency_p50", "-100%", "above -100%"),
        ("accuracy", "+0.5pt", "accuracy rises"),
        ("accuracy", "-5%", "ambiguous"),
        ("accuracy", "-200pt", "more than 100 points"),
        ("accuracy", "+1ms", "write for example"),
        ("artifact_size", "+1s", "write for example"),
        ("peak_memory", "much", "not a number"),
    ],
)
def test_margin_that_cannot_be_meant_is_refused_with_a_sentence(metric, text, says):
    with pytest.raises(ValueError, match=says):
        margin_from_text(metric, text)


@pytest.mark.parametrize(
    ("metric", "text", "kind", "limit", "is_floor"),
    [
        ("latency_p50", "<= 5ms", "limit", 0.005, False),
        ("latency_p99", "≤5ms", "limit", 0.005, False),
        ("latency_p50", "+3%, <= 5ms", "relative", 0.005, False),
        ("latency_p50", "<= 5ms, +3%", "relative", 0.005, False),
        ("first_inference", "+1ms,<=5ms", "absolute", 0.005, False),
        ("peak_memory", "<= 40MiB", "limit", 40 * 2**20, False),
        ("artifact_size", "+0%, <= 1MB", "relative", 1e6, False),
        ("accuracy", ">= 92%", "limit", 0.92, True),
        ("accuracy", "-0.5pt, >= 92%", "points", 0.92, True),
        ("accuracy", "<= 0.05", "limit", 0.05, False),
        ("class_accuracy", "-5pt, >= 80%", "points", 0.8, True),
    ],
)
def test_a_limit_is_read_beside_the_change_or_alone(metric, text, kind, limit, is_floor):
    margin = margin_from_text(metric, text)
    assert (margin.kind, margin.limit, margin.is_floor) == (kind, pytest.approx(limit), is_floor)
    assert margin.text == text.strip()
    if kind == "limit":
        assert margin.value == margin.limit


@pytest.mark.parametrize(
    ("metric", "text", "says"),
    [
        ("latency_p50", "< 5ms", 'write "<= 5ms"'),
        ("latency_p50", ">= 5ms", "is not a limit for latency_p50"),
        ("latency_p50", "<= 5MiB", "is not a limit for latency_p50"),
        ("latency_p50", "<= 0ms", "above zero"),
        ("latency_p50", "<= -1ms", "above zero"),
        ("latency_p50", "<= +1ms", "the amount itself"),
        ("latency_p50", "<= much", "not a number"),
        ("latency_p50", "<=", "not a number"),
        ("latency_p50", "<= 5ms, <= 6ms", "more than one change and one limit"),
        ("latency_p50", "+3%, +4%", "more than one change and one limit"),
        ("latency_p50", "+0,5%", "a decimal point is a point"),
        ("latency_p50", "+3%,", "more than one change and one limit"),
        ("latency_p50", ", <= 5ms", "not a number"),
        ("accuracy", ">= 100%", "below 100%"),
        ("accuracy", "+5%, >= 92%", "mixes"),
        ("accuracy", "-1pt, <= 0.05", "mixes"),
        ("accuracy", "<= 92%", "is not a limit for accuracy"),
        ("class_accuracy", "+5%", "write for example"),
        ("class_accuracy", "<= 0.1", "is not a limit for class_accuracy"),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused_with_a_sentence(metric, text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        margin_from_text(metric, text)


UNITS = {"s": {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}, "bytes": {"B": 1, "kB": 1e3, "MiB": 2**20, "GiB": 2**30}}
DIMENSIONS = {
    "latency_p50": "s", "latency_p95": "s", "latency_p99": "s", "first_inference": "s", "load_time": "s",
    "peak_memory": "bytes", "artifact_size": "bytes",
}  # fmt: skip
AMOUNTS = st.integers(1, 10**6).map(lambda thousandths: thousandths / 1000)


@st.composite
def written_margins(draw):
    """A metric, its margin as somebody may write it, and what it means: change in SI, limit in SI."""
    metric = draw(st.sampled_from(sorted(DIMENSIONS)))
    units = UNITS[DIMENSIONS[metric]]
    parts, change, limit = [], None, None
    if draw(st.booleans()):
        amount, unit = draw(AMOUNTS), draw(st.sampled_from(["%", *units]))
        sign = "+" if unit == "%" else draw(st.sampled_from(["+", "-", ""]))
        parts.append(f"{sign}{amount}{draw(st.sampled_from(['', ' ']))}{unit}")
        change = (-1 if sign == "-" else 1) * amount * (0.01 if unit == "%" else units[unit])
    if change is None or draw(st.booleans()):
        amount, unit = draw(AMOUNTS), draw(st.sampled_from(sorted(units)))
        parts.append(f"{draw(st.sampled_from(['<=', '≤', '<= ', ' <=  ']))}{amount}{unit}")
        limit = amount * units[unit]
    if draw(st.booleans()):
        parts.reverse()
    return metric, draw(st.sampled_from([",", ", ", " , "])).join(parts), change, limit


@settings(max_examples=200, deadline=None)
@given(written_margins())
def test_whatever_is_written_means_what_it_says_and_reads_back_the_same(written):
    metric, text, change, limit = written
    margin = margin_from_text(metric, text)
    assert margin.limit == (None if limit is None else pytest.approx(limit))
    assert margin.value == pytest.approx(limit if change is None else change)
    assert (margin.kind == "limit") == (change is None)
    assert margin_from_text(metric, margin.text) == margin
    assert msgspec.json.decode(msgspec.json.encode(margin), type=Margin) == margin


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted([*DIMENSIONS, "accuracy", "class_accuracy"])),
    st.text("+-<>=≤≥,. %0159mskMiBpt", max_size=20),
)
def test_any_text_is_a_margin_or_a_sentence(metric, text):
    try:
        margin = margin_from_text(metric, text)
    except ValueError as error:
        assert len(str(error).split()) > 3
    else:
        assert margin_from_text(metric, margin.text) == margin


def test_repeated_flags_of_one_metric_are_parts_of_one_margin():
    margins = margins_from_texts(["latency_p50=+3%", "latency_p50<=5ms", "accuracy>=92%"])
    assert (margins["latency_p50"].value, margins["latency_p50"].limit) == (pytest.approx(0.03), pytest.approx(0.005))
    assert margins["accuracy"].is_floor
    for texts, says in (
        (["latency_p50=+3%", "latency_p50=+4%"], "more than one change"),
        (["latency=+3%"], "latency_p50"),
    ):
        with pytest.raises(UsageError, match=says):
            margins_from_texts(texts)
