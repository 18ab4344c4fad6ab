"""Bad calibration data is refused or named."""

import numpy as np
import pytest

from edgedeploy.errors import DocumentError
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.ptq.calibration_check import check_calibration
from edgedeploy.records.dataset import InputPreparation
from edgedeploy.records.model import TensorSpec

IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))
INPUTS = [IMAGE]


def samples(images, name="photographs", preparations=None):
    images = np.asarray(images)
    return Samples(name, "", len(images), None, {"image": images}, preparations or {})


def normal(count=16, seed=0, size=1.0):
    return (np.random.default_rng(seed).standard_normal((count, 3, 8, 8)) * size).astype(np.float32)


def test_good_samples_are_passed_without_a_word():
    assert check_calibration(samples(normal()), INPUTS, evaluation=samples(normal(seed=1), "test photographs")) == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named_with_their_sample(bad):
    images = normal()
    images[11, 1, 2, 3] = bad
    with pytest.raises(DocumentError, match="sample 11 of photographs becomes NaN or infinite in input 'image'"):
        check_calibration(samples(images), INPUTS)


def test_preprocessing_that_makes_infinities_is_caught():
    wrong = {"image": InputPreparation(dtype="float32", layout="NCHW", scale=1e38, mean=(0.0,), std=(1e-30,))}
    with (
        pytest.raises(DocumentError, match="sample 0 of photographs becomes NaN or infinite"),
        np.errstate(all="ignore"),
    ):
        check_calibration(samples(normal(size=1e3), preparations=wrong), INPUTS)


def test_samples_that_are_all_the_same_are_refused():
    with pytest.raises(DocumentError, match="all 16 samples of photographs are the same"):
        check_calibration(samples(np.repeat(normal(1), 16, axis=0)), INPUTS)


def test_samples_of_one_value_each_are_refused():
    flat = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None, None, None], (16, 3, 8, 8))
    with pytest.raises(DocumentError, match="each sample of photographs is one single value throughout"):
        check_calibration(samples(flat), INPUTS)


def test_a_few_blank_samples_are_named():
    images = normal()
    images[3], images[7] = 0.5, 0.25
    (note,) = check_calibration(samples(images), INPUTS)
    assert "2 of 16 samples" in note
    assert "the first being sample 3" in note


def test_few_samples_are_named():
    (note,) = check_calibration(samples(normal(7)), INPUTS)
    assert "only 7 samples" in note


def test_repeated_samples_are_named():
    (note,) = check_calibration(samples(np.concatenate([normal(8), normal(8)])), INPUTS)
    assert "8 of 16 samples of photographs repeat another one" in note


def test_evaluation_samples_among_them_are_refused():
    images = normal()
    with pytest.raises(DocumentError, match="2 of 16 samples of photographs are also in test photographs"):
        check_calibration(
            samples(images), INPUTS, evaluation=samples(np.concatenate([images[4:6], normal(6, 5)]), "test photographs")
        )


def test_evaluation_samples_are_found_however_they_are_stored():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8)).astype(np.uint8)
    preparation = {"image": InputPreparation(dtype="float32", layout="NCHW", scale=1 / 256, mean=(0.0,), std=(1.0,))}
    stored = samples((pixels[:8].astype(np.float32) * np.float32(1 / 256)), "test photographs")
    with pytest.raises(DocumentError, match="8 of 16 samples"):
        check_calibration(samples(pixels, preparations=preparation), INPUTS, evaluation=stored)


def test_preprocessing_unlike_that_of_the_evaluation_set_is_refused():
    raw = np.random.default_rng(0).uniform(0, 255, (16, 3, 8, 8)).astype(np.float32)
    with pytest.raises(
        DocumentError, match=r"up to 255 in photographs and up to .* in test photographs; preprocess both"
    ):
        check_calibration(samples(raw), INPUTS, evaluation=samples(normal(), "test photographs"))


def test_raw_pixels_are_named():
    raw = np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8)).astype(np.float32)
    (note,) = check_calibration(samples(raw), INPUTS)
    assert "look like raw pixels" in note
    assert check_calibration(samples(raw / 255), INPUTS) == ()


def test_channels_last_are_named_where_the_model_takes_any_shape():
    free = TensorSpec(name="image", dtype="float32", shape=("batch", "a", "b", "c"))
    images = normal().transpose(0, 2, 3, 1)
    (note,) = check_calibration(samples(images), [free])
    assert "8×8×3, which looks like channels last" in note
    meant = TensorSpec(name="image", dtype="float32", shape=("batch", "a", "b", "c"), layout="NHWC")
    assert check_calibration(samples(images), [meant]) == ()
