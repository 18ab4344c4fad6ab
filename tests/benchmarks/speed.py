"""Pruned int8 artifacts beside PyTorch eager fp32, one thread, batch 1, alternating inference by inference.

    python -m tests.benchmarks.speed

ResNet-50 has random weights (speed does not depend on them); "50 % channels" is the same network at half its widths.
EfficientNet-Lite0 has its trained weights and is not pruned. Artifacts are the whole pipeline's own, for this machine.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from edgedeploy import pipeline
from tests.benchmarks import networks
from tests.benchmarks.efficientnet_lite0 import network as efficientnet_lite0
from tests.benchmarks.timing import medians_s, session

ROUNDS = 60
WARM_UP = 8


def resnet50():
    """Return ResNet-50 with random weights and batch statistics."""
    return networks.resnet50()


def resnet50_half():
    """Return it with half of the channels in every layer."""
    return networks.resnet50(share=0.5)


MODELS = {"ResNet-50": resnet50, "ResNet-50, 50 % channels": resnet50_half, "EfficientNet-Lite0": efficientnet_lite0}
REFERENCES = {"ResNet-50, 50 % channels": "ResNet-50"}


def main():
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 3, 224, 224)).astype(np.float32)
    tensor = torch.from_numpy(image)
    sources = {
        "ResNet-50": "resnet50",
        "ResNet-50, 50 % channels": "resnet50_half",
        "EfficientNet-Lite0": "efficientnet_lite0",
    }
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        os.environ["EDGEDEPLOY_CACHE_DIR"] = str(Path(scratch) / "cache")
        calibration = Path(scratch) / "noise.npz"
        np.savez(calibration, image=rng.standard_normal((16, 3, 224, 224)).astype(np.float32))
        eager, calls, sizes = {}, {}, {}
        for name, factory in sources.items():
            for precision in ("fp32", "int8"):
                built = pipeline.compile(
                    f"tests.benchmarks.speed:{factory}",
                    inputs=["image=batch,3,224,224"],
                    precision=precision,
                    calibration=calibration,
                )
                loaded = session(built.file)
                calls[f"{name}, {precision}"] = lambda loaded=loaded: loaded.run(None, {"image": image})
                sizes[f"{name}, {precision}"] = built.artifact.size_bytes
            module = MODELS[name]().eval()
            eager[name] = lambda module=module: module(tensor)
        every = calls | {f"{name}, eager": call for name, call in eager.items()}
        p50_s = medians_s(every, rounds=ROUNDS + WARM_UP, warm_up=WARM_UP)
    report = {
        name: {
            "p50_s": p50_s[name],
            "size_bytes": sizes[name],
            "times_faster_than_eager_fp32": p50_s[f"{_dense(name)}, eager"] / p50_s[name],
        }
        for name in calls
    }
    report["eager p50_s"] = {name: p50_s[f"{name}, eager"] for name in eager}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


def _dense(name):
    """Return the network that a pruned one replaces."""
    model = name.rpartition(", ")[0]
    return REFERENCES.get(model, model)


if __name__ == "__main__":
    main()
