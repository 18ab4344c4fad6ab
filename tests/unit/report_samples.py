"""A verdict with everything that a report can show, for the tests of reports."""

import random

from msgspec.structs import replace

from edgedeploy.records.explanation import (
    AccuracyExplanation,
    Cause,
    Change,
    ClassMove,
    Explanation,
    GroupDifference,
    Profile,
    SpeedExplanation,
)
from edgedeploy.records.passport import AaSummary, PassportSummary
from edgedeploy.records.run import LayerTime, Run
from edgedeploy.records.verdict import ClassFinding, Finding, LimitFinding, Margin, Verdict

from .render_samples import make_cell, make_findings, make_run, make_verdict, reference, visit

COMMAND = "edgedeploy run edgedeploy.toml --cell pruned-int8"


def with_answers(run: Run, *, classes: int = 10, changed: float = 0.0, seed: int = 3) -> Run:
    """A run whose scores are those of predictions; a share of them is drawn anew."""
    truth = random.Random(seed)
    own = random.Random(f"{seed} {run.side}")
    labels = tuple(truth.randrange(classes) for _ in range(run.outputs.samples))
    known = [label if truth.random() < 0.9 else truth.randrange(classes) for label in labels]
    predictions = tuple(own.randrange(classes) if own.random() < changed else answer for answer in known)
    scores = tuple(float(label == answer) for label, answer in zip(labels, predictions, strict=True))
    outputs = replace(
        run.outputs, labels=labels, predictions=predictions, scores=scores, value=sum(scores) / len(scores)
    )
    return replace(run, outputs=outputs)


def with_extras(run: Run) -> Run:
    """A run with a sentinel's visits and operators that were watched."""
    random_ = random.Random(f"extras {run.side}")
    sentinel = tuple(visit(random.Random(block), block, 0, 0.0011, samples=59) for block in (-1, 8))
    layers = tuple(
        LayerTime(name=f"conv_{number}", kind="FusedConv", p50_s=random_.uniform(1e-5, 4e-4)) for number in range(30)
    )
    return replace(run, sentinel=sentinel, sentinel_sha256="5e" * 32, layer_times=layers)


def rich_runs(**changes) -> dict[str, Run]:
    baseline, candidate = (
        with_extras(with_answers(make_run(side, p50_s=p50_s, **changes), changed=changed))
        for side, p50_s, changed in (("baseline", 0.0042, 0.0), ("candidate", 0.0046, 0.03))
    )
    return {"run-b": baseline, "run-c": candidate}


def class_finding() -> Finding:
    return Finding(
        metric="class_accuracy",
        decision="FAIL",
        baseline_value=0.91,
        candidate_value=0.71,
        effect=0.2,
        margin=Margin(kind="points", value=0.05, text="-5pt"),
        units=2000,
        reason="class 3 lost 20 points of 200 samples",
        classes=(
            ClassFinding(
                label=3, decision="FAIL", samples=200, lost=42, gained=2, baseline_value=0.91, candidate_value=0.71, effect=0.2,
                p_fail=1e-6, p_pass=1.0,
            ),
            ClassFinding(
                label=8, decision=None, samples=4, lost=1, gained=0, baseline_value=1.0, candidate_value=0.75, effect=0.25,
                needed_samples=90,
            ),
        ),
    )  # fmt: skip


def limited_finding() -> Finding:
    return Finding(
        metric="latency_p99",
        decision="INCONCLUSIVE",
        baseline_value=0.0049,
        candidate_value=0.0051,
        effect=0.04,
        low=0.01,
        high=0.07,
        margin=Margin(kind="limit", value=0.005, text="<5ms", limit=0.005),
        units=7,
        reason="5.1 ms against a limit of 5 ms",
        needed="about 12 more blocks",
        limit=LimitFinding(
            decision="INCONCLUSIVE", limit=0.005, value=0.0051, low=0.0048, high=0.0054, units=7, reason="the limit lies inside"
        ),
    )  # fmt: skip


def explanation() -> Explanation:
    def profile(side):
        return Profile(cell=f"demo-{side}", artifact=reference(side, f"demo-{side}"), runtime="onnxruntime 1.23.0")

    groups = tuple(
        GroupDifference(
            name=f"conv_{number} + relu_{number}", baseline_s=1e-4, candidate_s=1e-4 + 1e-5 * (20 - number),
            difference_s=1e-5 * (20 - number), low_s=5e-6, high_s=3e-4, is_proven=number < 3, share=0.1,
            baseline_precision="fp32", candidate_precision="int8", changes=("float32 before, int8 now",),
        )
        for number in range(20)
    )  # fmt: skip
    return Explanation(
        cell="pruned-int8",
        baseline_cell="dense-fp32",
        device="pi5-desk",
        metrics=("latency_p50", "accuracy"),
        speed=SpeedExplanation(
            baseline=profile("baseline"),
            candidate=profile("candidate"),
            passes=8,
            groups=groups,
            layers=Change(seconds=4e-4, low_s=3e-4, high_s=5e-4),
            causes=(Cause(kind="conversions", text="3 conversions between float and int8 cost 310 µs an inference"),),
            counteracting="two groups became faster by 40 µs",
        ),
        accuracy=AccuracyExplanation(
            dataset="fashion-mnist",
            metric="top1",
            samples=2000,
            causes=("the error jumps at conv_7",),
            classes=(
                ClassMove(label=3, samples=200, baseline_right=182, candidate_right=142, lost=42, gained=2, p=1e-8),
            ),
        ),
        explained_utc="2026-11-22T09:16:00Z",
        seconds=12.0,
        notes=("one pass was dropped",),
        edgedeploy="0.2.0",
    )


def rich_verdict() -> Verdict:
    """A verdict with a cell of each decision, and what the gate knows of itself."""
    failed = make_cell(
        "FAIL", findings=(*make_findings("FAIL"), class_finding(), limited_finding()), explanation=explanation()
    )
    cells = (
        failed,
        make_cell("INCONCLUSIVE", cell="pruned-int8@tflite"),
        make_cell("PASS", cell="pruned-fp32"),
    )
    aa = AaSummary(
        gates=240, false_fails=1, passes=231, inconclusive=8, rate=1 / 240, low=0.0001, high=0.023, confidence=0.95,
        error_rate=0.05, devices=("pi5-desk",), since_utc="2026-11-01T00:00:00Z", until_utc="2026-11-21T00:00:00Z",
        median_seconds=41.0,
    )  # fmt: skip
    passport = PassportSummary(
        device="pi5-desk", file="20261121T000000Z-12345678.json", started_utc="2026-11-21T00:00:00Z", run_to_run_cv=0.021,
        block_spread=0.012, seconds_per_block=5.1, smallest_effects={"1m": None, "5m": 0.014, "20m": 0.007}, drift_per_hour=0.002,
    )  # fmt: skip
    return replace(make_verdict(*cells, decision="FAIL"), aa=aa, devices=(passport,), command=COMMAND)
