"""The sentinel's network: its weights and its file never change, for its series would begin anew."""

import hashlib
import math

import pytest

from edgedeploy.prepare.sentinel import CLASSES, INPUT, OUTPUT, SIZE, shapes, weight_bytes, write_sentinel

# printf 'edgedeploy sentinel 1 weight_0' | openssl dgst -shake256 -xoflen 864 -binary, and so on, | sha256sum
WEIGHTS_SHA256 = "b84e3527004ff5181c56cc31a497ee6dd964cf3604263ceade192bde1485d076"
FILE_SHA256 = "e34b4681ce38f1a8a9d6809af11c5990eb263217ffbaea13f7903ee64d7d4f5e"


def test_weights_are_what_they_always_were():
    found = b"".join(weight_bytes(name, math.prod(shape)) for name, shape in shapes().items())
    assert hashlib.sha256(found).hexdigest() == WEIGHTS_SHA256


def test_file_is_what_it_always_was_and_is_written_once(tmp_path):
    pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
    path = write_sentinel(tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == FILE_SHA256
    before = path.stat().st_mtime_ns
    assert write_sentinel(tmp_path) == path
    assert path.stat().st_mtime_ns == before


def test_network_answers_with_numbers_that_do_not_vanish(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'edgedeploy[onnxruntime]'")
    import numpy as np

    session = onnxruntime.InferenceSession(write_sentinel(tmp_path), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    (scores,) = session.run([OUTPUT], {INPUT: image})
    assert scores.shape == (1, CLASSES)
    assert 1e-3 < np.abs(scores).max() < 1e3, "denormal or infinite numbers would be timed instead of the board"
