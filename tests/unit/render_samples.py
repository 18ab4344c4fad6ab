"""Simulated records for the rendering tests: log-normal visits with drift, spikes and a dropped pair."""

import math
import random

from edgedeploy.records.artifact import Artifact, LayerReport, Recipe
from edgedeploy.records.compression import CompressionReport
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.model import Fidelity, OutputFidelity, TensorSpec
from edgedeploy.records.run import ArtifactReference, Boundary, Burst, Conditions, MemoryVisit, Outputs, Run, Visit
from edgedeploy.records.verdict import CellVerdict, Finding, Margin, Policy, Verdict

FACTS = DeviceFacts(
    hostname="bench-7",
    machine="aarch64",
    system="Linux",
    kernel="6.6.31",
    os_name="Debian GNU/Linux 12",
    libc="glibc 2.36",
    python="3.11.2",
    cpu_model="Cortex-A76",
    isa=("asimd", "asimddp", "fphp"),
    cores=4,
    memory_bytes=8 * 2**30,
    boot_id="5a1e",
)
NO_CONDITIONS = Conditions(monotonic_s=0.0)
INPUTS = (TensorSpec(name="image", dtype="float32", shape=("batch", 1, 28, 28), layout="NCHW"),)


def conditions(random_: random.Random, monotonic_s: float) -> Conditions:
    return Conditions(
        monotonic_s=monotonic_s,
        cpu_clocks_hz=tuple(random_.choice((2.4e9, 2.4e9, 2.2e9)) for _ in range(4)),
        governors=("performance",) * 4,
        temperatures_celsius={"cpu-thermal": 48 + 9 * random_.random()},
        throttled=False,
        load_1min=0.1 + 0.2 * random_.random(),
        free_memory_bytes=int((5.9 + 0.1 * random_.random()) * 2**30),
    )


def visit(random_: random.Random, block: int, position: int, p50_s: float, *, samples: int = 64, dropped: str = ""):
    level_s = p50_s * math.exp(random_.gauss(0.03 * math.sin(block / 2), 0.008))
    times_s = [level_s * math.exp(abs(random_.gauss(0, 0.02))) for _ in range(samples)]
    for place in range(samples):
        if random_.random() < 0.01:
            times_s[place] *= 1.4 + random_.random()
    start_s = 1000.0 + 20 * block + 5 * position
    return Visit(
        block=block,
        position=position,
        load_s=0.031 * math.exp(random_.gauss(0, 0.05)),
        first_inference_s=3.1 * p50_s,
        warm_up_samples_s=tuple(level_s * (1 + 1 / (n + 1)) for n in range(12)),
        is_steady=True,
        bursts=tuple(
            Burst(pair=number, samples_s=tuple(times_s[first : first + 8]))
            for number, first in enumerate(range(0, samples, 8))
        ),
        before=conditions(random_, start_s),
        after=conditions(random_, start_s + 4),
        foreign_load=0.05 * random_.random(),
        dropped=dropped,
    )


def reference(side: str, name: str) -> ArtifactReference:
    is_candidate = side == "candidate"
    return ArtifactReference(
        name=name,
        sha256=("c0ffee" if is_candidate else "ba5e11") * 10 + "0123",
        size_bytes=247_112 if is_candidate else 1_204_331,
        key=("1234" if is_candidate else "abcd") * 16,
        model="edgedeploy.demo.model:pruned" if is_candidate else "edgedeploy.demo.model:dense",
        target="raspberry-pi-5",
        backend="onnxruntime",
        precision="int8" if is_candidate else "fp32",
        options={"threads": 4, "graph_optimization": "all"},
    )


def make_run(
    side: str,
    *,
    name: str = "",
    p50_s: float = 0.0042,
    blocks: int = 8,
    samples: int = 64,
    dropped_blocks: dict[int, str] | None = None,
    right: float = 0.912,
    questions: int = 2000,
    seed: int = 7,
    session: str = "session-1",
    events: tuple[str, ...] = (),
) -> Run:
    random_ = random.Random(f"{seed} {side}")
    answers = random.Random(seed)
    dropped_blocks = dropped_blocks or {}
    visits = []
    for block in range(blocks):
        is_first = (block % 2 == 0) == (side == "baseline")
        visits.append(
            visit(random_, block, 0 if is_first else 1, p50_s, samples=samples, dropped=dropped_blocks.get(block, ""))
        )
    # One difficulty a question, the same for both sides: answers are correlated, as they are in life.
    scores = tuple(float(answers.random() + 0.02 * random_.gauss(0, 1) < right) for _ in range(questions))
    name = name or f"demo-{side}"
    return Run(
        session=session,
        cell=name,
        side=side,
        artifact=reference(side, name),
        device="pi5-desk",
        facts=FACTS,
        runtime="onnxruntime 1.23.0",
        boundary=Boundary(
            includes_input_copy=False,
            includes_output_copy=True,
            threads=4,
            batch=1,
            detail="pre-processing outside",
        ),
        schedule="",
        started_utc="2026-11-22T09:14:05Z",
        visits=tuple(visits),
        memory=tuple(
            MemoryVisit(
                peak_rss_bytes=int((61 if side == "candidate" else 74) * 2**20 + 9000 * n), import_rss_bytes=47 * 2**20
            )
            for n in range(3)
        ),
        outputs=Outputs(
            dataset="fashion-mnist",
            dataset_sha256="da7a" * 16,
            samples=questions,
            sha256="0f" * 32,
            metric="top1",
            scores=scores,
            value=sum(scores) / questions,
            is_repeatable=True,
        ),
        events=events,
        edgedeploy="0.1.0",
        runner_sha256="ab" * 32,
    )


def make_artifact(side: str, name: str = "") -> Artifact:
    made = reference(side, name or f"demo-{side}")
    is_candidate = side == "candidate"
    return Artifact(
        name=made.name,
        file=f"{made.name}.onnx",
        sha256=made.sha256,
        size_bytes=made.size_bytes,
        key=made.key,
        recipe=Recipe(
            model=made.model,
            model_sha256="11" * 32,
            weights_sha256="22" * 32,
            inputs=INPUTS,
            calibration="fashion-mnist" if is_candidate else "",
            calibration_sha256="33" * 32 if is_candidate else "",
            target=made.target,
            target_sha256="44" * 32,
            backend=made.backend,
            precision=made.precision,
            options=made.options,
            toolchain={"torch": "2.9.0", "onnx": "1.19.0", "onnxruntime": "1.23.0", "edgedeploy": "0.1.0"},
        ),
        inputs=INPUTS,
        outputs=(TensorSpec(name="scores", dtype="float32", shape=("batch", 10)),),
        fidelity=tuple(
            Fidelity(
                reference="pytorch",
                candidate=candidate,
                samples=64,
                sample_source="fashion-mnist",
                outputs=(
                    OutputFidelity(
                        output="scores",
                        max_abs=max_abs,
                        max_relative=max_abs / 21,
                        cosine=0.999981,
                        sqnr_db=sqnr_db,
                        argmax_agreement=agreement,
                    ),
                ),
            )
            for candidate, max_abs, sqnr_db, agreement in [
                ("canonical fp32 ONNX", 3.8e-6, 121.4, 1.0),
                *([("int8 artifact", 0.41, 33.2, 0.984)] if is_candidate else []),
            ]
        ),
        compression=CompressionReport(
            parameters=228_442 if is_candidate else 301_066,
            nonzero_parameters=228_440 if is_candidate else 301_066,
            macs=11_400_000,
            initializer_bytes=913_000,
            operators={"Conv": 9, "Relu": 9, "Add": 4, "Gemm": 1},
        ),
        layers=LayerReport(
            operators={"QLinearConv": 9, "QLinearAdd": 4, "Gemm": 1} if is_candidate else {"FusedConv": 9, "Gemm": 1},
            quantized=tuple(f"conv_{n}" for n in range(9)) if is_candidate else (),
            float_islands=("head/gemm",) if is_candidate else (),
        ),
        notes=("weights limited to 7 bits",) if is_candidate else (),
        created_utc="2026-11-22T09:10:00Z",
    )


MARGINS = {
    "accuracy": Margin(kind="points", value=0.01, text="-1pt"),
    "latency_p50": Margin(kind="relative", value=0.05, text="+5%"),
    "peak_memory": Margin(kind="relative", value=0.10, text="+10%"),
    "artifact_size": Margin(kind="absolute", value=100 * 1024, text="+100KiB"),
}


def make_findings(decision: str = "PASS") -> tuple[Finding, ...]:
    latency = {
        "PASS": (-0.312, -0.331, -0.294, "2.89 ms against 4.2 ms: shown to be no more than 5 % slower"),
        "FAIL": (0.104, 0.087, 0.121, "4.64 ms against 4.2 ms: shown to be more than 5 % slower"),
        "INCONCLUSIVE": (0.041, -0.012, 0.094, "the interval holds both the margin and no change"),
    }[decision]
    return (
        Finding(
            metric="accuracy",
            decision="PASS",
            baseline_value=0.9125,
            candidate_value=0.909,
            effect=0.0035,
            low=-0.0012,
            high=0.0082,
            p_pass=0.003,
            p_fail=0.99,
            margin=MARGINS["accuracy"],
            units=2000,
            reason="2,000 samples, 21 lost and 14 gained; a drop of 0.6 points would have shown",
        ),
        Finding(
            metric="latency_p50",
            decision=decision,
            baseline_value=0.0042,
            candidate_value=0.0042 * (1 + latency[0]),
            effect=latency[0],
            low=latency[1],
            high=latency[2],
            p_pass=0.001,
            p_fail=0.999,
            margin=MARGINS["latency_p50"],
            units=7,
            reason=latency[3],
            needed="about 9 more blocks, or a quieter device" if decision == "INCONCLUSIVE" else "",
        ),
        Finding(
            metric="latency_p95",
            decision="PASS",
            baseline_value=0.0047,
            candidate_value=0.0046,
            effect=-0.02,
            low=-0.06,
            high=0.03,
            margin=None,
            units=7,
            reason="reported, not judged: the policy has no margin for it",
        ),
        Finding(
            metric="peak_memory",
            decision="PASS",
            baseline_value=74 * 2**20,
            candidate_value=61 * 2**20,
            effect=-0.176,
            low=-0.19,
            high=-0.16,
            margin=MARGINS["peak_memory"],
            units=3,
            reason="61 MiB against 74 MiB in 3 visits each",
        ),
        Finding(
            metric="artifact_size",
            decision="PASS",
            baseline_value=1_204_331,
            candidate_value=247_112,
            effect=247_112 - 1_204_331,
            margin=MARGINS["artifact_size"],
            units=1,
            reason="a file's size is exact",
        ),
    )


def make_cell(decision: str = "PASS", **changes) -> CellVerdict:
    fields = {
        "cell": "pruned-int8",
        "baseline_cell": "dense-fp32",
        "device": "pi5-desk",
        "target": "raspberry-pi-5",
        "decision": decision,
        "findings": make_findings(decision),
        "baseline_run": "run-b",
        "candidate_run": "run-c",
        "seconds": 94.2,
        "notes": ("stopped at the second look",),
    }
    return CellVerdict(**{**fields, **changes})


def make_verdict(*cells: CellVerdict, decision: str = "PASS", name: str = "fashion-mnist 1.4") -> Verdict:
    return Verdict(
        name=name,
        decision=decision,
        cells=cells or (make_cell(decision),),
        policy=Policy(margins=MARGINS),
        judged_utc="2026-11-22T09:15:41Z",
    )


def make_runs(candidate_p50_s: float = 0.0029, **changes) -> dict[str, Run]:
    return {
        "run-b": make_run("baseline", **changes),
        "run-c": make_run("candidate", p50_s=candidate_p50_s, right=0.909, **changes),
    }


def make_artifacts() -> dict[str, Artifact]:
    made = [make_artifact("baseline"), make_artifact("candidate")]
    return {artifact.sha256: artifact for artifact in made}
