"""edgedeploy: compile compressed PyTorch models for edge devices, measure them there, and gate releases.

The public verbs are the commands of the same names, loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from edgedeploy.pipeline import bench, compile, gate, init, inspect, run
    from edgedeploy.pipeline import gate as compare

_HOME = {
    "bench": "bench",
    "compare": "gate",
    "compile": "compile",
    "gate": "gate",
    "init": "init",
    "inspect": "inspect",
    "run": "run",
}
__all__ = ["__version__", "bench", "compare", "compile", "gate", "init", "inspect", "run"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module("edgedeploy.pipeline"), _HOME[name])
    raise AttributeError(f"module 'edgedeploy' has no attribute {name!r}")
