"""What is sent to MLflow for a verdict and its runs, and what is refused before anything is sent."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from edgedeploy.cli import run as command
from edgedeploy.documents import write_json
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.exports import mlflow
from edgedeploy.results import Results
from edgedeploy.storage import sha256_file

from .dashboard_samples import make_results
from .render_samples import make_artifact, make_run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Results(make_results(tmp_path_factory.mktemp("export"), days=1))


@pytest.fixture
def verdict(results):
    (file,) = (results.root / "reports").glob("*.json")
    return file


def entries_of(results, *references, **more):
    return mlflow.entries([str(one) for one in references], results, **more)


def test_a_verdict_is_a_gate_with_one_run_for_each_measured_artifact(results, verdict):
    gate, *runs = entries_of(results, verdict)
    assert (gate.name, gate.tags["edgedeploy.kind"], gate.tags["edgedeploy.decision"]) == (
        "fashion-mnist 1.0", "gate", "PASS",
    )  # fmt: skip
    assert gate.digest == sha256_file(verdict)
    assert [(one.name, one.tags["edgedeploy.side"]) for one in runs] == [
        ("dense-fp32 (baseline)", "baseline"),
        ("pruned-int8 (candidate)", "candidate"),
    ]
    assert {one.parent for one in runs} == {gate.digest}
    assert [Path(one.path).suffix for one in gate.files] == [".json", ".html"]


def test_a_run_has_its_recipe_figures_and_a_step_for_each_visit(results, verdict):
    run = next(one for one in entries_of(results, verdict) if "candidate" in one.name)
    assert run.parameters["backend"] == "onnxruntime"
    assert run.parameters["precision"] == "int8"
    assert run.parameters["device"] == "pi5-desk"
    assert run.parameters["edgedeploy"] == "0.1.0"
    assert run.parameters["option.threads"] == "4"
    assert run.tags["edgedeploy.decision"] == "PASS"
    numbers = {one.key: one.value for one in run.metrics}
    assert {"p50_s", "p95_s", "peak_rss_bytes", "size_bytes", "accuracy", "load_s", "first_inference_s"} <= set(numbers)
    assert numbers["p50_s"] == pytest.approx(0.0029, rel=0.1)
    assert numbers["size_bytes"] == 247_112
    series = [one for one in run.metrics if one.key == "visit_p50_s"]
    assert [one.step for one in series] == [0, 1, 2]
    assert [one.time_ms for one in series] == sorted(one.time_ms for one in series)
    assert run.start_ms <= series[0].time_ms <= run.end_ms
    assert numbers["latency_p50_change"] == pytest.approx(-0.312)


def test_a_run_alone_has_no_gate_and_one_that_belongs_to_a_named_gate_stands_below_it(results, verdict):
    files = results.run_files()
    (alone,) = entries_of(results, files[0])
    assert alone.parent == ""
    both = entries_of(results, files[0], verdict)
    assert [one.digest for one in both].count(alone.digest) == 1
    known = {one.digest for one in both if not one.parent}
    for place, one in enumerate(both):
        assert not one.parent or one.parent in {before.digest for before in both[:place]}, (
            "a gate comes before its runs"
        )
    assert sha256_file(verdict) in known


def test_the_same_file_twice_is_sent_once(results, verdict):
    assert len(entries_of(results, verdict, verdict)) == len(entries_of(results, verdict)) == 3


def test_a_verdict_and_a_run_are_found_by_name(results, verdict):
    assert entries_of(results, verdict.stem) == entries_of(results, verdict)
    file = results.run_files()[0]
    assert entries_of(results, file.stem) == entries_of(results, file)


def test_runs_that_are_not_at_hand_are_left_out_and_said(tmp_path, results, verdict):
    moved = tmp_path / verdict.name
    shutil.copy(verdict, moved)
    said = []
    (gate,) = entries_of(Results(tmp_path / "none"), moved, progress=said.append)
    assert gate.digest == sha256_file(verdict)
    assert len(said) == 2
    assert "is not at hand, so it is left out" in said[0]


def test_a_verdict_from_elsewhere_names_no_path_here(tmp_path, results, verdict):
    secret = tmp_path / "private" / "deep" / "run.json"
    write_json(secret, make_run("candidate", blocks=1, questions=1))
    moved = tmp_path / "reports" / "verdict.json"
    moved.parent.mkdir()
    text = verdict.read_text()
    cell_run = text.split('"candidate_run": "')[1].split('"')[0]
    moved.write_text(text.replace(cell_run, str(secret)))
    names = [one.name for one in entries_of(Results(tmp_path / "none"), moved)]
    assert names == ["fashion-mnist 1.0"]


def test_compiled_files_go_along_when_asked_for_and_what_is_missing_is_said(tmp_path, results, verdict):
    artifact = make_artifact("candidate")
    (tmp_path / artifact.file).write_bytes(b"compiled")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    said = []
    found = {artifact.key: (tmp_path, artifact)}
    _, baseline, candidate = entries_of(results, verdict, find_artifact=found.get, progress=said.append)
    assert [Path(one.path).name for one in candidate.files if one.folder == "artifact"] == [
        artifact.file, "manifest.json",
    ]  # fmt: skip
    assert candidate.parameters["recipe.calibration"] == "fashion-mnist"
    assert candidate.parameters["toolchain.torch"] == "2.9.0"
    assert len(baseline.files) == 1
    assert said == ["dense-fp32: its artifact is not in the cache any more, so the compiled file is left out"]


def test_a_key_that_is_no_digest_chooses_no_folder(tmp_path):
    run = make_run("candidate", blocks=1, questions=1)
    file = tmp_path / "run.json"
    write_json(file, replace(run, artifact=replace(run.artifact, key="../../../etc")))
    asked = []
    entries_of(Results(tmp_path), file, find_artifact=asked.append)
    assert asked == []


def test_numbers_that_are_none_are_not_sent(tmp_path):
    run = make_run("candidate", blocks=2, questions=1)
    outputs = replace(run.outputs, value=None)

    write_json(tmp_path / "run.json", replace(run, outputs=outputs))
    (entry,) = entries_of(Results(tmp_path), tmp_path / "run.json")
    assert all(math.isfinite(one.value) for one in entry.metrics)
    assert "accuracy" not in {one.key for one in entry.metrics}


def test_a_clock_that_was_set_back_gives_no_time_before_the_start(tmp_path):
    run = make_run("candidate", blocks=3, questions=1)
    last = run.visits[-1]
    back = replace(last, after=replace(last.after, monotonic_s=1.0))
    write_json(tmp_path / "run.json", replace(run, visits=(*run.visits[:-1], back)))
    (entry,) = entries_of(Results(tmp_path), tmp_path / "run.json")
    assert all(one.time_ms >= entry.start_ms for one in entry.metrics)


def test_long_and_odd_words_become_what_mlflow_takes(tmp_path):
    run = make_run("candidate", name="cell:with (odd) words\n" + "x" * 400, blocks=1, questions=1)
    artifact = replace(run.artifact, model="m" * 1000, options={"odd:key": "v"})
    write_json(tmp_path / "run.json", replace(run, artifact=artifact))
    (entry,) = entries_of(Results(tmp_path), tmp_path / "run.json")
    assert all(len(value) <= 500 for value in entry.parameters.values())
    assert entry.parameters["option.odd_key"] == "v"
    assert all("\n" not in value for value in entry.parameters.values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": "edgedeploy.lab/1"}', "neither a verdict nor a run, but edgedeploy.lab"),
        ("hello", "neither a verdict nor a run, but no document of edgedeploy"),
        ('{"format": "edgedeploy.verdict/99"}', "newer edgedeploy"),
        ('{"format": "edgedeploy.run/1", "visits": [', "not valid JSON"),
    ],
)
def test_what_is_no_verdict_and_no_run_is_a_sentence(tmp_path, text, said):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(DocumentError, match=said):
        entries_of(Results(tmp_path), file)


def test_a_name_that_nothing_has_is_a_sentence(results):
    with pytest.raises(UsageError, match="is neither"):
        entries_of(results, "no-such-run")


def test_an_address_is_asked_for_and_folders_are_refused(results, verdict, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    assert command(["export", "mlflow", str(verdict), "--results", str(results.root)]) == 2
    assert "say where MLflow keeps its runs" in capsys.readouterr().err
    for folder in ("file:///tmp/mlruns", "./mlruns"):
        assert command(["export", "mlflow", str(verdict), "--tracking-uri", folder]) == 2
        assert "keeps runs in folders no longer" in capsys.readouterr().err


def test_passwords_are_never_shown():
    uri = "https://ci:s3cr%21et@mlflow.example"
    said = mlflow._refusal(uri, f"could not connect to {uri}: s3cr!et was refused, s3cr%21et too")
    assert "s3cr" not in said
    assert "https://ci@mlflow.example" in said
    assert mlflow._page(uri, "1", "ab") == "https://mlflow.example/#/experiments/1/runs/ab"
    assert mlflow._page("sqlite:///x.db", "1", "ab") == ""


def test_the_commit_is_the_newest_one_at_that_time(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*words, **environment):
        identity = {"GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        names = {f"GIT_{who}_{what}": "x@x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        return subprocess.run(
            ["git", "-C", str(tmp_path), *words], env={**identity, **names, **environment}, check=True,
            capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    git("init", "-q")
    commits = []
    for day in (1, 3):
        moment = f"2026-11-0{day}T12:00:00Z"
        git("commit", "-q", "--allow-empty", "-m", "x", GIT_AUTHOR_DATE=moment, GIT_COMMITTER_DATE=moment)
        commits.append(git("rev-parse", "HEAD"))
    assert mlflow.commit_at(tmp_path, "2026-11-02T00:00:00Z") == commits[0]
    assert mlflow.commit_at(tmp_path, "2026-11-04T00:00:00Z") == commits[1]
    assert mlflow.commit_at(tmp_path, "2026-10-01T00:00:00Z") == ""
    assert mlflow.commit_at(tmp_path, "--all") == ""
    assert mlflow.commit_at(Path("/"), "2026-11-04T00:00:00Z") == ""


def test_compiled_files_are_found_in_the_cache_by_their_key_while_they_are_whole(tmp_path, monkeypatch):
    from edgedeploy.cli.exporting import _in_cache
    from edgedeploy.storage import sha256_bytes

    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path))
    artifact = replace(make_artifact("candidate"), sha256=sha256_bytes(b"compiled"), size_bytes=8)
    folder = tmp_path / "artifacts" / artifact.key
    assert _in_cache(artifact.key) is None
    write_json(folder / "manifest.json", artifact)
    (folder / artifact.file).write_bytes(b"compiled")
    assert _in_cache(artifact.key) == (folder, artifact)
    (folder / artifact.file).write_bytes(b"damaged!")
    assert _in_cache(artifact.key) is None
