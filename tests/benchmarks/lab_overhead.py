"""What a visit costs on top of what happens in its process: the host, the link and the agent, and where it goes."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedeploy.backends import backend, session_file
from edgedeploy.lab import bundle, visits
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.visits import Schedule, Side
from edgedeploy.records.compression import CompressionReport
from edgedeploy.records.model import Model, TensorSpec
from edgedeploy.records.target import Target
from edgedeploy.storage import sha256_file
from tests.benchmarks.lab_transfer import linked
from tests.testbed.plain import Plain

ROUNDS = 15
# The work of a visit is next to nothing, and the same in both: warm-up ends after its two first windows.
SCHEDULE = Schedule(bursts_per_visit=8, samples_per_burst=10, warm_up_window=2, warm_up_tolerance=1e9)
LINKS = (("loopback", 0.0), ("20 ms", 0.01))


@dataclass
class Cell:
    """An artifact of the fake runtime, ready to ship."""

    side: Side
    files: dict[str, Path]


def cell(folder: Path) -> Cell:
    """Return an artifact of the fake runtime whose inferences take 20 µs."""
    from numpy import zeros
    from safetensors.numpy import save_file

    fake = backend("fake")
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
    scores = TensorSpec(name="scores", dtype="float32", shape=("batch", 3))
    report = CompressionReport(parameters=0, nonzero_parameters=0, macs=None, initializer_bytes=0, operators={})
    model = Model(path="", sha256="0" * 64, source="", opset=17, inputs=(spec,), outputs=(scores,), compression=report)
    target = Target(format="edgedeploy.target/1", name="any", description="")
    fake.compile(model, target, fake.options(duration_us=20.0), folder / "artifact")
    save_file({"x": zeros((10, 4), "float32")}, folder / "inputs")
    files = {sha256_file(path): path for path in (session_file("fake"), folder / "artifact", folder / "inputs")}
    session, artifact, inputs = files
    return Cell(Side("toy", artifact, session, {}, inputs), files)


def child_alone(root: str, runner: str, side: Side) -> float:
    """Return the seconds of the same visit with nobody between it and us: its process's start, work and end."""
    job = visits._job(side, SCHEDULE)
    burst = {"do": "burst", "count": SCHEDULE.samples_per_burst, "lead_in": SCHEDULE.lead_in}
    commands = [{"do": "open", "job": job}, *[burst] * SCHEDULE.bursts_per_visit, {"do": "close"}]
    started_s = time.perf_counter()
    argv = [sys.executable, runner, "visit", "--root", root, "--parent", str(os.getpid())]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for command in commands:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert answer["event"] == "answer", answer
        process.stdin.close()
        process.wait()
    return time.perf_counter() - started_s


@dataclass
class Watched:
    """How long each command of a visit took, as the host sees it."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def watch(self, agent: Agent) -> None:
        """Time everything that this agent is asked for."""
        ask: Callable[..., dict[str, Any]] = agent.ask

        def timed(do: str, **fields: Any) -> dict[str, Any]:
            started_s = time.perf_counter()
            answer = ask(do, **fields)
            self.seconds.setdefault(do, []).append(time.perf_counter() - started_s)
            return answer

        agent.ask = timed  # type: ignore[method-assign]


def measure(board: Plain, folder: Path, delay_s: float) -> dict[str, Any]:
    """Return the overhead of a visit over a link, in seconds, and the commands that a visit is made of."""
    toy, root = cell(folder), str(folder / "root")
    over_s, alone_s, watched = [], [], Watched()
    with linked(board, delay_s, 0.0) as port:
        given = {"port": port, "root": root, "python": sys.executable}
        started_s = time.perf_counter()
        with (
            board.transport(**given) as transport,
            bundle.connect(transport, board.device(**given), device_name="board") as agent,
        ):
            first_s = time.perf_counter() - started_s
            bundle.ship(agent, transport, toy.files)
            shipping_s = time.perf_counter()
            bundle.ship(agent, transport, toy.files)
            shipping_s = time.perf_counter() - shipping_s
            runner = f"{root}/objects/{agent.runner_sha256}"
            watched.watch(agent)
            for number in range(ROUNDS):
                alone_s.append(child_alone(root, runner, toy.side))
                started_s = time.perf_counter()
                visits.measure_block(agent, [toy.side], SCHEDULE, block=number, seed=0)
                over_s.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        with board.transport(**given) as transport, bundle.connect(transport, board.device(**given), device_name="b"):
            again_s = time.perf_counter() - started_s
    return {
        "visit_s": statistics.median(over_s),
        "process_alone_s": statistics.median(alone_s),
        "overhead_s": statistics.median(one - other for one, other in zip(over_s, alone_s, strict=True)),
        # Of the fastest visits alone: what other programs of this machine do hides a difference of milliseconds.
        "overhead_of_fastest_s": min(over_s) - min(alone_s),
        "commands_per_visit": sum(map(len, watched.seconds.values())) / ROUNDS,
        "median_s": {do: statistics.median(seconds) for do, seconds in watched.seconds.items()},
        "connect_first_time_s": first_s,
        "connect_again_s": again_s,
        "ship_nothing_s": shipping_s,
    }


if __name__ == "__main__":
    found = {}
    for name, delay_s in LINKS:
        place = Path(tempfile.mkdtemp(prefix="edgedeploy-"))
        try:
            with Plain(place / "board") as device:
                found[name] = measure(device, place, delay_s)
        finally:
            shutil.rmtree(place)
    print(json.dumps({"rounds": ROUNDS, "links": found}))
