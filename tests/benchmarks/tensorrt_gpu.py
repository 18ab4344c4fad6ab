"""ResNet-50 on a GPU: TensorRT's int8 engine beside PyTorch fp32, eager and compiled, batch 1, inference by inference.

    python -m tests.benchmarks.tensorrt_gpu [--target nvidia-dgpu] [--trtexec PATH] [--rounds 300]

Needs, on one machine: an NVIDIA GPU, TensorRT's Python, and a PyTorch with CUDA. It was never executed where edgedeploy was
written: there was no GPU. Each call starts with an image in pinned memory and ends with the scores in memory of the
host. PyTorch computes products in TF32 by its own defaults, which the figures say. trtexec, where it is found, measures
the same engine by itself; what it calls "GPU Compute Time" is compared with our CUDA events. Weights are random: speed
does not depend on them.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from edgedeploy import pipeline
from edgedeploy.backends import session_file
from edgedeploy.ondevice.runner import load_device_half
from tests.benchmarks.timing import medians_s

WARM_UP = 50
# Where JetPack and the Debian packages put it.
TRTEXEC = "/usr/src/tensorrt/bin/trtexec"


def resnet50():
    """Return ResNet-50 with random weights and batch statistics."""
    from tests.benchmarks import networks

    return networks.resnet50()


def engine(target, scratch):
    """Return the int8 engine, built here by the whole pipeline."""
    calibration = scratch / "noise.npz"
    rng = np.random.default_rng(0)
    np.savez(calibration, image=rng.standard_normal((16, 3, 224, 224)).astype(np.float32))
    return pipeline.compile(
        "tests.benchmarks.tensorrt_gpu:resnet50", inputs=["image=1,3,224,224"], target=target, backend="tensorrt",
        precision="int8", calibration=calibration, device="local", progress=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip


def pytorch_calls(image):
    """Return what computes the float network on the GPU, from pinned memory to memory."""
    import torch

    module = resnet50().eval().cuda()
    pinned = torch.from_numpy(image).pin_memory()

    def call(network):
        def run():
            with torch.inference_mode():
                return network(pinned.to("cuda", non_blocking=True)).cpu()

        return run

    return {"eager fp32": call(module), "torch.compile fp32": call(torch.compile(module, mode="max-autotune"))}


def by_trtexec(program, path):
    """Return trtexec's own median milliseconds of GPU time for an engine, or why there is none."""
    found = program or shutil.which("trtexec") or (TRTEXEC if Path(TRTEXEC).exists() else "")
    if not found:
        return "trtexec was not found"
    command = [found, f"--loadEngine={path}", "--iterations=500", "--warmUp=500", "--duration=5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = re.search(r"GPU Compute Time: .*?median = ([\d.]+) ms", done.stdout)
    return (
        float(said.group(1)) if said else f"trtexec ended with {done.returncode} and said no time: {done.stderr[-500:]}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default="nvidia-dgpu")
    parser.add_argument("--trtexec", default="")
    parser.add_argument("--rounds", type=int, default=300)
    given = parser.parse_args()
    image = np.random.default_rng(1).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        built = engine(given.target, Path(scratch))
        device_half = load_device_half(str(session_file("tensorrt")))
        with device_half.Session(str(built.file), {"event_times": given.rounds}) as session:
            session.bind({"image": (image.tobytes(), "float32", list(image.shape))})
            calls = {"TensorRT int8": session.infer, **pytorch_calls(image)}
            p50_s = medians_s(calls, rounds=given.rounds + WARM_UP, warm_up=WARM_UP)
            events_ms, boundary = session.event_times_ms(), session.boundary()
        ours_ms, theirs_ms = statistics.median(events_ms), by_trtexec(given.trtexec, built.file)
    import torch

    report = {
        "gpu": torch.cuda.get_device_name(0),
        "runtimes": [session.runtime, f"torch {torch.__version__}"],
        "boundary": boundary,
        "torch_tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        },
        "p50_s": p50_s,
        "times_faster": {name: time_s / p50_s["TensorRT int8"] for name, time_s in p50_s.items()},
        "gpu_time_p50_ms": ours_ms,
        "trtexec_gpu_time_p50_ms": theirs_ms,
        "ratio_to_trtexec": ours_ms / theirs_ms if isinstance(theirs_ms, float) else None,
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
