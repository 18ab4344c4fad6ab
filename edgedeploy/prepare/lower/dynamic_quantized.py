"""torch.ao's quantize_dynamic (int8 and float16) becomes float layers with markers on weights and inputs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from edgedeploy.errors import ModelError
from edgedeploy.records.model import FoundCompression

if TYPE_CHECKING:
    from torch import nn

_HOMES = ("torch.ao.nn.quantized.dynamic.", "torch.ao.nn.intrinsic.quantized.dynamic.")
_STATE_NOTE = (
    "torch also quantizes the recurrent state, anew in every step; inside an ONNX node it stays float, which is "
    "closer to the float model"
)


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Replace dynamically quantized modules: LSTM, GRU, Linear and recurrent cells.

    Raises:
        ModelError: another kind of dynamically quantized module, or embeddings with integer weights.
    """
    if "torch.ao.nn.quantized" not in sys.modules:
        return module, ()
    parts = _dynamic_parts(module)
    if not parts:
        return module, ()
    from edgedeploy.prepare.lower import dynamic_layers, packed

    made = {path: type(part).__name__ for path, part in parts.items()}
    module = packed.replace_parts(module, parts, dynamic_layers.layer_of)
    return module, _described(module, made)


def _dynamic_parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return path → module; what lies inside of one that was found belongs to it."""
    found: dict[str, nn.Module] = {}

    def walk(part: nn.Module, path: str) -> None:
        home = type(part).__module__
        if home.startswith(_HOMES) and type(part).__name__ != "PackedParameter":
            found[path] = part
            return
        if home.startswith("torch.ao.nn.sparse.quantized"):
            raise ModelError(
                f"the layer {path or '(model)'!r} is a {type(part).__name__} of torch.ao.nn.sparse.quantized, whose "
                f"packed blocks no other runtime reads; give the pruned model and quantize it with quantize_dynamic"
            )
        for name, child in part._modules.items():
            if child is not None:
                walk(child, f"{path}.{name}" if path else name)

    walk(module, "")
    return found


def _described(module: nn.Module, made: dict[str, str]) -> tuple[FoundCompression, ...]:
    """Say what was found: integer and float16 weights apart, as they are different kinds of compression."""
    from edgedeploy.prepare.lower import dynamic_layers

    bits_of: dict[str, set[int]] = {}
    for path in made:
        inner = module.get_submodule(path).modules()
        bits_of[path] = {part.bits for part in inner if isinstance(part, dynamic_layers.Linear)}
    found = []
    for is_half in (False, True):
        paths = [path for path in made if (bits_of[path] == {0}) == is_half]
        if not paths:
            continue
        classes = sorted({made[path] for path in paths})
        notes = [] if is_half else _input_notes({bits for path in paths for bits in bits_of[path]})
        if not is_half and {"LSTM", "GRU"} & set(classes):
            notes.append(_STATE_NOTE)
        found.append(
            FoundCompression(
                kind="float16" if is_half else "dynamic int8",
                layers=tuple(path or "(model)" for path in paths),
                detail=f"quantize_dynamic, {', '.join(classes)}" + (", float16 weights, float32 arithmetic" * is_half),
                lowering="packed parameters became stored weights" + ("" if is_half else " and dynamic inputs"),
                note="; ".join(notes),
            )
        )
    return tuple(found)


def _input_notes(bits: set[int]) -> list[str]:
    if 7 in bits:
        return ["inputs are quantized per tensor, asymmetric, to 7 of 8 bits (reduce_range, as fbgemm needs)"]
    return ["inputs are quantized per tensor, asymmetric, to 8 bits"]
