"""What calibrating on many images takes: peak memory beyond the loaded images, and seconds, beside onnxruntime, as JSON.

    python -m tests.benchmarks.calibration_memory [--images 2000]

Each measurement is a process of its own. onnxruntime's min-max calibrator keeps its outputs for all images, so it is fed
in groups of 64; its percentile calibrator keeps 64 MB for each image and sees only a few, from which its needs for all
images are extrapolated (marked so). Images are noise: what is computed does not depend on them.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

KINDS = ("edgedeploy", "onnxruntime min-max", "onnxruntime percentile")
FEW = 16
GROUP = 64


def images(count):
    """Return images as bytes: in float32 they would themselves take more memory than what is measured."""
    return np.random.default_rng(0).integers(0, 256, (count, 3, 224, 224), dtype=np.uint8)


def measure(kind, model_path, count):
    """Return the peak of memory beyond what was held before calibrating, in bytes, and seconds."""
    from edgedeploy.documents import read_json
    from edgedeploy.prepare.dataset import Samples
    from edgedeploy.prepare.graph import read_graph, view
    from edgedeploy.prepare.ptq.quantized_set import quantized_set
    from edgedeploy.prepare.ptq.statistics import statistics
    from edgedeploy.records.dataset import InputPreparation
    from edgedeploy.records.model import FORMAT, Model

    model = read_json(Path(model_path), Model, FORMAT)
    stored = images(count)
    preparation = InputPreparation(dtype="float32", layout="NCHW", scale=1.0, mean=(127.0,), std=(128.0,))
    samples = Samples("noise", "", count, None, {"image": stored}, {"image": preparation})
    chosen = quantized_set(view(read_graph(Path(model.path)).graph), rounds_products=False)
    import onnxruntime  # noqa: F401  # loading the library is not calibrating

    before, begin = _peak_bytes(), time.perf_counter()
    if kind == "edgedeploy":
        statistics(model, samples, list(dict.fromkeys(chosen.origin(name) for name in chosen.tensors)))
    else:
        _theirs(kind, model, samples)
    return {
        "images": count, "extra_peak_bytes": _peak_bytes() - before, "seconds": time.perf_counter() - begin
    }  # fmt: skip


def _peak_bytes():
    """Return the peak of this process's memory; getrusage's would be that of the process that started it, if larger."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE).group(1))


def _theirs(kind, model, samples):
    from onnxruntime import quantization as theirs

    class Reader(theirs.CalibrationDataReader):
        def __init__(self, start, stop):
            self.places = iter(range(start, stop))

        def get_next(self):
            place = next(self.places, None)
            return None if place is None else samples.batch(place, place + 1)

    method = theirs.CalibrationMethod.MinMax if kind.endswith("min-max") else theirs.CalibrationMethod.Percentile
    with tempfile.TemporaryDirectory() as folder:
        calibrator = theirs.create_calibrator(
            model.path, calibrate_method=method, augmented_model_path=f"{folder}/augmented.onnx"
        )
        for start in range(0, samples.count, GROUP):
            calibrator.collect_data(Reader(start, min(start + GROUP, samples.count)))
        calibrator.compute_data()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--model", help="a model record beside its .onnx; made when missing")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        sys.stdout.write(json.dumps(measure(given.one[0], given.model, int(given.one[1]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        record = given.model or _record(Path(scratch))
        report = {}
        for kind in given.only or KINDS:
            count = FEW if kind.endswith("percentile") else given.images
            command = [sys.executable, "-m", "tests.benchmarks.calibration_memory", "--model", str(record)]
            done = subprocess.run([*command, "--one", kind, str(count)], stdout=subprocess.PIPE, text=True, check=True)
            # onnxruntime's calibrators print as they go, without ending the line.
            report[kind] = json.loads(done.stdout[done.stdout.rindex('{"images"') :])
            if count != given.images:
                factor = given.images / count
                report[kind][f"extrapolated to {given.images} images"] = {
                    key: report[kind][key] * factor for key in ("extra_peak_bytes", "seconds")
                }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


def _record(folder):
    """Prepare EfficientNet-Lite0 and return the file of its record."""
    from edgedeploy.documents import write_json
    from tests.benchmarks.efficientnet_lite0 import normalise
    from tests.benchmarks.photographs import CALIBRATION, crops, prepared

    model = prepared("efficientnet_lite0:network", Path(__file__).parent, crops(CALIBRATION, 0, 0, normalise), folder)
    write_json(folder / "model.json", model)
    return folder / "model.json"


if __name__ == "__main__":
    main()
