"""Calibration data that cannot be right is refused, and data that looks wrong is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import DocumentError
from edgedeploy.prepare.dataset import BATCH, Samples
from edgedeploy.records.model import TensorSpec
from edgedeploy.storage import sha256_bytes

Array = NDArray[Any]

# Below this, extremes are a matter of luck; int8 still works often enough that it is the person's decision.
_FEW = 8
# Calibration and evaluation inputs of one preprocessing differ in size by less; 0..255 and -1..1 by more.
_LARGEST_RATIO = 8.0
_RAW_PIXEL = 255.0


def check_calibration(
    samples: Samples, inputs: Sequence[TensorSpec], *, evaluation: Samples | None = None
) -> tuple[str, ...]:
    """Look calibration samples over and return a sentence for each thing that looks wrong.

    Args:
        samples: the calibration set.
        inputs: the model's inputs.
        evaluation: what the result will be judged on, where it is known.

    Raises:
        DocumentError: a sample holds NaN or infinity as the model takes it; all samples are the same, or each is one
            single value; an evaluation sample is among them; or their values are of another size than those of the
            evaluation set, so that one of the two is preprocessed wrongly.
    """
    seen = {spec.name: _Values() for spec in inputs}
    digests: Counter[str] = Counter()
    for start in range(0, samples.count, BATCH):
        batch = samples.batch(start, min(start + BATCH, samples.count))
        for name, values in seen.items():
            values.add(batch[name], samples, name, start)
        for row in range(len(next(iter(batch.values())))):
            digests[sha256_bytes(b"".join(np.ascontiguousarray(batch[name][row]).tobytes() for name in seen))] += 1
    _demand_variety(samples, seen, digests)
    if evaluation is not None:
        _demand_apart(samples, evaluation)
        _demand_same_size(samples, evaluation, seen)
    notes = [_few(samples), _repeated(samples, digests)]
    for spec in inputs:
        notes += [_constant(samples, spec.name, seen[spec.name]), _raw_pixels(samples, spec, seen[spec.name])]
        notes.append(_channels_last(samples, spec))
    return tuple(note for note in notes if note)


class _Values:
    """What one input holds, over all samples."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.is_whole = True
        self.constant: list[int] = []
        self.count = 0

    def add(self, batch: Array, samples: Samples, name: str, start: int) -> None:
        rows = batch.reshape(len(batch), -1)
        self.count += len(rows)
        if not rows.size:
            return
        if np.issubdtype(rows.dtype, np.floating) and not np.isfinite(rows).all():
            sample = start + int(np.argwhere(~np.isfinite(rows))[0][0])
            raise DocumentError(
                f"sample {sample} of {samples.name} becomes NaN or infinite in input {name!r}; repair or remove it"
            )
        self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
        self.is_whole = self.is_whole and bool((rows == np.rint(rows)).all())
        if rows.shape[1] > 1:
            self.constant += [start + int(row) for row in np.flatnonzero(rows.min(1) == rows.max(1))]

    @property
    def size(self) -> float:
        """The largest |value|."""
        return max(abs(self.low), abs(self.high))


def _demand_variety(samples: Samples, seen: dict[str, _Values], digests: Counter[str]) -> None:
    if samples.count > 1 and len(digests) == 1:
        raise DocumentError(f"all {samples.count} samples of {samples.name} are the same; calibrate on different ones")
    if all(len(values.constant) == values.count for values in seen.values()):
        raise DocumentError(
            f"each sample of {samples.name} is one single value throughout; give samples of what the model will see"
        )


def _demand_apart(samples: Samples, evaluation: Samples) -> None:
    shared = samples.overlap(evaluation)
    if shared:
        raise DocumentError(
            f"{shared} of {samples.count} samples of {samples.name} are also in {evaluation.name}, which the result is "
            f"judged on; calibrate on others"
        )


def _demand_same_size(samples: Samples, evaluation: Samples, seen: dict[str, _Values]) -> None:
    some = evaluation.batch(0, min(4 * BATCH, evaluation.count))
    for name, values in seen.items():
        if not np.issubdtype(some[name].dtype, np.floating):
            continue
        other = float(np.abs(some[name]).max(initial=0))
        if min(values.size, other) > 0 and max(values.size / other, other / values.size) > _LARGEST_RATIO:
            raise DocumentError(
                f"input {name!r} holds values up to {values.size:.3g} in {samples.name} and up to {other:.3g} in "
                f"{evaluation.name}; preprocess both alike"
            )


def _few(samples: Samples) -> str:
    if samples.count >= _FEW:
        return ""
    return f"{samples.name} has only {samples.count} samples: ranges are a matter of luck; give 100 or more"


def _repeated(samples: Samples, digests: Counter[str]) -> str:
    repeated = samples.count - len(digests)
    if repeated * 10 < samples.count or samples.count == 1:
        return ""
    return f"{repeated} of {samples.count} samples of {samples.name} repeat another one"


def _constant(samples: Samples, name: str, values: _Values) -> str:
    if not values.constant:
        return ""
    return (
        f"{len(values.constant)} of {samples.count} samples of {samples.name} hold one single value in input {name!r}, "
        f"the first being sample {values.constant[0]}; leave them out if the model will not see such"
    )


def _raw_pixels(samples: Samples, spec: TensorSpec, values: _Values) -> str:
    is_image = len(spec.shape) == 4 and spec.dtype in ("float32", "float16")
    if not (is_image and values.is_whole and values.low >= 0 and _RAW_PIXEL / 2 < values.high <= _RAW_PIXEL):
        return ""
    return (
        f"input {spec.name!r} of {samples.name} holds whole numbers from {values.low:g} to {values.high:g}, which look "
        f"like raw pixels; unless the model normalises them itself, give mean and std in a manifest.toml"
    )


def _channels_last(samples: Samples, spec: TensorSpec) -> str:
    shape = samples.arrays[spec.name].shape
    if len(shape) != 4 or shape[1] in (1, 3, 4) or shape[3] not in (1, 3, 4) or spec.layout == "NHWC":
        return ""
    return (
        f"samples of input {spec.name!r} in {samples.name} have shape {'×'.join(map(str, shape[1:]))}, which looks "
        f"like channels last; if the model takes channels first, transpose them"
    )
