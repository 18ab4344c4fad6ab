"""A device on this machine whose Python has the emulated TensorRT and the emulated CUDA libraries."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EMULATED = Path(__file__).parents[1] / "emulated"
VERSIONS = ("8.5.3", "8.6.0", "10.3.0", "10.13.3", "11.4.0")


def environment(version: str, libraries: Path | None, **more: str) -> dict[str, str]:
    """Return what a process needs to meet one emulated version; without libraries, a machine without a driver."""
    return {
        "EMULATED_TENSORRT": version,
        "PYTHONPATH": str(EMULATED),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",  # numpy's threads, which nothing here needs, take a while to start
        **({"LD_LIBRARY_PATH": str(libraries)} if libraries else {}),
        **more,
    }


def device_python(path: Path, version: str, libraries: Path | None, **more: str) -> Path:
    """Write a script that is this interpreter with the emulation, for a device's `python`."""
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in environment(version, libraries, **more).items()
    )
    path.write_text(f'#!/bin/sh\n{exports}exec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return path


# Builds one kit after another in one process, which is what most tests can share; each job may go wrong in its own way.
MANY = """
import importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("builder", sys.argv[1])
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)
find_spec = importlib.util.find_spec
answers = {}
for name, job in json.load(sys.stdin).items():
    print("== " + name, file=sys.stderr, flush=True)
    os.makedirs(job["folder"])
    import tensorrt.building
    sys.modules["tensorrt.building"].FAULT = job.get("fault", "")
    importlib.util.find_spec = lambda sought, hidden=job.get("hidden"): None if sought == hidden else find_spec(sought)
    told = []
    try:
        report, made = builder.build(job["files"], job["options"], job["folder"], lambda *said: told.append(said))
        answers[name] = {"report": report, "made": {key: os.path.join(job["folder"], made[key]) for key in made}}
    except builder.BuildError as error:
        answers[name] = {"kind": error.kind, "error": str(error)}
    answers[name]["told"] = told
json.dump({"probe": builder.probe(), "answers": answers}, sys.stdout)
"""


def build_many(
    builder: Path, version: str, libraries: Path | None, jobs: dict[str, dict[str, Any]], **more: str
) -> tuple[dict[str, Any], str]:
    """Run jobs in one process; return its answers and what it printed.

    A job is {"files", "options", "folder"}, and where wanted "fault" and "hidden", a module that is not to be found.
    """
    return run_python(
        [sys.executable, "-c", MANY, str(builder)], json.dumps(jobs), environment(version, libraries, **more)
    )


def run_python(argv: Sequence[str], text: str, variables: dict[str, str]) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        list(argv),
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **variables},
    )
    if done.returncode != 0:
        raise RuntimeError(f"ended with {done.returncode}\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout)), done.stderr
