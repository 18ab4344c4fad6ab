"""A named, pinned list of samples with one preprocessing, for calibration or evaluation."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record
from edgedeploy.records.model import DType

# History of edgedeploy.dataset:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.dataset/1"


class InputPreparation(Record, frozen=True, kw_only=True):
    """How one stored array becomes a model input: value = (raw * scale - mean) / std, cast to dtype.

    Attributes:
        mean: per channel (the axis "C" of `layout`), or one number for all.
        std: likewise.
    """

    dtype: DType
    layout: str = ""
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class DataSet(Record, frozen=True, kw_only=True):
    """The manifest.toml of a calibration or evaluation set.

    Attributes:
        file: an .npz beside the manifest: one array per input name (first axis = sample), `labels` for labels, or
            several arrays `labels.NAME`.
        count: samples in the file.
    """

    format: str
    name: str
    purpose: Literal["calibration", "evaluation"]
    file: str
    sha256: str
    count: int
    source: str
    licence: str
    seed: int | None = None
    selection: str = ""
    inputs: dict[str, InputPreparation]
