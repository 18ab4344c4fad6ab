"""Runs with known effects for the tests of the judge."""

import math
import random

from msgspec.structs import replace

from edgedeploy.judge.margin import margin_from_text
from edgedeploy.records.run import Burst, MemoryVisit, Outputs, Run, Visit
from edgedeploy.records.verdict import Policy

from .render_samples import NO_CONDITIONS, make_run

BASE_S = 0.004


def policy(*, error_rate: float = 0.05, min_blocks: int = 4, max_blocks: int = 16, **margins: str) -> Policy:
    return Policy(
        margins={metric: margin_from_text(metric, text) for metric, text in margins.items()},
        error_rate=error_rate,
        min_blocks=min_blocks,
        max_blocks=max_blocks,
    )


def make_visit(block: int, level_s: float, *, samples: int = 60, dropped: str = "", throttled: bool = False) -> Visit:
    return Visit(
        block=block,
        position=0,
        load_s=0.03,
        first_inference_s=0.01,
        warm_up_samples_s=(),
        is_steady=True,
        bursts=tuple(Burst(pair=pair, samples_s=(level_s,) * 10) for pair in range(samples // 10)),
        before=NO_CONDITIONS,
        after=replace(NO_CONDITIONS, throttled=throttled),
        dropped=dropped,
    )


def run_of(side: str, levels_s, **changes) -> Run:
    """A run with one visit a block, every inference of a visit alike."""
    visits = tuple(make_visit(block, level_s) for block, level_s in enumerate(levels_s))
    return replace(make_run(side, blocks=0), **{"visits": visits, "outputs": None, "memory": (), **changes})


def runs_with_effects(effects, **changes) -> tuple[Run, Run]:
    """A baseline at BASE_S and a candidate with these log ratios, one a block."""
    return (
        run_of("baseline", [BASE_S] * len(effects), **changes),
        run_of("candidate", [BASE_S * math.exp(effect) for effect in effects], **changes),
    )


def normal_effects(seed: int, mean: float, spread: float, count: int = 16) -> list[float]:
    random_ = random.Random(seed)
    return [random_.gauss(mean, spread) for _ in range(count)]


def outputs_of(scores, *, metric: str = "top1", dataset_sha256: str = "da7a" * 16) -> Outputs:
    return Outputs(
        dataset="photographs",
        dataset_sha256=dataset_sha256,
        samples=len(scores),
        sha256="0f" * 32,
        metric=metric,
        scores=tuple(float(score) for score in scores),
        value=math.fsum(scores) / len(scores) if scores else None,
    )


def answers(lost: int, gained: int, samples: int) -> tuple[Outputs, Outputs]:
    """Right-or-wrong answers of two sides that differ in `lost` and `gained` samples; all others are right."""
    baseline = [1] * lost + [0] * gained + [1] * (samples - lost - gained)
    candidate = [0] * lost + [1] * gained + [1] * (samples - lost - gained)
    return outputs_of(baseline), outputs_of(candidate)


def memory_of(*peaks_bytes: int) -> tuple[MemoryVisit, ...]:
    return tuple(MemoryVisit(peak_rss_bytes=peak, import_rss_bytes=1) for peak in peaks_bytes)


def finding_of(verdict, metric: str):
    return next(finding for finding in verdict.findings if finding.metric == metric)
