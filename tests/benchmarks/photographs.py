"""What int8 costs a network on photographs: every rule set, our choices beside onnxruntime's own quantizer, as figures.

Calibration and evaluation use crops of different photographs. Crops of one photograph resemble each other, and many are
textures, so agreement below about 5 points is noise; the signal-to-noise ratio of the logits is the sensitive figure.
Layers left in float are chosen on calibration photographs, in the same run. The held-out ones choose nothing in a run
and all variants are listed, but they were looked at while the methods were written, more than once: what was kept for
its held-out figures (17 crops of a calibration photograph in place of 9) may look better than on others.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from edgedeploy.judge.proportions import exact_mcnemar
from edgedeploy.prepare.dataset import Samples, load_samples
from edgedeploy.prepare.emission.emit import emit
from edgedeploy.prepare.export import export
from edgedeploy.prepare.graph import Runner, read_graph, view
from edgedeploy.prepare.load import load
from edgedeploy.prepare.ptq.equalize import equalize
from edgedeploy.prepare.ptq.quantize import quantize
from edgedeploy.prepare.ptq.sensitivity import curve, without
from edgedeploy.prepare.simplify import simplify
from edgedeploy.records.model import TensorSpec
from edgedeploy.records.quantization import QuantizationPolicy
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
RULES = {
    "ARM, int8 asymmetric": QuantizationRules(
        activation_dtype="int8", activation_symmetric=False, clamps="absorbed", weight_bits=8
    ),
    "x86 with VNNI, uint8": QuantizationRules(
        activation_dtype="uint8", activation_symmetric=False, clamps="absorbed", weight_bits=8
    ),
    "x86 without VNNI, uint8, 7-bit weights": QuantizationRules(
        activation_dtype="uint8", activation_symmetric=False, clamps="absorbed", weight_bits=7
    ),
    "TensorRT, int8 symmetric": QuantizationRules(
        activation_dtype="int8", activation_symmetric=True, weight_bits=8, bias="float32", residual_add="skip"
    ),
}
# onnxruntime keeps 64 MB for each image of this calibrator.
PERCENTILE_IMAGES = 16


def crops(files, count, seed, normalise):
    """Return the central crop of each photograph and `count` random ones, preprocessed; seed decides which."""
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
            pictures.append(normalise(np.asarray(crop, np.float32).transpose(2, 0, 1)))
    images = np.stack(pictures).astype(np.float32)
    return Samples(
        f"{len(images)} crops of {len(files)} photographs",
        f"{files} {count} {seed}",
        len(images),
        None,
        {"image": images},
        {},
    )


POLICIES = {
    "MSE ranges, bias correction": QuantizationPolicy(rounding="nearest", equalize=False),
    "default": QuantizationPolicy(),
}
# Rule sets that differ from another one in the weights' bits or in nothing that counts: old choices are not scored.
WITHOUT_STEPS = ("x86 with VNNI, uint8", "x86 without VNNI, uint8, 7-bit weights")
# The grids of ARM's int8 and of uint8 are the same, 128 codes apart: what is chosen for one is right for the other.
SAME_GRIDS = {"x86 with VNNI, uint8": "ARM, int8 asymmetric"}
MOST_FLOAT_LAYERS = 16


class Reference:
    """Logits of the float model on one set, computed once."""

    def __init__(self, run, samples):
        self.samples = samples
        self.logits = logits(run, samples)

    def figures(self, run):
        """Return how far another form's logits lie from the float ones."""
        got = logits(run, self.samples)
        error = (got - self.logits).astype(np.float64)
        row = {
            "sqnr_db": float(10 * np.log10((self.logits.astype(np.float64) ** 2).sum() / (error**2).sum())),
            "argmax_agreement": float((got.argmax(1) == self.logits.argmax(1)).mean()),
        }
        labels = self.samples.labels
        if labels is not None:
            was, now = (values.argmax(1) == labels for values in (self.logits, got))
            lost, gained = int((was & ~now).sum()), int((now & ~was).sum())
            row |= {"top1": float(now.mean()), "lost": lost, "gained": gained, "p": exact_mcnemar(lost, gained)}
        return row


def logits(run, samples):
    """Return the outputs for all samples, shape (samples, classes)."""
    return np.concatenate(
        [
            next(iter(run(samples.batch(start, min(start + 8, samples.count))).values()))
            for start in range(0, samples.count, 8)
        ]
    )


def prepared(factory, base, calibration, folder):
    """Return the canonical model."""
    exported = export(load(factory, None, base=base), [INPUT], calibration, folder / "exported.onnx")
    return simplify(exported, calibration, folder / "fp32.onnx")


def study(model, calibration, references, folder, *, budgets_db, rules=tuple(RULES), only="", with_onnxruntime=True):
    """Score every variant on every reference set.

    Args:
        references: name → Reference.
        budgets_db: rules' name → budgets on calibration samples, rising; all of them are points of one curve.
        only: policies whose name holds this.
    """
    report = {"fp32": {"bytes": Path(model.path).stat().st_size}, "calibration": calibration.name}
    for name, reference in references.items():
        if reference.samples.labels is not None:
            report["fp32"][f"top1 on {name}"] = float((reference.logits.argmax(1) == reference.samples.labels).mean())
    begin = time.perf_counter()
    equalized = equalize(model, calibration, folder / "equalized.onnx")
    report["seconds to equalize"] = round(time.perf_counter() - begin, 1)
    seen = view(read_graph(Path(equalized.path)).graph)
    plans = {}

    def score(name, source, table, rules_name, seconds, **more):
        form = emit(source, table, RULES[rules_name], calibration, folder / "form.onnx").model
        left = sorted(weighted_nodes(source) - set(table.nodes))
        report[name] = row_of(Path(form.path), references) | {"layers in float": left, "seconds": seconds, **more}
        say(f"{name}: {report[name]}")

    for rules_name in rules:
        for policy_name, policy in POLICIES.items():
            if only not in policy_name or (rules_name in WITHOUT_STEPS and policy.rounding == "nearest"):
                continue
            source = equalized if policy.equalize else model
            begin = time.perf_counter()
            table = quantize(source, calibration, RULES[rules_name], policy, cache=folder / "cache")
            seconds = round(time.perf_counter() - begin, 1)
            score(f"{rules_name}: {policy_name}", source, table, rules_name, seconds)
        if rules_name not in budgets_db or only not in "default":
            continue
        planned_for = SAME_GRIDS.get(rules_name, rules_name)
        begin = time.perf_counter()
        if planned_for not in plans:
            until = budgets_db[rules_name][-1]
            plans[planned_for] = curve(
                equalized, table, calibration, RULES[rules_name], until_db=until, most=MOST_FLOAT_LAYERS
            ).points
            for point in plans[planned_for]:
                say(f"  {len(point.float_nodes)} in float: {point.sqnr_db:.2f} dB, {point.size_bytes} bytes")
        seconds = round(time.perf_counter() - begin, 1)
        points = plans[planned_for]
        report[f"{rules_name}: curve on calibration samples"] = [
            {"layers in float": len(point.float_nodes), "sqnr_db": point.sqnr_db, "bytes": point.size_bytes}
            for point in points
        ]
        for budget in budgets_db[rules_name]:
            best = max(points, key=lambda point: point.sqnr_db)
            met = next((point for point in points if point.sqnr_db >= budget), best)
            score(
                f"{rules_name}: default, {budget:g} dB on calibration samples",
                equalized,
                without(table, seen, met.float_nodes),
                rules_name,
                seconds,
                **{"is budget met": met.sqnr_db >= budget},
            )
    if with_onnxruntime:
        for name, path, seconds in onnxruntime_forms(Path(model.path), calibration, folder):
            report[name] = row_of(path, references) | {"seconds": seconds}
            say(f"{name}: {report[name]}")
    return report


def weighted_nodes(model):
    """Return the names of the layers."""
    return {node.name for node in read_graph(Path(model.path)).graph.node if node.op_type in ("Conv", "Gemm")}


def row_of(path, references):
    """Return size and figures of a form, computed as it is written: exact arithmetic."""
    run = Runner(path, is_optimized=False)
    return {"bytes": path.stat().st_size} | {name: item.figures(run) for name, item in references.items()}


def onnxruntime_forms(model, calibration, folder):
    """Yield onnxruntime's own static quantization on the same data."""
    from onnxruntime import quantization as theirs

    class Reader(theirs.CalibrationDataReader):
        def __init__(self, count):
            self.rows = iter(calibration.arrays["image"][:: max(1, calibration.count // count)][:count])

        def get_next(self):
            row = next(self.rows, None)
            return None if row is None else {"image": row[None]}

    kinds = theirs.CalibrationMethod
    for name, dtype, is_symmetric, method, count in (
        ("onnxruntime U8S8 min-max", theirs.QuantType.QUInt8, False, kinds.MinMax, calibration.count),
        ("onnxruntime S8S8 symmetric min-max", theirs.QuantType.QInt8, True, kinds.MinMax, calibration.count),
        (
            f"onnxruntime U8S8 percentile 99.99, {PERCENTILE_IMAGES} images",
            theirs.QuantType.QUInt8,
            False,
            kinds.Percentile,
            PERCENTILE_IMAGES,
        ),
        (
            f"onnxruntime S8S8 symmetric percentile 99.99, {PERCENTILE_IMAGES} images",
            theirs.QuantType.QInt8,
            True,
            kinds.Percentile,
            PERCENTILE_IMAGES,
        ),
    ):
        begin = time.perf_counter()
        path = folder / "theirs.onnx"
        theirs.quantize_static(
            model, path, Reader(count), quant_format=theirs.QuantFormat.QDQ, per_channel=True, activation_type=dtype,
            weight_type=theirs.QuantType.QInt8, calibrate_method=method,
            extra_options={"ActivationSymmetric": is_symmetric, "CalibPercentile": 99.99},
        )  # fmt: skip
        yield name, path, round(time.perf_counter() - begin, 1)


def main(factory, normalise, budgets_db, description):
    """Run one network's study by the command line and print the figures."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--crops", type=int, default=40, help="random crops of each held-out photograph")
    parser.add_argument("--calibration-crops", type=int, default=16, help="random crops of each calibration photograph")
    parser.add_argument(
        "--labelled", type=Path, help="an .npz of labelled photographs, preprocessed as (x - 127) / 128"
    )
    parser.add_argument("--rules", action="append", choices=list(RULES), help="only these")
    parser.add_argument("--policies", default="", help="only those whose name holds this")
    parser.add_argument("--without-onnxruntime", action="store_true", help="leave onnxruntime's own quantizer out")
    parser.add_argument("--keep", type=Path, help="folder for the .onnx files and the calibration")
    given = parser.parse_args()
    calibration = crops(CALIBRATION, given.calibration_crops, 0, normalise)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        model = prepared(factory, Path(__file__).parent, calibration, folder)
        run = Runner(Path(model.path))
        references = {"held-out crops": Reference(run, crops(EVALUATION, given.crops, 1, normalise))}
        if given.labelled:
            stored = load_samples(given.labelled, [INPUT])
            images = np.stack([normalise(image * 128 + 127) for image in stored.arrays["image"]]).astype(np.float32)
            labelled = Samples(stored.name, "", stored.count, stored.labels, {"image": images}, {})
            references["labelled photographs"] = Reference(run, labelled)
        report = study(
            model,
            calibration,
            references,
            folder,
            budgets_db=budgets_db,
            rules=tuple(given.rules or RULES),
            only=given.policies,
            with_onnxruntime=not given.without_onnxruntime,
        )
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


def say(text):
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
