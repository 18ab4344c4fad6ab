"""What compression a model carries: counted in its graph, layer by layer, and what became of each kind on the way."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record

Fate = Literal["kept", "changed", "lost"]
Pattern = Literal["", "unstructured", "2:4", "channels"]
Scales = Literal["", "tensor", "channel", "block", "token"]


class Numbers(Record, frozen=True, kw_only=True):
    """How numbers are stored: a layer's weights in the file, or the activation that it reads while it computes.

    Attributes:
        storage: "float32", "float16", "bfloat16", "float8e4m3fn", "int8", "uint8", "int4" ...
        bits: of the grid, which may use less than its storage has (7 of 8 where int8 kernels saturate).
        is_symmetric: whether zero lies in the middle of the grid; None for floats, and where a back end decides it.
        scales: what has a scale of its own; "" for floats.
        is_dynamic: quantized anew in each inference, from the values that there are then.
    """

    storage: str = "float32"
    bits: int = 32
    is_symmetric: bool | None = None
    scales: Scales = ""
    is_dynamic: bool = False


class LayerCompression(Record, frozen=True, kw_only=True):
    """One node with weights, or one that multiplies and adds.

    Attributes:
        name: the node's name, which quantization tables refer to.
        operator: as the file has it: "Conv", "QLinearConv", "MatMulNBits" ...
        weight: name of the constant that holds its weights; "" where it has none (attention multiplies activations).
        weight_shape: as the operator reads it; of recurrent layers, the weights of what is read.
        weight_count: weights without bias, shared ones too; 0 for what does not multiply.
        output_channels: of those weights; 0 for what does not multiply.
        parameters: weights, bias and other learnt numbers; 0 for what an earlier layer shares.
        zero_weights: zeros among the weights alone, without bias.
        pattern: how the zeros lie: in whole output channels (or those are gone, beside a dense reference), at least
            two in each four neighbours along the input channels, or anyhow.
        rank: of the pair of layers that this one belongs to: a narrow product and a wide one with nothing between
            them are a matrix of that rank; None outside of such pairs.
        macs: multiply-accumulates of one sample; None where a shape is not known.
        effective_macs: of them, those with a weight that is not zero.
        stored_bytes: constants of this layer in the file, with scales and zero-points.
        zipped_bytes: the same after zlib.
        removed_channels: output channels that a dense reference has more; None without a reference.
        shares_with: name of the earlier layer that reads the same constant.
    """

    name: str
    operator: str
    weight: str = ""
    weight_shape: tuple[int, ...] = ()
    weight_count: int = 0
    output_channels: int = 0
    parameters: int = 0
    nonzero_parameters: int = 0
    zero_weights: int = 0
    pattern: Pattern = ""
    rank: int | None = None
    weights: Numbers = Numbers()
    activations: Numbers = Numbers()
    macs: int | None = None
    effective_macs: int | None = None
    stored_bytes: int = 0
    zipped_bytes: int = 0
    removed_channels: int | None = None
    shares_with: str = ""


class KindStatement(Record, frozen=True, kw_only=True):
    """What became of one kind of compression from PyTorch to ONNX and on to the artifact.

    Attributes:
        kind: one of `records.model.CompressionKind`.
        layers: how many layers carried it in PyTorch.
        detail: what it was exactly, and what was done to keep it.
        onnx: what the canonical pair (fp32 ONNX and quantization) has of it.
        onnx_reason: what was counted.
        artifact: what the artifact has of it; None where there is none yet.
        notes: what a person should know besides.
    """

    kind: str
    layers: int
    detail: str = ""
    onnx: Fate
    onnx_reason: str
    artifact: Fate | None = None
    artifact_reason: str = ""
    notes: tuple[str, ...] = ()


class CompressionReport(Record, frozen=True, kw_only=True):
    """What compression a model carries, counted in its ONNX graph.

    Attributes:
        macs: of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN for one sample; None where a shape that they need
            is not known.
        effective_macs: of them, those with a weight that is not zero.
        initializer_bytes: all constants in the file; zipped_bytes: the same after zlib, layer by layer.
        layers: in graph order.
        statements: one for each kind of compression that the source had.
        reference_parameters: of the dense reference; None without one. reference_macs: likewise.
    """

    parameters: int
    nonzero_parameters: int
    macs: int | None
    initializer_bytes: int
    operators: dict[str, int]
    effective_macs: int | None = None
    zipped_bytes: int | None = None
    layers: tuple[LayerCompression, ...] = ()
    statements: tuple[KindStatement, ...] = ()
    reference_parameters: int | None = None
    reference_macs: int | None = None
