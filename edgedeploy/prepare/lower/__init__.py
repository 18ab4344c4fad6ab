"""Compressed PyTorch models, rewritten so that the ONNX exporter keeps what compression bought: one file, one kind.

Every part has one of two functions, and both say what they found:

    lower_module(module) -> (module, found)      before torch.export; may change the module or return another
    lower_program(program) -> (program, found)   after it, on the graph, for a .pt2 as well as for a module

The order matters: what is baked first is seen as plain weights by those that follow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from edgedeploy.records.model import FoundCompression

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

# Files of this folder that are asked in turn.
_MODULE_PARTS = (
    "pt2e",  # first, because a prepared graph cannot be converted any more once it was copied
    "pruning_masks",
    "sparse_tensors",
    "eager_quantized",
    "fx_quantized",
    "dynamic_quantized",
    "torchao_tensors",
    "parametrizations",
    "half_floats",
    "shared_weights",
)
_PROGRAM_PARTS = ("pt2e", "half_floats", "low_rank", "constant_parameters", "shared_weights")


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Rewrite a module in evaluation mode so that it can be exported with its compression.

    Raises:
        ModelError: a kind of compression that is recognised and cannot be kept, with what to do instead.
    """
    found: list[FoundCompression] = []
    for part in _MODULE_PARTS:
        module, more = importlib.import_module(f"{__name__}.{part}").lower_module(module)
        found += more
    return module, tuple(found)


def lower_program(program: ExportedProgram) -> tuple[ExportedProgram, tuple[FoundCompression, ...]]:
    """Rewrite an exported program's graph so that the ONNX exporter has nothing left to fold or to undo.

    Raises:
        ModelError: as `lower_module`.
    """
    found: list[FoundCompression] = []
    for part in _PROGRAM_PARTS:
        program, more = importlib.import_module(f"{__name__}.{part}").lower_program(program)
        found += more
    return program, tuple(found)
