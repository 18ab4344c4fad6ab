import re
import xml.etree.ElementTree as ET
from html import unescape

import pytest
from msgspec.structs import replace

from edgedeploy.records.verdict import Finding
from edgedeploy.render.html import report_html

from .render_samples import MARGINS, make_artifacts, make_cell, make_run, make_runs, make_verdict


def _parsed(page):
    """The page is written so that it is XML too: a tag left open or an escape left out is an error here."""
    return ET.fromstring(page.replace("<!DOCTYPE html>", "").encode())


def _visits(page):
    return [element for element in _parsed(page).iter("g") if element.get("class", "").startswith("visit ")]


def _words(page):
    return " ".join("".join(_parsed(page).find("body").itertext()).split())


def test_every_metric_reason_and_note_appears():
    cell = make_cell("INCONCLUSIVE")
    words = _words(report_html(make_verdict(cell, decision="INCONCLUSIVE"), make_runs(), make_artifacts()))
    for finding in cell.findings:
        assert finding.metric.replace("_", " ") in words
        assert finding.reason in words
    assert "about 9 more blocks, or a quieter device" in words
    assert "stopped at the second look" in words


def test_every_decision_is_told_in_words():
    for decision in ("PASS", "FAIL", "INCONCLUSIVE"):
        root = _parsed(report_html(make_verdict(make_cell(decision), decision=decision), make_runs(), {}))
        assert "".join(root.find(".//h1").itertext()).strip() == decision


def test_the_page_needs_no_network_and_runs_no_script():
    page = report_html(make_verdict(), make_runs(), make_artifacts())
    assert "http://" not in page
    assert "https://" not in page
    assert "//" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)
    assert "url(" not in page.replace("url(#", "")
    root = _parsed(page)
    assert not [element.tag for element in root.iter() if element.tag in ("script", "link", "img", "iframe", "object")]
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on") or name == "src"]


@pytest.mark.parametrize("blocks", [1, 8, 150])
def test_every_visit_is_drawn(blocks):
    page = report_html(make_verdict(), make_runs(blocks=blocks, samples=16), {})
    assert len(_visits(page)) == 2 * blocks


def test_dropped_visits_are_hatched_and_their_reason_is_told():
    page = report_html(make_verdict(), make_runs(dropped_blocks={3: "too <hot>"}), {})
    dropped = [visit for visit in _visits(page) if "dropped" in visit.get("class")]
    assert len(dropped) == 2
    assert all(visit.find("rect").get("fill") == "url(#hatch)" for visit in dropped)
    assert "✕1 dropped: too <hot>" in _words(page)


def test_every_drawing_has_a_title_and_a_description():
    root = _parsed(report_html(make_verdict(), make_runs(), make_artifacts()))
    drawings = [svg for svg in root.iter("svg") if svg.get("role") == "img"]
    assert len(drawings) >= 2 + len(make_cell().findings)
    assert all(svg.findtext("title") and svg.findtext("desc") for svg in drawings)


def test_ids_are_unique_and_links_have_targets():
    root = _parsed(report_html(make_verdict(make_cell(), make_cell(cell="b"), make_cell(cell="c")), make_runs(), {}))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    links = [element.get("href") for element in root.iter("a")]
    assert len(links) == 3
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_hostile_text_is_shown_and_not_obeyed():
    hostile = "\"'><script>alert(1)</script>{{ 7 * 7 }}\x00\x1b[31m\ud800" + "x" * 500
    shown = unescape(hostile).replace("\x00", "").replace("\x1b", "").replace("\ud800", "")
    cell = make_cell(cell=hostile, baseline_cell=hostile, device=hostile, target=hostile, notes=(hostile,))
    runs = {
        "run-b": make_run("baseline", name=hostile, events=(hostile,), dropped_blocks={1: hostile}),
        "run-c": make_run("candidate", name=hostile),
    }
    page = report_html(make_verdict(cell, name=hostile), runs, make_artifacts())
    assert not list(_parsed(page).iter("script"))
    assert shown in _words(page)
    page.encode()


def test_the_recipe_names_digests_tools_and_fidelity():
    artifacts = make_artifacts()
    words = _words(report_html(make_verdict(), make_runs(), artifacts))
    for artifact in artifacts.values():
        for expected in (artifact.sha256, artifact.key, artifact.recipe.model_sha256, "onnxruntime 1.23.0"):
            assert expected in words
    assert "33.2 dB" in words


def test_manifests_are_found_whatever_their_keys():
    renamed = {f"cell {number}": artifact for number, artifact in enumerate(make_artifacts().values())}
    assert "33.2 dB" in _words(report_html(make_verdict(), make_runs(), renamed))


def test_missing_runs_and_manifests_are_said_to_be_missing():
    words = _words(report_html(make_verdict(make_cell(baseline_run="gone", candidate_run="")), {}, {}))
    assert "gone, not at hand when this page was made" in words
    assert "candidate: no run" in words
    assert "The runs hold no timed inferences, or are not at hand." in words


def test_runs_without_visits_outputs_and_memory_render():
    def emptied(side):
        return replace(make_run(side, blocks=0), memory=(), outputs=None, boundary=None)

    runs = {"run-b": emptied("baseline"), "run-c": emptied("candidate")}
    assert not _visits(report_html(make_verdict(), runs, {}))


def test_a_visit_that_died_before_its_first_sample_has_its_place():
    runs = make_runs(blocks=2)
    empty = make_run("candidate", blocks=2, samples=0)
    page = report_html(make_verdict(), {**runs, "run-c": empty}, {})
    assert sum("no samples" in visit.findtext("title") for visit in _visits(page)) == 2


def test_findings_without_numbers_render():
    empty = Finding(
        metric="latency_p50",
        decision="INCONCLUSIVE",
        baseline_value=None,
        candidate_value=None,
        effect=None,
        margin=MARGINS["latency_p50"],
        reason="no block counts",
    )
    exact = Finding(
        metric="artifact_size",
        decision="PASS",
        baseline_value=0,
        candidate_value=0,
        effect=0.0,
        margin=None,
        reason="nothing",
    )
    cell = make_cell("INCONCLUSIVE", findings=(empty, exact))
    assert "no block counts" in _words(report_html(make_verdict(cell, decision="INCONCLUSIVE"), make_runs(), {}))


def test_runs_of_two_sessions_are_said_not_to_be_interleaved():
    runs = {"run-b": make_run("baseline"), "run-c": make_run("candidate", session="another")}
    words = _words(report_html(make_verdict(), runs, {}))
    assert "were not interleaved" in words
    assert "block by block" not in words


def test_a_verdict_without_cells_renders():
    empty = replace(make_verdict(), cells=(), decision="INCONCLUSIVE")
    assert "No cell was judged." in _words(report_html(empty, {}, {}))


def test_two_renderings_are_the_same_bytes():
    assert report_html(make_verdict(), make_runs(), {}) == report_html(make_verdict(), make_runs(), {})
