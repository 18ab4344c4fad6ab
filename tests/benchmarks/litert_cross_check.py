"""Does our p50 of a .tflite agree with litert-benchmark's, the tool that comes in LiteRT's own wheel?

Both measure the same file with one thread, each round in a fresh process of either side, in alternating order. The tool
uses LiteRT's CompiledModel and we its Interpreter, so that a ratio of 1 says as much about the runtime as about us. It
says milliseconds with two digits after the point: models that take less than a few of them cannot be compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.numpy import save_file

from edgedeploy import pipeline
from edgedeploy.backends import session_file, session_options
from edgedeploy.build import Built
from edgedeploy.lab import bundle
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.inventory import device, load_lab, open_transport
from edgedeploy.prepare.dataset import random_samples
from edgedeploy.storage import sha256_file
from tests.benchmarks.models import chain

SAMPLES, WARM_UP = 100, 20
# What the console script litert-benchmark does.
TOOL = "import sys; from ai_edge_litert.tools.benchmark_litert_model import main; sys.exit(main())"


def theirs(file: Path) -> dict[str, float]:
    """Return what litert-benchmark says of a file in a fresh process, in seconds."""
    result = file.with_name("litert.json")
    subprocess.run(
        [
            *(sys.executable, "-c", TOOL, f"--model={file}", f"--result_json={result}", "--num_threads=1"),
            *(f"--num_runs={SAMPLES}", f"--warmup_runs={WARM_UP}"),
        ],
        check=True,
        capture_output=True,
        timeout=600,
    )
    said = json.loads(result.read_text())
    assert said["num_threads"] == 1
    return {
        "p50_s": said["latency"]["median_ms"] / 1e3,
        "fastest_s": said["latency"]["min_ms"] / 1e3,
        "is_fully_accelerated": said["fully_accelerated"],
    }


def ours(agent: Agent, job: dict[str, object]) -> dict[str, float]:
    """Return the median and the smallest of one visit's samples, in seconds."""
    agent.ask("open", visit="ours", job=job, timeout_s=120.0)
    answer = agent.ask("bursts", visits=["ours"], count=SAMPLES, lead_in=WARM_UP, timeout_s=600.0)
    agent.ask("close", visit="ours", timeout_s=30.0)
    (samples_ns,) = answer["samples_ns"]
    return {"p50_s": statistics.median(samples_ns) / 1e9, "fastest_s": min(samples_ns) / 1e9}


def rounds(built: Built, inputs: Path, count: int) -> dict[str, object]:
    """Measure one artifact from both sides, round by round."""
    lab = device(load_lab(Path("no lab file")), "local")
    files = {sha256_file(path): path for path in (built.file, inputs, session_file("tflite"))}
    artifact, samples, session = files
    job: dict[str, object] = {
        "session": session,
        "artifact": artifact,
        "inputs": samples,
        "options": session_options(built.artifact),
        "batch": 1,
        "warm_up": {"window": 10, "tolerance": 0.02, "cap_s": 5.0},
    }
    mine: list[dict[str, float]] = []
    tools: list[dict[str, float]] = []
    with open_transport("local", lab) as transport, bundle.connect(transport, lab, device_name="local") as agent:
        bundle.ship(agent, transport, files)
        for number in range(count):
            if number % 2:
                tools.append(theirs(built.file))
            mine.append(ours(agent, job))
            if not number % 2:
                tools.append(theirs(built.file))
    ratios = {
        key: sorted(one[key] / other[key] for one, other in zip(mine, tools, strict=True))
        for key in ("p50_s", "fastest_s")
    }
    return {
        "rounds": count,
        "our_p50_s": statistics.median(one["p50_s"] for one in mine),
        "litert_benchmark_p50_s": statistics.median(one["p50_s"] for one in tools),
        "median_ratio": statistics.median(ratios["p50_s"]),
        "smallest_ratio": ratios["p50_s"][0],
        "largest_ratio": ratios["p50_s"][-1],
        # What other processes do to this machine lengthens medians and leaves the fastest sample alone.
        "median_ratio_of_fastest": statistics.median(ratios["fastest_s"]),
        "all_operators_in_xnnpack": all(one["is_fully_accelerated"] for one in tools),
        "size_bytes": built.file.stat().st_size,
    }


def main() -> None:
    """Compare on two chains of convolutions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    count = parser.parse_args().rounds
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as temporary:
        if "EDGEDEPLOY_TOOLS_DIR" not in os.environ:  # the converter's environment is no part of what is measured
            from edgedeploy.storage import cache_dir

            os.environ["EDGEDEPLOY_TOOLS_DIR"] = str(cache_dir() / "tools")
        os.chdir(temporary)
        os.environ["EDGEDEPLOY_CACHE_DIR"] = f"{temporary}/cache"
        for layers in (20, 60):
            model = chain(layers, Path(f"chain_{layers}.onnx"))
            built = pipeline.compile(str(model), backend="tflite", output=Path(f"out_{layers}"))
            inputs = Path(f"inputs_{layers}.safetensors")
            save_file(random_samples(built.artifact.inputs, 1, 0).batch(0, 1), inputs)
            figures[f"chain of {layers}"] = rounds(built, inputs, count)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
