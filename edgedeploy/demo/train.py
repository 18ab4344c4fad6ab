"""Makes the demo's weights: trains the dense network, prunes it, fine-tunes what is left.

Run as ``python -m edgedeploy.demo.train [--data DIR] [--epochs N] [--tune-epochs N] [--out DIR]``. Seed and thread
count are fixed. The test images are looked at once for each network, when it is finished.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from edgedeploy.demo import data, prune
from edgedeploy.demo.model import DENSE_WIDTHS, PRUNED_WIDTHS, ResidualNet, count_macs
from edgedeploy.storage import sha256_bytes, write_atomic

_log = logging.getLogger(__name__)

SEED = 0
THREADS = 2
BATCH = 128
# The usual recipe for small residual networks on small images; no test accuracy was used to tune it.
PEAK_RATE = 0.2
TUNE_PEAK_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
CROP_MARGIN = 2
# Hinton, Vinyals, Dean 2015 (arXiv 1503.02531): a teacher's scores at a raised temperature, beside the labels.
TEMPERATURE = 4.0
KEPT_MACS_SHARE = 0.5
IMPORTANCE_BATCHES = 50

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Samples:
    """Normalised images, float32 (n, 1, 28, 28), and their labels, int64 (n,)."""

    image: Tensor
    label: Tensor


def read_samples(split: data.Split) -> Samples:
    """Normalise a split and move it to torch."""
    return Samples(torch.from_numpy(data.normalise(split.image)), torch.from_numpy(split.label))


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability one half and shift the whole batch by up to CROP_MARGIN pixels."""
    mirrored = torch.rand(len(image), 1, 1, 1, generator=generator) < 0.5
    image = torch.where(mirrored, image.flip(3), image)
    down, right = torch.randint(0, 2 * CROP_MARGIN + 1, (2,), generator=generator).tolist()
    padded = functional.pad(image, [CROP_MARGIN] * 4, value=-data.MEAN / data.STD)
    return padded[:, :, down : down + 28, right : right + 28].contiguous()


def label_loss(logits: Tensor, label: Tensor, image: Tensor) -> Tensor:
    """Return the cross-entropy with the labels; image is not used."""
    return functional.cross_entropy(logits, label)


def distillation_loss(teacher: nn.Module) -> Loss:
    """Return a loss that weighs the labels and the softened scores of a teacher in evaluation mode equally."""

    def loss(logits: Tensor, label: Tensor, image: Tensor) -> Tensor:
        with torch.no_grad():
            soft = functional.log_softmax(teacher(image) / TEMPERATURE, dim=1)
        own = functional.log_softmax(logits / TEMPERATURE, dim=1)
        divergence = functional.kl_div(own, soft, reduction="batchmean", log_target=True) * TEMPERATURE**2
        return 0.5 * label_loss(logits, label, image) + 0.5 * divergence

    return loss


def train(model: nn.Module, samples: Samples, *, epochs: int, peak_rate: float, loss: Loss, name: str) -> None:
    """Train in place with SGD and a one-cycle learning rate.

    Args:
        model: left in evaluation mode.
        samples: the training samples.
        epochs: passes over the samples.
        peak_rate: the highest learning rate.
        loss: of (logits, labels, images), a scalar.
        name: says in the log which model this is.
    """
    generator = torch.Generator().manual_seed(SEED)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=peak_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps = len(samples.label) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak_rate, epochs=epochs, steps_per_epoch=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(samples.label), generator=generator)
        for picked in torch.split(order[: steps * BATCH], BATCH):
            image = augment(samples.image[picked], generator)
            value = loss(model(image), samples.label[picked], image)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            optimiser.step()
            schedule.step()
            total += value.item()
        _log.info("%s epoch %d of %d: loss %.4f", name, epoch + 1, epochs, total / steps)
    model.eval()


@torch.inference_mode()
def count_correct(model: nn.Module, samples: Samples) -> int:
    """Return how many samples a model in evaluation mode labels correctly."""
    batches = zip(torch.split(samples.image, 1000), torch.split(samples.label, 1000), strict=True)
    return sum(int((model(image).argmax(1) == label).sum()) for image, label in batches)


def prune_and_tune(model: ResidualNet, samples: Samples, *, epochs: int) -> ResidualNet:
    """Return the pruned network: cut to PRUNED_WIDTHS and distilled from the dense one.

    The criterion's own choice of widths is logged, because PRUNED_WIDTHS records it and may need to follow a change.
    """
    picked = torch.randperm(len(samples.label), generator=torch.Generator().manual_seed(SEED))[
        : IMPORTANCE_BATCHES * BATCH
    ]
    importance = prune.measure_importance(model, samples.image[picked], samples.label[picked], batch=BATCH)
    chosen = prune.choose_widths(importance, macs=KEPT_MACS_SHARE * count_macs(DENSE_WIDTHS))
    _log.info("the criterion chooses %s; recorded is %s", chosen, PRUNED_WIDTHS)
    narrow = prune.cut(model, importance, PRUNED_WIDTHS)
    train(narrow, samples, epochs=epochs, peak_rate=TUNE_PEAK_RATE, loss=distillation_loss(model), name="pruned")
    return narrow


def write_weights(path: Path, model: nn.Module) -> str:
    """Write a model's float tensors as safetensors and return the file's sha256.

    Batch counters are left out: they matter only to training, and load_state_dict does without them.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    content = save(tensors)
    write_atomic(path, content)
    return sha256_bytes(content)


def _report(name: str, model: ResidualNet, samples: Samples, evaluated: Tensor) -> None:
    subset = Samples(samples.image[evaluated], samples.label[evaluated])
    _log.info(
        "%s: %d parameters, %d MACs, %.2f %% of %d test images, %.2f %% of the %d evaluation samples",
        name,
        sum(parameter.numel() for parameter in model.parameters()),
        count_macs(model.widths),
        100 * count_correct(model, samples) / len(samples.label),
        len(samples.label),
        100 * count_correct(model, subset) / len(subset.label),
        len(subset.label),
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m edgedeploy.demo.train", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=data.DEBIAN_DIR, help="folder of the *.gz files (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=8, help="of the dense network (default: %(default)s)")
    parser.add_argument("--tune-epochs", type=int, default=5, help="of the pruned network (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder of the weights (default: beside this file)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, prune, fine-tune, report and write both weight files.

    Args:
        arguments: the command line without the program's name; None reads ``sys.argv``.
    """
    options = _parse(arguments)
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    samples = read_samples(data.read_split(options.data, "train"))

    dense = ResidualNet(DENSE_WIDTHS)
    train(dense, samples, epochs=options.epochs, peak_rate=PEAK_RATE, loss=label_loss, name="dense")
    pruned = prune_and_tune(dense, samples, epochs=options.tune_epochs)

    split = data.read_split(options.data, "t10k")
    evaluated = torch.from_numpy(data.choose_balanced(split.label, count=data.EVALUATION_COUNT, seed=data.SEED))
    for name, model in (("dense", dense), ("pruned", pruned)):
        _report(name, model, read_samples(split), evaluated)
        _log.info("%s  %s.safetensors", write_weights(options.out / f"{name}.safetensors", model), name)
    _log.info("%.0f CPU-seconds", time.process_time())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
