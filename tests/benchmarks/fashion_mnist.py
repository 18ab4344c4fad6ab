"""The demo's network compressed in five ways: accuracy on the 10,000 test images, size, MACs, latency beside PyTorch.

    python -m tests.benchmarks.fashion_mnist [--data DIR] [--epochs N] [--images N]

Needs the complete Fashion-MNIST (Debian: dataset-fashion-mnist). Dense and pruned weights are the demo's own; QAT and the
low-rank factors are trained here, from them, with the demo's training loop. Ranges are calibrated on training images.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from edgedeploy import pipeline
from edgedeploy.demo import data
from edgedeploy.demo.model import DENSE_WIDTHS, PRUNED_WIDTHS, ConvNorm, ResidualNet
from edgedeploy.demo.train import Samples, count_correct, distillation_loss, label_loss, read_samples, train
from tests.benchmarks.timing import medians_s, session

DEMO = Path(data.__file__).parent
CALIBRATION = DEMO.parent.parent / "calibration" / "fashion-mnist"
ROUNDS = 300


def network(name):
    """Return one of the demo's networks with its weights."""
    from safetensors.torch import load_file

    module = ResidualNet(PRUNED_WIDTHS if name == "pruned" else DENSE_WIDTHS)
    module.load_state_dict(load_file(DEMO / f"{name}.safetensors"), strict=False)
    return module.eval()


class Factored(nn.Module):
    """A convolution as two: its kernel onto `rank` channels, then 1x1 onto the outputs. Singular values are split."""

    def __init__(self, conv, rank):
        super().__init__()
        weight = conv.weight.detach()
        left, values, right = torch.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
        root = values[:rank].sqrt()
        self.inner = nn.Conv2d(conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, bias=False)
        self.outer = nn.Conv2d(rank, conv.out_channels, 1, bias=False)
        self.inner.weight.data = (root[:, None] * right[:rank]).reshape(rank, *weight.shape[1:])
        self.outer.weight.data = (left[:, :rank] * root).reshape(-1, rank, 1, 1)

    def forward(self, features):
        return self.outer(self.inner(features))


def low_rank(samples, epochs):
    """Halve the work of every inner convolution by two factors, and train what that lost."""
    module, teacher = network("dense"), network("dense")
    for stage in module.stages:
        for pair in (stage.first, stage.second):
            assert isinstance(pair, ConvNorm)
            rows, columns = pair.conv.out_channels, pair.conv.in_channels * 9
            pair.conv = Factored(pair.conv, max(4, rows * columns // (rows + columns) // 2))
    train(module, samples, epochs=epochs, peak_rate=0.02, loss=distillation_loss(teacher), name="low-rank")
    return module


def trained_with_quantization(module, samples, epochs):
    """Quantization-aware training by PT2E: per-channel 7-bit weights, which no x86 kernel saturates, 8-bit activations."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True, weight_qmin=-63, weight_qmax=63)
    batch = torch.export.Dim("batch")
    example = (samples.image[:2],)
    captured = torch.export.export(module.train(), example, dynamic_shapes=({0: batch},)).module()
    prepared = prepare_qat_pt2e(captured, XNNPACKQuantizer().set_global(config))
    allow_exported_model_train_eval(prepared)
    train(prepared, samples, epochs=epochs, peak_rate=0.01, loss=label_loss, name="QAT")
    return convert_pt2e(prepared)


def saved(module, folder, name):
    """Save a module as .pt2, the way people hand models over."""
    path = folder / f"{name}.pt2"
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(module, (torch.zeros(2, 1, 28, 28),), dynamic_shapes=({0: batch},)), path)
    return path


def correct(loaded, test):
    name = loaded.get_inputs()[0].name
    batches = zip(torch.split(test.image, 500), torch.split(test.label, 500), strict=True)
    return sum(int((loaded.run(None, {name: x.numpy()})[0].argmax(1) == y.numpy()).sum()) for x, y in batches)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=data.DEBIAN_DIR)
    parser.add_argument("--epochs", type=int, default=1, help="of each training")
    parser.add_argument(
        "--images", type=int, default=20000, help="of the 60,000 that are trained on; 20,000 take minutes"
    )
    given = parser.parse_args()
    torch.manual_seed(0)
    samples, test = (read_samples(data.read_split(given.data, part)) for part in ("train", "t10k"))
    samples = Samples(samples.image[: given.images], samples.label[: given.images])
    dense = network("dense")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["EDGEDEPLOY_CACHE_DIR"] = str(folder / "cache")
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
        variants = {
            "dense fp32": (dense, "fp32"),
            "dense, int8 after training": (dense, "int8"),
            "50 % of the MACs pruned, fp32": (network("pruned"), "fp32"),
            "50 % of the MACs pruned, int8 after training": (network("pruned"), "int8"),
            "QAT int8": (trained_with_quantization(network("dense"), samples, given.epochs), "int8"),
            "pruned + QAT int8": (trained_with_quantization(network("pruned"), samples, given.epochs), "int8"),
            "low rank, fp32": (low_rank(samples, given.epochs), "fp32"),
        }
        report, sessions = {}, {}
        for name, (module, precision) in variants.items():
            source = saved(module, folder, f"v{len(report)}")
            built = pipeline.compile(
                str(source), precision=precision, calibration=CALIBRATION, output=folder / source.stem
            )
            sessions[name] = session(built.file)
            compression = built.artifact.compression
            report[name] = {
                "pytorch_correct_of_10000": count_correct(module, test),
                "artifact_correct_of_10000": correct(sessions[name], test),
                "size_bytes": built.artifact.size_bytes,
                "parameters": compression.parameters,
                "macs": compression.macs,
            }
        image = test.image[:1]
        torch.set_num_threads(1)
        with torch.inference_mode():
            calls = {"PyTorch eager, dense": lambda: dense(image)}
            for name, loaded in sessions.items():
                feed = {loaded.get_inputs()[0].name: image.numpy()}
                calls[name] = lambda loaded=loaded, feed=feed: loaded.run(None, feed)
            medians = medians_s(calls, rounds=ROUNDS, warm_up=ROUNDS // 10)
        base = report["dense fp32"]
        for name, row in report.items():
            row["size_ratio"] = row["size_bytes"] / base["size_bytes"]
            row["loss_points"] = (base["pytorch_correct_of_10000"] - row["artifact_correct_of_10000"]) / 100
            row["times_faster_than_eager_dense"] = medians["PyTorch eager, dense"] / medians[name]
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
