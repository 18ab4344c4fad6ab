"""The demo's data: reads Fashion-MNIST and writes the pinned calibration and evaluation samples.

Run as ``python -m edgedeploy.demo.data [--data DIR] [--calibration DIR] [--evaluation DIR]``; needs numpy only.
"""

import argparse
import gzip
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgedeploy.storage import sha256_bytes, write_atomic

_log = logging.getLogger(__name__)

DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist 0.0~git20200523.55506a9-1"
SCALE = 1 / 255
# Mean and standard deviation of all training pixels scaled to 0..1, to the four digits that are commonly used.
MEAN = 0.2860
STD = 0.3530
CLASS_COUNT = 10
CALIBRATION_COUNT = 512
EVALUATION_COUNT = 2500
SEED = 0

# sha256 of each unpacked file: the manifests name this source, so nothing else may stand in for it.
_UNPACKED_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# An IDX header is a magic number and one big-endian 32-bit size for each dimension.
_IMAGES_HEADER_BYTES = 16
_LABELS_HEADER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Split:
    """One labelled part of the data set.

    Attributes:
        image: raw pixels, uint8, shape (n, 1, 28, 28).
        label: int64, shape (n,), 0..9.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.int64]


def _unpack(path: Path) -> bytes:
    unpacked = gzip.decompress(path.read_bytes())
    if sha256_bytes(unpacked) != _UNPACKED_SHA256[path.stem]:
        raise ValueError(f"{path} is not the file of the Debian package {DEBIAN_PACKAGE}")
    return unpacked


def read_split(folder: Path, prefix: Literal["train", "t10k"]) -> Split:
    """Read one split from the gzipped IDX files.

    Args:
        folder: holds ``<prefix>-images-idx3-ubyte.gz`` and ``<prefix>-labels-idx1-ubyte.gz``.
        prefix: "train" for the 60,000 training samples, "t10k" for the 10,000 test samples.

    Returns:
        The split, in file order.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not the published one.
    """
    images = _unpack(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = _unpack(folder / f"{prefix}-labels-idx1-ubyte.gz")
    return Split(
        image=np.frombuffer(images, np.uint8, offset=_IMAGES_HEADER_BYTES).reshape(-1, 1, 28, 28),
        label=np.frombuffer(labels, np.uint8, offset=_LABELS_HEADER_BYTES).astype(np.int64),
    )


def normalise(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the float32 input the network expects: (image * SCALE - MEAN) / STD."""
    scaled = image.astype(np.float32) * np.float32(SCALE)
    return (scaled - np.float32(MEAN)) / np.float32(STD)


def choose_balanced(label: NDArray[np.int64], *, count: int, seed: int) -> NDArray[np.int64]:
    """Choose samples at random, class by class in turn, so that every prefix is class-balanced within one.

    Args:
        label: the labels of the whole split.
        count: how many to choose; no class may have fewer samples than its share.
        seed: of numpy's default generator.

    Returns:
        Indices into label, whose labels run 0, 1, .., 9, 0, 1, ..
    """
    generator = np.random.default_rng(seed)
    rounds = -(-count // CLASS_COUNT)
    columns = [generator.permutation(np.flatnonzero(label == one))[:rounds] for one in range(CLASS_COUNT)]
    return np.stack(columns, axis=1).reshape(-1)[:count]


def _render_manifest(*, purpose: str, sha256: str, count: int, file: str, selection: str) -> str:
    return f"""\
format = "edgedeploy.dataset/1"
name = "fashion-mnist"
purpose = "{purpose}"
file = "samples.npz"
sha256 = "{sha256}"
count = {count}
source = "Debian package {DEBIAN_PACKAGE}, {file}"
licence = "MIT"
seed = {SEED}
selection = "{selection}"

[inputs.image]
dtype = "float32"
layout = "NCHW"
scale = {SCALE!r}
mean = [{MEAN:.4f}]
std = [{STD:.4f}]
"""


def write_samples(folder: Path, split: Split, *, purpose: str, file: str, selection: str) -> str:
    """Write ``samples.npz`` and its ``manifest.toml``.

    Args:
        folder: made if missing.
        split: the chosen samples; images stay uint8, the manifest declares their normalisation.
        purpose: "calibration" or "evaluation".
        file: name of the published image file the samples come from.
        selection: one sentence: how they were chosen.

    Returns:
        The sha256 of ``samples.npz``.
    """
    packed = BytesIO()
    np.savez_compressed(packed, image=split.image, labels=split.label)
    write_atomic(folder / "samples.npz", packed.getvalue())
    sha256 = sha256_bytes(packed.getvalue())
    manifest = _render_manifest(purpose=purpose, sha256=sha256, count=len(split.label), file=file, selection=selection)
    write_atomic(folder / "manifest.toml", manifest.encode())
    return sha256


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m edgedeploy.demo.data", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEBIAN_DIR, help="folder of the *.gz files (default: %(default)s)")
    parser.add_argument(
        "--calibration", type=Path, default=Path("calibration/fashion-mnist"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--evaluation", type=Path, default=Path(__file__).parent / "evaluation", help="(default: beside this file)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both sample folders and report their sha256.

    Args:
        arguments: the command line without the program's name; None reads ``sys.argv``.
    """
    options = _parse(arguments)
    train, test = read_split(options.data, "train"), read_split(options.data, "t10k")

    chosen = choose_balanced(train.label, count=CALIBRATION_COUNT, seed=SEED)
    sha256 = write_samples(
        options.calibration,
        Split(train.image[chosen], train.label[chosen]),
        purpose="calibration",
        file="train-images-idx3-ubyte.gz",
        selection="Training images, 51 or 52 of each class, drawn class by class in turn "
        "with numpy's default_rng(seed).",
    )
    _log.info("%s  %s", sha256, options.calibration / "samples.npz")

    chosen = choose_balanced(test.label, count=EVALUATION_COUNT, seed=SEED)
    sha256 = write_samples(
        options.evaluation,
        Split(test.image[chosen], test.label[chosen]),
        purpose="evaluation",
        file="t10k-images-idx3-ubyte.gz",
        selection="Test images, 250 of each class, drawn class by class in turn with numpy's default_rng(seed).",
    )
    _log.info("%s  %s", sha256, options.evaluation / "samples.npz")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
