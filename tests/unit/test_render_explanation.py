"""An explanation as text and as a page: the causes first, nothing that a device said is obeyed."""

import re
from html.parser import HTMLParser

from msgspec.structs import replace

from edgedeploy.documents import read_json, write_json
from edgedeploy.judge.layer_difference import speed_explanation
from edgedeploy.judge.moved_samples import accuracy_explanation
from edgedeploy.records.explanation import FORMAT, Explanation
from edgedeploy.records.verdict import CellVerdict
from edgedeploy.render.explanation import explanation_text
from edgedeploy.render.explanation_page import explanation_html
from edgedeploy.render.text import verdict_text

from .explanation_samples import layer, profile, whole_differences_s
from .render_samples import make_verdict


def make_explanation(**changes):
    before = [layer("conv1", 1e-3), layer("conv2", 2e-3), layer("fc", 1e-4)]
    after = [layer("conv1", 1e-3), layer("conv2", 6e-3, precision="fp32"), layer("fc", 1e-4, seed=1)]
    baseline, candidate = profile("int8", before), profile("mixed", after)
    labels = [0] * 20 + [1] * 20
    found = Explanation(
        cell="mixed",
        baseline_cell="int8",
        device="bench-7",
        metrics=("latency_p50", "accuracy"),
        speed=speed_explanation(baseline, candidate, whole_differences_s(baseline, candidate), notes=("option x",)),
        accuracy=accuracy_explanation(
            dataset="photographs",
            metric="top1",
            outputs=None,
            labels=labels,
            predictions=(labels, [1] * 12 + labels[12:]),
            scores=([1.0] * 40, [0.0] * 12 + [1.0] * 28),
            layers=None,
            samples=40,
        ),
        explained_utc="2026-11-22T23:00:00Z",
        seconds=12.5,
        edgedeploy="0.2.0",
    )
    return replace(found, **changes)


def test_the_text_begins_with_the_difference_and_its_first_cause():
    text = explanation_text(make_explanation(), color=False, width=100)
    lines = text.splitlines()
    assert lines[0].startswith("mixed against int8 on bench-7: +3.9")
    assert "top1 1 → 0.7" in lines[0] + lines[1]
    assert "1. conv2 runs in fp32 in the candidate, in int8 in the baseline: +3.9" in text
    assert text.index("Why it is slower") < text.index("1. conv2") < text.index("Layers")
    assert "class 0 lost 12 right answers of 20 samples" in text
    assert all(len(line) <= 100 for line in lines)


def test_a_narrow_screen_keeps_to_its_width():
    assert all(len(line) <= 60 for line in explanation_text(make_explanation(), color=False, width=60).splitlines())


def test_the_record_survives_a_round_through_json(tmp_path):
    found = make_explanation()
    write_json(tmp_path / "found.json", found)
    assert read_json(tmp_path / "found.json", Explanation, FORMAT) == found


def test_the_page_has_the_causes_before_the_table_and_no_script():
    page = explanation_html(make_explanation())
    assert page.index("conv2 runs in fp32") < page.index("<h2>Layers</h2>")
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<rect") == 3


def test_the_page_is_well_formed():
    class Balanced(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Balanced()
    parser.feed(explanation_html(make_explanation()))
    assert parser.open == []


def test_what_a_device_said_is_shown_and_not_obeyed():
    hostile = "\x1b[31m<script>alert(1)</script>"
    before, after = [layer(hostile, 1e-3)], [layer(hostile, 3e-3)]
    baseline, candidate = profile(hostile, before), profile("b", after)
    found = make_explanation(
        cell=hostile, speed=speed_explanation(baseline, candidate, whole_differences_s(baseline, candidate))
    )
    assert "\x1b" not in explanation_text(found, color=False, width=100)
    page = explanation_html(found)
    assert "<script" not in page
    assert "\x1b" not in page


def test_a_failed_gate_tells_the_causes_below_its_figures():
    cell = CellVerdict(
        cell="b",
        baseline_cell="a",
        device="local",
        target="host",
        decision="FAIL",
        findings=(),
        explanation=make_explanation(),
    )
    text = " ".join(verdict_text(make_verdict(cell, decision="FAIL"), {}, color=False, width=100).split())
    assert "conv2 runs in fp32 in the candidate, in int8 in the baseline: +3.9" in text
