"""What MNN timed, in the names of the model that the file was made from."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgedeploy.backends.mnn.report import MOVES, Origins
from edgedeploy.records.explanation import LayerRole, ProfiledLayer

# How the runtime marks what it executes on integers.
_INTEGERS = re.compile(r"\s*\[\s*DT_INT8\s*\]\s*$")
_CONVERSIONS = frozenset({"FloatToInt8", "Int8ToFloat", "CastWrap", "Cast"})
# What it lays values down anew by: between blocks of four channels and plain order, and for all that only moves values.
_LAYOUTS = frozenset({"ConvertTensor", "Raster"})
# What MNN, and our rewriting before it, append to the name of the tensor that an operator is a part of.
_PART = re.compile(r"(?:_raster_\d+|__matmul_converted|__before_tr|/source columns|/columns| source|/float)+$")


def profiled_layers(origins: Origins, executed: Sequence[tuple[str, str]]) -> tuple[ProfiledLayer, ...]:
    """Return the layers that were timed; MNN calls an operator after the tensor that it makes, or helps to make.

    Args:
        origins: what the converter was told of where operators come from.
        executed: name and type of each operator, as the runtime called them.
    """
    found = []
    for name, kind in executed:
        plain = _INTEGERS.sub("", kind).strip()
        role: LayerRole = "compute"
        if plain in _CONVERSIONS:
            role = "convert"
        elif plain in _LAYOUTS:
            role = "layout"
        origin = origins.get(name)
        precision = "int8" if plain != kind.strip() else "" if plain in MOVES else "fp32"
        found.append(
            ProfiledLayer(
                name=name,
                kind=plain,
                role=role,
                precision=precision if role == "compute" else "",
                nodes=(origin[0],) if origin else (),
                tensors=tuple(dict.fromkeys(_PART.sub("", one) for one in (origin[3] if origin else "", name) if one)),
                passes_s=(),
            )
        )
    return tuple(found)
