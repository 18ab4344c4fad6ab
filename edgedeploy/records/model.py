"""A model on its way to a device: its ONNX file, typed inputs and outputs, where it came from, what it carries."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record
from edgedeploy.records.compression import CompressionReport
from edgedeploy.records.quantization import SourceQuantization

# History of edgedeploy.model:
#   1 (0.1.0)  first version
#   2 (0.2.0)  kinds of compression that were found, and the quantization that the source carried
FORMAT = "edgedeploy.model/2"

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


CompressionKind = Literal[
    "pruning masks",  # torch.nn.utils.prune, still a multiplication in forward
    "parametrization",  # torch.nn.utils.parametrize (torch.ao.pruning among others), weight_norm, spectral_norm
    "unstructured sparsity",  # zeros without a pattern, already in the weights
    "2:4 sparsity",
    "channel pruning",  # seen only beside a dense reference
    "low rank",
    "shared weights",
    "dynamic int8",  # integer weights, activations quantized anew in each inference
    "static int8",  # PTQ, converted
    "QAT int8",  # trained with fake quantization, converted or not
    "weight-only int8",
    "weight-only int4",
    "int8 activations, int4 weights",  # 8da4w
    "float8",
    "float16",
    "bfloat16",
    "autocast",
]


class FoundCompression(Record, frozen=True, kw_only=True):
    """One kind of compression that a source carries, and what was done so that ONNX keeps it.

    Attributes:
        layers: PyTorch module paths, or ONNX node names.
        detail: what it is exactly, in a phrase: "qnnpack, per-channel weights, fused ConvReLU2d".
        lowering: what was done, in a phrase: "masks multiplied into the weights"; "" when nothing was needed.
        is_kept: whether the canonical pair (fp32 ONNX and quantization) carries it.
        note: what a person should know: what changed, or why it could not be kept; "" when nothing.
    """

    kind: CompressionKind
    layers: tuple[str, ...]
    detail: str
    lowering: str = ""
    is_kept: bool = True
    note: str = ""


class Model(Record, frozen=True, kw_only=True):
    """A canonical ONNX model.

    Attributes:
        path: the .onnx file (weights inside).
        sha256: its digest.
        source: the reference it came from, as the person gave it.
        weights_sha256: digest of the weights file, "" where there is none.
        fidelity: every conversion so far, compared with what it was converted from.
        kinds: what compression was found in the source.
        quantization: the quantization that the source carried; None for a float model.
        check_inputs: a safetensors file of samples, one tensor an input, for a back end to check what it rewrites on.
        beyond_half: tensor → its largest magnitude on the samples, where that is too large for float16; filled in for
            back ends that compute in half floats.
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
    kinds: tuple[FoundCompression, ...] = ()
    quantization: SourceQuantization | None = None
    check_inputs: str = ""
    beyond_half: dict[str, float] = {}
