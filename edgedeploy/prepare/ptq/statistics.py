"""Statistics of a model's tensors on calibration samples: histograms in bounded memory, kept in a cache by content.

Two passes. The first finds each tensor's extremes; the second counts values in bins between them. Values leave the
graph already thinned out, at a stride that is coprime to the tensor's size, so that no channel or column is preferred:
a few thousand values of each tensor and sample, however many samples there are. The statistics depend on model and
samples only, so that one calibration serves every back end, every choice of ranges and every precision plan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.graph import Runner
from edgedeploy.prepare.ptq.calibrate import Extremes, bare, extremes, small_batches
from edgedeploy.records.model import Model
from edgedeploy.storage import atomic_path, sha256_bytes

Progress = Callable[[str], None]
Array = NDArray[Any]

BINS = 2048
# Values of one tensor that are looked at in all, and for one sample. A tail of one value in 10,000 is then 400 values.
_MOST_VALUES = 4_000_000
_VALUES_OF_A_SAMPLE = (1024, 16384)
# Part of the cache key: another number whenever statistics are made in another way.
_VERSION = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What one tensor holds on calibration samples.

    Attributes:
        low: smallest value over all samples, 0 at most.
        high: largest value, 0 at least.
        counts: how many of the values looked at lie in each of equal bins between `low` and `high`, zeros left out.
        zeros: how many of the values looked at are exactly 0, which every grid holds exactly.
    """

    low: float
    high: float
    counts: NDArray[np.int64]
    zeros: int

    @property
    def centers(self) -> NDArray[np.float64]:
        """The middle of each bin."""
        width = (self.high - self.low) / len(self.counts)
        return np.asarray(self.low + (np.arange(len(self.counts)) + 0.5) * width, np.float64)


def statistics(
    model: Model,
    samples: Samples,
    tensors: Sequence[str],
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Return the statistics of float tensors.

    Args:
        model: fp32.
        samples: real inputs.
        tensors: names in the graph, its inputs included.
        cache: folder where statistics of the same model, samples and tensors are looked for and kept.
        progress: called with a sentence, now and then.

    Raises:
        ModelError: a tensor becomes NaN or infinite on the samples.
    """
    kept = None if cache is None or not samples.sha256 else cache / f"{_key(model, samples, tensors)}.npz"
    found = None if kept is None else _read(kept, tensors)
    if found is not None:
        return found
    ends = extremes(model, samples, tensors, progress=progress)
    counted = _histograms(model, samples, ends, progress)
    if kept is not None:
        _write(kept, tensors, counted)
    return counted


def thinned(samples: Samples, most: int) -> Samples:
    """Return at most so many samples, evenly picked."""
    if samples.count <= most:
        return samples
    places = np.arange(most) * samples.count // most
    arrays = {name: array[places] for name, array in samples.arrays.items()}
    labels = None if samples.labels is None else samples.labels[places]
    digest = sha256_bytes(f"{samples.sha256} {most}".encode()) if samples.sha256 else ""
    return replace(samples, sha256=digest, count=most, labels=labels, arrays=arrays)


def stride(values: int, wanted: int) -> int:
    """Return the smallest step through `values` numbers that leaves at most `wanted` and is coprime to their count."""
    step = max(1, math.ceil(values / wanted))
    while math.gcd(step, values) > 1:
        step += 1
    return step


def histogram(values: Array, low: float, high: float, bins: int = BINS) -> tuple[NDArray[np.int64], int]:
    """Count values, zeros left out, in equal bins between `low` and `high`, and the zeros."""
    some = values[values != 0].astype(np.float64)
    width = (high - low) / bins
    if not some.size or width <= 0:
        return np.zeros(bins, np.int64), int(values.size - some.size)
    places = np.clip(((some - low) / width).astype(np.int64), 0, bins - 1)
    return np.bincount(places, minlength=bins), int(values.size - some.size)


def _histograms(
    model: Model, samples: Samples, ends: Mapping[str, Extremes], progress: Progress | None
) -> dict[str, Statistics]:
    from onnx import helper, numpy_helper

    graph = bare(model)
    wanted = int(np.clip(_MOST_VALUES // samples.count, *_VALUES_OF_A_SAMPLE))
    first, last = np.asarray([0]), np.asarray([np.iinfo(np.int64).max])
    for name, value in (("thinned/flat", [-1]), ("thinned/first", first), ("thinned/last", last)):
        graph.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int64), name))
    for tensor, end in ends.items():
        step = np.asarray([stride(end.values, wanted)], np.int64)
        graph.graph.initializer.append(numpy_helper.from_array(step, f"{tensor}/step"))
        flat, thinned = f"{tensor}/flat", f"{tensor}/thinned"
        graph.graph.node.append(helper.make_node("Reshape", [tensor, "thinned/flat"], [flat]))
        slices = [flat, "thinned/first", "thinned/last", "", f"{tensor}/step"]
        graph.graph.node.append(helper.make_node("Slice", slices, [thinned]))
        graph.graph.output.append(helper.make_tensor_value_info(thinned, 1, None))
    runner = Runner(graph.SerializeToString())
    counts = {tensor: np.zeros(BINS, np.int64) for tensor in ends}
    zeros = dict.fromkeys(ends, 0)
    done = 0
    for batch in small_batches(samples, model):
        answer = runner(batch)
        for tensor, end in ends.items():
            more, none = histogram(answer[f"{tensor}/thinned"], end.low, end.high)
            counts[tensor] += more
            zeros[tensor] += none
        done += len(next(iter(batch.values())))
        if progress:
            progress(f"counting values: {done} of {samples.count} samples")
    return {tensor: Statistics(end.low, end.high, counts[tensor], zeros[tensor]) for tensor, end in ends.items()}


def _key(model: Model, samples: Samples, tensors: Sequence[str]) -> str:
    parts = [str(_VERSION), str(BINS), model.sha256, samples.sha256, str(samples.count), *tensors]
    return sha256_bytes("\n".join(parts).encode())


def _read(file: Path, tensors: Sequence[str]) -> dict[str, Statistics] | None:
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as archive:
            low, high, counts, zeros = (archive[key] for key in ("low", "high", "counts", "zeros"))
    except Exception as error:  # noqa: BLE001  # zipfile, zlib and numpy raise half a dozen classes on damage
        _log.warning("%s is damaged and is made again: %s", file, error)
        return None
    if counts.shape != (len(tensors), BINS):
        _log.warning("%s does not hold what its name promises and is made again", file)
        return None
    return {
        tensor: Statistics(float(low[index]), float(high[index]), counts[index].astype(np.int64), int(zeros[index]))
        for index, tensor in enumerate(tensors)
    }


def _write(file: Path, tensors: Sequence[str], made: Mapping[str, Statistics]) -> None:
    rows = [made[tensor] for tensor in tensors]
    with atomic_path(file) as part, part.open("wb") as stream:
        np.savez_compressed(
            stream,
            low=np.asarray([row.low for row in rows]),
            high=np.asarray([row.high for row in rows]),
            counts=np.stack([row.counts for row in rows]) if rows else np.zeros((0, BINS), np.int64),
            zeros=np.asarray([row.zeros for row in rows]),
        )
