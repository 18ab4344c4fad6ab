"""The sentinel in a session: visited at both ends, written down like every step, and never what a session fails of."""

from pathlib import Path

import msgspec
import pytest

from edgedeploy import journal as journals
from edgedeploy import measure, passports, pipeline
from edgedeploy.build import load_artifact
from edgedeploy.errors import DeviceUnreachable
from edgedeploy.judge.sentinel import reading_of
from edgedeploy.lab import health, visits
from edgedeploy.records.session import BlockEnded, MemoryMeasured, SentinelVisited

from .small_lab import QUICK, measure_quickly, write_lab, write_release


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    measure_quickly(monkeypatch)
    monkeypatch.setattr(measure, "SENTINEL", QUICK)
    monkeypatch.setattr(health, "check", lambda *arguments, **options: health.Health())


@pytest.fixture
def witness(compiled, monkeypatch):
    """Let the fake back end have a sentinel, which a runtime that computes nothing has not."""

    def have(**options) -> Path:
        folder = compiled("sentinel", duration_us=70.0, **options)
        monkeypatch.setattr(passports, "sentinels", lambda *arguments, **more: {"fake": load_artifact(folder)})
        return folder

    return have


@pytest.fixture
def request_of(compiled):
    """A session of one artifact with a sentinel, as `measure` takes it."""

    def make(folder: Path, **changes):
        built = load_artifact(compiled("a", duration_us=50.0))
        lab = write_lab(Path.cwd(), ["a"])
        request = measure.MeasureRequest(
            sides=(("one", built),),
            device_name="a",
            device=pipeline.device_of(pipeline.load_lab(lab), "a"),
            limits=pipeline.this_target("fake-board").conditions,
            evaluation=None,
            blocks=2,
            sentinels={"fake": load_artifact(folder)},
        )
        return measure.replace(request, **changes)

    return make


def steps_of(request, **more):
    kept = []
    runs = measure.measure(request, lambda runs: False, lambda text: None, keep=kept.append, **more)
    return runs, kept


def test_gate_visits_the_sentinel_before_the_first_block_and_after_the_last(compiled, witness):
    folder = witness()
    artifact = compiled("a", duration_us=50.0)
    outcome = pipeline.gate(artifact, baseline=artifact, margins=["latency_p50=+90%"], max_blocks=2)
    for run in outcome.runs.values():
        assert [visit.block for visit in run.sentinel] == [-1, len(run.visits)]
        assert run.sentinel_sha256 == load_artifact(folder).artifact.sha256
        reading = reading_of(run)
        assert 50e-6 < reading.start_s < 1e-3
        assert 50e-6 < reading.end_s < 1e-3
    assert not any("the board changed" in note for cell in outcome.verdict.cells for note in cell.notes)


def test_bench_visits_it_too_and_the_lab_file_can_forbid_it(compiled, witness):
    witness()
    run, _ = pipeline.bench(compiled("a"), visits=1)
    assert [visit.block for visit in run.sentinel] == [-1, 1]
    lab = write_lab(Path.cwd(), ["mute"])
    lab.write_text(lab.read_text() + "sentinel = false\n")
    run, _ = pipeline.bench(compiled("a"), visits=1, device="mute", lab=lab)
    assert run.sentinel == ()
    assert run.sentinel_sha256 == ""


def test_runtime_that_computes_nothing_has_none(compiled):
    assert passports.sentinels("fake-board", ["fake"], lambda text: None) == {}
    run, _ = pipeline.bench(compiled("a"), visits=1)
    assert run.sentinel == ()


def test_session_goes_on_after_any_of_its_steps(request_of, witness):
    """The fold, without a device: after each k steps the next thing to do is the one that was done."""
    request = request_of(witness())
    (run,), steps = steps_of(request)
    kinds = [type(step).__name__ for step in steps if isinstance(step, MemoryMeasured | SentinelVisited | BlockEnded)]
    assert kinds == ["MemoryMeasured", "SentinelVisited", "BlockEnded", "BlockEnded", "SentinelVisited"]
    for count in range(len(steps) + 1):
        session = measure.Session(request, "s")
        for step in steps[:count]:
            session.apply(step)
        rest = [step for step in steps[count:] if isinstance(step, MemoryMeasured | SentinelVisited | BlockEnded)]
        words = {MemoryMeasured: "memory", SentinelVisited: "sentinel", BlockEnded: "block"}
        todo = session.next()
        assert (todo.what if todo else None) == (words[type(rest[0])] if rest else None)
        for step in steps[count:]:
            session.apply(step)
        assert session.runs() == (run,)


def test_steps_survive_the_journal(witness):
    witness()
    lab = write_lab(Path.cwd(), ["a"])
    outcome = pipeline.run(write_release(Path.cwd(), {"one": "a"}), lab=lab)
    lines = journals.named(outcome.journal).lines()
    visited = [line.did for line in lines if isinstance(getattr(line, "did", None), SentinelVisited)]
    assert [(step.is_end, step.visit.block) for step in visited] == [(False, -1), (True, 2)]
    for run in outcome.runs.values():
        assert run.sentinel == tuple(step.visit for step in visited)


def test_decided_session_still_has_its_last_visit(request_of, witness):
    asked = []

    def is_decided(runs):
        asked.append(runs)
        return True

    runs = measure.measure(request_of(witness()), is_decided, lambda text: None)
    assert asked, "a session that may be decided was asked about"
    assert [visit.block for visit in runs[0].sentinel] == [-1, 1]


def test_sentinel_that_dies_stops_nothing(request_of, witness):
    (run,), _ = steps_of(request_of(witness(crash_after=30)))
    assert len(run.visits) == 2
    assert run.sentinel == ()
    assert sum("the visit of the sentinel of fake failed" in event for event in run.events) == 2


def test_device_that_is_lost_before_the_last_visit_is_not_waited_for(request_of, witness, monkeypatch):
    request, measure_block, opened = request_of(witness()), visits.measure_block, []
    open_transport = measure.open_transport

    def lose(agent, sides, schedule, *, block, seed):
        if sides[0].cell.startswith("sentinel") and block > 0:
            raise DeviceUnreachable("gone")
        return measure_block(agent, sides, schedule, block=block, seed=seed)

    def counted(*arguments, **options):
        opened.append(arguments)
        return open_transport(*arguments, **options)

    monkeypatch.setattr(visits, "measure_block", lose)
    monkeypatch.setattr(measure, "open_transport", counted)
    (run,), steps = steps_of(request)
    assert len(run.visits) == 2
    assert len(opened) == 1
    assert "the sentinel was not visited after the last block: gone" in run.events
    assert isinstance(steps[-1], SentinelVisited)


def test_device_that_is_lost_before_the_first_block_is_reached_again(request_of, witness, monkeypatch):
    request, measure_block, lost = request_of(witness()), visits.measure_block, []

    def lose_once(agent, sides, schedule, *, block, seed):
        if sides[0].cell.startswith("sentinel") and not lost:
            lost.append(block)
            raise DeviceUnreachable("gone for a moment")
        return measure_block(agent, sides, schedule, block=block, seed=seed)

    monkeypatch.setattr(visits, "measure_block", lose_once)
    (run,), _ = steps_of(request)
    assert lost == [-1]
    assert [visit.block for visit in run.sentinel] == [-1, 2]


def test_session_of_a_dead_process_that_lacks_only_the_sentinel_reaches_no_device(request_of, witness, monkeypatch):
    request = request_of(witness())
    _, steps = steps_of(request)
    monkeypatch.setattr(measure, "open_transport", lambda *arguments, **options: pytest.fail("it was reached"))
    (run,), added = steps_of(request, done=steps[:-1], session="s")
    assert [visit.block for visit in run.sentinel] == [-1]
    assert [step.event for step in added] == [
        "the sentinel was not visited after the last block: the session had been measured by another process"
    ]


def test_steps_of_a_sentinel_that_the_lab_file_forbids_meanwhile_are_taken_as_they_are(request_of, witness):
    request = request_of(witness())
    _, steps = steps_of(request)
    session = measure.Session(
        measure.replace(request, device=msgspec.structs.replace(request.device, sentinel=False)), "s"
    )
    for step in steps:
        session.apply(step)
    assert session.next() is None
    assert session.runs()[0].sentinel == ()
