"""Many devices and processes at once: what takes seconds a test, and is therefore no part of `make test`."""

import concurrent.futures
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedeploy import journal as journals
from edgedeploy import measure, pipeline
from edgedeploy.errors import UsageError
from edgedeploy.journal import Finished, SessionStep
from edgedeploy.lab import health
from edgedeploy.outcomes import Outcome
from edgedeploy.records.session import BlockEnded
from tests.spine.conftest import model, place  # noqa: F401 - fixtures
from tests.spine.small_lab import QUICK, kill_runner, runners, write_lab, write_release


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "_usual_schedule", lambda sides: QUICK)
    monkeypatch.setattr(measure, "MEMORY_VISITS", 1)
    monkeypatch.setattr(health, "_LOAD_SPAN_S", 0.02)


@pytest.fixture
def site(model) -> Path:  # noqa: F811
    return model.parent


def devices_of(outcome: Outcome) -> dict[str, str]:
    return {entry.cell: entry.device for entry in outcome.verdict.ledger}


def states_of(outcome: Outcome) -> dict[str, str]:
    return {entry.cell: entry.state for entry in outcome.verdict.ledger}


def test_device_flag_takes_every_cell_to_one_device(site):
    lab = write_lab(site, ["a", "b"])
    outcome = pipeline.run(write_release(site, {"one": "any", "two": "b"}), lab=lab, device="a")
    assert devices_of(outcome) == {"one": "a", "two": "a"}


def test_quarantine_by_a_check_ends_when_the_device_is_needed_and_passes(site):
    lab = write_lab(site, ["a", "b"], b={"target": "another-kind"})
    health.quarantine("a", "it could not be reached", "health check")
    health.quarantine("b", "the person said so")
    health.quarantine("b", "found ill too", "run")
    outcome = pipeline.run(write_release(site, {"one": "a", "two": "b"}), lab=lab)
    assert states_of(outcome) == {"one": "judged", "two": "pending"}
    assert set(health.quarantined()) == {"b"}
    assert health.quarantined()["b"].why == "the person said so"


def test_device_that_is_lost_twice_in_a_session_is_quarantined_and_the_cell_is_measured_afresh_elsewhere(site):
    lab = write_lab(site, ["weak", "well"])

    def kill_always(text: str) -> None:
        if text.startswith("weak: block"):
            kill_runner(site / "devices" / "weak")

    said: list[str] = []
    outcome = pipeline.run(
        write_release(site, {"one": "weak"}, blocks=3),
        lab=lab,
        progress=lambda text: (said.append(text), kill_always(text)),
    )
    assert devices_of(outcome) == {"one": "well"}, said
    (run, _) = outcome.runs.values()
    assert [visit.block for visit in run.visits] == [0, 1, 2]
    assert not any("dropped" in event for event in run.events), "the other device's accidents are not this session's"
    assert "lost while it measured one" in health.quarantined()["weak"].why


def test_devices_work_while_a_build_fails_and_its_cell_alone_is_failed(site):
    lab = write_lab(site, ["a"])
    release = write_release(site, {"one": "a", "two": "a"})
    release.write_text(release.read_text().replace("duration_us = 52.0", "duration = 52.0"))
    with pytest.raises(UsageError, match="duration"):
        pipeline.run(release, lab=lab)
    release.write_text(release.read_text().replace("duration = 52.0", "duration_us = 52.0, crash_after = 3"))
    outcome = pipeline.run(release, lab=lab)
    assert states_of(outcome) == {"one": "judged", "two": "failed"}
    assert outcome.verdict.decision == "INCONCLUSIVE"


def test_executor_of_other_processes_builds_and_measures(site):
    lab = write_lab(site, ["a", "b"])
    release = write_release(site, {"one": "any", "two": "any"})
    with concurrent.futures.ProcessPoolExecutor(2) as executor:
        outcome = pipeline.run(release, lab=lab, executor=executor, builders=2)
    assert states_of(outcome) == {"one": "judged", "two": "judged"}
    assert set(devices_of(outcome).values()) == {"a", "b"}


def test_two_runs_of_one_release_at_once_both_end(site):
    lab = write_lab(site, ["a"])
    release = write_release(site, {"one": "a"})
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        both = [threads.submit(pipeline.run, release, lab=lab, wait_s=60.0) for _ in range(2)]
        outcomes = [one.result(timeout=100) for one in both]
    assert [states_of(one) for one in outcomes] == [{"one": "judged"}] * 2
    assert len({run.session for one in outcomes for run in one.runs.values()}) == 2
    assert len({one.journal for one in outcomes}) == 2


def test_interrupted_run_gives_every_device_back_and_can_go_on(site):
    lab = write_lab(site, ["a", "b"])
    release = write_release(site, {"one": "a", "two": "b"}, blocks=4)

    def press_ctrl_c(text: str) -> None:
        if text.startswith("b: block 2"):
            os.kill(os.getpid(), signal.SIGINT)

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(release, lab=lab, progress=lambda text: (said.append(text), press_ctrl_c(text)))
    assert runners(site / "devices" / "a") == runners(site / "devices" / "b") == []
    assert "--resume" in said[-1]
    outcome = pipeline.run(release, resume="newest")
    assert states_of(outcome) == {"one": "judged", "two": "judged"}
    for run in outcome.runs.values():
        assert [visit.block for visit in run.visits] == [0, 1, 2, 3]
        assert not [visit for visit in run.visits if visit.dropped]
    assert not health.quarantined()


def test_process_that_is_killed_at_random_points_loses_and_repeats_nothing(site):
    lab = write_lab(site, ["a", "b"])
    release = write_release(site, {"one": "any", "two": "any"}, duration_us=500.0)
    chance = random.Random(7)
    command = [sys.executable, "-m", "edgedeploy", "run", "--quiet", "--json"]
    arguments = [str(release), "--lab", str(lab)]
    for _ in range(2):
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = len(journals.journals()[0].lines()) if journals.journals() else 0
        wanted, deadline_s = lines + chance.randint(4, 9), time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline_s:
            found = journals.journals()
            if found and len(found[0].lines()) >= wanted:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.01)
        process.wait()
        arguments = ["--resume", str(release)]
    if not journals.history(journals.journals()[0]).is_over:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1, 4), done.stderr
    (journal,) = journals.journals()
    lines = journal.lines()
    for cell in ("one", "two"):
        mine = [line for line in lines if isinstance(line, SessionStep) and line.cell == cell]
        assert len({line.session for line in mine}) == 1
        blocks = [line.did.block for line in mine if isinstance(line.did, BlockEnded)]
        assert blocks == list(range(len(blocks)))
    files = list(Path("bench_results/runs").rglob("*.json"))
    assert len(files) == 4
    assert isinstance(lines[-1], Finished)
    assert [entry.state for entry in lines[-1].ledger] == ["judged", "judged"]
