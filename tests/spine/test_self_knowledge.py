"""The gate tried on itself, a device's passport and a time budget: what each says, keeps, and refuses."""

import json
from pathlib import Path

import msgspec
import pytest

import edgedeploy.cli
from edgedeploy import journal as journals
from edgedeploy import pipeline
from edgedeploy.journal import Planned
from edgedeploy.judge import noise, planning
from edgedeploy.lab import health
from edgedeploy.records.passport import AaCell, AaOutcome, Passport
from edgedeploy.render.text import verdict_text
from edgedeploy.results import Results

from .small_lab import measure_quickly, write_lab, write_release

MARGIN = ("--margin", "latency_p50=+60%")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    measure_quickly(monkeypatch)
    monkeypatch.setattr(health, "check", lambda *arguments, **options: health.Health())


@pytest.fixture
def site(model) -> Path:
    return model.parent


def _cli(*arguments: str) -> int:
    return edgedeploy.cli.run([*arguments])


def false_alarm(number: int) -> AaOutcome:
    return AaOutcome(
        name="tiny", judged_utc=f"2026-11-22T00:00:{number:02}Z", decision="FAIL", error_rate=0.05, margins={},
        cells=(AaCell(cell="a", device="local", target="fake-board", decision="FAIL", failed=("latency_p50",)),),
        seconds=1.0,
    )  # fmt: skip


def test_artifact_is_tried_against_itself_and_later_verdicts_carry_the_rate(compiled, capsys):
    artifact = compiled("a", duration_us=50.0)
    assert _cli("gate", str(artifact), "--aa", "--times", "2", "--max-blocks", "2", "-q", *MARGIN) == 0
    said = capsys.readouterr().out
    assert "false alarms: 0 FAIL in 2 gates of something against itself, 0 %" in said
    outcomes = Results(Path("bench_results")).aa_outcomes()
    assert len(outcomes) == 2
    assert all(len(one.runs) == 2 and one.seconds > 0 for one in outcomes)
    faster = compiled("b", duration_us=40.0)
    outcome = pipeline.gate(faster, baseline=artifact, margins=["latency_p50=+60%"], max_blocks=2)
    assert outcome.verdict.aa.gates == 2
    assert outcome.verdict.aa.low == 0
    assert "false alarms: 0 FAIL in 2 gates" in verdict_text(outcome.verdict, outcome.runs, color=False, width=200)


def test_gate_that_cries_wolf_is_found_out(compiled, capsys):
    store = Results(Path("bench_results"))
    for number in range(12):
        store.save_aa(false_alarm(number))
    artifact = compiled("a", duration_us=50.0)
    assert _cli("gate", str(artifact), "--aa", "--max-blocks", "2", "-q", "--json", *MARGIN) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["kept"]["proven_above"] is True
    assert document["summary"]["proven_above"] is False
    assert document["kept"]["gates"] == 13


def test_release_is_tried_against_itself(site, capsys):
    lab = write_lab(site, ["a"])
    release = write_release(site, {"one": "a", "two": "a"})
    assert _cli("gate", str(release), "--aa", "--lab", str(lab), "-q") == 0
    (outcome,) = Results(Path("bench_results")).aa_outcomes()
    assert [cell.cell for cell in outcome.cells] == ["one", "two"]
    (verdict_runs,) = {len(outcome.runs)}
    assert verdict_runs == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gate"], "say what is judged"),
        (["gate", "nowhere", "--aa"], "neither a folder that compile wrote nor a release file"),
        (["gate", "a", "--times", "3"], "add --aa"),
        (["gate", "edgedeploy.toml", "--aa", "--margin", "latency_p50=+5%"], "itself says --margin"),
        (["gate", "a", "--aa", "--baseline", "b"], "--baseline is of no use with --aa"),
        (["run", "--budget", "soon"], "a time from 0 to a week is meant"),
        (["run", "--budget", "20"], "say which unit is meant, such as 20m or 20s"),
        (["run", "--budget", "0"], "give the time that each device may measure"),
        (["devices", "passport", "nobody"], "there is no device 'nobody'"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(site, capsys, arguments, said):
    assert _cli(*arguments) == 2
    assert said in capsys.readouterr().err


def test_budget_is_planned_from_the_first_blocks_and_then_from_what_is_known(site, capsys, monkeypatch):
    monkeypatch.setattr(noise, "MOST_BLOCKS", 6)
    monkeypatch.setattr(planning, "MOST_BLOCKS", 6)
    lab = write_lab(site, ["a", "b"])
    release = write_release(site, {"one": "a", "two": "b"})
    assert _cli("run", str(release), "--lab", str(lab), "--dry-run", "--budget", "10m") == 0
    assert "one: its noise is not known; its first blocks are measured" in capsys.readouterr().out
    said: list[str] = []
    outcome = pipeline.run(release, lab=lab, budget_s=600.0, progress=said.append)
    assert any("they count for no verdict" in text for text in said)
    plan = [text for text in said if "at most" in text and "blocks," in text]
    assert len(plan) == 2
    assert set(outcome.verdict.policy.blocks) == {"one", "two"}
    for run in outcome.runs.values():
        assert len(run.visits) <= outcome.verdict.policy.blocks["one" if run.device == "a" else "two"]
    planned = next(line for line in journals.named(outcome.journal).lines() if isinstance(line, Planned))
    assert planned.blocks == outcome.verdict.policy.blocks
    again = pipeline.run(release, resume=outcome.journal)
    assert again.verdict.policy.blocks == planned.blocks
    assert _cli("run", str(release), "--lab", str(lab), "--dry-run", "--budget", "10m") == 0
    known = capsys.readouterr().out
    assert "not known" not in known
    assert "one on a: at most" in known


def test_budget_that_is_too_short_is_refused_before_anything_is_judged(site, capsys):
    lab = write_lab(site, ["a"])
    release = write_release(site, {"one": "a"})
    assert _cli("run", str(release), "--lab", str(lab), "-q", "--budget", "1s") == 2
    assert "is too short" in capsys.readouterr().err
    assert not list(Path("bench_results").glob("reports/*"))


def test_passport_is_kept_shown_and_planned_with(compiled, capsys, site):
    artifact = compiled("a", duration_us=50.0)
    assert _cli("devices", "passport", "local", "--minutes", "0.01", "--artifact", str(artifact), "-q", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "edgedeploy.passport/1"
    assert document["blocks"] >= 4
    assert document["smallest_effects"].keys() == {"1m", "5m", "20m"}
    assert len(document["runs"]) == 2
    store = Results(Path("bench_results"))
    passport, path = store.newest_passport("local")
    assert {store.find_run(name).stem for name in passport.runs} == set(passport.runs)
    assert _cli("devices", "show", "local") == 0
    assert "run-to-run CV" in capsys.readouterr().out
    assert _cli("devices", "list", "--json") == 0
    (local,) = json.loads(capsys.readouterr().out)["devices"]
    assert local["passport"]["file"] == path.name
    outcome = pipeline.gate(artifact, baseline=artifact, margins=["latency_p50=+60%"], max_blocks=2)
    (summary,) = outcome.verdict.devices
    assert (summary.file, summary.stale) == (path.name, "")


def kept_passport(**changes) -> Path:
    """Keep a passport of `local` that nobody measured."""
    plain = Passport(
        device="local", started_utc="2026-11-22T00:00:00Z", cpu_model="core", boot_id="b", artifact="a",
        artifact_sha256="5e" * 32, backend="fake", runtime="fake 1", schedule="", error_rate=0.05, power=0.8,
        level_s=0.001, seconds=60.0, seconds_per_block=3.0, setup_s=5.0, blocks=20, run_to_run_cv=0.01,
        block_spread=0.01, effect=0.0, low=-0.01, high=0.01, runs=("a", "b"), edgedeploy="0",
    )  # fmt: skip
    return Results(Path("bench_results")).save_passport(msgspec.structs.replace(plain, **changes))


def test_passport_that_was_edited_by_hand_is_named_and_not_believed(compiled, capsys):
    artifact = compiled("a", duration_us=50.0)
    path = kept_passport()
    path.write_text(path.read_text().replace('"run_to_run_cv": 0', '"run_to_run_cv": 9'))
    assert _cli("devices", "show", "local") == 2
    assert "was changed after it was written" in capsys.readouterr().err
    outcome = pipeline.gate(artifact, baseline=artifact, margins=["latency_p50=+60%"], max_blocks=2)
    assert outcome.verdict.devices == ()
    assert any("was changed after it was written" in note for cell in outcome.verdict.cells for note in cell.notes)


def test_passport_of_another_processor_is_stale(compiled):
    artifact = compiled("a", duration_us=50.0)
    kept_passport(cpu_model="another")
    outcome = pipeline.gate(artifact, baseline=artifact, margins=["latency_p50=+60%"], max_blocks=2)
    assert "it is of another, and the device has" in outcome.verdict.devices[0].stale
