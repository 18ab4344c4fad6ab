"""The kit: what a device builds an engine from, as one file whose bytes depend on the forms alone.

A zip without compression (weights hardly compress, and a Jetson need not unpack): kit.json, weak.onnx for builders that
are told precisions by flags (TensorRT 8), typed.onnx for builders that read them from the graph (10 and later).
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgedeploy.documents import Record
from edgedeploy.errors import DocumentError
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.target import Precision
from edgedeploy.storage import write_atomic

if TYPE_CHECKING:
    from edgedeploy.backends.trt_forms import EngineForms

# History of edgedeploy.kit:
#   1 (0.3.0)  first version
FORMAT = "edgedeploy.kit/1"
CONTENTS, WEAK, TYPED = "kit.json", "weak.onnx", "typed.onnx"
# The oldest time that a zip can say; a real one would make two equal kits differ.
_NO_TIME = (1980, 1, 1, 0, 0, 0)


class _Head(msgspec.Struct, frozen=True):
    """What kit.json of any format says."""

    format: str


class Contents(Record, frozen=True, kw_only=True):
    """kit.json.

    Attributes:
        float_type: what is computed in where integers are not.
        has_int8: whether the forms have Q/DQ pairs.
        operators: operator → how many, in the typed form.
        float32_nodes: node that must stay float32 → why.
        int8_nodes: nodes that are meant to run on integers.
        pairs: quantized tensor or weights → its scale, or scales.
        profiles: dynamic input → "min", "opt" and "max" shape.
        notes: sentences for a person.
    """

    format: str = FORMAT
    precision: Precision
    float_type: str
    has_int8: bool
    operators: dict[str, int]
    float32_nodes: dict[str, str]
    int8_nodes: tuple[str, ...]
    pairs: dict[str, tuple[float, ...]]
    profiles: dict[str, dict[str, tuple[int, ...]]]
    notes: tuple[str, ...] = ()


def write_kit(out: Path, forms: EngineForms) -> None:
    """Write both forms and what the builder must know about them."""
    contents = Contents(
        precision=forms.precision,
        float_type=forms.float_type,
        has_int8=bool(forms.pairs),
        operators=dict(sorted(Counter(node.op_type for node in forms.typed.graph.node).items())),
        float32_nodes=dict(forms.float32_nodes),
        int8_nodes=tuple(forms.int8_nodes),
        pairs={name: tuple(scales) for name, scales in forms.pairs.items()},
        profiles={name: {key: tuple(shape) for key, shape in one.items()} for name, one in forms.profiles.items()},
        notes=tuple(forms.notes),
    )
    members = {
        CONTENTS: msgspec.json.format(msgspec.json.encode(contents), indent=1),
        WEAK: forms.weak.SerializeToString(deterministic=True),
        TYPED: forms.typed.SerializeToString(deterministic=True),
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as kit:
        for name, data in members.items():
            kit.writestr(zipfile.ZipInfo(name, _NO_TIME), data)
    write_atomic(out, packed.getvalue())


def read_contents(kit: Path) -> Contents:
    """Return what a kit says about itself.

    Raises:
        DocumentError: it is damaged, or of a newer format.
    """
    try:
        with zipfile.ZipFile(kit) as opened:
            said = opened.read(CONTENTS)
        found = msgspec.json.decode(said, type=_Head).format
        if found != FORMAT:
            raise DocumentError(f"{kit} is {found}, and this edgedeploy reads {FORMAT}; compile again")
        return msgspec.json.decode(said, type=Contents)
    except (OSError, KeyError, zipfile.BadZipFile, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DocumentError(f"{kit} is not a whole kit ({error}); compile again") from error


def asked_report(kit: Path) -> LayerReport:
    """Say what a kit asks of the builder; nothing of it has been built yet."""
    from edgedeploy.backends.trt_layers import kept_in_float32

    contents = read_contents(kit)
    return LayerReport(
        operators=contents.operators,
        quantized=contents.int8_nodes,
        float_islands=tuple(contents.float32_nodes) if contents.has_int8 else (),
        scales=contents.pairs,
        notes=(*contents.notes, *kept_in_float32(contents.float32_nodes)),
    )


def engine_layers(kit: Path, layers: Path, *, is_refused: bool) -> LayerReport:
    """Say what an engine does with a kit's layers and scales.

    Args:
        kit: what it was built from.
        layers: the engine inspector's JSON.
        is_refused: raise where a scale was lost, instead of noting it. A product that was meant to run on integers and
            does not is named in the notes either way.

    Raises:
        CompileError: a scale was lost, and that is refused.
        DocumentError: the kit or the JSON cannot be read.
    """
    from edgedeploy.backends.trt_layers import engine_report, kept_in_float32, layers_from_inspector

    contents = read_contents(kit)
    return engine_report(
        layers_from_inspector(layers.read_text(encoding="utf-8", errors="replace")),
        contents.int8_nodes,
        contents.pairs,
        (*contents.notes, *kept_in_float32(contents.float32_nodes)),
        is_refused=is_refused,
        backend="tensorrt",
    )
