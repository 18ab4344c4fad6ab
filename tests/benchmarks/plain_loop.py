"""Does our p50 agree with a plain hand-written ONNX Runtime loop? Both in one run, bursts alternating.

The plain loop is what anybody would write: a fresh process, one session with one thread, warm-up, perf_counter_ns
around session.run. It waits for a line between bursts, so that this machine's own drift hits both alike; several fresh
pairs of processes show what differs from process to process.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.numpy import save_file

from edgedeploy import pipeline
from edgedeploy.backends import session_file
from edgedeploy.build import Built
from edgedeploy.lab import bundle
from edgedeploy.lab.inventory import device, load_lab, open_transport
from edgedeploy.prepare.dataset import random_samples
from edgedeploy.storage import sha256_file
from tests.benchmarks.models import chain

PROCESS_PAIRS = 6
BURST_PAIRS = 60
SAMPLES = 5
LEAD_IN = 2
PLAIN = """
import sys, time, json
import onnxruntime as ort
from safetensors.numpy import load_file
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {name: value[:1] for name, value in load_file(sys.argv[2]).items()}
for _ in range(50):
    session.run(None, feed)
for line in sys.stdin:
    count, lead_in = map(int, line.split())
    for _ in range(lead_in):
        session.run(None, feed)
    samples = []
    for _ in range(count):
        started = time.perf_counter_ns()
        session.run(None, feed)
        samples.append(time.perf_counter_ns() - started)
    print(json.dumps(samples), flush=True)
"""


def process_pair(built: Built, inputs: Path) -> tuple[list[float], list[float]]:
    """Alternate our visit with a plain loop; return the median of every burst of ours and of the plain one's, in s."""
    lab = device(load_lab(Path("no lab file")), "local")
    files = {sha256_file(path): path for path in (built.file, inputs, session_file(built.artifact.recipe.backend))}
    artifact, samples, session = files
    job = {
        "session": session,
        "artifact": artifact,
        "inputs": samples,
        "options": dict(built.artifact.recipe.options),
        "batch": 1,
        "warm_up": {"window": 10, "tolerance": 0.02, "cap_s": 5.0},
    }
    ours: list[float] = []
    plain: list[float] = []
    with (
        open_transport("local", lab) as transport,
        bundle.connect(transport, lab, device_name="local") as agent,
        subprocess.Popen(
            [sys.executable, "-c", PLAIN, str(built.file), str(inputs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as loop,
    ):
        bundle.ship(agent, transport, files)
        agent.ask("open", visit="ours", job=job, timeout_s=60.0)
        assert loop.stdin is not None
        assert loop.stdout is not None
        for number in range(BURST_PAIRS):
            for side in ((ours, plain), (plain, ours))[number % 2]:
                if side is ours:
                    answer = agent.ask("bursts", visits=["ours"], count=SAMPLES, lead_in=LEAD_IN, timeout_s=60.0)
                    (samples_ns,) = answer["samples_ns"]
                else:
                    loop.stdin.write(f"{SAMPLES} {LEAD_IN}\n")
                    loop.stdin.flush()
                    samples_ns = json.loads(loop.stdout.readline())
                side.append(statistics.median(samples_ns) / 1e9)
        loop.stdin.close()
    return ours, plain


def main() -> None:
    """Compare on a small and a larger model."""
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        os.environ["EDGEDEPLOY_CACHE_DIR"] = f"{temporary}/cache"
        for layers in (1, 20):
            model = chain(layers, Path(f"chain_{layers}.onnx"))
            built = pipeline.compile(str(model), output=Path(f"out_{layers}"))
            inputs = Path(f"inputs_{layers}.safetensors")
            save_file(random_samples(built.artifact.inputs, 1, 0).batch(0, 1), inputs)
            pairs = [process_pair(built, inputs) for _ in range(PROCESS_PAIRS)]
            ratios = [statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in pairs]
            differences_s = [statistics.median(a - b for a, b in zip(*pair, strict=True)) for pair in pairs]
            figures[f"chain of {layers}"] = {
                "process_pairs": PROCESS_PAIRS,
                "our_p50_s": statistics.median(burst for ours, _ in pairs for burst in ours),
                "plain_p50_s": statistics.median(burst for _, plain in pairs for burst in plain),
                "median_ratio": statistics.median(ratios),
                "ratio_of_each_process_pair": ratios,
                "median_difference_s": statistics.median(differences_s),
            }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
