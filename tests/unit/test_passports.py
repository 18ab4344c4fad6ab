"""What is made of passports and sentinels: staleness, series over stored runs, doubts in a verdict, planning."""

import math
from pathlib import Path

import pytest
from msgspec.structs import replace

from edgedeploy import passports
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.judge.gate import judge_gate
from edgedeploy.passports import Asked, known_noise, passport_of, plan_budget, sentinel_series, staleness
from edgedeploy.records.run import Conditions
from edgedeploy.render.noise import device_line, fitness_text, passport_rows, plan_lines, plan_rows, summary_text
from edgedeploy.results import Results

from .judge_samples import BASE_S, make_visit, normal_effects, policy, run_of

SHA = "5e" * 32


def timed(run, block_s: float = 3.0):
    """Give the visits of a run a clock."""
    visits = tuple(
        replace(
            visit,
            before=Conditions(monotonic_s=100 + block_s * visit.block),
            after=Conditions(monotonic_s=100 + block_s * visit.block + 0.9 * block_s),
        )
        for visit in run.visits
    )
    return replace(run, visits=visits)


def session(name: str, spread: float = 0.01, *, blocks: int = 12, seed: int = 1, start_s=0.001, end_s=0.001, **changes):
    """Both runs of a session, with a sentinel."""
    effects = normal_effects(seed, 0.0, spread, blocks)
    sentinel = (make_visit(-1, start_s), make_visit(blocks, end_s))
    common = {"session": name, "sentinel": sentinel, "sentinel_sha256": SHA, **changes}
    return (
        timed(run_of("baseline", [BASE_S] * blocks, cell="shipped", **common)),
        timed(run_of("candidate", [BASE_S * math.exp(one) for one in effects], cell="new", **common)),
    )


@pytest.fixture
def store(tmp_path) -> Results:
    return Results(tmp_path / "bench_results")


@pytest.fixture
def passport(store):
    first, second = session("passport", started_utc="2026-11-21T00:00:00Z")
    files = [store.save_run(run) for run in (first, second)]
    found = passport_of(first, second, seconds=45.0, names=[path.stem for path in files])
    return found, store.save_passport(found)


def test_passport_says_what_the_session_said(passport, store):
    found, path = passport
    assert found.blocks == 12
    assert found.seconds_per_block == pytest.approx(3.0)
    assert found.setup_s == pytest.approx(45 - 36)
    assert 0.004 < found.block_spread < 0.02
    assert found.smallest_effects["1m"] > found.smallest_effects["5m"]
    assert found.seconds_to_decide["1%"] > found.seconds_to_decide["5%"]
    assert found.sentinel.start_s == 0.001
    assert store.newest_passport(found.device) == (found, path)
    assert "is fit for a gate with a margin of 3 %" in fitness_text(found)
    assert dict(passport_rows(found))["measured"] == "2026-11-21T00:00:00Z, 12 blocks in 45 s"


def test_wild_device_is_said_to_be_unfit():
    wild = passport_of(*session("wild", 0.5), seconds=45.0, names=["a", "b"])
    assert wild.seconds_to_decide["3%"] is None
    assert "is not fit for a gate with a margin of 3 %" in fitness_text(wild)


def test_passports_are_appended_and_one_that_was_edited_is_refused(passport, store):
    found, path = passport
    store.save_passport(replace(found, started_utc="2026-11-22T00:00:00Z"))
    assert len(store.passport_files(found.device)) == 2
    newest = store.passport_files(found.device)[-1]
    newest.write_bytes(newest.read_bytes().replace(b'"blocks": 12', b'"blocks": 99'))
    with pytest.raises(DocumentError, match="was changed after it was written"):
        store.newest_passport(found.device)
    assert path.exists()


def test_passport_gets_stale_with_age_and_with_another_processor(passport):
    found, _ = passport
    facts = run_of("baseline", [BASE_S]).facts
    assert staleness(found, now_utc="2026-12-01T00:00:00Z", facts=facts) == ""
    assert "is 40 days old" in staleness(found, now_utc="2026-12-31T00:00:00Z", facts=facts)
    other = replace(facts, cpu_model="another core")
    assert "the device has another core" in staleness(found, now_utc="2026-11-22T00:00:00Z", facts=other)


def test_series_takes_every_session_once_from_runs_and_passports(passport, store):
    for number in range(3):
        for run in session(f"s{number}", started_utc=f"2026-11-22T0{number}:00:00Z"):
            store.save_run(run)
    device = passport[0].device
    assert [one.session for one in sentinel_series(store, [device])] == ["passport", "s0", "s1", "s2"]
    assert sentinel_series(store, ["elsewhere"]) == []


def test_run_that_cannot_be_read_is_no_part_of_the_series(store, caplog):
    for run in session("s0"):
        path = store.save_run(run)
    path.write_text("{")
    assert len(sentinel_series(store, [run.device])) == 1
    assert "is left out" in caplog.text


def judged(store, runs, **margins):
    verdict = judge_gate("tiny", [runs], policy(**margins), judged_utc="2026-11-22T12:00:00Z")
    cell = replace(verdict.cells[0], baseline_run="old.json", candidate_run="new.json")
    known = {"old.json": runs[0], "new.json": runs[1]}
    return passports.with_self_knowledge(replace(verdict, cells=(cell,)), known, store)


def test_verdict_says_that_the_board_changed_and_not_the_model(store):
    for number in range(6):
        for run in session(f"s{number}", started_utc=f"2026-11-22T0{number}:00:00Z", end_s=0.001 + 1e-6 * number):
            store.save_run(run)
    slower = session("now", started_utc="2026-11-22T09:00:00Z", start_s=0.001, end_s=0.0014)
    verdict = judged(store, slower, latency_p50="+5%")
    (note,) = [note for note in verdict.cells[0].notes if "the board changed" in note]
    assert note.startswith("the board changed, not the model, in this session")
    same = session("now", started_utc="2026-11-22T09:00:00Z")
    assert not any("the board changed" in note for note in judged(store, same, latency_p50="+5%").cells[0].notes)


def test_undecided_cell_is_told_what_its_passport_had_said(store):
    noisy = [replace(run, device="board") for run in session("passport", 0.08, blocks=16)]
    found = passport_of(*noisy, seconds=60.0, names=["a", "b"])
    store.save_passport(replace(found, started_utc=passports.utc_now()))
    runs = tuple(replace(run, device="board") for run in session("now", 0.08, blocks=16, seed=3))
    verdict = judged(store, runs, latency_p50="+3%")
    assert verdict.decision == "INCONCLUSIVE"
    assert any("told this beforehand" in note for note in verdict.cells[0].notes)
    assert verdict.devices[0].device == "board"
    assert "board: run-to-run CV" in device_line(verdict.devices[0])
    assert "in 5 min" in summary_text(verdict.devices[0])


def test_earlier_session_of_a_cell_says_how_its_next_one_is_planned(store):
    runs = session("s0")
    for run in runs:
        store.save_run(run)
    asked = [Asked(cell="new", baseline="shipped", devices=(runs[0].device,))]
    rules = policy(latency_p50="+3%")
    noises = known_noise(asked, rules, store)
    assert noises["new"].margin == 0.03
    assert noises["new"].seconds_per_block == pytest.approx(3.0)
    assert noises["new"].source.startswith("12 blocks of ")
    plan = plan_budget(noises, asked, rules, 600.0)
    assert plan.cells[0].is_enough
    assert plan.unknown == ()
    assert len(plan_rows(plan)[0]) == 8
    assert "decides what lies" in plan_lines(plan)[1]


def test_few_blocks_are_planned_with_more_noise_than_they_showed(store):
    few, many = (
        passports.noise_from_session(
            Asked(cell="new", baseline="shipped", devices=("d",)),
            *session("s", blocks=blocks, seed=5),
            policy(latency_p50="+3%"),
            store,
        )
        for blocks in (4, 40)
    )
    assert passports._upper_spread(0.01, 3) == pytest.approx(0.0173, abs=1e-4)
    assert few.spread > 1.3 * 0.01 * 0.5
    assert many.spread < 1.3 * 0.01 * 1.2


def test_passport_of_more_blocks_is_believed_rather_than_a_few_blocks(passport, store):
    fresh = replace(passport[0], started_utc=passports.utc_now(), blocks=50, block_spread=0.0042)
    store.save_passport(fresh)
    found = passports.noise_from_session(
        Asked(cell="new", baseline="shipped", devices=("d",)), *session("s"), policy(latency_p50="+3%"), store
    )
    assert found.spread == 0.0042
    assert found.source.startswith("passport of")


def test_unknown_cell_is_named_and_a_short_budget_refused(store):
    asked = [Asked(cell="new", baseline="shipped", devices=("d",))]
    plan = plan_budget({}, asked, policy(latency_p50="+3%"), 600.0)
    assert plan.unknown == ("new",)
    assert "its noise is not known" in plan_lines(plan)[1]
    for run in session("s0", device="d"):
        store.save_run(run)
    noises = known_noise(asked, policy(latency_p50="+3%"), store)
    with pytest.raises(UsageError, match="is too short"):
        plan_budget(noises, asked, policy(latency_p50="+3%"), 5.0)


def test_sessions_of_other_cells_say_nothing_about_this_one(store):
    for run in session("s0"):
        store.save_run(run)
    asked = [Asked(cell="new", baseline="another", devices=(run.device,))]
    assert known_noise(asked, policy(latency_p50="+3%"), store) == {}
    assert Path(store.root).is_dir()
