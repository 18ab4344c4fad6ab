"""Builds and sessions on real Dask clusters of two worker processes, and what happens when one of them dies."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import edgedeploy
from edgedeploy import build, dask_cluster, dispatch, measure, pipeline
from edgedeploy.build import BuildRequest
from edgedeploy.dask_cluster import Cluster
from edgedeploy.errors import EdgedeployError, ToolchainError, UsageError
from edgedeploy.journal import Journal, SessionStep, history, journals, journals_dir
from edgedeploy.records.session import BlockEnded
from tests.spine.conftest import TARGET
from tests.spine.small_lab import QUICK, runners, write_lab, write_release
from tests.testbed.board import free_port, wait_until
from tests.testbed.kept import Kept

pytest.importorskip("distributed", reason="Dask is not installed: pip install 'edgedeploy[dask]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a model, a target and a cache, which is the working directory of this module's tests."""
    onnx = pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
    helper = onnx.helper
    folder = tmp_path_factory.mktemp("dask")
    (folder / "targets").mkdir()
    (folder / "targets" / "fake-board.toml").write_text(TARGET)
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["scores"], name="relu")],
        "tiny",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "tiny.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.setenv("EDGEDEPLOY_STATE_DIR", str(folder / "state"))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.delenv("EDGEDEPLOY_LAB", raising=False)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def client(site):
    with dask_cluster.cluster("dask", workers=2) as cluster:
        yield cluster._client


def as_born(client) -> None:
    """Undo what tests do to workers, and have them measure in a hurry."""

    # Functions within functions are pickled whole, so that workers need not find this file.
    def restore(cache: str, version: str) -> None:
        import os

        import edgedeploy
        from edgedeploy import dask_cluster, dispatch, measure
        from edgedeploy.lab.visits import Schedule

        quick = Schedule(bursts_per_visit=2, samples_per_burst=30, lead_in=0, warm_up_cap_s=0.2)
        measure._usual_schedule = lambda sides: quick
        measure.MEMORY_VISITS = 1
        dask_cluster.build_task, dask_cluster.session_task = dispatch.build_task, dispatch.session_task
        edgedeploy.__version__ = version
        os.environ["EDGEDEPLOY_CACHE_DIR"] = cache

    client.wait_for_workers(2, timeout=120)
    client.run(restore, os.environ["EDGEDEPLOY_CACHE_DIR"], edgedeploy.__version__)


@pytest.fixture
def cluster(client):
    as_born(client)
    told: list[str] = []
    with Cluster(client, told.append) as cluster:
        cluster.told = told
        yield cluster


@pytest.fixture
def mortal(site):
    """An executor on a cluster of its own, whose workers may die."""
    told: list[str] = []
    with dask_cluster.cluster("dask", workers=2, progress=told.append) as cluster:
        as_born(cluster._client)
        cluster.told = told
        yield cluster


def request(site: Path, **options: object) -> BuildRequest:
    return BuildRequest(
        name="tiny",
        source="tiny.onnx",
        base=site,
        target="fake-board",
        backend="fake",
        precision="fp32",
        options=options,
    )


def test_run_builds_and_measures_on_the_workers_alone(site, cluster, monkeypatch):
    def here(*given: object, **more: object) -> None:
        raise AssertionError("this was to be done on a worker")

    monkeypatch.setattr(build, "canonical_model", here)
    monkeypatch.setattr(dispatch, "measure", here)
    lab = write_lab(site, ["a", "b"])
    release = write_release(site, {"one": "a", "two": "b"})
    outcome = pipeline.run(release, lab=lab, executor=cluster, builders=cluster.builders, progress=cluster.told.append)
    assert {entry.cell: (entry.state, entry.device) for entry in outcome.verdict.ledger} == {
        "one": ("judged", "a"),
        "two": ("judged", "b"),
    }
    assert len(outcome.runs) == 4
    assert all(Path(file).is_file() for file in outcome.runs)
    assert any("block 1 of" in text for text in cluster.told), "workers tell their progress"
    steps = history(journals()[0])
    assert set(steps.stored) == {"one", "two"}
    assert not steps.open


def test_error_of_a_worker_keeps_its_class_and_its_sentence(site, cluster):
    with pytest.raises(UsageError, match="unknown option -O no_such_option=1"):
        cluster.submit(dispatch.build_task, request(site, no_such_option=1)).result(60)


def test_local_cluster_lets_nobody_else_in(client):
    import distributed

    with pytest.raises(OSError, match=r"Timed out|certificate|SSL|closed"):
        distributed.Client(client.scheduler.address, security=distributed.Security.temporary(), timeout=3)
    with pytest.raises(OSError, match=r"Timed out|SSL|closed"):
        distributed.Client(client.scheduler.address.replace("tls", "tcp"), timeout=3)
    for page in ("/", "/info/main/workers.html", "/json/counts.json", "/metrics"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(client.dashboard_link.partition("/status")[0] + page, timeout=10)


def die_in_builds(client, flag: Path, times: int) -> None:
    def arrange(flag: str, times: int) -> None:
        import os
        import signal
        from pathlib import Path

        from edgedeploy import dask_cluster, dispatch

        def build_or_die(request: object, progress: object = None) -> object:
            with Path(flag).open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            if len(Path(flag).read_text().split()) <= times:
                os.kill(os.getpid(), signal.SIGKILL)
            return dispatch.build_task(request, progress)

        dask_cluster.build_task = build_or_die

    client.run(arrange, str(flag), times)


def test_build_whose_worker_dies_is_done_once_more_elsewhere(site, mortal, tmp_path):
    die_in_builds(mortal._client, tmp_path / "pids", times=1)
    built = mortal.submit(dispatch.build_task, request(site, duration_us=11.0)).result(120)
    assert built.file.is_file()
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == len(set(pids)) == 2, "it was begun once in each of two processes"
    assert any("died while it built" in text for text in mortal.told)


def test_build_that_kills_two_workers_is_given_up(site, mortal, tmp_path):
    die_in_builds(mortal._client, tmp_path / "pids", times=100)
    with pytest.raises(ToolchainError, match=r"tiny could not be built: each of the Dask workers .* died over it"):
        mortal.submit(dispatch.build_task, request(site, duration_us=12.0)).result(120)
    assert len((tmp_path / "pids").read_text().split()) == 2


def test_session_whose_worker_dies_goes_on_elsewhere_and_measures_nothing_twice(site, mortal, tmp_path):
    def arrange(flag: str) -> None:
        import dataclasses
        import os
        import signal
        from pathlib import Path

        from edgedeploy import dask_cluster, dispatch
        from edgedeploy.records.session import BlockEnded

        class DeadlyJournal(dask_cluster.TellingJournal):
            def append(self, line: object) -> None:
                super().append(line)
                if (
                    isinstance(getattr(line, "did", None), BlockEnded)
                    and line.did.block == 1
                    and not Path(flag).exists()
                ):
                    Path(flag).touch()
                    os.kill(os.getpid(), signal.SIGKILL)

        def measure_or_die(order: object, progress: object, stop: object) -> object:
            journal = DeadlyJournal(order.journal.path, order.journal.tell)
            return dispatch.session_task(dataclasses.replace(order, journal=journal), progress, stop)

        dask_cluster.session_task = measure_or_die

    mortal._client.run(arrange, str(tmp_path / "died"))
    lab = write_lab(site, ["a"])
    outcome = pipeline.run(
        write_release(site, {"one": "a"}, blocks=4), lab=lab, executor=mortal, progress=mortal.told.append
    )
    assert (tmp_path / "died").exists()
    assert any("died; the session goes on elsewhere" in text for text in mortal.told)
    old, new = outcome.runs.values()
    assert [visit.block for visit in old.visits] == [visit.block for visit in new.visits] == [0, 1, 2, 3]
    assert len({old.session, new.session}) == 1
    assert not any(visit.dropped for visit in old.visits)
    steps = [
        line for line in Journal(journals_dir() / f"{outcome.journal}.jsonl").lines() if isinstance(line, SessionStep)
    ]
    assert {step.session for step in steps} == {old.session}
    assert [step.did.block for step in steps if isinstance(step.did, BlockEnded)] == [0, 1, 2, 3]


def test_worker_of_another_version_is_told_and_not_used(site, client, cluster):
    def pretend(version: str) -> None:
        import edgedeploy

        edgedeploy.__version__ = version

    first, second = client.nthreads()
    client.run(pretend, "0.1.0", workers=[first])
    told: list[str] = []
    with Cluster(client, told.append) as other:
        assert other.builders == 1
        assert list(other._fit()) == [second]
        assert f"the Dask worker {first} has edgedeploy 0.1.0, and here is " in told[0]
    client.run(pretend, "0.1.0", workers=[second])
    with Cluster(client, told.append) as other, pytest.raises(EdgedeployError, match="no worker of the Dask cluster"):
        other.submit(dispatch.build_task, request(site)).result(60)


def test_artifacts_come_back_as_bytes_and_are_sent_as_bytes_where_the_cache_is_not_shared(
    site, client, cluster, tmp_path, monkeypatch
):
    def move(cache: str) -> None:
        import os

        os.environ["EDGEDEPLOY_CACHE_DIR"] = cache

    client.run(move, str(tmp_path / "theirs"))
    told: list[str] = []
    with Cluster(client, told.append) as apart:
        built = apart.submit(dispatch.build_task, request(site, duration_us=13.0)).result(60)
        assert built.folder.parent == site / "cache" / "artifacts"
        assert (tmp_path / "theirs" / "artifacts" / built.artifact.key).is_dir()
        assert build.load_artifact(built.folder).artifact == built.artifact
        # A device that is this machine cannot be reached from workers that may be anywhere; so let them be here.
        monkeypatch.setattr(Cluster, "_belongs_here", lambda self, order: False)
        monkeypatch.setattr(dispatch, "measure", None)
        outcome = pipeline.run(
            write_release(site, {"one": "a"}, duration_us=14.0), lab=write_lab(site, ["a"]), executor=apart
        )
    assert [entry.state for entry in outcome.verdict.ledger] == ["judged"]
    assert all(Path(file).is_relative_to(site) for file in outcome.runs)


def test_local_device_is_measured_here_when_workers_may_be_elsewhere(site, client, cluster, tmp_path, monkeypatch):
    def move(cache: str) -> None:
        import os

        os.environ["EDGEDEPLOY_CACHE_DIR"] = cache

    client.run(move, str(tmp_path / "theirs"))
    monkeypatch.setattr(measure, "_usual_schedule", lambda sides: QUICK)
    here: list[str] = []
    in_this_process = dispatch.measure

    def noted(request: object, *given: object, **more: object) -> object:
        here.append(request.device_name)
        return in_this_process(request, *given, **more)

    monkeypatch.setattr(dispatch, "measure", noted)
    with Cluster(client, print) as apart:
        monkeypatch.setattr("edgedeploy.dask_cluster._measured_there", None)
        outcome = pipeline.run(
            write_release(site, {"one": "a"}, duration_us=15.0), lab=write_lab(site, ["a"]), executor=apart
        )
    assert here == ["a"]
    assert [entry.state for entry in outcome.verdict.ledger] == ["judged"]


# ---------------------------------------------------------------- clusters that other processes run


class Foreign:
    """A scheduler and a worker that were started by hand."""

    def __init__(self, folder: Path, *options: str, scheme: str = "tcp") -> None:
        self.port = free_port()
        self.address = f"{scheme}://127.0.0.1:{self.port}"
        quiet = ("--no-dashboard",)
        self.scheduler = self._started(
            folder, "scheduler", "--host", f"{scheme}://127.0.0.1", "--port", str(self.port), *quiet, *options,
            says="Scheduler at:",
        )  # fmt: skip
        self.worker = self._started(
            folder, "worker", self.address, "--host", "127.0.0.1", "--no-nanny", "--nthreads", "4", *quiet, *options,
            says="Registered to:",
        )  # fmt: skip

    def _started(self, folder: Path, role: str, *arguments: str, says: str) -> Kept:
        argv = ["env", "-C", folder, sys.executable, "-m", "distributed.cli.dask_" + role, *arguments]
        process = Kept(argv, folder / f"{role}.log")
        wait_until(lambda: says in process.log.read_text(), timeout_s=60, what=process.said)
        return process

    def stop(self) -> None:
        self.worker.stop()
        self.scheduler.stop()


def test_run_that_is_killed_leaves_no_worker_at_its_device_and_all_that_was_told_in_the_journal(site, tmp_path):
    foreign = Foreign(tmp_path)
    try:
        lab, root = write_lab(site, ["a"]), site / "devices" / "a"
        # Minutes, if nobody told the worker that its client is dead.
        release = write_release(site, {"one": "a"}, blocks=500, duration_us=60.0)
        argv = [sys.executable, "-m", "edgedeploy", "run", str(release), "--lab", str(lab)]
        argv += ["--scheduler", foreign.address.replace("tcp", "dask")]
        known = len(journals())
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            wait_until(lambda: len(journals()) > known, timeout_s=60, what=lambda: "no journal")
            journal = journals()[0]

            def blocks() -> list[int]:
                steps = [line.did for line in journal.lines() if isinstance(line, SessionStep)]
                return [step.block for step in steps if isinstance(step, BlockEnded)]

            wait_until(lambda: len(blocks()) > 1, timeout_s=120, what=lambda: "no block")
            assert runners(root), "a worker measures"
            process.send_signal(signal.SIGKILL)
        wait_until(lambda: not runners(root), timeout_s=60, what=lambda: "the worker is still at the device")
        assert blocks() == list(range(len(blocks())))
        assert history(journal).open["one"].blocks == len(blocks())
        assert foreign.worker.is_alive()
    finally:
        foreign.stop()


def test_scheduler_behind_tls_is_used_with_certificates_and_with_nothing_else(site, tmp_path):
    import distributed

    made = distributed.Security.temporary()
    (tmp_path / "ca.pem").write_text(made.tls_ca_file)
    (tmp_path / "key.pem").write_text(made.tls_client_key)
    (tmp_path / "cert.pem").write_text(made.tls_client_cert)
    options = [
        f"--tls-{what}={tmp_path / name}.pem" for what, name in (("ca-file", "ca"), ("cert", "cert"), ("key", "key"))
    ]
    security = tmp_path / "security.toml"
    security.write_text('format = "edgedeploy.scheduler/1"\nca = "ca.pem"\ncert = "cert.pem"\nkey = "key.pem"\n')
    foreign = Foreign(tmp_path, *options, scheme="tls")
    try:
        with dask_cluster.cluster(foreign.address, security=security) as cluster:
            built = cluster.submit(dispatch.build_task, request(site, duration_us=16.0)).result(60)
            assert built.file.is_file()
        with (
            pytest.raises(ToolchainError, match=r"cannot be reached .*does it speak tcp\?"),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(dask_cluster, "CONNECT_S", 2.0)
            with dask_cluster.cluster(f"dask://127.0.0.1:{foreign.port}"):
                pass
    finally:
        foreign.stop()


def test_scheduler_that_is_lost_in_the_middle_ends_the_run_with_a_sentence(site, tmp_path):
    foreign = Foreign(tmp_path)
    try:
        with dask_cluster.cluster(foreign.address) as cluster:
            assert cluster.builders == 1
            foreign.scheduler.stop()
            with pytest.raises(EdgedeployError, match="edgedeploy run --resume"):
                cluster.submit(dispatch.build_task, request(site, duration_us=17.0)).result(120)
    finally:
        foreign.stop()
