import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from html import unescape

import numpy as np
import pytest
from msgspec.structs import replace

from edgedeploy.records.verdict import Finding
from edgedeploy.render.html import MOST_PICTURES, report_html
from edgedeploy.render.page_script import page_script

from .render_samples import MARGINS, make_artifacts, make_cell, make_run, make_runs, make_verdict
from .report_samples import COMMAND, rich_runs, rich_verdict


def _parsed(page):
    """The page is written so that it is XML too: a tag left open or an escape left out is an error here."""
    return ET.fromstring(page.replace("<!DOCTYPE html>", "").encode())


def _visits(page):
    return [element for element in _parsed(page).iter("g") if element.get("class", "").startswith("visit ")]


def _words(page):
    body = _parsed(page).find("body")
    for script in body.findall("script"):
        body.remove(script)
    return " ".join("".join(body.itertext()).split())


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


def test_the_page_needs_no_network_and_runs_only_the_script_that_its_policy_names():
    page = report_html(rich_verdict(), rich_runs(), make_artifacts())
    script = page_script()
    own = page.replace(script.text, "").replace(script.style, "")
    assert "http://" not in own
    assert "https://" not in own
    assert "//" not in re.sub(r"<style>.*</style>", "", own, flags=re.DOTALL)
    assert "url(" not in own.replace("url(#", "")
    root = _parsed(page)
    assert not [element.tag for element in root.iter() if element.tag in ("link", "iframe", "object", "form")]
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]
    assert all(one.get("src").startswith("data:image/png;base64,") for one in root.iter() if one.get("src"))
    data, code = root.iter("script")
    assert data.get("type") == "application/json"
    digest = base64.b64encode(
        hashlib.sha256(page.split("<script>")[1].split("</script>")[0].encode()).digest()
    ).decode()
    (policy,) = [one.get("content") for one in root.iter("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy
    assert "uPlot" in code.text


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
    assert len(list(_parsed(page).iter("script"))) == 2
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


def pixels_of(digest, index):
    return {"image": np.random.default_rng(index).integers(0, 256, (1, 1, 28, 28), np.uint8)}


def test_changed_answers_are_shown_class_by_class_and_as_pictures():
    runs = rich_runs()
    page = report_html(rich_verdict(), runs, make_artifacts(), sample_of=pixels_of)
    before, after = (runs[name].outputs.predictions for name in ("run-b", "run-c"))
    changed = sum(old != new for old, new in zip(before, after, strict=True))
    assert f"{changed} of 2,000 answers changed" in _words(page)
    table = next(one for one in _parsed(page).iter("table") if one.get("class") == "flips")
    counts = [int(cell.text) for cell in table.iter("td") if (cell.text or "–").strip() not in ("", "–")]
    assert sum(counts) == changed
    pictures = list(_parsed(page).iter("img"))
    assert len(pictures) == 3 * min(MOST_PICTURES, changed)
    assert all(picture.get("alt").startswith("sample ") for picture in pictures)


@pytest.mark.parametrize(
    ("sample", "said"),
    [(None, "is not in this machine's cache"), ({"image": np.zeros((1, 40, 16, 2), np.float32)}, "are not images")],
)
def test_it_is_said_why_there_are_no_pictures(sample, said):
    page = report_html(rich_verdict(), rich_runs(), {}, sample_of=lambda digest, index: sample)
    assert said in _words(page)
    assert not list(_parsed(page).iter("img"))


def test_pictures_of_many_cells_do_not_fill_the_page():
    cells = [make_cell(cell=f"cell {number}") for number in range(12)]
    page = report_html(make_verdict(*cells), rich_runs(), {}, sample_of=pixels_of)
    assert len(list(_parsed(page).iter("img"))) <= 96


def test_an_explanation_limits_classes_and_what_the_gate_knows_of_itself_are_shown():
    words = _words(report_html(rich_verdict(), rich_runs(), make_artifacts()))
    for expected in (
        "3 conversions between float and int8 cost 310 µs an inference",
        "two groups became faster by 40 µs",
        "the error jumps at conv_7",
        "conv_0 + relu_0",
        "one pass was dropped",
        "the limit lies inside",
        "class 3 lost 20 points of 200 samples",
        "needs 90 samples",
        "1 of 240 gates of something against itself said FAIL",
        "pi5-desk",
        "The sentinel",
        "the slowest operators, watched one by one",
        COMMAND.replace(" --", " \\ --"),
        "edgedeploy gate run-c \\ --baseline run-b \\ --margin accuracy=-1pt",
    ):
        assert expected in words


def test_the_charts_of_a_page_have_their_data():
    page = report_html(rich_verdict(), rich_runs(), {})
    root = _parsed(page)
    charts = [one.get("data-chart") for one in root.iter("div") if one.get("data-chart")]
    data = json.loads(next(root.iter("script")).text)
    assert [cell["cell"] for cell in data["cells"]] == ["cell-1", "cell-2", "cell-3"]
    assert charts.count("distribution") == sum(cell["distribution"] is not None for cell in data["cells"]) == 3
    assert charts.count("panel") == sum(len(cell["panels"]) for cell in data["cells"]) > 3


def test_a_visit_tells_its_times_conditions_and_why_it_was_dropped():
    page = report_html(make_verdict(), make_runs(dropped_blocks={3: "too hot"}), {})
    dropped = next(visit for visit in _visits(page) if "dropped" in visit.get("class"))
    lines = dropped.findtext("title").splitlines()
    assert lines[0].startswith("baseline, block 3, visit ") or lines[0].startswith("candidate, block 3, visit ")
    assert lines[1] == "dropped: too hot"
    assert any(line.startswith("p50 ") for line in lines)
    assert any("°C" in line for line in lines)
    assert any("GHz" in line for line in lines)


def test_many_inferences_do_not_make_the_page_heavy():
    cells = [make_cell(cell=f"cell {number}") for number in range(20)]
    page = report_html(make_verdict(*cells), make_runs(blocks=4, samples=300), {})
    assert len(_visits(page)) == 20 * 8
    assert 'class="dots"' not in page
