"""The demo's committed files agree with their manifests and with each other; needs neither torch nor safetensors."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "edgedeploy/demo"
CALIBRATION = ROOT / "calibration/fashion-mnist"
EVALUATION = DEMO / "evaluation"
WEIGHTS = [DEMO / "dense.safetensors", DEMO / "pruned.safetensors"]

KEYS = ["format", "name", "purpose", "file", "sha256", "count", "source", "licence", "seed", "selection", "inputs"]
ITEM_BYTES = {"F32": 4}


def read_manifest(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "manifest.toml").read_text("utf-8"))


def read_arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["image", "labels"]
        return arrays["image"], arrays["labels"]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's header and the length of the data behind it."""
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    return header, len(content) - 8 - header_bytes


@pytest.fixture(params=[CALIBRATION, EVALUATION], ids=["calibration", "evaluation"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_manifest_has_exactly_the_keys_of_its_format(folder):
    manifest = read_manifest(folder)
    assert list(manifest) == KEYS
    assert manifest["format"] == "edgedeploy.dataset/1"
    assert list(manifest["inputs"]) == ["image"]
    assert list(manifest["inputs"]["image"]) == ["dtype", "layout", "scale", "mean", "std"]


def test_manifest_says_what_its_folder_is_for():
    assert read_manifest(CALIBRATION)["purpose"] == "calibration"
    assert read_manifest(EVALUATION)["purpose"] == "evaluation"


def test_manifest_sha256_is_that_of_the_samples(folder):
    manifest = read_manifest(folder)
    assert hashlib.sha256((folder / manifest["file"]).read_bytes()).hexdigest() == manifest["sha256"]


def test_samples_have_the_declared_count_and_type(folder):
    image, labels = read_arrays(folder)
    count = read_manifest(folder)["count"]
    assert (image.shape, image.dtype) == ((count, 1, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)


def test_sets_have_the_agreed_sizes():
    assert read_manifest(CALIBRATION)["count"] == 512
    assert read_manifest(EVALUATION)["count"] == 2500


@pytest.mark.parametrize("taken", [100, 512])
def test_every_prefix_is_class_balanced(folder, taken):
    counts = np.bincount(read_arrays(folder)[1][:taken], minlength=10)
    assert len(counts) == 10
    assert counts.max() - counts.min() <= 1


def test_preprocessed_samples_have_about_zero_mean_and_unit_spread(folder):
    declared = read_manifest(folder)["inputs"]["image"]
    image = read_arrays(folder)[0].astype(np.float32)
    normalised = (image * np.float32(declared["scale"]) - np.float32(declared["mean"])) / np.float32(declared["std"])
    assert normalised.mean() == pytest.approx(0, abs=0.05)
    assert normalised.std() == pytest.approx(1, abs=0.05)


def test_no_image_appears_twice_in_or_across_the_sets():
    images = np.concatenate([read_arrays(CALIBRATION)[0], read_arrays(EVALUATION)[0]])
    assert len({image.tobytes() for image in images}) == 3012


def test_demo_files_stay_small():
    assert (EVALUATION / "samples.npz").stat().st_size < 2_000_000
    assert (CALIBRATION / "samples.npz").stat().st_size < 1_000_000
    for path in WEIGHTS:
        assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_weights_are_float32_tensors_that_fill_the_file(path):
    header, data_bytes = read_header(path)
    expected = 0
    for tensor in sorted(header.values(), key=lambda tensor: tensor["data_offsets"]):
        begin, end = tensor["data_offsets"]
        assert begin == expected
        assert end - begin == ITEM_BYTES[tensor["dtype"]] * np.prod(tensor["shape"], dtype=int)
        expected = end
    assert expected == data_bytes


def test_pruned_network_has_fewer_channels_in_every_convolution():
    dense, pruned = (read_header(path)[0] for path in WEIGHTS)
    assert set(dense) == set(pruned)
    convolutions = [name for name in dense if name.endswith("conv.weight")]
    assert len(convolutions) == 9
    for name in convolutions:
        assert pruned[name]["shape"][0] < dense[name]["shape"][0]


def test_model_card_names_the_files_that_are_here():
    card = (DEMO / "MODEL_CARD.md").read_text("utf-8")
    for path in [*WEIGHTS, CALIBRATION / "samples.npz", EVALUATION / "samples.npz"]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card
