"""The -O options that both TensorRT back ends have."""

from __future__ import annotations

import dataclasses
from typing import Literal

from edgedeploy.errors import CompileError

# Number, of one back end or both → least and most that can be meant.
_RANGES: dict[str, tuple[int, int | None]] = {
    "builds": (1, None),
    "dla_core": (-1, None),
    "optimization_level": (-1, 5),
    "threads": (1, 1),
    "time_limit_s": (1, None),
    "workspace_mib": (0, None),
}


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is built, and how a session runs it.

    Attributes:
        float_type: what is computed in half floats or in float32 where fp16 or int8 is asked for; fp32 never is short.
        axes: range of each dynamic axis, "batch=1:4:8" for least, usual and largest, several joined by commas.
        time_limit_s: after which a build is given up.
        lost_scales: "refuse" or "note" where a scale of the model is not in the engine. A product that was meant to run
            on integers and computes in float is noted either way: it computes with the values that they stand for.
        buffers: "cudart", our own layer over CUDA's runtime, or "pycuda" where that is installed.
        cuda_graph: launch a captured graph instead of kernel by kernel.
        spin_wait: wait for the GPU in a busy loop, which answers sooner and keeps a core busy.
        copies: count the copies between host and GPU as part of an inference.
        threads: of the host; one feeds the GPU.
    """

    float_type: Literal["float16", "float32"] = "float16"
    axes: str = ""
    time_limit_s: int = 3600
    lost_scales: Literal["refuse", "note"] = "refuse"
    buffers: Literal["cudart", "pycuda"] = "cudart"
    cuda_graph: bool = False
    spin_wait: bool = False
    copies: bool = True
    threads: int = 1


def demand_sense(options: EngineOptions, backend: str) -> None:
    """Raise where an option's number cannot be meant.

    Raises:
        CompileError: its hint says what can be.
    """
    for name, (least, most) in _RANGES.items():
        number = getattr(options, name, least)
        if number < least or (most is not None and number > most):
            wanted = f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"
            raise CompileError(f"{name} is {number}", backend=backend, hint=f"give {wanted}")
