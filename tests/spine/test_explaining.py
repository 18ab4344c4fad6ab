"""A gate that fails on the fake back end says why, as far as anything is known, and within its time."""

import json

import numpy as np
import pytest

import edgedeploy.cli
from edgedeploy import outcomes, pipeline
from edgedeploy.documents import read_json
from edgedeploy.errors import DeviceUnreachable, UsageError
from edgedeploy.explain import explained
from edgedeploy.records.explanation import FORMAT, Explanation
from edgedeploy.records.verdict import CellVerdict, Finding, Margin, Policy, Verdict
from edgedeploy.results import Results

LATENCY = ("latency_p50=+5%",)


def gate(candidate, baseline, **named):
    outcome = pipeline.gate(candidate, baseline=baseline, max_blocks=4, **{"margins": LATENCY, **named})
    (cell,) = outcome.verdict.cells
    return outcome, cell


@pytest.fixture
def samples(model):
    values = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    labels = np.array([sum(row.tobytes()) % 4 for row in values])
    np.savez("samples.npz", image=values, labels=labels)
    return "samples.npz"


def test_a_latency_that_failed_is_explained_and_the_explanation_is_kept(compiled, place):
    outcome, cell = gate(compiled("slow", duration_us=800.0), compiled("fast", duration_us=200.0))
    assert cell.decision == "FAIL"
    found = cell.explanation
    assert found.metrics == ("latency_p50",)
    assert "does not say what single operators take" in found.speed.baseline.not_available
    assert any(
        "option duration_us is 200.0 in the baseline, 800.0 in the candidate" in note for note in found.speed.notes
    )
    (stored,) = (place / "bench_results" / "explanations").iterdir()
    assert read_json(stored, Explanation, FORMAT) == found
    # What the verdict's file keeps is the same.
    outcomes.write_reports(outcome, html="report.html")
    assert json.loads((place / "report.json").read_text())["cells"][0]["explanation"]["format"] == FORMAT
    # Asked again by the verdict's name: compiled here, so both artifacts are in the cache by the keys that the runs hold.
    again, _ = pipeline.explain("report.json", passes=2)
    assert (again.cell, again.device, again.speed.whole.seconds > 0) == (cell.cell, "local", True)
    with pytest.raises(UsageError, match="has no cell 'other'"):
        pipeline.explain("report.json", "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(place / "another cache"))
        with pytest.raises(UsageError, match="no longer in the cache"):
            pipeline.explain(cell.candidate_run, cell.baseline_run)


def test_accuracy_that_failed_is_explained_by_classes_and_samples(compiled, samples):
    _, cell = gate(compiled("wrong", wrong_every=2), compiled("right"), margins=("accuracy=-1pt",), evaluation=samples)
    assert cell.decision == "FAIL"
    accuracy = cell.explanation.accuracy
    assert cell.explanation.speed is None
    assert accuracy.baseline_value == 1.0
    assert accuracy.candidate_value < 0.8
    assert sum(move.lost for move in accuracy.classes) == sum(flip.samples for flip in accuracy.flips)
    assert all(flip.candidate_class == (flip.label + 1) % 4 for flip in accuracy.flips)
    assert accuracy.worst[0].baseline_class == accuracy.worst[0].label != accuracy.worst[0].candidate_class
    assert any("does not show its inner tensors" in note for note in accuracy.notes)


def test_what_passes_is_not_explained(compiled):
    _, cell = gate(compiled("fast", duration_us=100.0), compiled("slow", duration_us=400.0))
    assert cell.decision == "PASS"
    assert cell.explanation is None


def test_no_explain_switches_it_off(compiled, capsys):
    slow, fast = compiled("slow", duration_us=800.0), compiled("fast", duration_us=200.0)
    arguments = ["gate", str(slow), "--baseline", str(fast), "--margin", *LATENCY, "--max-blocks", "4", "--json", "-q"]
    assert edgedeploy.cli.run([*arguments, "--no-explain"]) == 1
    assert json.loads(capsys.readouterr().out)["cells"][0].get("explanation") is None


def failed_verdict():
    margin = Margin(kind="relative", value=0.05, text="+5%")
    finding = Finding(
        metric="latency_p50",
        decision="FAIL",
        baseline_value=1e-3,
        candidate_value=2e-3,
        effect=1.0,
        margin=margin,
        reason="",
    )
    cell = CellVerdict(cell="b", baseline_cell="a", device="local", target="host", decision="FAIL", findings=(finding,))
    policy = Policy(margins={"latency_p50": margin})
    return Verdict(name="b against a", decision="FAIL", cells=(cell,), policy=policy, judged_utc="2026-11-22T23:00:00Z")


def test_a_device_that_is_gone_leaves_the_verdict_and_a_note(place):
    def gone(cell, metrics):
        raise DeviceUnreachable("local: nothing answers")

    after = explained(failed_verdict(), gone, Results(place), lambda text: None)
    assert after.decision == "FAIL"
    assert after.cells[0].explanation is None
    assert after.cells[0].notes == ("why it failed could not be explained: local: nothing answers",)


def test_when_time_is_up_the_next_cell_is_not_begun(place):
    def never(cell, metrics):
        raise AssertionError("it is too late")

    late = explained(failed_verdict(), never, Results(place), lambda text: None, cap_s=-1.0)
    assert "no cell is begun after -1 s" in late.cells[0].notes[0]


def test_a_run_of_a_release_file_takes_the_artifacts_from_the_cache(model, place):
    from .test_pipeline import RELEASE

    text = RELEASE.replace("duration_us = 200.0", "duration_us = 1600.0")
    (place / "edgedeploy.toml").write_text(text)
    (cell,) = pipeline.run("edgedeploy.toml").verdict.cells
    assert cell.decision == "FAIL"
    assert cell.explanation.cell == "candidate"
    assert cell.explanation.speed.whole.seconds > 0
