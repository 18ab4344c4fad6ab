"""A runtime that computes nothing and needs nothing: the living definition of the protocol, and the tests' work-horse.

An artifact is a small JSON file. The session answers every sample with scores that depend on that sample's bytes alone,
after exactly as long as the options say; further options make it fail in the ways that real runtimes fail.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.errors import CompileError
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.model import Model
from edgedeploy.records.target import Precision, Target


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What the fake runtime does.

    Attributes:
        duration_us: time of one inference.
        is_idle: it waits for that time asleep, so that many devices of one machine are not in each other's way.
        wobble: spread of that time from one inference to the next, as a fraction (half-normal, seeded).
        wrong_every: every n-th kind of sample is answered wrongly; 0: none.
        crash_after: inferences until the process dies; 0: never.
        crash_signal: what it dies of.
        hang_after: inferences until it stops answering; 0: never.
        leak_bytes: memory that every inference takes and keeps.
        print_noise: whether every inference prints to descriptor 1, as C++ runtimes do.
        flood_bytes: what every inference prints there in one line, which has no end.
        threads: reported in the boundary, otherwise without effect.
    """

    duration_us: float = 200.0
    is_idle: bool = False
    wobble: float = 0.0
    wrong_every: int = 0
    crash_after: int = 0
    crash_signal: str = "SIGSEGV"
    hang_after: int = 0
    leak_bytes: int = 0
    print_noise: bool = False
    flood_bytes: int = 0
    threads: int = 1


class FakeBackend:
    """The host half of the fake runtime."""

    name = "fake"
    suffix = ".fake.json"
    precisions: frozenset[Precision] = frozenset({"fp32", "int8"})
    builds_on: Literal["host", "device"] = "host"
    options: type = Options
    packages: tuple[str, ...] = ()
    tools: ToolEnvironment | None = None
    computes = False
    computes_in_half = False
    int8_is_portable = True

    def missing(self) -> str | None:
        """Say that nothing is missing."""
        return None

    def compile(self, model: Model, target: Target, options: Options, out: Path) -> None:
        """Write the artifact: the model's identity and interface."""
        if not model.outputs:
            raise CompileError("the model has no outputs", backend=self.name, hint="check the export")
        document = {
            "format": "edgedeploy.fake/1",
            "model_sha256": model.sha256,
            "inputs": {spec.name: [spec.dtype, *spec.shape] for spec in model.inputs},
            "outputs": {spec.name: [spec.dtype, *spec.shape] for spec in model.outputs},
            "operators": model.compression.operators,
            "options": dataclasses.asdict(options),
        }
        out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def inspect(self, artifact: Path) -> LayerReport:
        """Report the operators of the model that the artifact was made from."""
        document = json.loads(artifact.read_text(encoding="utf-8"))
        operators: dict[str, int] = document["operators"]
        quantized = ("everything",) if "QuantizeLinear" in operators else ()
        return LayerReport(operators=operators, quantized=quantized, float_islands=())


BACKEND = FakeBackend()
