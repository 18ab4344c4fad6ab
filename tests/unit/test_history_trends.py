"""Whose change it is, what else changed there, and how that is told."""

import math
import random

import pytest

from edgedeploy.history.trends import newest_of, trend_of
from edgedeploy.records.history import CellKey, CellRow, Point, Refreshed, Skipped
from edgedeploy.render.trend_figures import refreshed_sentences
from edgedeploy.render.trend_html import history_html
from edgedeploy.render.trend_svg import sentinel_svg, trend_svg
from edgedeploy.render.trend_text import cells_text, trend_text

KEY = CellKey(model="demo", target="board", backend="fake", precision="int8", device="pi5")


def point(number: int, value: float, **changes) -> Point:
    fields = {
        "utc": f"2026-09-{1 + number // 24:02d}T{number % 24:02d}:00:00Z",
        "value": value,
        "digest": f"{number:064x}",
        "run": f"20260901T000000Z-{number:08x}",
        "path": "",
        "cell": "demo-int8",
        "session": f"s{number}",
        "side": "single",
        "artifact_sha256": "a" * 64,
        "edgedeploy": "0.1.0",
        "runtime": "fake 1.0",
        "kernel": "6.1",
        "driver": "",
        "system": "Debian 12",
        "visits": 8,
        **changes,
    }
    return Point(**fields)


def trend(cell: float, beside: float | None, *, count: int = 30, start: int = 15, **changed):
    """A trend whose cell and sentinel change at a place, both by a fraction, and some fields of a run with them."""
    draws = random.Random(3)
    points = []
    for number in range(count):
        is_new = number >= start
        level = 0.004 * math.exp(draws.gauss(0, 0.01)) * (1 + cell if is_new else 1)
        sentinel_s = 0.001 * math.exp(draws.gauss(0, 0.01)) * (1 + (beside or 0.0) if is_new else 1)
        reading = {} if beside is None else {"sentinel_s": sentinel_s, "sentinel": "5e on fake"}
        points.append(point(number, level, **{**reading, **(changed if is_new else {})}))
    return trend_of(KEY, "latency_p50", points)


@pytest.mark.parametrize(
    ("cell", "sentinel", "changed", "whose", "says"),
    [
        (0.20, 0.20, {"kernel": "6.6"}, "board", "it is the board"),
        (0.20, 0.20, {}, "board", "it is the board"),
        (0.20, 0.0, {"artifact_sha256": "b" * 64}, "model", "the sentinel stayed"),
        (0.20, 0.0, {"runtime": "fake 2.0"}, "model", "the runtime changed"),
        (0.20, 0.0, {}, "unknown", "nothing that decides"),
        (0.30, 0.10, {"artifact_sha256": "b" * 64}, "both", "another amount"),
        (0.20, -0.10, {"artifact_sha256": "b" * 64}, "model", "the other way"),
        (0.20, None, {"artifact_sha256": "b" * 64}, "unknown", "too few runs"),
        (0.20, 0.20, {"sentinel": "5e on fake 2.0"}, "unknown", "another one"),
        (-0.20, -0.20, {}, "board", "it is the board"),
    ],
)
def test_sentinel_tells_the_board_from_the_model(cell, sentinel, changed, whose, says):
    (change,) = trend(cell, sentinel, **changed).changes
    assert abs(change.index - 15) <= 1
    assert change.low < cell < change.high
    assert change.whose == whose
    assert says in change.why


def test_what_changed_with_it_is_named_the_likeliest_first():
    (change,) = trend(0.2, None, kernel="6.6", driver="550", artifact_sha256="b" * 64, edgedeploy="0.2.0").changes
    assert [(one.what, one.before, one.after) for one in change.causes] == [
        ("artifact", "aaaaaaaa", "bbbbbbbb"),
        ("edgedeploy", "0.1.0", "0.2.0"),
        ("driver", "none", "550"),
        ("kernel", "6.1", "6.6"),
    ]


def test_cause_is_found_where_noise_has_moved_the_place_by_a_run():
    points = [point(number, 0.004 * (1.2 if number >= 15 else 1.0 + 0.001 * (number % 2))) for number in range(30)]
    late = [one if number < 16 else point(number, one.value, runtime="fake 2.0") for number, one in enumerate(points)]
    (change,) = trend_of(KEY, "latency_p50", late).changes
    assert change.index == 15
    assert [one.what for one in change.causes] == ["runtime"]


def test_times_that_are_not_positive_do_not_stop_the_others():
    points = [point(number, 0.004 if number % 5 else 0.0) for number in range(20)]
    found = trend_of(KEY, "latency_p50", points)
    assert len(found.points) == 20
    assert found.changes == ()
    assert trend_svg(found).count("<circle") == 20
    assert trend_text(found, color=False, width=80)


def test_size_and_accuracy_change_with_every_value_and_say_in_what():
    sizes = [
        point(number, 100.0 if number < 4 else 110.0, artifact_sha256="ab"[number >= 4] * 64) for number in range(8)
    ]
    (change,) = trend_of(KEY, "artifact_size", sizes).changes
    assert (change.change, change.whose, change.low) == (pytest.approx(0.1), "model", None)
    scores = [
        point(number, 0.91 if number < 4 else 0.89, evaluation=f"top1 of set ({number // 4})") for number in range(8)
    ]
    found = trend_of(KEY, "accuracy", scores)
    assert (found.worse, found.changes[0].change) == ("down", pytest.approx(-0.02))
    assert found.changes[0].causes[0].what == "evaluation set"
    assert "-2.00 pt, for the worse" in trend_text(found, color=False, width=100)
    errors = [point(number, 0.1, evaluation="mae of set (0)") for number in range(3)]
    assert trend_of(KEY, "accuracy", errors).worse == "up"


def test_newest_run_that_stands_out_is_said_and_is_no_change():
    points = [point(number, 0.004 + 0.00001 * (number % 3)) for number in range(20)] + [point(20, 0.006)]
    found = trend_of(KEY, "latency_p50", points)
    assert found.changes == ()
    assert found.set_aside == (20,)
    assert "stands out by +4" in found.note
    assert "×" in trend_text(found, color=False, width=100)


def test_few_runs_are_said_to_be_few():
    assert "that takes 6, and there are 1" in trend_of(KEY, "latency_p50", [point(0, 0.004)]).note
    assert "no run of this cell" in trend_text(trend_of(KEY, "latency_p99", []), color=False, width=80)


def test_newest_part_keeps_what_lies_in_it():
    whole = trend(0.2, None)
    index = whole.changes[0].index
    part = newest_of(whole, 30 - index)
    assert [change.index for change in part.changes] == [0]
    assert part.hidden == index
    assert newest_of(whole, 5).changes == ()
    assert newest_of(whole, 0) == newest_of(whole, 99) == whole


def row_of(found, **changes) -> CellRow:
    change = found.changes[-1] if found.changes else None
    fields = {
        "key": KEY, "name": "demo-int8", "runs": len(found.points), "first_utc": found.points[0].utc,
        "last_utc": found.points[-1].utc, "metric": found.metric, "worse": found.worse,
        "last": found.points[-1].value, "values": {}, "recent": tuple(one.value for one in found.points),
        "change": change, "since": 15, "decision": "FAIL", "release": "demo 1.4",
    }  # fmt: skip
    return CellRow(**{**fields, **changes})


def test_page_shows_every_run_and_change_and_needs_no_network():
    found = trend(0.2, 0.2, artifact_sha256="b" * 64)
    page = history_html(
        [(row_of(found), found), (row_of(found, name="<script>alert(1)</script>\x07"), found)], made_utc="now"
    )
    assert page.count('class="run') == 60
    assert page.count('class="reading"') == 60
    assert page.count('class="change worse"') == 2
    assert "<script" not in page
    assert "\x07" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "FAIL" in page and "demo 1.4" in page
    assert "this figure" in history_html([], made_utc="now")


def test_drawings_stand_where_there_is_something_to_draw():
    without = trend(0.2, None)
    assert sentinel_svg(without) == ""
    assert "<circle" in sentinel_svg(trend(0.2, 0.2))
    assert trend_svg(trend_of(KEY, "latency_p50", [])) == ""
    one = trend_of(KEY, "peak_memory", [point(0, 5e6)])
    assert trend_svg(one).count("<circle") == 1


def test_table_says_by_whom_and_since_when():
    found = trend(0.2, 0.0, artifact_sha256="b" * 64)
    text = cells_text([row_of(found)], color=False, width=160)
    assert "+19.80 %" in text and "on 2026-09-01" in text and "artifact" in text and "FAIL, demo 1.4" in text
    assert cells_text([], color=False, width=80) == "no runs yet"


@pytest.mark.parametrize("width", [20, 60, 400])
def test_plot_fits_its_terminal(width):
    found = trend(0.2, None, count=300, start=150)
    plotted = trend_text(found, color=False, width=width).split("\n\n")[1].splitlines()
    assert max(map(len, plotted)) <= max(width, 22) + 12
    assert sum(line.count("▲") for line in plotted) == 1


def test_files_that_are_left_out_are_counted_and_the_first_named():
    skipped = tuple(Skipped(path=f"runs/{number}.json", why="it was edited") for number in range(5))
    told = refreshed_sentences(Refreshed(skipped=skipped, rebuilt="it was damaged", runs=3), "the index x")
    assert told[0] == "the index x was made anew from 3 runs and 0 verdicts: it was damaged"
    assert told[1].startswith("left out 5 files: runs/0.json: it was edited; ")
    assert told[1].endswith("and 2 more")
