import csv
import io

from msgspec.structs import replace

from edgedeploy.render.samples_csv import COLUMNS, samples_csv

from .render_samples import make_cell, make_runs, make_verdict


def _read(verdict, runs):
    return list(csv.DictReader(io.StringIO("".join(samples_csv(verdict, runs)))))


def test_every_inference_is_read_back_exactly_as_it_was_measured():
    runs = make_runs(blocks=3)
    rows = _read(make_verdict(), runs)
    for side, name in (("baseline", "run-b"), ("candidate", "run-c")):
        visits = runs[name].visits
        for phase, expected in {
            "first": [visit.first_inference_s for visit in visits],
            "warm-up": [one for visit in visits for one in visit.warm_up_samples_s],
            "timed": [one for visit in visits for burst in visit.bursts for one in burst.samples_s],
        }.items():
            found = [float(row["seconds"]) for row in rows if row["side"] == side and row["phase"] == phase]
            assert found == expected


def test_a_row_says_where_it_was_measured():
    rows = _read(make_verdict(), make_runs(blocks=2, dropped_blocks={1: "too hot"}))
    assert tuple(rows[0]) == COLUMNS
    timed = [row for row in rows if row["phase"] == "timed" and row["side"] == "candidate"]
    assert {(row["cell"], row["run"]) for row in timed} == {("pruned-int8", "run-c")}
    assert {(row["block"], row["dropped"]) for row in timed} == {("0", ""), ("1", "too hot")}
    assert [(row["pair"], row["index"]) for row in timed[:9]] == [*(("0", str(n)) for n in range(8)), ("1", "0")]


def test_a_missing_run_has_no_rows():
    runs = make_runs()
    del runs["run-b"]
    assert {row["side"] for row in _read(make_verdict(), runs)} == {"candidate"}
    assert _read(replace(make_verdict(), cells=()), runs) == []


def test_no_name_is_a_formula_or_a_row_of_its_own():
    hostile = '=HYPERLINK("http://x")\n"quoted",\x00second'
    verdict = make_verdict(make_cell(cell=hostile))
    rows = _read(verdict, make_runs(blocks=1, dropped_blocks={0: hostile}))
    expected = '\'=HYPERLINK("http://x") "quoted",second'
    assert {row["cell"] for row in rows} == {row["dropped"] for row in rows} == {expected}
