"""What the figures on aarch64 devices share: the demo's pruned network compiled for a runtime, and a provisioned device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgedeploy import boards, pipeline
from edgedeploy.build import Built
from edgedeploy.lab.inventory import lab_path, load_lab
from edgedeploy.measure import Evaluation, MeasureRequest, measure
from edgedeploy.records.model import TensorSpec
from edgedeploy.records.run import Run
from edgedeploy.records.target import Precision
from tests.testbed.board import Board

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "edgedeploy" / "demo"
EVALUATION = DEMO / "evaluation"
SPECS = (TensorSpec(name="image", dtype="float32", shape=("batch", 1, 28, 28)),)
RUNTIMES = ("onnxruntime", "tflite", "mnn")


def tell(text: str) -> None:
    """Say on stderr what happens; stdout is for the figures."""
    print(text, file=sys.stderr)


def prepare(folder: Path) -> None:
    """Work in a folder, with a state and a lease of our own; what was fetched and packed is kept where it always is."""
    os.chdir(folder)
    for name in ("state", "lease"):
        (folder / name).mkdir()
        os.environ[f"EDGEDEPLOY_{name.upper()}_DIR"] = str(folder / name)
    sys.path.insert(0, str(ROOT))  # the demo's model is a factory of the checkout


def compiled(backend: str, precision: Precision, target: str) -> Built:
    """Return the demo's pruned network in one precision for one runtime; int8 has ranges of the demo's calibration set."""
    return pipeline.compile(
        "edgedeploy.demo.model:pruned",
        weights=DEMO / "pruned.safetensors",
        inputs=SPECS,
        target=target,
        backend=backend,
        precision=precision,
        calibration=ROOT / "calibration" / "fashion-mnist" if precision == "int8" else None,
        name=f"pruned-{backend}-{precision}",
        progress=tell,
    )


def write_lab(board: Board, folder: Path, **changes: object) -> Path:
    """Write a lab file with one device."""
    path = folder / "lab.toml"
    path.write_text('format = "edgedeploy.lab/1"\n' + board.entry(**changes))
    return path


def provided(board: Board, lab: Path, backend: str) -> str:
    """Install a back end's runtime on a device and return which one."""
    done = boards.provision_device(board.name, lab, [backend], tell)
    return f"{done.provided[0].runtime.distribution} {done.provided[0].runtime.version}"


def looked_at(built: Built, device: str, lab: Path | None, evaluation: Path | None) -> Run:
    """Return a run with an artifact's answers to the evaluation set; without one, with its memory visits."""
    entry = pipeline.device_of(load_lab(lab_path(lab)), device)
    request = MeasureRequest(
        sides=((built.artifact.name, built),),
        device_name=device,
        device=entry,
        limits=pipeline.this_target(built.artifact.recipe.target).conditions,
        evaluation=Evaluation(path=evaluation) if evaluation else None,
        blocks=0,
    )
    (run,) = measure(request, lambda runs: True, tell)
    return run
