"""Cells spread over devices: each cell once, each device by one at a time, and what is not fit is told, never dropped."""

import itertools
import json
import pickle
from pathlib import Path

import msgspec
import pytest

import edgedeploy.cli
from edgedeploy import dispatch, measure, pipeline
from edgedeploy.errors import CompileError, DeviceError, UsageError
from edgedeploy.lab import bundle, health
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.inventory import device as device_of
from edgedeploy.lab.inventory import load_lab
from edgedeploy.outcomes import Outcome

from .small_lab import kill_runner, measure_quickly, write_lab, write_release


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    measure_quickly(monkeypatch)
    monkeypatch.setattr(health, "_LOAD_SPAN_S", 0.02)


@pytest.fixture
def site(model) -> Path:
    return model.parent


def devices_of(outcome: Outcome) -> dict[str, str]:
    return {entry.cell: entry.device for entry in outcome.verdict.ledger}


def states_of(outcome: Outcome) -> dict[str, str]:
    return {entry.cell: entry.state for entry in outcome.verdict.ledger}


def test_cells_spread_over_the_devices_of_their_kind_and_each_device_does_one_thing_at_a_time(site):
    lab = write_lab(site, ["a", "b", "other"], other={"target": ""})
    release = write_release(site, {"one": "any", "two": "any", "three": "b"})
    outcome = pipeline.run(release, lab=lab)
    assert states_of(outcome) == dict.fromkeys(["one", "two", "three"], "judged")
    assert devices_of(outcome)["three"] == "b"
    assert set(devices_of(outcome).values()) == {"a", "b"}
    for old, new in zip(*[iter(outcome.runs.values())] * 2, strict=True):
        assert (old.device, old.session) == (new.device, new.session)
    for device in ("a", "b"):
        spans = sorted((one.started_s, one.ended_s) for one in outcome.occupied if one.device == device)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    # Both were at work at the same time.
    first = {device: next(one for one in outcome.occupied if one.device == device) for device in ("a", "b")}
    assert first["a"].started_s < first["b"].ended_s
    assert first["b"].started_s < first["a"].ended_s


def test_device_that_cannot_start_the_runner_is_quarantined_and_another_of_its_kind_does_its_work(site, capsys):
    lab = write_lab(site, ["broken", "well"], broken={"python": "/no/python"})
    release = write_release(site, {"one": "broken", "two": "any"})
    said: list[str] = []
    outcome = pipeline.run(release, lab=lab, progress=said.append)
    assert devices_of(outcome) == {"one": "well", "two": "well"}
    assert "/no/python" in health.quarantined()["broken"].why
    assert any(text.startswith("broken: out of use") for text in said)
    assert edgedeploy.cli.run(["devices", "quarantine", "broken", "--lift", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == {}


def test_cell_without_a_fit_device_is_pending_with_the_reason_and_goes_on_when_there_is_one(site, capsys):
    lab = write_lab(site, ["a", "b"], b={"target": "another-kind"})
    release = write_release(site, {"one": "a", "two": "b"})
    health.quarantine("b", "its fan is broken")
    assert edgedeploy.cli.run(["run", str(release), "--lab", str(lab), "--quiet"]) == 3
    told = capsys.readouterr().out
    assert "of 2 cells: 1 judged, 1 pending; go on with: edgedeploy run --resume" in told
    assert "its fan is broken" in told.replace("\n", " ")
    health.lift("b")
    outcome = pipeline.run(release, resume="newest")
    assert devices_of(outcome) == {"one": "a", "two": "b"}
    assert len(outcome.occupied) == 1, "what was measured is not measured again"
    with pytest.raises(UsageError, match="stopped in the middle"):
        pipeline.run(release, resume="newest")


def test_only_cell_without_a_fit_device_is_an_error(site):
    lab = write_lab(site, ["a"], a={"python": "/no/python"})
    with pytest.raises(DeviceError, match="/no/python"):
        pipeline.run(write_release(site, {"one": "a"}), lab=lab)


def test_any_without_a_device_of_the_target_says_what_to_write(site):
    lab = write_lab(site, ["a"], a={"target": "another-kind"})
    with pytest.raises(UsageError, match='add target = "fake-board"'):
        pipeline.run(write_release(site, {"one": "any"}), lab=lab)


def test_work_of_a_device_that_somebody_holds_goes_to_others_of_the_kind_or_stays_pending(site):
    lab = write_lab(site, ["held", "free"])
    release = write_release(site, {"one": "any", "two": "held"})
    held = device_of(load_lab(lab), "held")
    with (
        measure.open_transport("held", held) as transport,
        bundle.connect(transport, held, device_name="held"),
    ):
        outcome = pipeline.run(release, lab=lab)
    assert states_of(outcome) == {"one": "judged", "two": "pending"}
    assert devices_of(outcome)["one"] == "free"
    assert "held" not in health.quarantined(), "to be busy is no fault"


@pytest.mark.parametrize("is_rebooted", [False, True])
def test_link_that_is_lost_once_is_taken_up_again_at_the_next_block(site, monkeypatch, is_rebooted):
    lab = write_lab(site, ["a"])
    deaths: list[str] = []
    if is_rebooted:
        facts = Agent.facts.fget
        monkeypatch.setattr(
            Agent, "facts", property(lambda self: msgspec.structs.replace(facts(self), boot_id=f"boot-{len(deaths)}"))
        )

    def kill_once(text: str) -> None:
        if "block 2 of" in text and not deaths:
            deaths.append(text)
            kill_runner(site / "devices" / "a")

    outcome = pipeline.run(write_release(site, {"one": "a"}, blocks=4), lab=lab, progress=kill_once)
    (run, _) = outcome.runs.values()
    assert [visit.block for visit in run.visits if not visit.dropped] == [0, 2, 3]
    assert "block 1 was dropped" in run.events[0]
    assert "measuring went on at" in run.events[1]
    assert ("after a reboot (boot boot-0, now boot-1)" if is_rebooted else "on the same boot") in run.events[1]
    assert len({run.session for run in outcome.runs.values()}) == 1
    assert not health.quarantined()


def test_errors_keep_their_words_on_the_way_from_another_process():
    error = CompileError("no kernel", backend="tflite", node="/n", op="Op", hint="use another")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.backend, again.node, again.op, again.hint) == (
        str(error),
        "tflite",
        "/n",
        "Op",
        "use another",
    )
    result = dispatch.SessionResult(state="failed", error=error)
    assert str(pickle.loads(pickle.dumps(result)).error) == str(error)
