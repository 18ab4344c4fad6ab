"""Exports into real stores of MLflow: a database file, and a server that is down, refuses, or breaks off in the middle."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgedeploy.cli import run as command
from edgedeploy.exports import mlflow

from .dashboard_samples import make_results

pytest.importorskip("mlflow", reason="pip install 'edgedeploy[mlflow]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a gate of two runs, and what MLflow keeps of them after an export by the command."""
    folder = tmp_path_factory.mktemp("mlflow")
    make_results(folder, days=1)
    return folder


@pytest.fixture(scope="module")
def uri(place):
    return f"sqlite:///{place}/mlflow.db"


def verdict_of(place):
    (file,) = (place / "bench_results" / "reports").glob("*.json")
    return file


def export(place, uri, *references, experiment="gates", **more):
    return mlflow.export(
        [str(one) for one in references],
        results=place / "bench_results",
        tracking_uri=uri,
        experiment=experiment,
        **more,
    )


def kept(uri, experiment="gates"):
    """Return MLflow's runs by name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found else []
    return client, {run.info.run_name: run for run in runs}


@pytest.fixture(scope="module")
def exported(place, uri):
    return export(place, uri, verdict_of(place))


def test_a_gate_arrives_with_a_run_below_it_for_each_artifact(place, uri, exported):
    client, runs = kept(uri)
    assert sorted(runs) == ["dense-fp32 (baseline)", "fashion-mnist 1.0", "pruned-int8 (candidate)"]
    gate, candidate = runs["fashion-mnist 1.0"], runs["pruned-int8 (candidate)"]
    assert {one.name for one in exported} == set(runs)
    assert candidate.data.tags["mlflow.parentRunId"] == gate.info.run_id
    assert "mlflow.parentRunId" not in gate.data.tags
    assert gate.data.tags["edgedeploy.decision"] == "PASS"
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert candidate.data.params["precision"] == "int8"
    assert candidate.data.metrics["size_bytes"] == 247_112
    assert candidate.data.metrics["p50_s"] == pytest.approx(0.0029, rel=0.1)
    history = client.get_metric_history(candidate.info.run_id, "visit_p50_s")
    assert sorted(one.step for one in history) == [0, 1, 2]


def test_the_verdict_its_report_and_the_runs_are_artifacts_beside_the_database(place, uri, exported):
    client, runs = kept(uri)
    for name, expected in (("fashion-mnist 1.0", {".json", ".html"}), ("pruned-int8 (candidate)", {".json"})):
        files = client.list_artifacts(runs[name].info.run_id)
        assert {Path(one.path).suffix for one in files} == expected
    assert runs["fashion-mnist 1.0"].info.artifact_uri.startswith(f"file://{place}/mlruns/gates/")
    stored = next(Path(place, "mlruns").rglob(verdict_of(place).name))
    assert stored.read_bytes() == verdict_of(place).read_bytes()


def test_exporting_twice_sends_nothing_twice(place, uri, exported):
    again = export(place, uri, verdict_of(place))
    assert [one.state for one in again] == ["already there"] * 3
    assert [one.run_id for one in again] == [one.run_id for one in exported]
    assert len(kept(uri)[1]) == 3


def test_an_export_that_was_cut_off_is_completed(place, uri, exported, monkeypatch):
    fill, calls = mlflow._fill, []

    def fails(client, run_id, entry):
        calls.append(entry.name)
        if len(calls) == 2:
            raise ConnectionError("the network is gone")
        fill(client, run_id, entry)

    monkeypatch.setattr(mlflow, "_fill", fails)
    with pytest.raises(mlflow.ToolchainError, match=r"the network is gone; is it up.*sends only the rest"):
        export(place, uri, verdict_of(place), experiment="cut")
    assert len(calls) == 2
    monkeypatch.setattr(mlflow, "_fill", fill)
    states = [one.state for one in export(place, uri, verdict_of(place), experiment="cut")]
    assert states == ["already there", "exported", "exported"]
    _, runs = kept(uri, "cut")
    assert len(runs) == 3
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_run_that_was_sent_alone_is_put_below_its_gate_later(place, uri):
    file = max((place / "bench_results" / "runs").glob("*/*dense*/*.json"))
    (alone,) = export(place, uri, file, experiment="alone")
    gate, baseline, _ = export(place, uri, verdict_of(place), experiment="alone")
    assert (baseline.state, baseline.run_id) == ("already there", alone.run_id)
    _, runs = kept(uri, "alone")
    assert runs["dense-fp32 (baseline)"].data.tags["mlflow.parentRunId"] == gate.run_id


def test_a_deleted_experiment_is_a_sentence(place, uri):
    export(place, uri, verdict_of(place), experiment="gone")
    client, _ = kept(uri, "gone")
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(mlflow.UsageError, match="'gone' was deleted there; restore it"):
        export(place, uri, verdict_of(place), experiment="gone")


def test_the_command_says_what_it_sent_and_is_quiet_about_mlflows_own_affairs(place, uri):
    words = ["export", "mlflow", str(verdict_of(place)), "--tracking-uri", uri, "--experiment", "by-command", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "edgedeploy", *words, "--results", "bench_results"],
        cwd=place, capture_output=True, text=True, check=False, env={**os.environ, "EDGEDEPLOY_LOG": "warning"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["format"] == "edgedeploy.export/1"
    assert [one["state"] for one in document["runs"]] == ["exported"] * 3
    assert [line for line in done.stderr.splitlines() if not line.startswith("·")] == []


# ---------------------------------------------------------------- servers


def test_a_server_that_is_down_is_a_sentence_within_seconds(place, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://ci:s3cret@127.0.0.1:{free.getsockname()[1]}"
    start_s = time.monotonic()
    assert command(["export", "mlflow", str(verdict_of(place)), "--tracking-uri", address]) == 3
    said = capsys.readouterr().err
    assert "did not take the export" in said
    assert "is it up, and is the address right?" in said
    assert "s3cret" not in said
    assert "Traceback" not in said
    assert time.monotonic() - start_s < 60


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A server that knows nobody."""

    def do_GET(self):
        body = b'{"error_code": "PERMISSION_DENIED", "message": "who are you?"}'
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        """Say nothing."""


def test_a_server_that_refuses_is_quoted(place, capsys):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"
            assert command(["export", "mlflow", str(verdict_of(place)), "--tracking-uri", address]) == 3
        finally:
            server.shutdown()
            thread.join()
    assert "who are you?" in capsys.readouterr().err


def test_an_address_that_mlflow_does_not_know_is_a_sentence(place, capsys):
    assert command(["export", "mlflow", str(verdict_of(place)), "--tracking-uri", "gopher://x"]) == 3
    assert "gopher" in capsys.readouterr().err
