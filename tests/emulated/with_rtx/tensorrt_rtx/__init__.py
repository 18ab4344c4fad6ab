"""TensorRT-RTX, emulated: the emulated TensorRT 11.4 by its name, with the switches that only its runtime has."""

from __future__ import annotations

from typing import Any

import tensorrt
from tensorrt import execution, names

__version__ = "1.7.1"
_API = names.api_of("rtx-1.7.1")


class IRuntimeConfig(execution.IRuntimeConfig):
    """How a context runs; both are remembered, and neither changes what is computed."""

    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None


execution.RUNTIME_CONFIG = IRuntimeConfig
CudaGraphStrategy = names.enumeration("CudaGraphStrategy", _API["enums"]["CudaGraphStrategy"])
DynamicShapesKernelSpecializationStrategy = names.enumeration(
    "DynamicShapesKernelSpecializationStrategy", _API["enums"]["DynamicShapesKernelSpecializationStrategy"]
)


def __getattr__(name: str) -> Any:
    if name not in _API["names"]:
        raise AttributeError(f"module 'tensorrt_rtx' has no attribute {name!r}")
    return getattr(tensorrt, name)
