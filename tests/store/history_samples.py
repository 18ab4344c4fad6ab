"""Runs, verdicts and passports as files, for the tests of the history."""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from msgspec.structs import replace

from edgedeploy.documents import encode_json
from edgedeploy.records.passport import Passport
from edgedeploy.records.run import Run
from edgedeploy.results import Results
from tests.unit.judge_samples import make_visit, run_of
from tests.unit.render_samples import make_cell, make_verdict

START = datetime(2026, 9, 1, 8, 0, 0, tzinfo=UTC)


def utc(number: int) -> str:
    """The time of the n-th run: one every six hours."""
    return (START + number * timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ")


def make_run(number: int, level_s: float = 0.004, **changes) -> Run:
    """The n-th run of a cell; names of an artifact's fields change these."""
    run = run_of("candidate", [level_s, level_s * 1.002, level_s * 0.998])
    sentinel_s = changes.pop("sentinel_s", None)
    if sentinel_s is not None:
        changes["sentinel"] = (make_visit(-1, sentinel_s), make_visit(3, sentinel_s))
        changes.setdefault("sentinel_sha256", "5e" * 32)
    of_artifact = {name: changes.pop(name) for name in list(changes) if name in run.artifact.__struct_fields__}
    fields = {
        "started_utc": utc(number),
        "session": f"session-{number}",
        "side": "single",
        "cell": "demo-int8",
        **changes,
    }
    return replace(run, artifact=replace(run.artifact, **of_artifact), **fields)


def save(results: Path, run: Run) -> Path:
    return Results(results).save_run(run)


def save_series(results: Path, levels_s, **changes) -> list[Path]:
    return [save(results, make_run(number, level_s, **changes)) for number, level_s in enumerate(levels_s)]


def save_verdict(
    results: Path, candidate: Path, *, number: int = 0, decision: str = "PASS", name: str = "demo 1.0"
) -> Path:
    cell = make_cell(decision, cell="demo-int8", candidate_run=str(candidate), baseline_run="elsewhere/nowhere.json")
    verdict = replace(make_verdict(cell, decision=decision, name=name), judged_utc=utc(number))
    path = results / "reports" / f"{utc(number).replace('-', '').replace(':', '')}-{name.replace(' ', '-')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encode_json(verdict))
    return path


def save_passport(results: Path, device: str, *, number: int = 0, cv: float = 0.02) -> Path:
    passport = Passport(
        device=device, started_utc=utc(number), cpu_model="", boot_id="", artifact="a", artifact_sha256="0" * 64,
        backend="fake", runtime="fake 1", schedule="", error_rate=0.05, power=0.8, level_s=0.004, seconds=60.0,
        seconds_per_block=3.0, setup_s=1.0, blocks=16, run_to_run_cv=cv, block_spread=cv, effect=0.0, low=-0.01,
        high=0.01, runs=(), edgedeploy="0.1.0",
    )  # fmt: skip
    data = encode_json(passport)
    stamp = utc(number).replace("-", "").replace(":", "")
    path = results / "passports" / device / f"{stamp}-{hashlib.sha256(data).hexdigest()[:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
