"""How often the gate's rules are wrong, and how often they see a change, on simulated devices.

The noise model of the method: log-normal times; a drift that both sides share; an effect of each fresh process; iterations
that depend on the one before; 1 % of iterations are spikes. Beside it, block effects that break the t-test's assumptions.
It is a model and not a device: `gate_on_local` measures the real thing.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.margin import margin_from_text
from edgedeploy.judge.speed import Block, Blocks, LatencyEvidence, blocks_of, judge_latency
from edgedeploy.records.run import Burst, Conditions, Visit
from edgedeploy.records.verdict import Policy

MARGIN = margin_from_text("latency_p50", "+5%")
POLICY = Policy(margins={"latency_p50": MARGIN})
RATE = ErrorRate(POLICY.error_rate, POLICY.error_rate)
CHANGES = (0.0, 0.03, 0.05, 0.06, 0.10)
# Standard deviations of the logarithm: of a process, of the drift.
DEVICES = {"quiet": (0.005, 0.005), "typical": (0.02, 0.02), "noisy": (0.10, 0.05)}
BURSTS, BURST_SAMPLES = 6, 10
# From one burst to the next, and from one inference to the next.
DRIFT_CORRELATION, INFERENCE_CORRELATION = 0.98, 0.5
INFERENCE_SD, SPIKE_SHARE = 0.01, 0.01
NOWHERE = Conditions(monotonic_s=0.0)


def autoregressive(random: np.random.Generator, count: int, correlation: float, spread: float) -> np.ndarray:
    """Return a stationary AR(1) series with this standard deviation."""
    series = random.normal(0, spread, count)
    series[1:] *= math.sqrt(1 - correlation**2)
    for place in range(1, count):
        series[place] += correlation * series[place - 1]
    return series


def sessions(
    random: np.random.Generator, change: float, process_sd: float, drift_sd: float, count: int
) -> Iterator[LatencyEvidence]:
    """Yield what `count` sessions of alternating bursts say, each with the most blocks that a gate may take."""
    for _ in range(count):
        drift = autoregressive(random, POLICY.max_blocks * BURSTS * 2, DRIFT_CORRELATION, drift_sd)
        sides: tuple[list[Visit], list[Visit]] = ([], [])
        for block in range(POLICY.max_blocks):
            for side, visits in enumerate(sides):
                level = math.log1p(change) * side + random.normal(0, process_sd)
                noise = autoregressive(random, BURSTS * BURST_SAMPLES, INFERENCE_CORRELATION, INFERENCE_SD)
                spikes = np.where(random.random(len(noise)) < SPIKE_SHARE, random.uniform(0.4, 1.1, len(noise)), 0)
                slots = drift[block * BURSTS * 2 + side :][: BURSTS * 2 : 2]
                times_s = 0.004 * np.exp(level + noise + spikes + np.repeat(slots, BURST_SAMPLES))
                visits.append(visit_of(block, times_s.reshape(BURSTS, BURST_SAMPLES)))
        yield evidence(blocks_of("latency_p50", *sides, is_relative=True))


def visit_of(block: int, bursts_s: np.ndarray) -> Visit:
    """Return a visit with these bursts."""
    return Visit(
        block=block,
        position=0,
        load_s=0.03,
        first_inference_s=0.01,
        warm_up_samples_s=(),
        is_steady=True,
        bursts=tuple(Burst(pair=pair, samples_s=tuple(burst.tolist())) for pair, burst in enumerate(bursts_s)),
        before=NOWHERE,
        after=NOWHERE,
    )


def evidence(blocks: Blocks) -> LatencyEvidence:
    """Return evidence that rests on these blocks."""
    return LatencyEvidence(
        metric="latency_p50", margin=MARGIN, blocks=blocks, refusal=None, baseline_s=None, candidate_s=None
    )


def rates(judged: Iterator[LatencyEvidence]) -> dict[str, float]:
    """Judge each session and return the share of each decision and the mean number of blocks."""
    findings = [judge_latency(one, POLICY, error_rate=RATE) for one in judged]
    decisions = Counter(finding.decision for finding in findings)
    shares = {decision: decisions[decision] / len(findings) for decision in ("PASS", "FAIL", "INCONCLUSIVE")}
    return shares | {"mean_blocks": round(float(np.mean([finding.units for finding in findings])), 2)}


def block_effects(random: np.random.Generator, shape: str, spread: float, size: tuple[int, int]) -> np.ndarray:
    """Return centred block effects of a shape with this standard deviation."""
    if shape == "normal":
        return random.normal(0, spread, size)
    if shape == "student_t3":
        return random.standard_t(3, size) * spread / math.sqrt(3)
    skewed = np.exp(0.5 * random.normal(size=size))  # one side has long stalls: outside what the test assumes
    return (skewed - math.exp(0.125)) / math.sqrt((math.exp(0.25) - 1) * math.exp(0.25)) * spread


def on_the_margin(random: np.random.Generator, shape: str, spread: float, gates: int) -> dict[str, float]:
    """Return the rates where the true change is the margin itself, the hardest case for both directions."""
    effects = math.log1p(MARGIN.value) + block_effects(random, shape, spread, (gates, POLICY.max_blocks))
    return rates(evidence(Blocks(tuple(Block(effect, 1.0, 1.0, 0) for effect in row))) for row in effects.tolist())


def main() -> None:
    """Print every rate as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=int, default=400, help="simulated gates for each rate")
    gates = parser.parse_args().gates
    random = np.random.default_rng(20261122)
    print(
        json.dumps(
            {
                "margin": MARGIN.text,
                "error_rate": POLICY.error_rate,
                "gates_per_rate": gates,
                "devices": {
                    name: {
                        f"{change:+.0%}": rates(sessions(random, change, process_sd, drift_sd, gates))
                        for change in CHANGES
                    }
                    for name, (process_sd, drift_sd) in DEVICES.items()
                },
                "on_the_margin": {
                    f"{shape}, block sd {spread:.0%}": on_the_margin(random, shape, spread, 10 * gates)
                    for shape in ("normal", "student_t3", "skewed")
                    for spread in (0.01, 0.04)
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
