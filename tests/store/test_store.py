"""The history's store on SQLite and on PostgreSQL: the same tests for both."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from edgedeploy.errors import UsageError
from edgedeploy.history import reading
from edgedeploy.history.store import METRICS
from edgedeploy.records.history import CellKey, cell_text
from edgedeploy.render.figures import run_figures
from edgedeploy.results import load_run
from tests.store.history_samples import make_run, save, save_passport, save_series, save_verdict, utc


def test_every_figure_of_a_run_is_the_one_that_reports_show(door):
    path = save(door.results, make_run(0, 0.004))
    figures = run_figures(load_run(path))
    store, brought = door.taken_in()
    (row,) = store.cells()
    assert brought.runs == 1
    assert row.values == {
        "latency_p50": figures.p50_s,
        "latency_p95": figures.p95_s,
        "load_time": figures.load_s,
        "first_inference": figures.first_inference_s,
        "artifact_size": float(figures.size_bytes),
    }
    assert row.last == figures.p50_s
    store.close()


def test_figures_that_a_run_lacks_are_missing_and_all_that_it_has_are_there(door):
    from tests.unit.render_samples import make_run as whole_run

    path = save(door.results, whole_run("candidate", samples=320))
    figures = run_figures(load_run(path))
    store, _ = door.taken_in()
    (row,) = store.cells("peak_memory")
    assert set(row.values) == set(METRICS)
    assert row.values["latency_p95"] == figures.p95_s
    assert row.values["peak_memory"] == figures.peak_rss_bytes
    assert row.values["accuracy"] == load_run(path).outputs.value
    (point,) = store.trend(row.key, "accuracy")
    assert point.evaluation == "top1 of fashion-mnist (da7ada7a)"
    assert row.key.options == "graph_optimization=all, threads=4"
    store.close()


def test_dropped_and_throttled_visits_do_not_count(door):
    from tests.unit.judge_samples import make_visit

    visits = (
        make_visit(0, 0.004),
        make_visit(1, 0.4, dropped="a cable was pulled"),
        make_visit(2, 0.4, throttled=True),
    )
    path = save(door.results, make_run(0, visits=visits))
    store, _ = door.taken_in()
    (row,) = store.cells()
    assert row.last == run_figures(load_run(path)).p50_s == 0.004
    assert store.trend(row.key, "latency_p50")[0].visits == 1
    store.close()


def test_level_that_changed_is_named_with_the_release_that_did_it(door):
    paths = [save(door.results, make_run(number, 0.0040 + 0.00001 * (number % 3))) for number in range(12)]
    paths += [
        save(door.results, make_run(12 + number, 0.0050 + 0.00001 * (number % 3), sha256="ab" * 32))
        for number in range(8)
    ]
    save_verdict(door.results, paths[11], number=11, name="demo 1.3")
    save_verdict(door.results, paths[12], number=12, name="demo 1.4", decision="FAIL")
    store, _ = door.taken_in()
    (row,) = store.cells()
    assert row.change.index == 12
    assert row.since == 8
    assert row.change.change == pytest.approx(0.25, abs=0.01)
    assert row.change.low < 0.25 < row.change.high
    (cause,) = row.change.causes
    assert cause.what == "artifact"
    assert cause.before.endswith("(demo 1.3, PASS)")
    assert cause.after == "abababab (demo 1.4, FAIL)"
    assert (row.decision, row.release) == ("FAIL", "demo 1.4")
    whole = store.whole_trend(row.key, "latency_p50")
    assert [change.index for change in whole.changes] == [12]
    shown = store.whole_trend(row.key, "latency_p50", last=10)
    assert [change.index for change in shown.changes] == [2]
    assert shown.hidden == 10
    assert store.trend(row.key, "latency_p50", last=3) == list(whole.points[-3:])
    store.close()


def test_nothing_is_read_again_that_has_not_changed(door, monkeypatch):
    save_series(door.results, [0.004] * 5)
    first, brought = door.taken_in()
    first.close()
    monkeypatch.setattr(reading, "read", lambda *_: pytest.fail("a file was read again"))
    again, nothing = door.taken_in()
    assert (brought.runs, brought.known) == (5, 0)
    assert (nothing.runs, nothing.known, nothing.removed) == (0, 5, 0)
    assert len(again.trend(again.cells()[0].key, "latency_p50")) == 5
    again.close()


def test_run_that_is_gone_is_forgotten_by_an_index_and_kept_by_a_store(door):
    paths = save_series(door.results, [0.004] * 4)
    verdict = save_verdict(door.results, paths[0])
    door.taken_in()[0].close()
    paths[0].unlink()
    verdict.unlink()
    store, brought = door.taken_in()
    assert brought.removed == (0 if door.is_shared else 2)
    assert store.cells()[0].runs == (4 if door.is_shared else 3)
    assert len(store.verdicts()) == (1 if door.is_shared else 0)
    store.close()


def test_file_that_cannot_be_used_is_named_and_hides_no_other(door):
    good = save_series(door.results, [0.004] * 2)
    folder = good[0].parent
    edited = save(door.results, make_run(5))
    edited.write_text(edited.read_text().replace('"demo-int8"', '"demo-fp32"'))
    document = json.loads(good[0].read_text())
    wrong = {
        "newer.json": json.dumps({**document, "format": "edgedeploy.run/2"}),
        "verdict.json": json.dumps({**document, "format": "edgedeploy.verdict/1"}),
        "truncated.json": good[0].read_text()[:500],
        "deep.json": "[" * 100_000,
        "list.json": "[]",
        "time.json": json.dumps({**document, "started_utc": "yesterday"}),
        "size.json": json.dumps({**document, "artifact": {**document["artifact"], "size_bytes": 10**30}}),
        "bytes.json": "\udcff",
        "missing.json": json.dumps({key: value for key, value in document.items() if key != "visits"}),
    }
    for name, text in wrong.items():
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    store, brought = door.taken_in()
    skipped = {one.path.rpartition("/")[2]: one.why for one in brought.skipped}
    assert set(skipped) == {*wrong, edited.name}
    assert "edited by hand" in skipped[edited.name]
    assert "newer edgedeploy" in skipped["newer.json"]
    assert "edgedeploy.verdict/1" in skipped["verdict.json"]
    assert "not valid JSON" in skipped["truncated.json"]
    assert "yesterday" in skipped["time.json"]
    assert store.cells()[0].runs == 2
    again, known = store, store.push() if door.is_shared else store.refresh()
    assert known.skipped == brought.skipped
    again.close()


def test_run_under_another_name_is_taken_as_it_is(door):
    path = save(door.results, make_run(0))
    path.rename(path.with_name("kept-from-1.0.json"))
    store, brought = door.taken_in()
    assert (brought.runs, brought.skipped) == (1, ())
    store.close()


def test_copy_of_a_run_counts_once(door):
    path = save(door.results, make_run(0))
    (path.parent / "copy.json").write_bytes(path.read_bytes())
    store, _ = door.taken_in()
    assert store.cells()[0].runs == 1
    (path.parent / "copy.json").unlink()
    if not door.is_shared:
        assert store.refresh().removed == 1
        assert store.cells()[0].runs == 1
    store.close()


def test_baseline_measured_again_is_no_point_of_the_trend(door):
    for number in range(4):
        save(door.results, make_run(number, 0.004, side="candidate"))
        save(door.results, make_run(number, 0.008, side="baseline", sha256="0d" * 32))
    save(door.results, make_run(9, 0.005, side="baseline", precision="fp32"))
    store, _ = door.taken_in()
    by_precision = {row.key.precision: row for row in store.cells()}
    assert by_precision["int8"].recent == (0.004,) * 4
    assert by_precision["fp32"].recent == (0.005,)
    store.close()


def test_cells_differ_by_every_word_of_their_key_and_by_nothing_else(door):
    save(door.results, make_run(0))
    save(door.results, make_run(1, cell="renamed", runtime="onnxruntime 1.24.0"))
    for changes in ({"device": "pi4"}, {"options": {"threads": 1}}, {"precision": "fp16"}, {"model": "other"}):
        save(door.results, make_run(2, **changes))
    store, _ = door.taken_in()
    rows = store.cells()
    assert sorted(row.runs for row in rows) == [1, 1, 1, 1, 2]
    assert next(row for row in rows if row.runs == 2).name == "renamed"
    assert [row.key.device for row in store.cells(device="pi4")] == ["pi4"]
    store.close()


def test_person_names_a_cell_by_name_model_or_part_of_it(door):
    save(door.results, make_run(0))
    save(door.results, make_run(1, device="pi4"))
    save(door.results, make_run(2, cell="other-fp32", model="other", precision="fp32"))
    store, _ = door.taken_in()
    assert store.cell_named("demo-int8", device="pi4").device == "pi4"
    assert store.cell_named("other").precision == "fp32"
    assert store.cell_named("onnxruntime/fp32").model == "other"
    key = store.cell_named("other-fp32")
    assert store.cell_named(cell_text(key)) == key
    with pytest.raises(UsageError, match=r"fits 2 cells: .*pi4.*pi5-desk.*--device"):
        store.cell_named("demo-int8")
    with pytest.raises(UsageError, match='did you mean "other-fp32"'):
        store.cell_named("other-fp23")
    with pytest.raises(UsageError, match="did you mean"):
        store.cells("latency_p5")
    assert store.trend(CellKey(model="?", target="", backend="", precision="", device=""), "latency_p50") == []
    store.close()


def test_verdicts_come_newest_first_and_page_by_page_and_whole(door):
    run = save(door.results, make_run(0))
    for number in range(5):
        save_verdict(door.results, run, number=number, name=f"demo 1.{number}", decision=("PASS", "FAIL")[number % 2])
    (door.results / "reports" / "notes.json").write_text('{"format": "somebody.else/1"}')
    store, brought = door.taken_in()
    assert (brought.verdicts, brought.skipped) == (5, ())
    assert [one.name for one in store.verdicts(last=2)] == ["demo 1.4", "demo 1.3"]
    assert [one.name for one in store.verdicts(last=2, offset=4)] == ["demo 1.0"]
    assert [one.name for one in store.verdicts(last=0, offset=3)] == ["demo 1.1", "demo 1.0"]
    newest = store.verdicts(last=1)[0]
    assert newest.cells[0].cell == "demo-int8"
    whole = store.verdict(newest.id)
    assert (whole.name, whole.decision) == ("demo 1.4", "PASS")
    assert len(whole.cells[0].findings) > 0
    with pytest.raises(UsageError, match="no verdict"):
        store.verdict("0" * 64)
    store.close()


def test_devices_with_their_sentinel_and_newest_passport(door):
    for number in range(8):
        save(door.results, make_run(number, sentinel_s=0.001 + 0.000001 * (number % 3)))
    for number in range(8, 16):
        save(door.results, make_run(number, sentinel_s=0.0013 + 0.000001 * (number % 3)))
    save(door.results, make_run(3, device="pi4"))
    save_passport(door.results, "pi5-desk", number=1, cv=0.03)
    newest = save_passport(door.results, "pi5-desk", number=2, cv=0.04)
    store, brought = door.taken_in()
    assert brought.passports == 2
    pi4, pi5 = store.devices()
    assert (pi4.device, pi4.runs, pi4.sentinel_s, pi4.passport) == ("pi4", 1, None, "")
    assert (pi5.device, pi5.runs, pi5.cells, pi5.last_seen_utc) == ("pi5-desk", 16, 1, utc(15))
    assert pi5.sentinel_s == pytest.approx(0.0013)
    assert pi5.sentinel_change.index == 8
    assert (pi5.passport, pi5.run_to_run_cv) == (newest.stem, 0.04)
    store.close()


def test_words_that_a_database_or_a_terminal_cannot_take_are_cleaned(door):
    save(door.results, make_run(0, cell="a\x00b\x1b[31m", device="x" * 5000))
    store, brought = door.taken_in()
    assert (brought.runs, brought.skipped) == (1, ())
    (row,) = store.cells()
    assert row.name == "ab[31m"
    assert len(row.key.device) == 300
    assert [point.value for point in store.trend(row.key, "latency_p50")] == [row.last]
    store.close()


_WRITER = """
import sys
from pathlib import Path
from edgedeploy.history.store import open_store

results, url, lab = sys.argv[1:]
sys.stdin.readline()
with open_store(Path(results), url, lab=lab) as store:
    brought = store.push() if url else store.refresh()
print(len(store.where) > 0, brought.skipped)
"""


@dataclass
class Writer:
    process: subprocess.Popen

    @classmethod
    def start(cls, door, lab: str) -> "Writer":
        command = [sys.executable, "-c", _WRITER, str(door.results), door.url, lab]
        return cls(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )

    def finished(self) -> str:
        said, complained = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, complained
        return said


def test_two_writers_at_once_leave_every_run_once(door):
    """They also make the tables at once, of a database that has none."""
    save_series(door.results, [0.004] * 300)
    for number in range(20):
        save_verdict(door.results, door.results / "none.json", number=number, name=f"demo {number}")
    writers = [Writer.start(door, lab) for lab in ("bench", "bench", "other")]
    for writer in writers:
        writer.process.stdin.write("\n")
        writer.process.stdin.flush()
    for writer in writers:
        assert writer.finished() == "True ()\n"
    store = door.open()
    assert sum(row.runs for row in store.cells()) == 300
    assert len(store.verdicts(last=0)) == 20
    assert all(len(one.cells) == 1 for one in store.verdicts(last=0))
    store.close()
