"""The whole spine on the fake back end: compile, bench, gate, baseline, run, and what each says when it cannot."""

import json
from pathlib import Path

import pytest

import edgedeploy.cli
from edgedeploy import pipeline
from edgedeploy.arguments import parse_input, read_release
from edgedeploy.errors import DeviceError, DocumentError, UsageError
from edgedeploy.results import Results, load_run

RELEASE = """\
format = "edgedeploy.release/1"
name = "tiny"

[models.tiny]
source = "tiny.onnx"

[[cells]]
name = "shipped"
model = "tiny"
target = "fake-board"
backend = "fake"
precision = "fp32"
options = { duration_us = 400.0 }

[[cells]]
name = "candidate"
model = "tiny"
target = "fake-board"
backend = "fake"
precision = "fp32"
options = { duration_us = 200.0 }

[gate]
baseline = "shipped"
max_blocks = 6
[gate.margins]
latency_p50 = "+20%"
artifact_size = "+1MiB"
"""


@pytest.fixture
def release(model) -> Path:
    path = model.parent / "edgedeploy.toml"
    path.write_text(RELEASE)
    return path


def _cli(*arguments: str) -> int:
    return edgedeploy.cli.run([*arguments])


def test_second_compile_rebuilds_nothing_and_says_so(compiled, model, capsys):
    said: list[str] = []
    compiled("a")
    built = pipeline.compile("tiny.onnx", target="fake-board", backend="fake", name="a", progress=said.append)
    assert built.is_cached
    assert "from the cache" in said[0]


@pytest.mark.parametrize("change", ["options", "weights", "target", "calibration"])
def test_any_change_of_what_goes_in_rebuilds(compiled, model, change):
    import numpy as np

    def compile_now(**more):
        return pipeline.compile("tiny.onnx", target="fake-board", backend="fake", name="a", **more)

    first = compile_now()
    more = {}
    if change == "options":
        more["options"] = {"duration_us": 300.0}
    elif change == "weights":
        import onnx

        graph = onnx.load(model)
        graph.graph.node[0].op_type = "Abs"
        onnx.save(graph, model)
    elif change == "target":
        path = Path("targets/fake-board.toml")
        path.write_text(path.read_text().replace("only in tests", "nowhere"))
    else:
        np.savez("samples.npz", image=np.zeros((4, 4), np.float32))
        more["calibration"] = Path("samples.npz")
    second = compile_now(**more)
    assert not second.is_cached
    assert second.artifact.key != first.artifact.key
    assert compile_now(**more).is_cached


def test_damaged_cache_entry_is_built_anew(compiled, model):
    first = pipeline.compile("tiny.onnx", target="fake-board", backend="fake", name="a")
    first.file.write_bytes(b"torso")
    again = pipeline.compile("tiny.onnx", target="fake-board", backend="fake", name="a")
    assert not again.is_cached
    assert again.artifact.sha256 == first.artifact.sha256


def test_bench_stores_an_immutable_run_with_raw_samples(compiled):
    run, path = pipeline.bench(compiled("a"), visits=2)
    assert load_run(path) == run
    assert len(run.visits) == 2
    samples = [sample for burst in run.visits[0].bursts for sample in burst.samples_s]
    assert len(samples) >= 59
    assert min(samples) >= 200e-6
    assert run.memory[0].peak_rss_bytes > 0
    assert path.parent == Path("bench_results/runs/fake-board/a")


def test_gate_passes_the_faster_candidate_and_fails_the_slower(compiled):
    fast, slow = compiled("fast", duration_us=200.0), compiled("slow", duration_us=400.0)
    margins = ["latency_p50=+20%"]
    assert pipeline.gate(str(fast), baseline=str(slow), margins=margins).verdict.decision == "PASS"
    outcome = pipeline.gate(str(slow), baseline=str(fast), margins=margins)
    assert outcome.verdict.decision == "FAIL"
    assert len({run.session for run in outcome.runs.values()}) == 1


def test_stored_runs_of_one_session_are_judged_as_they_were(compiled):
    fast, slow = compiled("fast", duration_us=200.0), compiled("slow", duration_us=400.0)
    measured = pipeline.gate(str(fast), baseline=str(slow), margins=["latency_p50=+20%"]).verdict.cells[0]
    again = pipeline.gate(measured.candidate_run, baseline=measured.baseline_run, margins=["latency_p50=+20%"])
    assert again.verdict.cells[0].findings == measured.findings


def test_runs_of_different_sessions_never_pass_on_latency(compiled):
    folder = compiled("a")
    (_, first), (_, second) = pipeline.bench(folder, visits=2), pipeline.bench(folder, visits=2)
    outcome = pipeline.gate(str(second), baseline=str(first), margins=["latency_p50=+500%"])
    assert outcome.verdict.decision == "INCONCLUSIVE"


def test_baseline_is_a_pointer_with_a_reason_and_notices_an_edited_run(compiled, capsys):
    _, path = pipeline.bench(compiled("a"), visits=2)
    assert _cli("baseline", "set", str(path), "--why", "as shipped") == 0
    assert _cli("baseline", "show", "fake-board", "a") == 0
    assert "as shipped" in capsys.readouterr().out
    outcome = pipeline.gate(str(path), margins=["artifact_size=+0%"])
    assert outcome.verdict.decision == "PASS"
    path.write_text(path.read_text().replace('"local"', '"other"', 1))
    with pytest.raises(DocumentError, match="changed after it was written"):
        pipeline.gate(str(path), margins=["artifact_size=+0%"])


def test_baseline_without_a_reason_is_refused(compiled):
    _, path = pipeline.bench(compiled("a"), visits=1)
    with pytest.raises(UsageError, match="--why"):
        Results(Path("bench_results")).set_baseline(path, "  ")


def test_run_takes_a_release_file_to_a_verdict_and_a_report(release, capsys):
    code = _cli("run", "--quiet", "--junit", "junit.xml", "--markdown", "comment.md", "--html", "report.html")
    assert code == 0, capsys.readouterr().out
    assert "PASS" in Path("comment.md").read_text()
    assert "<testsuite" in Path("junit.xml").read_text()
    assert "candidate" in Path("report.html").read_text()
    assert json.loads(Path("report.json").read_text())["decision"] == "PASS"
    assert len(list(Path("bench_results/runs").rglob("*.json"))) == 2
    (kept,) = Path("bench_results/reports").glob("*.json")  # where history, serve and bundle look for it
    assert kept.read_bytes() == Path("report.json").read_bytes()


def test_run_exits_1_when_the_candidate_is_slower(release, capsys):
    release.write_text(RELEASE.replace("200.0", "800.0"))
    assert _cli("run", "--quiet", "--json") == 1
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["format"] == "edgedeploy.verdict/1"
    assert verdict["decision"] == "FAIL"


def test_dry_run_says_what_would_happen_and_does_nothing(release, capsys):
    assert _cli("run", "--dry-run") == 0
    assert "measure shipped and candidate interleaved on local" in capsys.readouterr().out
    assert not Path("bench_results").exists()


def test_child_that_dies_in_every_block_ends_with_exit_code_3_and_keeps_what_was_measured(compiled, capsys):
    folder = compiled("dying", crash_after=30)
    assert _cli("bench", str(folder), "--quiet") == 3
    told = capsys.readouterr().err
    assert "local" in told
    assert "Traceback" not in told.splitlines()[0]


def test_artifact_against_nothing_is_refused_with_a_sentence(compiled):
    folder = compiled("a")
    with pytest.raises(UsageError, match="'nothing' is neither an artifact folder nor a run's file"):
        pipeline.gate(str(folder), baseline="nothing")


def test_unknown_device_names_the_likely_one(compiled):
    with pytest.raises(UsageError, match="local"):
        pipeline.bench(compiled("a"), device="locl")


def test_edited_artifact_is_not_measured(compiled):
    folder = compiled("a")
    (folder / "model.fake.json").write_text("{}")
    with pytest.raises(DocumentError, match="compile again"):
        pipeline.bench(folder)


def test_init_writes_a_release_file_that_reads(place, model):
    path = pipeline.init(Path("edgedeploy.toml"))
    path.write_text(path.read_text().replace("model.onnx", "tiny.onnx"))
    release, policy = read_release(path)
    assert [cell.name for cell in release.cells] == ["shipped", "candidate"]
    assert policy.margins["latency_p50"].value == 0.05
    with pytest.raises(UsageError, match="--force"):
        pipeline.init(path)


def test_wrong_margin_names_file_and_line(release):
    release.write_text(RELEASE.replace('"+20%"', '"+20 parsecs"'))
    with pytest.raises(DocumentError, match=r"edgedeploy\.toml, line 27: .*parsecs"):
        pipeline.run(release)


@pytest.mark.parametrize(
    "text",
    ["image", "image=", "=1x2", "image=1x0x2", "image=1x2:floaty", "image=1x-2", "image=1x2.5", "image=batchxlength"],
)
def test_malformed_input_flag_is_a_sentence(text):
    with pytest.raises(UsageError, match="--input"):
        parse_input(text)


def test_unreachable_device_is_exit_code_3(compiled, capsys):
    Path("lab.toml").write_text(
        'format = "edgedeploy.lab/1"\n[devices.gone]\ntransport = "ssh"\nhost = "127.0.0.1"\nport = 9\n'
    )
    pytest.importorskip("paramiko", reason="SSH needs paramiko: pip install 'edgedeploy[ssh]'")
    with pytest.raises(DeviceError, match="gone"):
        pipeline.bench(compiled("a"), device="gone", lab=Path("lab.toml"))


def test_evaluation_samples_that_were_calibrated_on_are_told(release):
    import numpy as np

    rng = np.random.default_rng(0)
    samples, labels = rng.standard_normal((80, 4)).astype(np.float32), rng.integers(0, 4, 80)
    np.savez("calibration.npz", image=samples[:30])
    np.savez("evaluation.npz", image=samples[20:], labels=labels[20:])
    release.write_text(
        RELEASE.replace(
            "[[cells]]", '[calibration]\nset = "calibration.npz"\n[evaluation]\nset = "evaluation.npz"\n[[cells]]', 1
        )
    )
    (cell,) = pipeline.run(release).verdict.cells
    assert "10 of the 60 evaluation samples were also calibrated on" in cell.notes[0]


def test_missing_release_file_says_how_to_write_one(place, capsys):
    assert _cli("run") == 2
    assert "edgedeploy init" in capsys.readouterr().err


def test_cell_that_cannot_be_measured_does_not_hide_the_others_and_never_passes(release, capsys):
    broken = RELEASE.split("[[cells]]")[2].replace("candidate", "dying").replace("200.0", "200.0, crash_after = 5")
    release.write_text(RELEASE.replace("[gate]\n", f"[[cells]]{broken.split('[gate]')[0]}[gate]\n"))
    assert _cli("run", "--quiet", "--json") == 3
    verdict = json.loads(capsys.readouterr().out)
    assert [(cell["cell"], cell["decision"]) for cell in verdict["cells"]] == [
        ("candidate", "PASS"),
        ("dying", "INCONCLUSIVE"),
    ]
    assert verdict["decision"] == "INCONCLUSIVE"
    assert "could not be built or measured" in verdict["cells"][1]["notes"][0]


def test_sides_with_thread_pools_take_turns_by_whole_visits(compiled):
    fast, slow = compiled("fast", duration_us=200.0, threads=2), compiled("slow", duration_us=400.0, threads=2)
    outcome = pipeline.gate(str(fast), baseline=str(slow), margins=["latency_p50=+20%"])
    assert outcome.verdict.decision == "PASS"
    assert {run.schedule.rsplit(" ", 1)[1] for run in outcome.runs.values()} == {"visits"}


def test_model_with_a_large_fixed_batch_needs_no_samples_of_its_own(model):
    import onnx

    graph = onnx.load(model)
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 64
    onnx.save(graph, model)
    built = pipeline.compile("tiny.onnx", target="fake-board", backend="fake")
    assert built.artifact.fidelity[0].samples == 64


def test_full_disk_is_a_sentence_that_says_what_to_move(model, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    assert _cli("compile", "tiny.onnx", "--target", "fake-board", "--backend", "fake", "-o", "out", "-q") == 3
    assert "EDGEDEPLOY_CACHE_DIR" in capsys.readouterr().err
    assert not Path("out/manifest.json").exists()
