import base64
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.prepare.evaluated import EvaluatedSamples
from edgedeploy.records.model import TensorSpec
from edgedeploy.render.flips import flips
from edgedeploy.render.thumbnails import SIDE, thumbnail

from .render_samples import make_run

DIGEST = "ab" * 32


def answered(side, predictions, labels=None):
    run = make_run(side, blocks=1, questions=len(predictions))
    outputs = replace(run.outputs, predictions=tuple(predictions), labels=None if labels is None else tuple(labels))
    return replace(run, outputs=outputs)


def test_changed_answers_are_told_with_their_classes_and_what_was_lost_comes_first():
    labels = [0, 1, 2, 3, 4, 5]
    found = flips(answered("baseline", [0, 9, 2, 3, 7, 5], labels), answered("candidate", [0, 1, 8, 8, 9, 5], labels))
    assert [(one.index, one.fate, one.before, one.after) for one in found.answers] == [
        (2, "lost", 2, 8),
        (3, "lost", 3, 8),
        (1, "gained", 9, 1),
        (4, "other", 7, 9),
    ]
    assert found.counts == {(2, 8): 1, (3, 8): 1, (9, 1): 1, (7, 9): 1}
    assert (found.samples, found.of("lost"), found.of("gained"), found.of("other")) == (6, 2, 1, 1)


def test_without_labels_nothing_is_called_lost():
    found = flips(answered("baseline", [1, 2]), answered("candidate", [1, 3]))
    assert [one.fate for one in found.answers] == ["other"]


@pytest.mark.parametrize("candidate", [answered("candidate", [1, 2, 3]), make_run("candidate", questions=2)])
def test_answers_to_other_questions_and_unknown_answers_are_not_compared(candidate):
    assert flips(answered("baseline", [1, 2]), candidate) is None
    assert flips(None, candidate) is None


def test_many_classes_are_listed_the_most_frequent_first():
    before = [*range(40), 5, 5]
    after = [number + 1 for number in range(40)] + [6, 6]
    found = flips(answered("baseline", before), answered("candidate", after))
    assert not found.is_table
    assert found.most_frequent()[0] == (5, 6, 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_every_changed_answer_is_counted_once(answers):
    labels, before, after = zip(*answers, strict=True)
    found = flips(answered("baseline", before, labels), answered("candidate", after, labels))
    changed = sum(old != new for old, new in zip(before, after, strict=True))
    assert sum(found.counts.values()) == len(found.answers) == changed
    assert found.of("lost") + found.of("gained") + found.of("other") == changed


def decoded(uri):
    """Pixels of a PNG without filters."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (check,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert check == zlib.crc32(kind + body)
        chunks[kind] = body
        place += 12 + length
    width, height, depth, color = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, {0: 1, 2: 3}[color])


@pytest.mark.parametrize(
    ("layout", "axes"), [("NCHW", (2, 0, 1)), ("NHWC", (0, 1, 2)), ("", (2, 0, 1)), ("", (0, 1, 2))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_are_shown_as_they_are_in_either_layout(layout, axes, channels):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 12, channels), np.uint8)
    spec = TensorSpec(name="image", dtype="uint8", shape=("batch", *pixels.transpose(axes).shape), layout=layout)
    assert (decoded(thumbnail({"image": pixels.transpose(axes)[None]}, [spec])) == pixels).all()


def test_prepared_numbers_are_stretched_to_the_whole_range():
    picture = decoded(thumbnail({"image": np.linspace(-2.1, 2.6, 64, dtype=np.float32).reshape(1, 1, 8, 8)}))
    assert (picture.min(), picture.max()) == (0, 255)
    assert not decoded(thumbnail({"image": np.full((1, 8, 8), np.nan, np.float32)})).any()


def test_a_large_image_is_made_small_and_keeps_its_brightness():
    pixels = np.full((3, 224, 150), 77, np.uint8)
    picture = decoded(thumbnail({"image": pixels}))
    assert max(picture.shape) <= SIDE
    assert set(picture.ravel()) == {77}


@pytest.mark.parametrize(
    "values", [np.zeros(10), np.zeros((40, 16)), np.zeros((5, 8, 8)), np.array("x"), np.zeros((1, 3, 3))]
)
def test_what_is_no_image_has_no_picture(values):
    assert thumbnail({"input": values}) == ""


def test_samples_are_read_back_one_by_one(tmp_path):
    from safetensors.numpy import save_file

    values = np.arange(5 * 6, dtype=np.float32).reshape(5, 1, 6)
    save_file({"image": values}, tmp_path / f"{DIGEST}.safetensors")
    samples = EvaluatedSamples(tmp_path)
    assert (samples(DIGEST, 3)["image"] == values[3:4]).all()
    assert samples(DIGEST, 5) is None
    assert samples("cd" * 32, 0) is None


def test_a_digest_from_a_file_decides_no_path(tmp_path):
    from safetensors.numpy import save_file

    save_file({"image": np.zeros((1, 1))}, tmp_path / "secret.safetensors")
    (tmp_path / "inputs").mkdir()
    assert EvaluatedSamples(tmp_path / "inputs")("../secret", 0) is None


def test_a_damaged_set_has_no_samples(tmp_path):
    (tmp_path / f"{DIGEST}.safetensors").write_bytes(b"\xff" * 40)
    assert EvaluatedSamples(tmp_path)(DIGEST, 0) is None
