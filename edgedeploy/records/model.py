"""A model on its way to a device: its ONNX file, typed inputs and outputs, where it came from, what it carries."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record

# History of edgedeploy.model:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.model/1"

DType = Literal["float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


class TensorSpec(Record, frozen=True, kw_only=True):
    """One named input or output.

    Attributes:
        shape: one entry per axis; an int is fixed, a string names a dynamic axis ("batch").
        layout: the meaning of the axes ("NCHW", "NHWC", "NC"), where it is known.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    layout: str = ""


class OutputFidelity(Record, frozen=True, kw_only=True):
    """How far one output of a converted model lies from its reference, over all samples and elements.

    Attributes:
        max_abs: the largest |converted - reference|.
        max_relative: `max_abs` divided by the largest |reference|.
        cosine: cosine similarity of the flattened outputs.
        sqnr_db: 10 log10(sum reference² / sum error²); None when the error is exactly zero.
        argmax_agreement: fraction of samples with the same arg-max over the last axis; None for outputs of one element.
    """

    output: str
    max_abs: float
    max_relative: float
    cosine: float
    sqnr_db: float | None
    argmax_agreement: float | None


class Fidelity(Record, frozen=True, kw_only=True):
    """A converted model compared with its reference on the same samples."""

    reference: str
    candidate: str
    samples: int
    sample_source: str
    outputs: tuple[OutputFidelity, ...]


class CompressionReport(Record, frozen=True, kw_only=True):
    """What compression a model carries, counted in its ONNX graph."""

    parameters: int
    nonzero_parameters: int
    macs: int | None
    initializer_bytes: int
    operators: dict[str, int]


class Model(Record, frozen=True, kw_only=True):
    """A canonical ONNX model.

    Attributes:
        path: the .onnx file (weights inside).
        sha256: its digest.
        source: the reference it came from, as the person gave it.
        weights_sha256: digest of the weights file, "" where there is none.
        fidelity: every conversion so far, compared with what it was converted from.
    """

    format: str = FORMAT
    path: str
    sha256: str
    source: str
    weights_sha256: str = ""
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    compression: CompressionReport
    fidelity: tuple[Fidelity, ...] = ()
