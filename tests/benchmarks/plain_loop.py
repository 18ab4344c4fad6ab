"""Does our p50 agree with a plain hand-written ONNX Runtime loop? Both in one run, blocks alternating.

The plain loop is what anybody would write: a fresh process, one session with one thread, warm-up, then
perf_counter_ns around session.run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from edgedeploy import pipeline
from tests.benchmarks.models import chain

ROUNDS = 12
SAMPLES = 80
PLAIN = """
import sys, time, json
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
entry = session.get_inputs()[0]
shape = [size if isinstance(size, int) else 1 for size in entry.shape]
feed = {entry.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
for _ in range(50):
    session.run(None, feed)
samples = []
for _ in range(int(sys.argv[2])):
    started = time.perf_counter_ns()
    session.run(None, feed)
    samples.append(time.perf_counter_ns() - started)
print(json.dumps(samples))
"""


def plain_p50_s(model: Path) -> float:
    """Return the median of a plain loop in a fresh process."""
    command = [sys.executable, "-c", PLAIN, str(model), str(SAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return statistics.median(json.loads(done.stdout)) / 1e9


def our_p50_s(folder: Path) -> float:
    """Return the median of one visit."""
    run, _ = pipeline.bench(folder, visits=1)
    return statistics.median(sample for burst in run.visits[0].bursts for sample in burst.samples_s)


def main() -> None:
    """Alternate both on a small and a larger model, and print the paired comparison."""
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        os.environ["EDGEDEPLOY_CACHE_DIR"] = f"{temporary}/cache"
        for layers in (1, 20):
            built = pipeline.compile(str(chain(layers, Path(f"chain_{layers}.onnx"))), output=Path(f"out_{layers}"))
            ours, plain = [], []
            for number in range(ROUNDS):
                # ABBA: neither side always comes first.
                for side in ((ours, plain), (plain, ours))[number % 2]:
                    side.append(our_p50_s(built.folder) if side is ours else plain_p50_s(built.file))
            differences_s = [a - b for a, b in zip(ours, plain, strict=True)]
            figures[f"chain of {layers}"] = {
                "rounds": ROUNDS,
                "our_p50_median_s": statistics.median(ours),
                "plain_p50_median_s": statistics.median(plain),
                "median_difference_s": statistics.median(differences_s),
                "median_ratio": statistics.median(a / b for a, b in zip(ours, plain, strict=True)),
            }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
