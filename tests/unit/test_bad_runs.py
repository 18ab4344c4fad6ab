"""Runs that are torn, edited, from elsewhere or impossible: each is a sentence, and nothing is overwritten."""

import json
import math
import multiprocessing
from pathlib import Path

import pytest
from msgspec.structs import replace

from edgedeploy.documents import encode_json
from edgedeploy.errors import DocumentError, ModelError
from edgedeploy.judge.gate import judge
from edgedeploy.judge.scores import class_labels, predictions, score
from edgedeploy.outcomes import Outcome, report_path
from edgedeploy.records.run import Conditions, Run
from edgedeploy.results import Results, load_run
from edgedeploy.storage import create_atomic, sha256_file

from .judge_samples import answers, finding_of, make_visit, memory_of, normal_effects, policy, runs_with_effects
from .render_samples import make_run, make_runs, make_verdict

MIB = 2**20
ALL = policy(
    accuracy="-1pt", class_accuracy="-5pt", latency_p50="+5%", latency_p95="+5%", first_inference="+50%",
    load_time="+50%", peak_memory="+5%", artifact_size="+10%",
)  # fmt: skip


def pair(blocks=8):
    before, after = answers(4, 5, 2000)
    labels = tuple(place % 10 for place in range(2000))
    baseline, candidate = runs_with_effects(normal_effects(1, 0.0, 0.005, blocks))
    memory = memory_of(*[60 * MIB] * 3)
    return (
        replace(baseline, outputs=replace(before, labels=labels), memory=memory),
        replace(candidate, outputs=replace(after, labels=labels), memory=memory),
    )


def told(verdict, metric):
    finding = finding_of(verdict, metric)
    assert finding.decision == "INCONCLUSIVE"
    assert finding.needed
    return finding.reason


def test_a_good_pair_passes_in_everything():
    baseline, candidate = pair()
    size = replace(candidate.artifact, size_bytes=baseline.artifact.size_bytes)
    assert judge(baseline, replace(candidate, artifact=size), ALL).decision == "PASS"


# ---------------------------------------------------------------- files


@pytest.fixture
def stored(tmp_path) -> Path:
    return Results(tmp_path).save_run(make_run("candidate"))


def test_a_run_reads_back_under_its_own_name_and_under_any_other(stored):
    assert load_run(stored) == make_run("candidate")
    elsewhere = stored.rename(stored.with_name("mine.json"))
    assert load_run(elsewhere) == make_run("candidate")


def test_an_edited_run_is_named_with_both_digests(stored):
    was = stored.stem[-8:]
    stored.write_text(stored.read_text().replace('"pi5-desk"', '"faster"', 1))
    now = sha256_file(stored)[:8]
    with pytest.raises(DocumentError, match=f"carries the digest {was} and its bytes have {now}.*restore the file"):
        load_run(stored)
    elsewhere = stored.rename(stored.with_name("edited.json"))
    assert load_run(elsewhere).device == "faster"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_torn_run_is_a_sentence(stored, share):
    data = stored.read_bytes()
    stored.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DocumentError, match="truncated"):
        load_run(stored)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "edgedeploy.run/2"}, "newer edgedeploy; upgrade"),
        ({"format": "edgedeploy.verdict/1"}, 'expected "edgedeploy.run/1"'),
        ({"format": 1}, "no key format"),
        ({"visits": None}, "visits"),
        ({"visit": []}, 'unknown key "visit"'),
        ({"outputs": {"scores": [None]}}, "outputs"),
    ],
)
def test_a_run_that_is_no_run_is_a_sentence(stored, change, says):
    stored.write_text(json.dumps({**json.loads(stored.read_text()), **change}))
    with pytest.raises(DocumentError, match=says):
        load_run(stored)


def test_not_a_number_does_not_get_into_a_run(stored):
    stored.write_text(stored.read_text().replace('"load_s": 0', '"load_s": NaN, "x": 0', 1))
    with pytest.raises(DocumentError, match="NaN"):
        load_run(stored)


def test_runs_without_the_newer_fields_still_load(stored):
    document = json.loads(stored.read_text())
    for name in ("labels", "predictions"):
        document["outputs"].pop(name)
    stored.write_text(json.dumps(document))
    old = load_run(stored.rename(stored.with_name("old.json")))
    assert (old.outputs.labels, old.outputs.predictions) == (None, None)


# ---------------------------------------------------------------- what a run says


@pytest.mark.parametrize("blocks", [0, 1])
def test_zero_visits_and_one_are_too_few(blocks):
    baseline, candidate = pair(blocks)
    verdict = judge(baseline, candidate, ALL)
    assert verdict.decision == "INCONCLUSIVE"
    for metric in ("latency_p50", "latency_p95", "first_inference", "load_time"):
        reason = told(verdict, metric)
        assert ("no A/B block was measured" if not blocks else "1 A/B blocks") in reason
    for count in (0, 1, 2):
        memory = memory_of(*[60 * MIB] * count)
        assert f"{count} memory visits" in told(judge(baseline, replace(candidate, memory=memory), ALL), "peak_memory")


@pytest.mark.parametrize(
    ("changes", "metrics", "says"),
    [
        ({"visits": ()}, ("latency_p50", "first_inference", "load_time"), "all 8 A/B blocks were dropped"),
        ({"memory": ()}, ("peak_memory",), "0 memory visits"),
        ({"outputs": None}, ("accuracy", "class_accuracy"), "the candidate was not run on an evaluation set"),
    ],
)
def test_a_metric_that_one_side_lacks_is_inconclusive_and_the_others_are_judged(changes, metrics, says):
    baseline, candidate = pair()
    verdict = judge(baseline, replace(candidate, **changes), ALL)
    assert verdict.decision != "PASS"
    for metric in metrics:
        assert says in told(verdict, metric)
    judged = {finding.metric for finding in verdict.findings if finding.decision == "PASS"}
    assert judged >= {"accuracy", "latency_p50", "peak_memory"} - set(metrics)


def test_another_evaluation_set_cannot_be_paired():
    baseline, candidate = pair()
    outputs = replace(candidate.outputs, dataset="others", dataset_sha256="0b" * 32)
    verdict = judge(baseline, replace(candidate, outputs=outputs), ALL)
    for metric in ("accuracy", "class_accuracy"):
        assert "of others: not the same samples" in told(verdict, metric)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_named_by_sample_and_side(bad):
    baseline, candidate = pair()
    scores = (*candidate.outputs.scores[:7], bad, *candidate.outputs.scores[8:])
    verdict = judge(baseline, replace(candidate, outputs=replace(candidate.outputs, scores=scores)), ALL)
    for metric in ("accuracy", "class_accuracy"):
        assert f"the candidate's score of sample 7 is {bad}" in told(verdict, metric)
    encode_json(verdict)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_no_numbers_are_not_scored_and_have_no_arg_max(bad):
    import numpy as np

    output = np.array([[0.1, 0.9], [0.8, bad]])
    with pytest.raises(ModelError, match="sample 1 is not finite"):
        score("top1", output, np.array([1, 0]))
    assert predictions("top1", output) is None


def test_labels_and_predictions_are_kept_of_classifiers_only():
    import numpy as np

    output, labels = np.array([[[0.1, 0.9]], [[0.5, 0.5]]], np.float32), np.array([1, 0])
    assert predictions("top5", output) == (1, 0)
    assert class_labels("top1", labels) == (1, 0)
    assert class_labels("mae", labels) is None
    assert class_labels("top1", None) is None
    assert predictions("mae", output) is None
    assert predictions("top1", np.zeros((2, 3, 4))) is None
    assert predictions("top1", np.zeros((0, 3))) is None


@pytest.mark.parametrize("field", ["threads", "batch", "includes_input_copy", "includes_output_copy"])
def test_unlike_timing_boundaries_are_not_compared(field):
    baseline, candidate = pair()
    value = getattr(candidate.boundary, field)
    boundary = replace(candidate.boundary, **{field: not value if isinstance(value, bool) else value + 1})
    backend = replace(candidate.artifact, backend=baseline.artifact.backend)
    verdict = judge(baseline, replace(candidate, boundary=boundary, artifact=backend), ALL)
    for metric in ("latency_p50", "latency_p95", "first_inference", "load_time"):
        assert f"{field} is {value!r} for the baseline" in told(verdict, metric)
    assert "differ" in told(verdict, "peak_memory")


# ---------------------------------------------------------------- clocks


def with_visit(run: Run, block: int, **changes) -> Run:
    return replace(
        run, visits=tuple(replace(visit, **changes) if visit.block == block else visit for visit in run.visits)
    )


def timed(run: Run, block_s: float = 40.0) -> Run:
    for visit in run.visits:
        start_s = 1000 + visit.block * block_s
        run = with_visit(
            run,
            visit.block,
            before=Conditions(monotonic_s=start_s),
            after=Conditions(monotonic_s=start_s + block_s / 2),
        )
    return run


def test_a_clock_that_runs_on_is_no_reason_for_doubt():
    baseline, candidate = (timed(run) for run in pair())
    assert finding_of(judge(baseline, candidate, ALL), "latency_p50").decision == "PASS"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"after": Conditions(monotonic_s=1100.0)}, "ended 20 s before it began"),
        ({"after": Conditions(monotonic_s=1120.2)}, "in all: the device's clock jumped"),
        ({"after": Conditions(monotonic_s=1120.0 + 90 * 3600)}, "took 90 hours by the device's clock"),
        ({"before": Conditions(monotonic_s=5.0), "after": Conditions(monotonic_s=25.0)}, "began"),
        ({"load_s": -0.5}, "loading took -0.5 s"),
        ({"load_s": math.nan}, "loading took nan s"),
        ({"first_inference_s": -1.0}, "the first inference took -1.0 s"),
        ({"bursts": make_visit(3, -0.001).bursts}, "an inference that took -0.001 s"),
    ],
)
def test_a_clock_that_jumped_makes_no_latency_count(changes, says):
    baseline, candidate = (timed(run) for run in pair())
    candidate = with_visit(candidate, 3, load_s=0.2, warm_up_samples_s=(0.004,) * 100)
    verdict = judge(baseline, with_visit(candidate, 3, **changes), ALL)
    for metric in ("latency_p50", "latency_p95", "first_inference", "load_time"):
        reason = told(verdict, metric)
        assert "the candidate's visit in block 3" in reason
        assert says in reason
    assert finding_of(verdict, "accuracy").decision == "PASS"


def test_times_of_a_dropped_visit_and_of_a_reboot_are_no_jump():
    baseline, candidate = (timed(run) for run in pair(9))
    dropped = with_visit(candidate, 3, after=Conditions(monotonic_s=0.0), dropped="the link was lost")
    assert finding_of(judge(baseline, dropped, ALL), "latency_p50").decision == "PASS"
    rebooted = [
        replace(run, events=("measuring went on at 2026-11-22T09:14:05Z with block 5, after a lost link",))
        for run in (baseline, candidate)
    ]
    for block in range(5, 9):
        after = {"before": Conditions(monotonic_s=float(block)), "after": Conditions(monotonic_s=block + 0.9)}
        rebooted = [with_visit(run, block, **after) for run in rebooted]
    assert finding_of(judge(*rebooted, ALL), "latency_p50").decision == "PASS"


@pytest.mark.parametrize(("metric", "field"), [("load_time", "load_s"), ("first_inference", "first_inference_s")])
def test_what_took_no_time_at_all_has_no_ratio(metric, field):
    baseline, candidate = pair()
    verdict = judge(baseline, with_visit(candidate, 2, **{field: 0.0}), ALL)
    assert "took no time" in told(verdict, metric)
    assert finding_of(verdict, "latency_p50").decision == "PASS"


# ---------------------------------------------------------------- two gates at once


def _write(place: str, start, number: int) -> None:
    """Store runs and a report of the same second and name as every other process does."""
    start.wait()
    results = Results(Path(place))
    for seed in range(8):
        results.save_run(make_run("candidate", seed=100 * number + seed, blocks=1, questions=3))
        results.save_run(make_run("baseline", seed=seed, blocks=1, questions=3))  # the same in every process
    runs = make_runs(blocks=1, questions=3)
    verdict = replace(make_verdict(), cells=(replace(make_verdict().cells[0], baseline_run=f"run of {number}"),))
    outcome = Outcome(verdict, runs)
    assert create_atomic(report_path(outcome, place).with_suffix(".json"), encode_json(verdict))


def test_two_gates_that_write_at_once_lose_and_overwrite_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    start, writers = context.Event(), 3
    processes = [context.Process(target=_write, args=(str(tmp_path), start, number)) for number in range(writers)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * writers
    files = Results(tmp_path).run_files()
    assert len(files) == 8 * writers + 8
    assert len({encode_json(load_run(path)) for path in files}) == len(files)
    assert len(list((tmp_path / "reports").glob("*.json"))) == writers
    assert not list(tmp_path.rglob("*.part"))


def test_a_report_never_takes_the_place_of_another_of_the_same_second_and_name(tmp_path):
    one, other = make_verdict(decision="PASS"), make_verdict(decision="FAIL")
    places = [report_path(Outcome(verdict, make_runs()), tmp_path) for verdict in (one, other, one)]
    assert places[0] == places[2] != places[1]
    long = report_path(Outcome(replace(one, name="x/../" * 200), make_runs()), tmp_path)
    assert long.parent == tmp_path / "reports"
    assert len(long.name) < 200


def test_what_stands_under_a_name_is_never_replaced(tmp_path):
    path = tmp_path / "a.json"
    assert create_atomic(path, b"one")
    assert not create_atomic(path, b"two")
    assert path.read_bytes() == b"one"
    run = make_run("candidate", blocks=1, questions=3)
    first = Results(tmp_path).save_run(run)
    first.write_bytes(b"something else under the short name")
    second = Results(tmp_path).save_run(run)
    assert first.read_bytes() == b"something else under the short name"
    assert load_run(second) == run
    assert Results(tmp_path).save_run(run) == second
