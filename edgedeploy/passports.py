"""Device passports, the sentinel and time budgets: what is known of a device's noise, and what follows from it.

A passport is an A/A session: one artifact against itself, by the same spine as any other session. Its file is appended
to bench_results/passports/<device>/ and is never edited. Judging and planning read it; nothing here decides a verdict.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

import edgedeploy
from edgedeploy.arguments import DEFAULT_MARGINS, allowed_precisions, margins_from_texts
from edgedeploy.backends import backend
from edgedeploy.build import BuildRequest, Built, Progress, build, load_artifact, this_target
from edgedeploy.errors import DocumentError, ModelError, ToolchainError, UsageError
from edgedeploy.judge.effort import seconds_per_block
from edgedeploy.judge.estimate import POWER
from edgedeploy.judge.false_alarms import summary_of as false_alarms_of
from edgedeploy.judge.noise import blocks_to_decide, noise_of, smallest_effect
from edgedeploy.judge.planning import CellNoise, latency_error_rate, policy_of, relative_margin, spend
from edgedeploy.judge.sentinel import judge_sentinel, reading_of
from edgedeploy.judge.speed import blocks_of
from edgedeploy.lab.inventory import LOCAL, lab_path, load_lab
from edgedeploy.lab.inventory import device as device_of
from edgedeploy.measure import MeasureRequest, measure
from edgedeploy.prepare.sentinel import write_sentinel
from edgedeploy.records.device import Device, DeviceFacts
from edgedeploy.records.passport import (
    BudgetPlan,
    Passport,
    PassportSummary,
    SentinelReading,
    SentinelSummary,
)
from edgedeploy.records.run import Run, Visit
from edgedeploy.records.verdict import CellVerdict, Policy, Verdict
from edgedeploy.results import Results, load_run, utc_now
from edgedeploy.storage import cache_dir

_LOG = logging.getLogger(__name__)

# What changes a board's noise (a kernel, a runtime, dust in a fan, the season) takes weeks, and a passport minutes.
MOST_AGE_DAYS = 30
# Times that a passport says the smallest effect for, and distances that it says the time for.
TIMES_S = {"1m": 60.0, "5m": 300.0, "20m": 1200.0}
DISTANCES = {"1%": 0.01, "3%": 0.03, "5%": 0.05}
# The first look of the usual policy; a passport of fewer blocks says little.
LEAST_BLOCKS = 4
# A passport ends by its time.
_NO_END = 1_000_000
# Runs that are looked through for earlier sentinels and earlier sessions of a cell: newer ones say more, and these are
# read in a tenth of a second.
NEWEST_RUNS = 200
# Blocks that are measured to learn the noise of a cell that nobody knows; they count for no verdict.
PILOT_BLOCKS = 4
# The spread of a few blocks is as likely too small as too large: what is planned with is its one-sided 80 % limit
# (Browne 1995, Statistics in Medicine 14:1933).
_PLANNING_CONFIDENCE = 0.8


# ---------------------------------------------------------------- the sentinel


def sentinel(target: str, backend_name: str, progress: Progress) -> Built | None:
    """Return the sentinel as a back end compiled it for a target: from the cache, but for the first time.

    None where it would say nothing, or would cost more than it says: a runtime that computes nothing; one whose
    artifacts are built on the device, where a build takes minutes and another tactic would look like another board;
    one whose converter is not installed here; a target that does not do fp32.
    """
    runtime = backend(backend_name)
    rules = this_target(target).backends.get(backend_name)
    if runtime.builds_on == "device" or not runtime.computes or rules is None:
        return None
    if "fp32" not in allowed_precisions(this_target(target), runtime) or importlib.util.find_spec("onnx") is None:
        return None
    if runtime.missing() or (runtime.tools is not None and not runtime.tools.is_made()):
        return None
    path = write_sentinel(cache_dir() / "sentinel")
    request = BuildRequest(
        name="sentinel",
        source=str(path),
        base=path.parent,
        target=target,
        backend=backend_name,
        precision="fp32",
    )
    try:
        return build(request, lambda text: None)
    except (ModelError, ToolchainError) as error:
        progress(f"no sentinel of {backend_name} for {target}: {error}")
        return None


def sentinels(target: str, backends: Iterable[str], progress: Progress) -> dict[str, Built]:
    """Return back end → the sentinel that it compiled for a target, for those that have one."""
    found = {name: sentinel(target, name, progress) for name in dict.fromkeys(backends)}
    return {name: built for name, built in found.items() if built is not None}


class _Facts(msgspec.Struct, frozen=True):
    """What is read of a stored run's device."""

    cpu_model: str
    boot_id: str


class _Artifact(msgspec.Struct, frozen=True):
    """What is read of a stored run's artifact."""

    backend: str


class _Glance(msgspec.Struct, frozen=True):
    """What is read of a stored run without its samples."""

    session: str
    cell: str
    side: str
    started_utc: str
    device: str
    facts: _Facts
    artifact: _Artifact
    runtime: str
    sentinel: tuple[Visit, ...] = ()
    sentinel_sha256: str = ""


def _glances(store: Results) -> list[tuple[Path, _Glance]]:
    """Return the newest stored runs, newest first; one that cannot be read is no part of any series."""
    found = []
    for path in reversed(store.run_files()[-NEWEST_RUNS:]):
        try:
            found.append((path, msgspec.json.decode(path.read_bytes(), type=_Glance)))
        except (OSError, msgspec.DecodeError) as error:
            _LOG.warning("%s is left out of what is known of devices: %s", path, error)
    return found


def sentinel_series(store: Results, devices: Iterable[str]) -> list[SentinelReading]:
    """Return what the sentinel took on some devices: of the newest stored runs, and of the newest passports."""
    wanted = set(devices)
    found: dict[tuple[str, str], SentinelReading] = {}
    for name in sorted(wanted):
        passport = _newest(store, name)
        if passport is not None and passport[0].sentinel is not None:
            found[passport[0].sentinel.session, passport[0].sentinel.backend] = passport[0].sentinel
    for path, run in _glances(store):
        if run.device in wanted and (reading := reading_of(run, file=str(path))) is not None:
            found[run.session, run.artifact.backend] = reading
    return sorted(found.values(), key=lambda one: (one.started_utc, one.session))


def sentinel_summaries(runs: Sequence[Run], store: Results) -> list[SentinelSummary]:
    """Say of each session, and each back end in it, whether the board changed."""
    readings = {(one.session, one.backend): one for run in runs if (one := reading_of(run)) is not None}
    if not readings:
        return []
    known = sentinel_series(store, {one.device for one in readings.values()})
    passports = {name: _newest(store, name) for name in {one.device for one in readings.values()}}
    return [
        judge_sentinel(one, known, passport[0] if (passport := passports[one.device]) else None)
        for one in readings.values()
    ]


# ---------------------------------------------------------------- passports


@dataclass(frozen=True, slots=True, kw_only=True)
class PassportRequest:
    """A passport that is asked for.

    Attributes:
        minutes: how long to measure, from connecting on; at least four blocks are measured.
        artifact: a folder that `compile` wrote; None: the sentinel.
        backend: of the sentinel; "": the first of the device's kind that has one.
        wait_s: how long to queue for a device that somebody else holds.
    """

    device: str
    minutes: float = 5.0
    artifact: Path | None = None
    backend: str = ""
    lab: Path | None = None
    results: Path = Path("bench_results")
    seed: int = 0
    wait_s: float = 0.0


def take_passport(request: PassportRequest, progress: Progress) -> tuple[Passport, Path]:
    """Measure one artifact against itself on a device, and keep what that says about the device's noise.

    Raises:
        UsageError: there is no such device, or nothing to measure on it.
        DeviceError: it failed; what was measured until then is not a passport.
    """
    entry = device_of(load_lab(lab_path(request.lab)), request.device)
    built = _measured_artifact(request, entry, progress)
    recipe = built.artifact.recipe
    session = MeasureRequest(
        sides=((f"{built.artifact.name} (first)", built), (f"{built.artifact.name} (second)", built)),
        device_name=request.device,
        device=entry,
        limits=this_target(recipe.target).conditions,
        evaluation=None,
        blocks=_NO_END,
        seed=request.seed,
        wait_s=request.wait_s,
        sentinels=sentinels(recipe.target, [recipe.backend], progress) if entry.sentinel else {},
    )
    started_s = time.monotonic()

    def is_over(runs: tuple[Run, ...]) -> bool:
        counted = min(sum(not visit.dropped for visit in run.visits) for run in runs)
        # A device that drops every block would keep us for ever.
        is_late = time.monotonic() - started_s >= 60 * request.minutes
        return is_late and (counted >= LEAST_BLOCKS or len(runs[0].visits) >= 3 * LEAST_BLOCKS)

    first, second = measure(session, is_over, progress)
    seconds = time.monotonic() - started_s
    store = Results(request.results)
    files = [store.save_run(run) for run in (first, second)]
    passport = passport_of(first, second, seconds=seconds, names=[path.stem for path in files])
    return passport, store.save_passport(passport)


def _measured_artifact(request: PassportRequest, entry: Device, progress: Progress) -> Built:
    """Return what is measured: the artifact that was named, or a sentinel of the device's kind."""
    if request.artifact is not None:
        return load_artifact(request.artifact)
    target = entry.target or ("host" if entry.transport == LOCAL else "")
    if not target:
        raise UsageError(
            f"the lab file does not say what kind of device {request.device} is; add target = "
            f'"..." to it (edgedeploy targets list), or give an artifact for it: --artifact FOLDER'
        )
    known = this_target(target).backends
    names = [request.backend] if request.backend else sorted(known, key=lambda name: name != "onnxruntime")
    for name in names:
        backend(name)  # a sentence where there is none
        progress(f"{request.device}: compiling the sentinel with {name}")
        if (built := sentinel(target, name, progress)) is not None:
            return built
    raise UsageError(
        f"no back end of target {target!r} has a sentinel here ({', '.join(names) or 'it has none'}): it must compile "
        f"fp32 on this machine; give an artifact for {request.device} instead: --artifact FOLDER"
    )


def passport_of(first: Run, second: Run, *, seconds: float, names: Sequence[str]) -> Passport:
    """Return what a session of one artifact against itself says about its device.

    Args:
        first, second: the two sides.
        seconds: from connecting to the end of the session.
        names: of the stored runs.

    Raises:
        UsageError: fewer than two blocks count.
    """
    noise = noise_of(first, second)
    block_s = seconds_per_block((*first.visits, *second.visits))
    assert block_s is not None, "blocks that count have a beginning and an end"
    setup_s = max(0.0, seconds - block_s * len({visit.block for visit in first.visits}))
    error_rate = latency_error_rate(Policy(margins=margins_from_texts(DEFAULT_MARGINS)), 1)

    def effect_in(time_s: float) -> float | None:
        blocks = int((time_s - setup_s) / block_s)
        found = smallest_effect(noise.block_spread, blocks, min_blocks=LEAST_BLOCKS, error_rate=error_rate)
        return None if found is None else math.expm1(min(found, 700.0))

    def time_for(distance: float) -> float | None:
        blocks = blocks_to_decide(
            noise.block_spread, math.log1p(distance), min_blocks=LEAST_BLOCKS, error_rate=error_rate
        )
        return None if blocks is None else setup_s + blocks * block_s

    drift = noise.drift
    return Passport(
        device=first.device,
        started_utc=first.started_utc,
        cpu_model=first.facts.cpu_model,
        boot_id=first.facts.boot_id,
        artifact=first.artifact.name,
        artifact_sha256=first.artifact.sha256,
        backend=first.artifact.backend,
        runtime=first.runtime,
        schedule=first.schedule,
        error_rate=error_rate,
        power=POWER,
        level_s=noise.level_s,
        seconds=seconds,
        seconds_per_block=block_s,
        setup_s=setup_s,
        blocks=noise.blocks,
        dropped=noise.dropped,
        run_to_run_cv=noise.run_to_run_cv,
        block_spread=noise.block_spread,
        effect=noise.effect,
        low=noise.low,
        high=noise.high,
        drift_per_hour=drift.per_hour if drift else None,
        drift_low=drift.low if drift else None,
        drift_high=drift.high if drift else None,
        lag1_autocorrelation=noise.lag1_autocorrelation,
        block_autocorrelation=noise.block_autocorrelation,
        smallest_effects={name: effect_in(time_s) for name, time_s in TIMES_S.items()},
        seconds_to_decide={name: time_for(distance) for name, distance in DISTANCES.items()},
        sentinel=reading_of(first, file=names[0]),
        runs=tuple(names),
        edgedeploy=edgedeploy.__version__,
    )


def newest_summary(device: str, store: Results, *, facts: DeviceFacts | None = None) -> PassportSummary | None:
    """Return what is known of a device's noise; None where it has no passport.

    Args:
        device: its name.
        store: where passports are kept.
        facts: what the device is now; None: it was not asked, and only the age can make a passport stale.

    Raises:
        DocumentError: the newest passport was changed by hand, or cannot be read.
    """
    found = store.newest_passport(device)
    if found is None:
        return None
    passport, path = found
    return PassportSummary(
        device=device,
        file=path.name,
        started_utc=passport.started_utc,
        run_to_run_cv=passport.run_to_run_cv,
        block_spread=passport.block_spread,
        seconds_per_block=passport.seconds_per_block,
        smallest_effects=passport.smallest_effects,
        drift_per_hour=passport.drift_per_hour,
        stale=staleness(passport, now_utc=utc_now(), facts=facts),
    )


def staleness(passport: Passport, *, now_utc: str, facts: DeviceFacts | None) -> str:
    """Say why a passport no longer describes its device; "" where it does."""
    if facts is not None and facts.cpu_model != passport.cpu_model:
        had, has = (text or "an unknown processor" for text in (passport.cpu_model, facts.cpu_model))
        return f"it is of {had}, and the device has {has}"
    days = (datetime.fromisoformat(now_utc) - datetime.fromisoformat(passport.started_utc)).days
    return f"it is {days} days old, and tells nothing after {MOST_AGE_DAYS}" if days > MOST_AGE_DAYS else ""


def _newest(store: Results, device: str) -> tuple[Passport, Path] | None:
    """Return a device's newest passport; None also where it cannot be trusted, which the verdict says elsewhere."""
    try:
        return store.newest_passport(device)
    except DocumentError as error:
        _LOG.warning("the passport of %s is left out: %s", device, error)
        return None


# ---------------------------------------------------------------- what a verdict carries of it


def with_self_knowledge(verdict: Verdict, runs: Mapping[str, Run], store: Results) -> Verdict:
    """Add to a verdict how noisy its devices are, what the sentinel says, and how often the gate cried wolf.

    Nothing of it changes a decision: notes say where a reader should doubt the board, and why an undecided cell could
    not have been decided.
    """
    devices = sorted({run.device for run in runs.values()})
    facts = {run.device: run.facts for run in runs.values()}
    said: list[str] = []
    summaries: dict[str, PassportSummary] = {}
    for name in devices:
        try:
            found = newest_summary(name, store, facts=facts[name])
        except DocumentError as error:
            said.append(f"the noise of {name} is not known: {error}")
            continue
        if found is not None:
            summaries[name] = found
    try:
        outcomes = [one for one in store.aa_outcomes() if any(cell.device in facts for cell in one.cells)]
    except DocumentError as error:
        outcomes = []
        said.append(f"how often this gate raises false alarms is not known: {error}")
    sentinel_of = {
        (one.reading.session, one.reading.backend): one for one in sentinel_summaries(list(runs.values()), store)
    }
    cells = []
    for cell in verdict.cells:
        own = [runs[file] for file in (cell.baseline_run, cell.candidate_run) if file in runs]
        keys = dict.fromkeys((run.session, run.artifact.backend) for run in own)
        changed = [sentinel_of[key].statement for key in keys if key in sentinel_of and sentinel_of[key].board_changed]
        doubts = _doubts(cell, verdict.policy, summaries.get(cell.device), len(verdict.cells))
        cells.append(msgspec.structs.replace(cell, notes=(*cell.notes, *changed, *doubts, *said)))
    return msgspec.structs.replace(
        verdict, cells=tuple(cells), devices=tuple(summaries.values()), aa=false_alarms_of(outcomes)
    )


def _doubts(cell: CellVerdict, policy: Policy, passport: PassportSummary | None, cells: int) -> list[str]:
    """Say what a device's passport lets one expect of an undecided cell, or why it cannot."""
    finding = next((one for one in cell.findings if one.metric == "latency_p50"), None)
    if passport is None or finding is None or finding.decision != "INCONCLUSIVE":
        return []
    name = f"the passport of {passport.device} ({passport.started_utc[:10]})"
    if passport.stale:
        return [f"{name} is stale: {passport.stale}; take a new one: edgedeploy devices passport {passport.device}"]
    margin = relative_margin(finding.margin, finding.baseline_value)
    own = policy_of(policy, cell.cell)
    effect = smallest_effect(
        passport.block_spread, own.max_blocks, min_blocks=own.min_blocks, error_rate=latency_error_rate(policy, cells)
    )
    if margin is None or effect is None or effect <= abs(math.log1p(margin)):
        return []
    return [
        f"{name} told this beforehand: {own.max_blocks} blocks decide there, with {POWER * 100:.0f} % chance, what "
        f"lies {math.expm1(min(effect, 700.0)) * 100:.1f} % or more from the margin, and an unchanged candidate lies "
        f"{abs(margin) * 100:.1f} % from it"
    ]


# ---------------------------------------------------------------- time budgets


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A cell that blocks are to be planned for: it is measured beside its baseline on one of these devices."""

    cell: str
    baseline: str
    devices: tuple[str, ...]


def known_noise(asked: Sequence[Asked], policy: Policy, store: Results) -> dict[str, CellNoise]:
    """Return what earlier sessions say about cells: their own blocks, or their time with their device's passport.

    A cell of which not even the time is known is left out.
    """
    glances = _glances(store)
    return {one.cell: noise for one in asked if (noise := _noise_of_earlier(one, policy, glances, store)) is not None}


def _noise_of_earlier(
    asked: Asked, policy: Policy, glances: Sequence[tuple[Path, _Glance]], store: Results
) -> CellNoise | None:
    newest: dict[str, dict[str, Path]] = {}
    for path, run in glances:
        if run.device in asked.devices and run.side in ("baseline", "candidate"):
            newest.setdefault(run.session, {}).setdefault(run.side, path)
            is_candidate = run.side == "candidate" and run.cell == asked.cell
            is_baseline = run.side == "baseline" and run.cell == asked.baseline
            if not (is_candidate or is_baseline):
                newest[run.session]["other"] = path
    for files in newest.values():
        if set(files) == {"baseline", "candidate"}:
            try:
                pair = load_run(files["baseline"]), load_run(files["candidate"])
            except DocumentError as error:
                _LOG.warning("an earlier session of %s is left out: %s", asked.cell, error)
                continue
            if (found := noise_from_session(asked, *pair, policy, store)) is not None:
                return found
    return None


def noise_from_session(asked: Asked, baseline: Run, candidate: Run, policy: Policy, store: Results) -> CellNoise | None:
    """Return what a session of a cell says about the next one; None where too few of its blocks count.

    The spread is that of the device's passport, where it has one that is not stale and of more blocks than the session.
    """
    blocks = blocks_of("latency_p50", baseline.visits, candidate.visits, is_relative=True)
    block_s = seconds_per_block((*baseline.visits, *candidate.visits))
    if len(blocks.usable) < 2 or block_s is None:
        return None
    found = _newest(store, candidate.device)
    is_usable = found is not None and not staleness(found[0], now_utc=utc_now(), facts=candidate.facts)
    if found is not None and is_usable and found[0].blocks > len(blocks.usable):
        spread, source = found[0].block_spread, f"passport of {candidate.device}, {found[0].started_utc[:10]}"
    else:
        effects = [block.effect for block in blocks.usable]
        spread = _upper_spread(statistics.stdev(effects), len(effects) - 1)
        source = f"{len(effects)} blocks of {candidate.started_utc[:16].replace('T', ' ')}"
    margin = relative_margin(policy.margins.get("latency_p50"), blocks.usable[0].baseline_s)
    return CellNoise(
        cell=asked.cell,
        devices=asked.devices,
        spread=spread,
        seconds_per_block=block_s,
        setup_s=_setup_s(candidate, baseline),
        margin=margin,
        source=source,
    )


def _setup_s(*runs: Run) -> float:
    """Return about what is done once in a session, from what it did: memory visits start processes as blocks do."""
    starts = statistics.median(
        visit.load_s + visit.first_inference_s for run in runs for visit in run.visits if not visit.dropped
    )
    processes = sum(len(run.memory) for run in runs) + 2 * sum(bool(run.sentinel) for run in runs)
    outputs = sum(
        run.outputs.samples * statistics.median(visit.first_inference_s for visit in run.visits if not visit.dropped)
        for run in runs
        if run.outputs is not None
    )
    # Connecting, sending and starting interpreters take seconds that no record holds.
    return 5.0 + processes * (starts + 0.5) + outputs


def _upper_spread(spread: float, degrees: int) -> float:
    """Return the one-sided 80 % limit of a standard deviation."""
    from scipy.special import chdtri

    # chdtri inverts the upper tail.
    return spread * math.sqrt(degrees / float(chdtri(degrees, _PLANNING_CONFIDENCE)))


def plan_budget(noises: Mapping[str, CellNoise], asked: Sequence[Asked], policy: Policy, budget_s: float) -> BudgetPlan:
    """Say how a time budget is spent over cells; those whose noise is not known are named, and get none of it.

    Raises:
        UsageError: the budget is too short for the first look of every cell.
    """
    cells = [noises[one.cell] for one in asked if one.cell in noises]
    planned = spend(
        cells, budget_s, min_blocks=policy.min_blocks, error_rate=latency_error_rate(policy, max(len(asked), 1))
    )
    return BudgetPlan(
        budget_s=budget_s, cells=planned, unknown=tuple(one.cell for one in asked if one.cell not in noises)
    )
