import json
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.render.charts import distribution_svg, panel_svg, sentinel_svg, strip_svg, strip_words
from edgedeploy.render.page_script import chart_data, page_script
from edgedeploy.render.series import Panel, Strip, distribution, panels, sentinels, strips
from edgedeploy.storage import sha256_bytes
from edgedeploy.units import format_bytes

from .render_samples import NO_CONDITIONS, make_run, make_runs
from .report_samples import with_extras


def test_a_distribution_is_of_the_inferences_that_count():
    baseline, candidate = make_runs(blocks=4, dropped_blocks={1: "hot"}).values()
    shown = distribution(baseline, candidate)
    assert shown.samples == (3 * 64, 3 * 64)
    kept = [one for visit in baseline.visits if not visit.dropped for burst in visit.bursts for one in burst.samples_s]
    middle = len(shown.times_s) // 2
    share = sum(one <= shown.times_s[middle] for one in kept) / len(kept)
    assert shown.baseline[middle] == share
    assert list(shown.baseline) == sorted(shown.baseline)
    assert shown.beyond[0] == sum(one > shown.times_s[-1] for one in kept)


def test_a_distribution_of_one_side_or_none():
    assert distribution(None, None) is None
    assert distribution(make_run("baseline", blocks=0), None) is None
    shown = distribution(make_run("baseline", blocks=2), None)
    assert (len(shown.baseline) > 2, shown.candidate) == (True, ())
    assert "candidate" not in ET.fromstring(distribution_svg(shown, "d")).findall("polyline")[0].get("class")


def test_conditions_are_shown_over_the_time_of_the_session():
    found = {panel.title: panel for panel in panels(*make_runs(blocks=3).values())}
    assert set(found) == {
        "hottest sensor", "slowest core's clock", "load average, 1 min", "free memory", "cores taken by others",
    }  # fmt: skip
    times_s = [time_s for time_s, _ in found["hottest sensor"].baseline]
    assert times_s[0] == 0
    assert times_s == sorted(times_s)
    assert len(times_s) == 6


def test_what_no_device_says_has_no_chart():
    run = make_run("baseline", blocks=2)
    visits = [replace(visit, before=NO_CONDITIONS, after=NO_CONDITIONS, foreign_load=None) for visit in run.visits]
    assert panels(replace(run, visits=tuple(visits)), None) == []


def test_strips_show_each_visit_once():
    found = {strip.title: strip for strip in strips(*make_runs(blocks=5, dropped_blocks={2: "hot"}).values())}
    assert [len(found[title].baseline) for title in ("load", "first inference", "peak memory")] == [4, 4, 3]
    drawn = ET.fromstring(strip_svg(found["load"], strip_words(found["load"])))
    assert [len([one for one in side if one.get("class") == "median"]) for side in drawn.findall("g")] == [4, 4]


def test_a_sentinel_that_both_runs_share_is_shown_once():
    baseline, candidate = (with_extras(run) for run in make_runs().values())
    (shown,) = sentinels(baseline, candidate)
    assert [block for block, _ in shown.readings] == [-1, 8]
    assert len(sentinels(baseline, replace(candidate, sentinel_sha256="6f" * 32))) == 2
    assert sentinel_svg(shown.readings[:1], "d") == ""
    assert "after 8 blocks" in sentinel_svg(shown.readings, "d")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e3, 1e12)), min_size=2, max_size=20))
def test_any_readings_are_drawn_inside_the_chart(readings):
    drawn = ET.fromstring(panel_svg(Panel("t", "", 1.0, "{:.3g}".format, tuple(sorted(readings)), ()), "d"))
    _, _, width, height = map(float, drawn.get("viewBox").split())
    points = [
        tuple(map(float, point.split(",")))
        for line in drawn.findall("polyline")
        for point in line.get("points").split()
    ]
    assert all(-1 <= x <= width + 1 and -1 <= y <= height + 1 for x, y in points)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e12), max_size=9), st.lists(st.floats(0, 1e12), min_size=1, max_size=9))
def test_any_figures_are_drawn_inside_the_strip(baseline, candidate):
    drawn = ET.fromstring(strip_svg(Strip("t", 1.0, "{:.3g}".format, tuple(baseline), tuple(candidate)), "d"))
    assert len(drawn.findall("g/circle")) == len(baseline)
    assert all(0 <= float(one.get("cx")) <= 360 for one in drawn.findall("g/circle"))


def test_chart_data_is_json_that_ends_no_element():
    shown = distribution(*make_runs().values())
    hostile = Panel("</script><img src=x onerror=alert(1)>&", "°C", 1.0, str, ((0.0, 1.0), (2.0, 3.0)), ((1.0, 5.0),))
    text = chart_data([("cell-1", shown, [hostile])])
    assert not {"<", ">", "&"} & set(text)
    (cell,) = json.loads(text)["cells"]
    (panel,) = cell["panels"]
    assert panel["title"] == hostile.title
    assert (panel["x"], panel["baseline"], panel["candidate"]) == ([0, 1, 2], [1, None, 3], [None, 5, None])
    assert cell["distribution"]["unit"] == "ms"
    assert math.isclose(cell["distribution"]["x"][-1], shown.times_s[-1] * 1e3, rel_tol=1e-5)
    assert json.loads(chart_data([("cell-1", None, [])]))["cells"][0]["distribution"] is None


# uPlot 1.6.32, as `npm pack uplot@1.6.32` brought it; its licence stands in the page with it.
@pytest.mark.parametrize(
    ("file", "digest"),
    [
        ("uPlot.iife.min.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
        ("uPlot.min.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
        ("uPlot.LICENSE.txt", "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd"),
    ],
)
def test_the_plotting_library_is_the_one_that_was_published(file, digest):
    from edgedeploy.render import page_script as module

    assert sha256_bytes((module._VENDOR / file).read_bytes()) == digest


def test_the_script_ends_neither_its_element_nor_its_section():
    script = page_script()
    assert "</" not in script.text
    assert script.text.count("]]>") == 1
    assert script.text.endswith("//]]>")
    assert "The MIT License" in script.text
    assert "unsafe-inline" not in script.policy.split("script-src")[1].split(";")[0]


def test_the_axis_of_memory_has_round_mebibytes():
    peaks = tuple(mebibytes * 2.0**20 for mebibytes in (61.8, 62.1, 63.5))
    drawn = ET.fromstring(strip_svg(Strip("peak memory", 2.0**-20, format_bytes, peaks, ()), "d"))
    assert [one.text for one in drawn.findall("text")] == ["62 MiB", "64 MiB"]
