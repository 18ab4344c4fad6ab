"""Which TFLite kernels compute on int8, and what each asks of the grids of its tensors.

Source: TensorFlow Lite 8-bit quantization specification (ai.google.dev/edge/litert/models/quantization_spec) and the
Prepare functions of tensorflow/lite/kernels; each is run against ONNX Runtime in tests/backends/test_tflite_compile.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgedeploy.records.quantization import Grid

# How the grids of a kernel's tensors hang together: not at all, the output has the first input's, all inputs have the
# output's, or the output's is the kernel's own.
Constraint = Literal["free", "as input", "as output", "fixed"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """An operator that computes on int8.

    Attributes:
        version: the first one whose runtime has the int8 kernel; an older runtime refuses the file by it.
        grids: how the grids of its tensors hang together.
        data: places of its inputs that are activations; None: all that are float.
        weights: place of constant weights, None where it has none.
        bias: place of the bias.
        axis: of the output channels in its weights.
        fixed: the output's grid, where it is the kernel's own.
        moves: whether each output value is one of the input's, so that rounding before and after is the same.
    """

    version: int = 2
    grids: Constraint = "free"
    data: tuple[int, ...] | None = None
    weights: int | None = None
    bias: int | None = None
    axis: int = 0
    fixed: Grid | None = None
    moves: bool = False


def _grid(scale: float, zero_point: int) -> Grid:
    return Grid(scale=scale, zero_point=zero_point, low_code=-128, high_code=127)


_MOVE = Kernel(1, "as input", (0,), moves=True)
_MOVE_2 = Kernel(2, "as input", (0,), moves=True)

KERNELS: dict[str, Kernel] = {
    "CONV_2D": Kernel(3, data=(0,), weights=1, bias=2),
    "DEPTHWISE_CONV_2D": Kernel(3, data=(0,), weights=1, bias=2, axis=3),
    "FULLY_CONNECTED": Kernel(4, data=(0,), weights=1, bias=2),
    "TRANSPOSE_CONV": Kernel(3, data=(2,), weights=1, bias=3),
    "BATCH_MATMUL": Kernel(2, data=(0, 1)),
    "ADD": Kernel(2, data=(0, 1)),
    "SUB": Kernel(2, data=(0, 1)),
    "MUL": Kernel(2, data=(0, 1)),
    "MEAN": Kernel(2, data=(0,)),
    "SUM": Kernel(2, data=(0,)),
    "AVERAGE_POOL_2D": Kernel(2, "as input", (0,)),
    "RESIZE_BILINEAR": Kernel(2, "as input", (0,)),
    "RELU": Kernel(2, data=(0,)),
    "RELU6": Kernel(2, data=(0,)),
    "LEAKY_RELU": Kernel(2, data=(0,)),
    "HARD_SWISH": Kernel(1, data=(0,)),
    "GELU": Kernel(2, data=(0,)),
    "SOFTMAX": Kernel(2, "fixed", (0,), fixed=_grid(1 / 256, -128)),
    "LOGISTIC": Kernel(2, "fixed", (0,), fixed=_grid(1 / 256, -128)),
    "TANH": Kernel(2, "fixed", (0,), fixed=_grid(1 / 128, 0)),
    "CONCATENATION": Kernel(2, "as output"),
    "MAXIMUM": Kernel(2, "as output", (0, 1)),
    "MINIMUM": Kernel(2, "as output", (0, 1)),
    "PACK": Kernel(2, "as output"),
    "MAX_POOL_2D": _MOVE_2,
    "REDUCE_MAX": _MOVE_2,
    "REDUCE_MIN": _MOVE_2,
    "RESHAPE": _MOVE,
    "SQUEEZE": _MOVE,
    "EXPAND_DIMS": _MOVE,
    "TRANSPOSE": _MOVE_2,
    "SLICE": _MOVE_2,
    "STRIDED_SLICE": _MOVE_2,
    "SPLIT": Kernel(2, "as input", (1,), moves=True),
    "SPLIT_V": _MOVE_2,
    "UNPACK": _MOVE_2,
    "GATHER": _MOVE_2,
    "GATHER_ND": _MOVE_2,
    "TILE": _MOVE,
    "BROADCAST_TO": _MOVE_2,
    "SPACE_TO_DEPTH": _MOVE_2,
    "DEPTH_TO_SPACE": _MOVE_2,
    "SPACE_TO_BATCH_ND": _MOVE_2,
    "BATCH_TO_SPACE_ND": _MOVE_2,
    "REVERSE_V2": _MOVE_2,
    "MIRROR_PAD": _MOVE_2,
    "PAD": _MOVE_2,
    # Its third input is the value to pad with, which is rounded to the same grid.
    "PADV2": _MOVE_2,
    "RESIZE_NEAREST_NEIGHBOR": _MOVE_2,
}

# What only hands on each of its values once, so that rounding its output is rounding its input.
REARRANGES = frozenset({"RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "SPACE_TO_DEPTH", "DEPTH_TO_SPACE"})

# First versions that read or write the types that conversions between float and integers use.
QUANTIZE_VERSION, REQUANTIZE_VERSION = 1, 2
DEQUANTIZE_VERSION, DEQUANTIZE_HALF_VERSION, DEQUANTIZE_CHANNELS_VERSION = 2, 3, 5
