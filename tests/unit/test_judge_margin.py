import pytest

from edgedeploy.judge.margin import margin_from_text


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
