"""TensorRT, emulated: the Python API of one version (EMULATED_TENSORRT), on a machine without a GPU.

It shows that our builder and session use names that the version has, in an order and with arguments that it takes, and
that what goes wrong there becomes a sentence here. It is NOT NVIDIA's compiler: it fuses by a few plain rules, times
nothing, and its "engine" is the ONNX model, computed by ONNX Runtime.

Recorded from the real modules: which names each version has (tests/data/tensorrt_api_names.json); the refusals of the
parser for zero-points, uint8, int32 biases and mixed floats; what happens without a driver.
From NVIDIA's documentation and sources only, never seen running: that 8.x needs EXPLICIT_BATCH and the flag INT8 for Q/DQ,
that a strongly typed network takes no precision flags, the inspector's JSON, the phases of a progress monitor, the timing
cache's manners, refitting, and the texts of these errors, some of them in our words.

EMULATED_FAULT: segv-parse | segv | killed | hang | slow | oom | no-workspace | build-none | parse | no-int8
"""

from __future__ import annotations

import importlib
from typing import Any

from . import names

__version__ = names.VERSION

for _short, _long in {
    "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int8": "INT8", "int32": "INT32", "int64": "INT64",
    "bool": "BOOL", "uint8": "UINT8",
}.items():  # fmt: skip
    if _short in names.API["names"]:
        globals()[_short] = getattr(names.enum("DataType"), _long)


def nptype(trt_type: Any) -> Any:
    """Return numpy's type of one of TensorRT's."""
    import numpy as np

    kinds = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
             "UINT8": "uint8"}  # fmt: skip
    return np.dtype(kinds[trt_type.name]).type


def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool:
    """Register nothing: there are no plugins here."""
    return isinstance(namespace, str)


def __getattr__(name: str) -> Any:
    if name in names.API["enums"]:
        return names.enum(name)
    # What only asks for the version does not wait for onnx.
    for part in ("building", "execution") if name in names.API["names"] else ():
        module = importlib.import_module(f"{__name__}.{part}")
        thing = getattr(module, name, None)
        if getattr(thing, "__module__", "") == module.__name__:
            return thing
    if name in names.API["names"]:
        raise NotImplementedError(f"TensorRT {names.VERSION} has {name}, and this emulation does not")
    raise AttributeError(f"module 'tensorrt' has no attribute {name!r}")
