"""Samples: what is accepted, what is refused with which sentence, and what preprocessing computes."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.prepare.dataset import BATCH, load_samples, random_samples
from edgedeploy.records.model import TensorSpec
from edgedeploy.storage import sha256_file

IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 2, 3), layout="NCW")


def write_set(folder, *, stored=None, count=None, preparation="", file="samples.npz", sha256=None):
    folder.mkdir(exist_ok=True)
    stored = {"image": np.arange(24, dtype=np.uint8).reshape(4, 2, 3)} if stored is None else stored
    np.savez_compressed(folder / "samples.npz", **stored)
    digest = sha256 or sha256_file(folder / "samples.npz")
    (folder / "manifest.toml").write_text(
        f"""format = "edgedeploy.dataset/1"
name = "made"
purpose = "calibration"
file = "{file}"
sha256 = "{digest}"
count = {len(next(iter(stored.values()))) if count is None else count}
source = "this test"
licence = "MIT"
[inputs.image]
dtype = "float32"
layout = "NCW"
{preparation}
"""
    )
    return folder


def test_preprocessing_scales_and_normalises_each_channel(tmp_path):
    preparation = "scale = 0.5\nmean = [1.0, 2.0]\nstd = [2.0, 4.0]"
    samples = load_samples(write_set(tmp_path / "set", preparation=preparation), [IMAGE])
    raw = np.arange(24).reshape(4, 2, 3)
    expected = (raw * 0.5 - np.array([1.0, 2.0]).reshape(1, 2, 1)) / np.array([2.0, 4.0]).reshape(1, 2, 1)
    got = samples.batch(1, 3)["image"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected[1:3], rtol=1e-6)


def test_digest_changes_with_preprocessing(tmp_path):
    plain = load_samples(write_set(tmp_path / "a"), [IMAGE])
    scaled = load_samples(write_set(tmp_path / "b", preparation="scale = 0.5"), [IMAGE])
    assert plain.sha256 != scaled.sha256
    assert plain.sha256 == load_samples(tmp_path / "a", [IMAGE]).sha256


def test_npz_is_taken_as_it_is_with_its_labels(tmp_path):
    values = np.ones((5, 2, 3), np.float32)
    np.savez(tmp_path / "adhoc.npz", image=values, labels=np.arange(5))
    samples = load_samples(tmp_path / "adhoc.npz", [IMAGE])
    assert (samples.name, samples.count) == ("adhoc", 5)
    assert samples.labels is not None
    assert list(samples.labels) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(samples.batch(0, 5)["image"], values)


def test_dynamic_axes_take_any_size_but_one_name_one_size(tmp_path):
    specs = [
        TensorSpec(name="a", dtype="float32", shape=("batch", "length")),
        TensorSpec(name="b", dtype="float32", shape=("batch", "length", 2)),
    ]
    np.savez(tmp_path / "good.npz", a=np.zeros((2, 7), np.float32), b=np.zeros((2, 7, 2), np.float32))
    assert load_samples(tmp_path / "good.npz", specs).count == 2
    np.savez(tmp_path / "bad.npz", a=np.zeros((2, 7), np.float32), b=np.zeros((2, 6, 2), np.float32))
    with pytest.raises(DocumentError, match='axis "length" is 7 long in "a" and 6 in "b"'):
        load_samples(tmp_path / "bad.npz", specs)


@pytest.mark.parametrize(
    ("stored", "sentence"),
    [
        ({"imago": np.zeros((2, 2, 3), np.float32)}, 'no array "image".*it holds: imago'),
        (
            {"image": np.zeros((2, 2, 3), np.float32), "labells": np.zeros(2)},
            'array "labells" that is no input of the model; did you mean "labels"',
        ),
        ({"image": np.zeros((2, 2, 4), np.float32)}, "has shape 2×4; the model's input takes 2×3"),
        ({"image": np.zeros((2, 2, 3))}, "is float64 and the model's input is float32; save it as float32"),
        ({"image": np.zeros((0, 2, 3), np.float32)}, "holds no samples"),
        ({"image": np.float32(1)}, "is a single number"),
        (
            {"image": np.zeros((2, 2, 3), np.float32), "labels": np.zeros(3)},
            r"different lengths \(image: 2, labels: 3\)",
        ),
        ({"image": np.array([[[{}]]])}, "only be read by unpickling"),
    ],
)
def test_unfit_npz_is_refused_with_its_reason(tmp_path, stored, sentence):
    np.savez(tmp_path / "x.npz", **stored)
    with pytest.raises(DocumentError, match=sentence):
        load_samples(tmp_path / "x.npz", [IMAGE])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_value_that_is_not_finite_is_named(tmp_path, bad):
    values = np.zeros((BATCH + 4, 2, 3), np.float32)
    values[BATCH + 2, 1, 0] = values[BATCH + 3, 0, 0] = bad
    np.savez(tmp_path / "x.npz", image=values)
    with pytest.raises(DocumentError, match=f"at sample {BATCH + 2}, position 1×0"):
        load_samples(tmp_path / "x.npz", [IMAGE])


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"count": 5}, "promises 5 samples; samples.npz holds image: 4"),
        ({"sha256": "0" * 64}, "is not the file that .* pins"),
        ({"file": "../samples.npz"}, "not beside it"),
        ({"file": "other.npz"}, "names other.npz, which is not beside it"),
        ({"preparation": "std = [0.0]"}, "divides by a std of 0"),
        ({"preparation": "mean = [0.0, 1.0, 2.0]"}, "3 values of mean for 2 channels"),
    ],
)
def test_set_that_is_not_what_its_manifest_says_is_refused(tmp_path, settings_, sentence):
    with pytest.raises(DocumentError, match=sentence):
        load_samples(write_set(tmp_path / "set", **settings_), [IMAGE])


def test_wrong_conversion_is_refused(tmp_path):
    folder = write_set(tmp_path / "set")
    with pytest.raises(DocumentError, match="makes float32 and the model's input is uint8"):
        load_samples(folder, [TensorSpec(name="image", dtype="uint8", shape=("batch", 2, 3))])


def test_missing_and_foreign_paths_are_refused(tmp_path):
    with pytest.raises(DocumentError, match="does not exist"):
        load_samples(tmp_path / "none.npz", [IMAGE])
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DocumentError, match=r"neither a folder with manifest.toml nor an .npz"):
        load_samples(tmp_path / "x.csv", [IMAGE])


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_damaged_npz_is_a_sentence_or_still_reads(tmp_path_factory, cut, flip):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, image=np.arange(24, dtype=np.float32).reshape(4, 2, 3))
    data = bytearray(buffer.getvalue())
    data[flip % len(data)] ^= 0xFF
    path = tmp_path_factory.mktemp("damaged") / "x.npz"
    path.write_bytes(bytes(data[: max(1, cut)]))
    try:
        samples = load_samples(path, [IMAGE])
    except DocumentError as error:
        assert str(path) in str(error)
    else:
        assert samples.count == 4


def test_a_lone_npy_in_disguise_is_refused(tmp_path):
    with (tmp_path / "x.npz").open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(DocumentError, match=r"single .npy array"):
        load_samples(tmp_path / "x.npz", [IMAGE])
    with zipfile.ZipFile(tmp_path / "x.npz", "w"):
        pass
    with pytest.raises(DocumentError, match="it holds: nothing"):
        load_samples(tmp_path / "x.npz", [IMAGE])


def test_overlap_counts_identical_samples_whatever_their_storage(tmp_path):
    raw = np.arange(36, dtype=np.uint8).reshape(6, 2, 3)
    stored = load_samples(write_set(tmp_path / "set", stored={"image": raw}), [IMAGE])
    other = raw[[5, 1]].astype(np.float32)
    np.savez(tmp_path / "x.npz", image=np.concatenate([other, other + 0.5]))
    assert stored.overlap(load_samples(tmp_path / "x.npz", [IMAGE])) == 2
    assert stored.overlap(stored) == 6


@settings(max_examples=25, deadline=None)
@given(
    values=arrays(
        np.float32, st.tuples(st.integers(1, 20), st.just(2), st.just(3)), elements=st.floats(-9, 9, width=32)
    )
)
def test_batches_return_every_sample_once_in_order(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("batches") / "x.npz"
    np.savez(path, image=values)
    samples = load_samples(path, [IMAGE])
    batches = [batch["image"] for batch in samples.batches([IMAGE])]
    np.testing.assert_array_equal(np.concatenate(batches), values)
    assert max(len(batch) for batch in batches) <= BATCH


def test_fixed_batch_gets_whole_batches_only(tmp_path):
    np.savez(tmp_path / "x.npz", image=np.zeros((7, 2, 3), np.float32))
    samples = load_samples(tmp_path / "x.npz", [IMAGE])
    fixed = TensorSpec(name="image", dtype="float32", shape=(3, 2, 3))
    assert [len(batch["image"]) for batch in samples.batches([fixed])] == [3, 3]
    too_many = TensorSpec(name="image", dtype="float32", shape=(8, 2, 3))
    with pytest.raises(UsageError, match="exactly 8 samples at a time and x has 7"):
        list(samples.batches([too_many]))


def test_random_samples_repeat_by_seed_and_say_that_they_are_random():
    specs = [IMAGE, TensorSpec(name="ids", dtype="int64", shape=("batch", "length"))]
    first, again, other = random_samples(specs, 4, 0), random_samples(specs, 4, 0), random_samples(specs, 4, 1)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.is_synthetic
    assert "random" in first.name
    batch = first.batch(0, 4)
    assert batch["image"].dtype == np.float32
    assert batch["ids"].dtype == np.int64
    assert batch["ids"].shape[0] == 4


def test_several_label_arrays_are_kept_by_name_and_must_have_a_row_for_each_sample(tmp_path):
    image = np.zeros((4, 2, 3), np.float32)
    boxes = np.arange(4 * 5 * 4, dtype=np.float32).reshape(4, 5, 4)
    np.savez(tmp_path / "boxes.npz", image=image, **{"labels.boxes": boxes, "labels.classes": np.ones((4, 5), int)})
    samples = load_samples(tmp_path / "boxes.npz", [IMAGE])
    assert samples.labels is None
    assert list(samples.named_labels) == ["boxes", "classes"]
    np.testing.assert_array_equal(samples.named_labels["boxes"], boxes)
    np.savez(tmp_path / "short.npz", image=image, **{"labels.boxes": boxes[:3]})
    with pytest.raises(DocumentError, match=r"different lengths.*labels\.boxes: 3"):
        load_samples(tmp_path / "short.npz", [IMAGE])
