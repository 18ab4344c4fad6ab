"""int8 on an aarch64 device beside x86, runtime by runtime: answers that are the same bits, and how far others differ.

The demo's pruned network, quantized, on its evaluation set. Each artifact is built once, for the aarch64 device, and run
there and here. A step (LSB) is the smallest distance of two answers of this machine: the scale of a quantized output.

    python -m tests.benchmarks lab_int8_bits
    python -m tests.benchmarks lab_int8_bits -- --board orin --samples 64
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from edgedeploy.build import Built
from edgedeploy.lab.inventory import load_lab
from edgedeploy.prepare.dataset import load_samples
from edgedeploy.records.run import Run
from edgedeploy.storage import cache_dir
from tests.benchmarks import lab_boards
from tests.benchmarks.__main__ import cpu_model
from tests.testbed.hybrid import Hybrid

TARGETS = {"pi4": "raspberry-pi-4", "orin": "arm64-linux"}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--board", choices=sorted(TARGETS), default="pi4")
    parser.add_argument("--samples", type=int, default=256)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bits-") as place, Hybrid(given.board, name="board") as board:
        here = Path(place)
        lab_boards.prepare(here)
        lab = lab_boards.write_lab(board, here, target=TARGETS[given.board], timeout_s=60.0)
        evaluation = _few(here, given.samples)
        figures = {}
        for backend in lab_boards.RUNTIMES:
            provided = lab_boards.provided(board, lab, backend)
            figures[backend] = {"device_runtime": provided}
            for precision in ("int8", "fp32"):
                built = lab_boards.compiled(backend, precision, TARGETS[given.board])
                figures[backend][precision] = beside(built, lab, evaluation)
        facts = load_lab(lab).devices["board"]
        print(json.dumps({"x86": cpu_model(), "board": given.board, "target": facts.target, "runtimes": figures}))


def _few(folder: Path, samples: int) -> Path:
    """Write the first samples of the demo's evaluation set."""
    path = folder / "evaluation.npz"
    every = load_samples(lab_boards.EVALUATION, tuple(lab_boards.SPECS))
    np.savez(path, **every.batch(0, samples), labels=every.labels[:samples])
    return path


def beside(built: Built, lab: Path, evaluation: Path) -> dict[str, object]:
    """Return how an artifact's answers on the device differ from those here."""
    here = lab_boards.looked_at(built, "local", None, evaluation)
    there = lab_boards.looked_at(built, "board", lab, evaluation)
    return {
        "x86_runtime": here.runtime,
        "arm_runtime": there.runtime,
        # Without VNNI, x86 adds products of bytes in 16 bits, which can overflow: the exact answer is then the other one.
        "x86_isa": [name for name in here.facts.isa if "avx" in name or "vnni" in name],
        "arm_isa": list(there.facts.isa),
        **difference(_answers(here), _answers(there)),
        "golden_of_x86": _agreement(here),
        "golden_of_arm": _agreement(there),
    }


def _agreement(run: Run) -> float | None:
    return run.golden.outputs[0].argmax_agreement if run.golden else None


def _answers(run: Run) -> np.ndarray:
    assert run.outputs is not None, "it was run on an evaluation set"
    (values,) = load_file(cache_dir() / "outputs" / f"{run.outputs.sha256}.safetensors").values()
    return values


def difference(here: np.ndarray, there: np.ndarray) -> dict[str, object]:
    """Return how many values differ, and by how many of the steps that `here` is made of.

    >>> difference(np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 1.0]))["lsb_counts"]
    {'0': 2, '1': 1}
    """
    apart = np.abs(here.astype(np.float64) - there.astype(np.float64))
    gaps = np.diff(np.unique(here.astype(np.float64)))
    step = float(gaps.min()) if gaps.size else 0.0
    # Where answers are multiples of one step, their distances are too; floats have no step to count in.
    is_stepped = bool(gaps.size) and bool(np.all(np.abs(gaps / step - np.rint(gaps / step)) < 1e-2)) and step > 1e-4
    found: dict[str, object] = {
        "values": int(here.size),
        "differ": int(np.count_nonzero(apart)),
        "is_bit_exact": bool(np.array_equal(here, there)),
        "largest_difference": float(apart.max()),
        "argmax_differs": int(np.count_nonzero(here.argmax(-1) != there.argmax(-1))),
    }
    if is_stepped:
        steps, counts = np.unique(np.rint(apart / step).astype(int), return_counts=True)
        found |= {"step": step, "lsb_counts": {str(k): int(n) for k, n in zip(steps, counts, strict=True)}}
    return found


if __name__ == "__main__":
    main()
