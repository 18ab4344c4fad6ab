"""What share of the time sixteen devices are at work when one host drives them, with visits as long as real ones.

The devices are plain sshds of this machine and the fake runtime, which sleeps for the time of an inference: what is
measured is our own scheduling, connecting, shipping and bookkeeping, not the devices.

    python -m tests.benchmarks lab_sixteen
    python -m tests.benchmarks lab_sixteen -- --devices 4 --cells 8
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from edgedeploy import journal, pipeline
from edgedeploy.journal import SessionStep
from edgedeploy.outcomes import Outcome
from edgedeploy.records.session import BlockEnded
from tests.testbed.plain import Plain

TARGET = """\
format = "edgedeploy.target/1"
name = "fake-board"
description = "a board that exists only in tests"
[backends.fake]
precisions = ["fp32"]
[conditions]
max_foreign_load = 1000.0
max_temperature_celsius = 1000.0
"""
BLOCKS = 4


def write_model(path: Path) -> None:
    """Write a network of one operator."""
    import onnx

    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def release(cells: int, inference_ms: float) -> str:
    """Return a release file with so many candidates on any device."""

    def cell(name: str, microseconds: float) -> str:
        return (
            f'[[cells]]\nname = "{name}"\nmodel = "tiny"\ntarget = "fake-board"\nbackend = "fake"\nprecision = "fp32"\n'
            f'device = "any"\noptions = {{ duration_us = {microseconds}, is_idle = true }}\n'
        )

    text = 'format = "edgedeploy.release/1"\nname = "sixteen"\n[models.tiny]\nsource = "tiny.onnx"\n'
    text += cell("base", 1e3 * inference_ms)
    text += "".join(cell(f"cell-{number:02}", 1e3 * inference_ms + number + 1) for number in range(cells))
    # Without a margin nothing is decided early: every cell takes all its blocks.
    return text + f'[gate]\nbaseline = "base"\nmin_blocks = {BLOCKS}\nmax_blocks = {BLOCKS}\n'


def main() -> None:
    """Run it in a folder of its own and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--cells", type=int, default=32)
    parser.add_argument("--inference-ms", type=float, default=15.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sixteen-") as place, contextlib.ExitStack() as boards:
        os.chdir(place)
        here = Path(place)
        for name in ("cache", "state", "targets"):
            (here / name).mkdir()
            os.environ[f"EDGEDEPLOY_{name.upper()}{'' if name == 'targets' else '_DIR'}"] = str(here / name)
        (here / "targets" / "fake-board.toml").write_text(TARGET)
        lab = 'format = "edgedeploy.lab/1"\n'
        for number in range(given.devices):
            board = boards.enter_context(Plain(here / f"board-{number:02}", name=f"board-{number:02}"))
            lab += board.entry(target="fake-board", python=sys.executable)
        (here / "lab.toml").write_text(lab)
        write_model(here / "tiny.onnx")
        (here / "edgedeploy.toml").write_text(release(given.cells, given.inference_ms))
        started_s, used_s = time.monotonic(), time.process_time()
        outcome = pipeline.run(
            here / "edgedeploy.toml", lab=here / "lab.toml", progress=lambda text: print(text, file=sys.stderr)
        )
        wall_s, host_cpu_s = time.monotonic() - started_s, time.process_time() - used_s
        print(json.dumps(figures(outcome, given.devices, wall_s, host_cpu_s)))


def figures(outcome: Outcome, devices: int, wall_s: float, host_cpu_s: float) -> dict[str, object]:
    """Return the shares of the time between the first device's start and the last one's end."""
    begin = min(one.started_s for one in outcome.occupied)
    end = max(one.ended_s for one in outcome.occupied)
    held: dict[str, float] = {}
    for one in outcome.occupied:
        held[one.device] = held.get(one.device, 0.0) + one.ended_s - one.started_s
    in_blocks: dict[str, float] = dict.fromkeys(held, 0.0)
    device_of = {one.cell: one.device for one in outcome.occupied}
    for line in journal.named(outcome.journal).lines():
        if isinstance(line, SessionStep) and isinstance(line.did, BlockEnded):
            visits = [taken.visit for taken in line.did.taken]
            first = min(visit.before.monotonic_s for visit in visits)
            in_blocks[device_of[line.cell]] += max(visit.after.monotonic_s for visit in visits) - first
    shares = [held.get(name, 0.0) / (end - begin) for name in held]
    return {
        "devices": devices,
        "devices_used": len(held),
        "cells": len(outcome.verdict.ledger),
        "judged": sum(entry.state == "judged" for entry in outcome.verdict.ledger),
        "wall_s": wall_s,
        "measuring_span_s": end - begin,
        "host_cpu_s": host_cpu_s,
        # From connecting to the stored run.
        "busy_share_mean": sum(shares) / devices,
        "busy_share_least": min(shares) if len(shares) == devices else 0.0,
        # Between the first and the last reading of a block's conditions: runtimes are loaded, warmed up and timed.
        "in_blocks_share_mean": sum(in_blocks.values()) / devices / (end - begin),
        "load_1min": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
