"""Our TFLite compiler beside litert-torch on the same networks, fp32: seconds to compile, size, error, operators.

    python -m tests.benchmarks litert_torch_cross_check [-- --model NAME] [--keep FOLDER]

litert-torch 0.10 and what it needs (2.1 GB, made once) are kept in an environment of their own beside our converters':
in EDGEDEPLOY_TOOLS_DIR, else in the cache. Its child is given the network as an exported program; the seconds of both
sides start from PyTorch and leave out starting Python and importing packages. Both files answer the same samples on
LiteRT, one thread, and are compared with PyTorch.
"""

import argparse
import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from edgedeploy import pipeline
from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.errors import DeviceError, EdgedeployError
from edgedeploy.storage import cache_dir
from tests.benchmarks.agreement import figures
from tests.benchmarks.real_models import Cell, device_answers, known, local_device, say
from tests.benchmarks.subjects import ROOT, SUBJECTS

HERE = Path(__file__).parent
LITERT_TORCH = ToolEnvironment("litert-torch", HERE / "litert_torch_requirements.txt", ("litert_torch",))
SAMPLES = 8
CHILD_LIMIT_S = 900


def ours(name, facts, target, rows):
    """Compile for TFLite in fp32 and return the figures."""
    subject = SUBJECTS[name]
    begin = time.perf_counter()
    try:
        built = pipeline.compile(
            subject.source,
            weights=facts.files.weights,
            inputs=subject.inputs,
            target=target,
            backend="tflite",
            calibration=facts.files.calibration,
            name=name,
            progress=say,
        )
        seconds = time.perf_counter() - begin + facts.exported_s
        with local_device() as (agent, transport):
            made = device_answers(Cell("tflite", "fp32", {}, built), rows, agent, transport)
    except (EdgedeployError, DeviceError) as error:
        return {"why": f"{type(error).__name__}: {error}"}
    return {
        "compile_s": None if built.is_cached else round(seconds, 2),
        "size_bytes": built.artifact.size_bytes,
        "operators": dict(built.artifact.layers.operators),
        "answers": made,
    }


def theirs(name, facts, rows, folder, python):
    """Let litert-torch convert the same network in its own process and return the figures."""
    import torch

    from edgedeploy.prepare.load import load

    arrays = rows.batch(0, rows.count)
    program, inputs = folder / "program.pt2", folder / "inputs.npz"
    module = load(SUBJECTS[name].source, facts.files.weights, base=ROOT).program
    example = tuple(torch.from_numpy(array[:1]) for array in arrays.values())
    begin = time.perf_counter()
    torch.export.save(torch.export.export(module, example), program)
    exported_s = time.perf_counter() - begin
    np.savez(inputs, **arrays)
    command = [str(python), str(HERE / "litert_torch_convert.py"), str(program), str(inputs), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CHILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"why": f"litert-torch took longer than {CHILD_LIMIT_S} s"}
    if done.returncode != 0:
        return {"why": f"exit status {done.returncode}: {' | '.join(done.stderr.strip().splitlines()[-3:])}"}
    said = json.loads(done.stdout.splitlines()[-1])
    return {
        "compile_s": round(exported_s + said["convert_s"], 2),
        "size_bytes": said["size_bytes"],
        "operators": said["operators"],
        "answers": np.load(folder / "answers.npy"),
    }


def beginning(samples):
    """Return the first samples of a set as a set of its own."""
    return dataclasses.replace(
        samples,
        sha256=f"{samples.sha256}-{SAMPLES}",
        count=SAMPLES,
        labels=None,
        arrays={name: array[:SAMPLES] for name, array in samples.arrays.items()},
    )


def judged(row, expected):
    """Put how far the answers lie from PyTorch's in their place."""
    if "answers" in row:
        row["max_relative_error"] = figures(row.pop("answers"), expected)["max_relative_error"]
    return row


def beside(name, target, scratch, python):
    """Return the figures of one network."""
    facts = known(name, target, scratch)
    rows = beginning(facts.sets[facts.first])
    expected = facts.expected[facts.first][:SAMPLES]
    folder = scratch / "litert_torch" / name.replace(" ", "_").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    row = {
        "edgedeploy": judged(ours(name, facts, target, rows), expected),
        "litert-torch": judged(theirs(name, facts, rows, folder, python), expected),
    }
    seconds = [side.get("compile_s") for side in row.values()]
    sizes = [side.get("size_bytes") for side in row.values()]
    if all(seconds):
        row["compile_time_ratio"] = seconds[0] / seconds[1]
    if all(sizes):
        row["size_ratio"] = sizes[0] / sizes[1]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="x86-64")
    parser.add_argument("--model", action="append", choices=list(SUBJECTS), help="only these")
    parser.add_argument("--keep", type=Path, help="a folder for weights, samples and artifacts, used again next time")
    given = parser.parse_args()
    os.chdir(ROOT)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    os.environ.setdefault("EDGEDEPLOY_TOOLS_DIR", str(cache_dir() / "tools"))
    python = LITERT_TORCH.python(say)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (given.keep or Path(temporary)).absolute()
        scratch.mkdir(parents=True, exist_ok=True)
        os.environ["EDGEDEPLOY_CACHE_DIR"] = str(scratch / "cache")
        report = {name: beside(name, given.target, scratch, python) for name in given.model or SUBJECTS}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
