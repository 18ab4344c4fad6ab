"""A run that dies at any point goes on: nothing is measured twice, nothing is lost, and nothing that changed is mixed."""

import dataclasses
from pathlib import Path

import pytest

from edgedeploy import journal as journals
from edgedeploy import measure, pipeline
from edgedeploy.errors import UsageError
from edgedeploy.journal import Finished, Journal, Planned, Resumed, SessionStep
from edgedeploy.lab import health
from edgedeploy.records.session import Begun, BlockEnded, Continued, MemoryMeasured, Shipped

from .small_lab import measure_quickly, write_lab, write_release


class Killed(BaseException):
    """The host process died here."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    measure_quickly(monkeypatch)
    monkeypatch.setattr(health, "check", lambda *arguments, **options: health.Health())


@pytest.fixture
def site(model) -> Path:
    return model.parent


@pytest.fixture
def death(monkeypatch):
    """Let the process die at the n-th line that is written: before it, in the middle of it, or after it."""
    write = Journal.append
    dying = {"at": 0, "how": "after"}
    written = []

    def append(self, line):
        # Each of a resumed run's first lines is no progress; a death at it alone would never end.
        is_progress = not isinstance(line, Planned | Resumed) and not (
            isinstance(line, SessionStep) and isinstance(line.did, Continued | Shipped)
        )
        dying["at"] -= is_progress
        if is_progress and dying["at"] == 0:
            if dying["how"] == "before":
                raise Killed
            if dying["how"] == "within":
                with self.path.open("ab") as stream:
                    stream.write(b'{"record":"step","cell":"one","did":{"st')
                raise Killed
        written.append(line)
        write(self, line)
        if is_progress and dying["at"] == 0:
            raise Killed

    monkeypatch.setattr(Journal, "append", append)
    return dying, written


def steps_of(lines, kind):
    return [line.did for line in lines if isinstance(line, SessionStep) and isinstance(line.did, kind)]


def test_run_that_dies_after_every_line_goes_on_each_time_and_measures_nothing_twice(site, death):
    dying, written = death
    lab = write_lab(site, ["a"])
    release = write_release(site, {"one": "a"})
    outcome, deaths = None, 0
    while outcome is None:
        # One line is written for good in each life; before it, now and then, it dies of writing half of it.
        lives = (("before", 1), ("after", 1), ("within", 2), ("after", 1))
        dying["how"], dying["at"] = lives[deaths % 4]
        try:
            outcome = pipeline.run(release, lab=lab, resume=journals.journals()[0].name if deaths else "")
        except Killed:
            deaths += 1
        assert deaths < 60
    assert deaths >= 10
    (name,) = {journal.name for journal in journals.journals()}
    lines = journals.named(name).lines()
    assert [step.block for step in steps_of(lines, BlockEnded)] == [0, 1]
    assert sorted(step.side for step in steps_of(lines, MemoryMeasured)) == [0, 1]
    assert len(steps_of(lines, Begun)) == 1
    assert lines == written, "what was written is what is there"
    old, new = outcome.runs.values()
    for run, side in ((old, 0), (new, 1)):
        recorded = [taken.visit for step in steps_of(lines, BlockEnded) for taken in step.taken if taken.side == side]
        assert list(run.visits) == recorded
        assert run.session == steps_of(lines, Begun)[0].session
    assert any("measuring went on at" in event and "by another process" in event for event in new.events)
    assert len(list(Path("bench_results/runs").rglob("*.json"))) == 2
    assert isinstance(lines[-1], Finished)


def test_half_measured_cell_goes_on_and_the_others_are_loaded(site, death):
    dying, written = death
    lab = write_lab(site, ["a"])
    release = write_release(site, {"one": "a", "two": "a"})
    dying["at"] = 3 + 6 + 4  # three builds, the first cell, two steps and two blocks of the second
    with pytest.raises(Killed):
        pipeline.run(release, lab=lab)
    first = [line for line in written if isinstance(line, SessionStep)]
    dying["at"] = -1
    said: list[str] = []
    outcome = pipeline.run(release, resume="newest", progress=said.append)
    assert "1 of 2 cells are measured" in next(text for text in said if "going on" in text)
    assert [entry.state for entry in outcome.verdict.ledger] == ["judged", "judged"]
    assert {one.cell for one in outcome.occupied} == {"two"}
    assert [line for line in written if isinstance(line, SessionStep)][: len(first)] == first
    assert set(outcome.artifacts) == {"base-a", "one", "two"}


def test_fresh_run_beside_an_unfinished_one_says_how_to_go_on_with_that(site, death):
    dying, _ = death
    lab = write_lab(site, ["a"])
    release = write_release(site, {"one": "a"})
    dying["at"] = 1
    with pytest.raises(Killed):
        pipeline.run(release, lab=lab)
    (stopped,) = journals.journals()
    dying["at"] = -1
    said: list[str] = []
    pipeline.run(release, lab=lab, progress=said.append)
    assert any(f"--resume {stopped.name}" in text for text in said)
    assert len(journals.journals()) == 2


def test_run_does_not_go_on_when_what_its_numbers_rest_on_changed(site, death, monkeypatch):
    dying, _ = death
    lab = write_lab(site, ["a"])
    release = write_release(site, {"one": "a"})
    dying["at"] = 5
    with pytest.raises(Killed):
        pipeline.run(release, lab=lab)
    dying["at"] = -1
    text = release.read_text()
    release.write_text(text + "\n")
    with pytest.raises(UsageError, match="the release file"):
        pipeline.run(release, resume="newest")
    release.write_text(text)
    with monkeypatch.context() as changed, pytest.raises(UsageError, match="and is 99"):
        changed.setattr("edgedeploy.__version__", "99")
        pipeline.run(release, resume="newest")
    with monkeypatch.context() as changed, pytest.raises(UsageError, match=r"edgedeploy's measure\.py"):
        changed.setattr(pipeline, "_deciding_code", lambda: {"measure.py": "other"})
        pipeline.run(release, resume="newest")

    import onnx

    graph = onnx.load("tiny.onnx")
    graph.graph.node[0].op_type = "Abs"
    onnx.save(graph, "tiny.onnx")
    with pytest.raises(UsageError, match="the artifact of cell 'base-a' is not the one"):
        pipeline.run(release, resume="newest")


def test_resume_takes_no_other_options_and_no_unknown_run(site, capsys):
    import edgedeploy.cli

    release = write_release(site, {"one": "local"})
    assert edgedeploy.cli.run(["run", "--resume", str(release)]) == 2
    assert "stopped in the middle" in capsys.readouterr().err
    assert edgedeploy.cli.run(["run", "--seed", "3", "--resume"]) == 2
    assert "leave --seed out" in capsys.readouterr().err
    assert edgedeploy.cli.run(["run", "--resume", "20260101T000000Z-000000"]) == 2
    assert "there is no run" in capsys.readouterr().err


def test_session_continued_after_any_step_does_what_it_would_have_done(site, monkeypatch):
    """The fold itself, without a device: after each k steps the next thing to do is the one that was done."""
    lab = write_lab(site, ["a"])
    outcome = pipeline.run(write_release(site, {"one": "a"}, blocks=4), lab=lab)
    steps = [line.did for line in journals.named(outcome.journal).lines() if isinstance(line, SessionStep)]
    sides = tuple(
        (cell, pipeline.load_artifact(Path(line.folder)))
        for cell in ("base-a", "one")
        for line in journals.named(outcome.journal).lines()
        if getattr(line, "record", "") == "built" or (hasattr(line, "folder") and line.cell == cell)
    )
    request = measure.MeasureRequest(
        sides=sides,
        device_name="a",
        device=pipeline.device_of(pipeline.load_lab(lab), "a"),
        limits=pipeline.this_target("fake-board").conditions,
        evaluation=None,
        blocks=4,
    )
    for count in range(len(steps) + 1):
        session = measure.Session(request, "s")
        for step in steps[:count]:
            session.apply(step)
        rest = [step for step in steps[count:] if isinstance(step, MemoryMeasured | BlockEnded)]
        todo = session.next()
        if not rest:
            assert todo is None
        elif isinstance(rest[0], MemoryMeasured):
            assert (todo.what, todo.number) == ("memory", rest[0].side)
        else:
            assert (todo.what, todo.number) == ("block", rest[0].block)
        for step in steps[count:]:
            session.apply(step)
        assert session.runs() == tuple(outcome.runs.values())
        assert dataclasses.replace(request) == request
