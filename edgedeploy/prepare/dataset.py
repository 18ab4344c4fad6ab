"""Calibration and evaluation samples: checked once when opened, preprocessed batch by batch when read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.documents import closest, encode_json, read_toml
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.records.dataset import FORMAT, DataSet, InputPreparation
from edgedeploy.records.model import TensorSpec
from edgedeploy.storage import sha256_bytes, sha256_file

Array = NDArray[Any]

LABELS = "labels"
# Before the name of one array of labels where a set has several: labels.boxes, labels.classes, or an output's name.
_LABELS_OF = "labels."
# Samples that are looked at together where the count is ours to choose: a few images of activations stay below 100 MB.
BATCH = 8
# Stands for a dynamic axis other than the batch when samples are made up.
_DYNAMIC_AXIS_SIZE = 16


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples kept as stored and preprocessed when read.

    Attributes:
        name: of the set, as people know it.
        sha256: of the stored bytes and the preprocessing together.
        count: number of samples.
        labels: first axis = sample; None where the set has none.
        arrays: input name → stored array, first axis = sample.
        preparations: input name → how the stored values become the model's; a missing name is taken as it is.
        is_synthetic: made up by `random_samples`, so nothing about accuracy can be learnt from them.
        named_labels: what follows "labels." in an array's name → that array, first axis = sample.
    """

    name: str
    sha256: str
    count: int
    labels: Array | None
    arrays: Mapping[str, Array]
    preparations: Mapping[str, InputPreparation]
    is_synthetic: bool = False
    named_labels: Mapping[str, Array] = field(default_factory=dict)

    def batch(self, start: int, stop: int) -> dict[str, Array]:
        """Return samples start..stop-1 as the model takes them, contiguous, first axis = sample."""
        return {
            name: np.ascontiguousarray(_prepared(array[start:stop], self.preparations.get(name)))
            for name, array in self.arrays.items()
        }

    def batches(self, inputs: Sequence[TensorSpec], limit: int | None = None) -> Iterator[dict[str, Array]]:
        """Yield the samples in batches that the inputs accept.

        A model with a fixed batch gets exactly that many at a time; a last, incomplete batch is left out.

        Args:
            inputs: the model's inputs; the first axis of each is the batch.
            limit: look at no more than so many samples.

        Raises:
            UsageError: fewer samples than one fixed batch.
        """
        fixed = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
        size = int(max(fixed)) if fixed else BATCH
        count = self.count if limit is None else min(self.count, limit)
        if fixed and count < size:
            raise UsageError(
                f"the model takes exactly {size} samples at a time and {self.name} has {count}; add samples or name "
                f"the batch axis"
            )
        for start in range(0, count, size):
            stop = min(start + size, count)
            if not fixed or stop - start == size:
                yield self.batch(start, stop)

    def overlap(self, other: Samples) -> int:
        """Return how many of these samples are byte-identical, after preprocessing, to one in `other`."""
        theirs = set(_digests(other))
        return sum(digest in theirs for digest in _digests(self))


def inference_batch(inputs: Sequence[TensorSpec]) -> int:
    """Return a fixed batch as it is, a dynamic one as 1: latency at the edge is latency of one sample."""
    first = inputs[0].shape[0] if inputs and inputs[0].shape else 1
    return first if isinstance(first, int) else 1


def load_samples(path: Path, inputs: Sequence[TensorSpec]) -> Samples:
    """Open a data set and check it against a model's inputs.

    Args:
        path: a folder with manifest.toml, or an .npz with one array per input (first axis = sample), and `labels`, or
            several arrays `labels.NAME` (np.savez(file, image=..., **{"labels.boxes": ...})).
        inputs: the model's inputs. A sample has the shape of an input without its first axis.

    Raises:
        DocumentError: missing, damaged, not what its manifest pins, or not what the model takes: names, shapes, types,
            NaN or infinity.
    """
    if path.is_dir():
        manifest = path / "manifest.toml"
        if not manifest.is_file():
            raise DocumentError(f"the folder {path} has no manifest.toml; give a folder that has one, or an .npz")
        dataset = read_toml(manifest, DataSet, FORMAT)
        file = path / dataset.file
        if file.resolve().parent != path.resolve():
            raise DocumentError(f"{manifest} names the file {dataset.file!r}, which is not beside it; move it there")
        if not file.is_file():
            raise DocumentError(f"{manifest} names {dataset.file}, which is not beside it; restore it")
        if sha256_file(file) != dataset.sha256:
            raise DocumentError(f"{file} is not the file that {manifest} pins (its sha256 differs); restore it")
        name, digest, preparations = dataset.name, sha256_bytes(encode_json(dataset)), dict(dataset.inputs)
        arrays = _read_npz(file)
        if any(len(array) != dataset.count for array in arrays.values()):
            found = ", ".join(f"{key}: {len(array)}" for key, array in arrays.items())
            raise DocumentError(f"{manifest} promises {dataset.count} samples; {file.name} holds {found}")
    elif path.suffix == ".npz":
        if not path.is_file():
            raise DocumentError(f"{path} does not exist; give an .npz or a folder with manifest.toml")
        file, name, digest, preparations = path, path.stem, sha256_file(path), {}
        arrays = _read_npz(file)
    else:
        raise DocumentError(f"{path} is neither a folder with manifest.toml nor an .npz; give one of these")
    labels = None if any(spec.name == LABELS for spec in inputs) else arrays.pop(LABELS, None)
    fed = {spec.name for spec in inputs}
    named = {key: arrays.pop(key) for key in list(arrays) if key.startswith(_LABELS_OF) and key not in fed}
    _demand_names(file, [spec.name for spec in inputs], arrays)
    counts = {key: len(array) for key, array in (arrays | named).items()}
    counts |= {} if labels is None else {LABELS: len(labels)}
    if len(set(counts.values())) != 1:
        found = ", ".join(f"{key}: {count}" for key, count in counts.items())
        raise DocumentError(f"{file} has arrays of different lengths ({found}); the first axis of each is the sample")
    count = next(iter(counts.values()))
    if count == 0:
        raise DocumentError(f"{file} holds no samples; put at least one in")
    for spec in inputs:
        _demand_fit(file, spec, arrays[spec.name], preparations.get(spec.name))
    _demand_same_axes(file, inputs, arrays)
    ordered = {spec.name: arrays[spec.name] for spec in inputs}
    named_labels = {key.removeprefix(_LABELS_OF): array for key, array in named.items()}
    return Samples(name, digest, count, labels, ordered, preparations, named_labels=named_labels)


def random_samples(inputs: Sequence[TensorSpec], count: int, seed: int) -> Samples:
    """Make up samples for a model that comes without data: standard normal floats, integers and booleans 0 or 1.

    They show that two forms of a model compute the same; they say nothing about its accuracy.

    Args:
        inputs: the model's inputs.
        count: how many samples.
        seed: same inputs, count and seed: same samples.
    """
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for spec in inputs:
        shape = (count, *(size if isinstance(size, int) else _DYNAMIC_AXIS_SIZE for size in spec.shape[1:]))
        is_float = np.issubdtype(np.dtype(spec.dtype), np.floating)
        values = rng.standard_normal(shape) if is_float else rng.integers(0, 2, shape)
        arrays[spec.name] = values.astype(spec.dtype)
    digest = sha256_bytes(b"".join(name.encode() + array.tobytes() for name, array in arrays.items()))
    return Samples(f"random (seed {seed})", digest, count, None, arrays, {}, is_synthetic=True)


def _read_npz(file: Path) -> dict[str, Array]:
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DocumentError(f"{file} is a single .npy array; save it by numpy.savez with one name per input")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except DocumentError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise half a dozen classes on a damaged file
        if "allow_pickle" in str(error) and zipfile.is_zipfile(file):
            raise DocumentError(
                f"{file} holds Python objects, which can only be read by unpickling; save plain arrays"
            ) from error
        raise DocumentError(f"{file} cannot be read as .npz (truncated or damaged?); write or copy it again") from error
    for key, array in arrays.items():
        if array.ndim == 0:
            raise DocumentError(f'array "{key}" in {file} is a single number; its first axis must be the sample')
    return arrays


def _demand_names(file: Path, wanted: Sequence[str], arrays: Mapping[str, Array]) -> None:
    for name in wanted:
        if name not in arrays:
            held = ", ".join(arrays) or "nothing"
            raise DocumentError(f'{file} has no array "{name}" for the model\'s input of that name (it holds: {held})')
    for name in arrays:
        if name not in wanted:
            raise DocumentError(
                f'{file} has an array "{name}" that is no input of the model{closest(name, [*wanted, LABELS])} '
                f"(inputs: {', '.join(wanted)})"
            )


def _demand_fit(file: Path, spec: TensorSpec, array: Array, preparation: InputPreparation | None) -> None:
    expected = spec.shape[1:]
    fits = array.ndim == len(spec.shape) and all(
        isinstance(size, str) or size == actual for size, actual in zip(expected, array.shape[1:], strict=True)
    )
    if not fits:
        raise DocumentError(
            f'each sample of "{spec.name}" in {file} has shape {_shape(array.shape[1:])}; the model\'s input takes '
            f"{_shape(expected)}"
        )
    if preparation is None:
        if array.dtype != np.dtype(spec.dtype):
            raise DocumentError(
                f'array "{spec.name}" in {file} is {array.dtype} and the model\'s input is {spec.dtype}; save it as '
                f"{spec.dtype}, or describe the conversion in a manifest.toml"
            )
    else:
        _demand_preparation(file, spec, array, preparation)
    _demand_finite(file, spec.name, array)


def _demand_preparation(file: Path, spec: TensorSpec, array: Array, preparation: InputPreparation) -> None:
    manifest = file.with_name("manifest.toml")
    where = f"[inputs.{spec.name}] in {manifest}"
    if preparation.dtype != spec.dtype:
        raise DocumentError(f"{where} makes {preparation.dtype} and the model's input is {spec.dtype}; make them agree")
    if spec.layout and preparation.layout and spec.layout != preparation.layout:
        raise DocumentError(f"{where} has layout {preparation.layout} and the model's input {spec.layout}")
    if any(std == 0 for std in preparation.std):
        raise DocumentError(f"{where} divides by a std of 0; give the standard deviation of the training data")
    for key in ("mean", "std"):
        values = getattr(preparation, key)
        if len(values) == 1:
            continue
        axis = preparation.layout.find("C")
        if len(preparation.layout) != array.ndim or axis < 0:
            raise DocumentError(
                f'{where} has a {key} per channel and its layout "{preparation.layout}" does not say which of the '
                f"{array.ndim} axes is C"
            )
        if array.shape[axis] != len(values):
            raise DocumentError(f"{where} has {len(values)} values of {key} for {array.shape[axis]} channels")


def _demand_same_axes(file: Path, inputs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> None:
    """Demand that a named axis has one size in all inputs."""
    sizes: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        for axis, size in list(enumerate(spec.shape))[1:]:
            if isinstance(size, str):
                actual = arrays[spec.name].shape[axis]
                known, first = sizes.setdefault(size, (actual, spec.name))
                if known != actual:
                    raise DocumentError(
                        f'axis "{size}" is {known} long in "{first}" and {actual} in "{spec.name}" of {file}; give '
                        f"both the same length or the axes different names"
                    )


def _demand_finite(file: Path, name: str, array: Array) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        return
    for start in range(0, len(array), BATCH):
        finite = np.isfinite(array[start : start + BATCH])
        if not finite.all():
            index = tuple(int(step) for step in np.argwhere(~finite)[0])
            sample = start + index[0]
            value = array[(sample, *index[1:])]
            raise DocumentError(
                f'array "{name}" in {file} holds {value} at sample {sample}, position {_shape(index[1:])}; remove or '
                f"repair that sample"
            )


def _prepared(raw: Array, preparation: InputPreparation | None) -> Array:
    if preparation is None:
        return raw
    if preparation.scale == 1.0 and preparation.mean == (0.0,) and preparation.std == (1.0,):
        return raw.astype(preparation.dtype)
    # float32 throughout, as a data loader in training computes it.
    values = raw.astype(np.float32) * np.float32(preparation.scale)
    values = (values - _per_channel(preparation.mean, preparation.layout)) / _per_channel(
        preparation.std, preparation.layout
    )
    return values.astype(preparation.dtype)


def _per_channel(values: tuple[float, ...], layout: str) -> Array:
    numbers = np.asarray(values, np.float32)
    if len(values) == 1:
        return numbers.reshape(())
    shaped: Array = numbers.reshape([-1 if axis == "C" else 1 for axis in layout])
    return shaped


def _digests(samples: Samples) -> Iterator[str]:
    for start in range(0, samples.count, BATCH):
        batch = samples.batch(start, min(start + BATCH, samples.count))
        for row in range(len(next(iter(batch.values())))):
            yield sha256_bytes(b"".join(name.encode() + batch[name][row].tobytes() for name in sorted(batch)))


def _shape(shape: Sequence[int | str]) -> str:
    return "×".join(str(size) for size in shape) or "(none)"
