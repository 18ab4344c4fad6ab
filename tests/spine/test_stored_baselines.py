"""A candidate against a stored run: measured again where the cache has its artifact, else widened by known noise."""

import json
import shutil
from pathlib import Path

import pytest

import edgedeploy.cli
from edgedeploy import pipeline
from edgedeploy.errors import UsageError
from edgedeploy.results import Results, load_run
from edgedeploy.storage import cache_dir

MARGINS = ["latency_p50=+20%"]


def _cli(*arguments: str) -> int:
    return edgedeploy.cli.run([*arguments])


def _forget_artifact(run) -> None:
    shutil.rmtree(cache_dir() / "artifacts" / run.artifact.key)


def _passport(device: str, cpu_model: str, cv: float) -> None:
    from edgedeploy.records.passport import Passport

    Results(Path("bench_results")).save_passport(
        Passport(
            device=device,
            started_utc="2026-11-22T09:00:00Z",
            cpu_model=cpu_model,
            boot_id="",
            artifact="a",
            artifact_sha256="00",
            backend="fake",
            runtime="fake",
            schedule="",
            error_rate=0.05,
            power=0.8,
            level_s=0.0004,
            seconds=1.0,
            seconds_per_block=0.1,
            setup_s=0.1,
            blocks=8,
            run_to_run_cv=cv,
            block_spread=cv,
            effect=0.0,
            low=0.0,
            high=0.0,
            runs=(),
            edgedeploy="0",
        )
    )


@pytest.fixture
def blessed(compiled):
    """A slow artifact that was measured and blessed, and a fast one of the same model name."""
    slow = compiled("tiny", duration_us=800.0)
    run, path = pipeline.bench(slow, visits=4)
    Results(Path("bench_results")).set_baseline(path, "as shipped")
    fast = pipeline.compile(
        "tiny.onnx", target="fake-board", backend="fake", options={"duration_us": 200.0}, output="fast", name="tiny"
    )
    return run, path, fast.folder


def test_a_blessed_baseline_is_measured_again_while_the_cache_has_its_artifact(blessed, capsys):
    run, path, fast = blessed
    assert _cli("gate", str(fast), "--margin", MARGINS[0], "--max-blocks", "4", "--no-explain") == 0
    out, err = capsys.readouterr()
    assert "is measured again, interleaved with the candidate" in err
    assert "stored numbers do not cancel drift" in " ".join(out.split())
    outcome = pipeline.gate(fast, baseline=path, margins=MARGINS, max_blocks=4)
    assert outcome.verdict.decision == "PASS"
    sides = list(outcome.runs.values())
    assert sides[0].session == sides[1].session != run.session
    assert sides[0].artifact.sha256 == run.artifact.sha256


def test_a_baseline_whose_artifact_is_gone_may_fail_the_candidate_and_never_passes_it_unless_allowed(blessed):
    run, path, fast = blessed
    _forget_artifact(run)
    outcome = pipeline.gate(fast, margins=MARGINS, max_blocks=4)
    (cell,) = outcome.verdict.cells
    finding = next(one for one in cell.findings if one.metric == "latency_p50")
    assert cell.decision == "INCONCLUSIVE"
    assert "was not measured again" in cell.notes[0]
    assert "edgedeploy devices passport local" in finding.needed
    assert cell.baseline_run == str(path)
    assert {one.side for one in outcome.runs.values()} == {"single"}
    _passport("local", "another processor", 0.02)
    assert "is not known" in _latency(pipeline.gate(cell.candidate_run, margins=MARGINS)).reason
    _passport("local", load_run(path).facts.cpu_model, 0.02)
    assert "no PASS" in _latency(pipeline.gate(cell.candidate_run, margins=MARGINS)).reason
    allowed = pipeline.gate(cell.candidate_run, margins=MARGINS, allow_stored_pass=True)
    assert allowed.verdict.decision == "PASS"
    assert allowed.verdict.policy.allow_stored_pass
    worse = pipeline.gate(str(path), baseline=cell.candidate_run, margins=MARGINS)
    assert worse.verdict.decision == "FAIL"
    assert _latency(worse).is_stored


def _latency(outcome):
    return next(one for one in outcome.verdict.cells[0].findings if one.metric == "latency_p50")


def test_an_artifact_whose_bytes_are_others_by_now_is_not_the_baselines(blessed):
    _, path, fast = blessed
    document = json.loads(path.read_text())
    document["artifact"]["sha256"] = "0" * 64
    foreign = Path("foreign.json")
    foreign.write_text(json.dumps(document))
    outcome = pipeline.gate(fast, baseline=foreign, margins=MARGINS, max_blocks=4)
    assert "was not measured again" in outcome.verdict.cells[0].notes[0]
    document["artifact"]["key"] = "../../etc"
    foreign.write_text(json.dumps(document))
    outcome = pipeline.gate(fast, baseline=foreign, margins=MARGINS, max_blocks=4)
    assert "was not measured again" in outcome.verdict.cells[0].notes[0]


def test_without_a_blessed_baseline_the_command_is_named(compiled):
    with pytest.raises(UsageError, match="edgedeploy baseline set"):
        pipeline.gate(compiled("a"), margins=MARGINS)


def test_an_edited_run_is_refused_on_the_command_line(blessed, capsys):
    _, path, _ = blessed
    path.write_text(path.read_text().replace('"local"', '"other"', 1))
    assert _cli("gate", str(path), "--baseline", str(path)) == 2
    assert "was changed after it was written" in capsys.readouterr().err


def test_limits_on_the_command_line(compiled, capsys):
    fast, slow = compiled("fast", duration_us=200.0), compiled("slow", duration_us=400.0)
    gate = ["gate", str(fast), "--baseline", str(slow), "--max-blocks", "4", "--quiet", "--no-explain"]
    assert _cli(*gate, "--margin", "latency_p50=+20%, <= 50ms", "--margin", "artifact_size<=1MiB", "--json") == 0
    verdict = json.loads(capsys.readouterr().out)
    finding = next(one for one in verdict["cells"][0]["findings"] if one["metric"] == "latency_p50")
    assert finding["margin"]["limit"] == pytest.approx(0.05)
    assert finding["limit"]["decision"] == "PASS"
    assert _cli(*gate, "--margin", "latency_p50=+20%", "--margin", "latency_p50<=100us") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "exceed the limit of 100 µs" in text
    assert _cli(*gate, "--margin", "latency_p50<100us") == 2
    assert 'write "<= 100us"' in capsys.readouterr().err


def test_a_99th_percentile_gets_the_samples_that_it_needs(compiled):
    fast, slow = compiled("fast", duration_us=200.0), compiled("slow", duration_us=400.0)
    outcome = pipeline.gate(fast, baseline=slow, margins=["latency_p99=+200%"], max_blocks=4)
    for run in outcome.runs.values():
        assert all(sum(len(burst.samples_s) for burst in visit.bursts) >= 299 for visit in run.visits)
    finding = next(one for one in outcome.verdict.cells[0].findings if one.metric == "latency_p99")
    assert finding.units == 4
    assert finding.effect < 0


def test_a_release_file_says_limits_classes_and_what_stored_numbers_may_do(model):
    from edgedeploy.arguments import read_release
    from edgedeploy.errors import DocumentError

    path = pipeline.init(Path("edgedeploy.toml"))
    text = (
        path.read_text()
        .replace("model.onnx", "tiny.onnx")
        .replace("# allow_stored_pass = false", "allow_stored_pass = true")
    )
    text = text.replace("# class_accuracy =", "class_accuracy =").replace(
        'latency_p50 = "+5%"', 'latency_p50 = "+5%, <= 5ms"'
    )
    path.write_text(text + 'latency_p99 = "<= 9ms"\n')
    _, policy = read_release(path)
    assert policy.allow_stored_pass
    assert policy.margins["latency_p50"].limit == pytest.approx(0.005)
    assert policy.margins["latency_p99"].kind == "limit"
    assert policy.margins["class_accuracy"].value == pytest.approx(0.05)
    path.write_text(text + 'latency_p99 = "< 9ms"\n')
    with pytest.raises(DocumentError, match=r'edgedeploy\.toml, line \d+: .*write "<= 9ms"'):
        read_release(path)
