"""One model as the two ONNX graphs that TensorRT builders take: weakly and strongly typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedeploy.backends.qdq import read_form
from edgedeploy.backends.trt_graph import Draft, copied, draft_of
from edgedeploy.backends.trt_halves import float32_nodes, with_halves
from edgedeploy.backends.trt_operators import demand_known
from edgedeploy.backends.trt_opset import lower, settle_normalizations, spell_out
from edgedeploy.backends.trt_options import EngineOptions
from edgedeploy.backends.trt_pairs import Pairs, settle_pairs, store_as_floats, widen_constants
from edgedeploy.backends.trt_profiles import Profile, Range, apply_axes, demand_one_sample, parse_axes
from edgedeploy.errors import CompileError
from edgedeploy.records.model import Model
from edgedeploy.records.target import Precision

if TYPE_CHECKING:
    from onnx import ModelProto

FloatType = Literal["float16", "float32"]
# protobuf cannot serialise more into one message.
_MAX_FILE_BYTES = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class EngineForms:
    """One model in the two forms that TensorRT builders take.

    Nodes and tensors are called the same in both, as in the canonical model; what a form adds is called after what it
    belongs to ("/norm1/square").

    Attributes:
        weak: float32 with explicit Q/DQ pairs, opset 17 at most, in operators that 8.5 parses, weights as float32: the
            builder's flags say which types its kernels may choose.
        typed: each tensor in the type that it is computed in; inputs, outputs and all around Q/DQ pairs are float32.
        precision: what the model was formed as.
        float_type: what is computed on floats; an fp32 engine has float32 only.
        float32_nodes: node of either form → why it must not become float16; empty where nothing is float16. Products on
            integers, and what lies between their pairs, are not named.
        int8_nodes: products that are meant to run on integers.
        pairs: quantized tensor or weights, by our name → scales, one or one per channel.
        profiles: dynamic input → "min", "opt" and "max" sizes.
        notes: what a person should know.
    """

    weak: ModelProto
    typed: ModelProto
    precision: Precision
    float_type: FloatType
    float32_nodes: dict[str, str]
    int8_nodes: tuple[str, ...]
    pairs: dict[str, tuple[float, ...]]
    profiles: dict[str, Profile]
    notes: tuple[str, ...]


def forms_of(model: Model, options: EngineOptions, backend: str) -> EngineForms:
    """Write both forms of what a back end is given, with what a person asked for.

    Raises:
        CompileError: as `engine_forms` does; or a range that no single sample fits in.
        UsageError: ranges that cannot be read, or of an axis that the model does not have.
    """
    axes = parse_axes(options.axes)
    demand_one_sample(model.inputs, axes, backend)
    path = Path(model.path)
    return engine_forms(
        path,
        read_form(path, backend).precision,
        float_type=options.float_type,
        beyond_half=model.beyond_half,
        axes=axes,
        backend=backend,
    )


def engine_forms(
    path: Path,
    precision: Precision,
    *,
    float_type: FloatType,
    beyond_half: Mapping[str, float],
    axes: Mapping[str, Range],
    backend: str,
) -> EngineForms:
    """Write both forms of a model.

    Args:
        path: a self-contained .onnx: plain fp32, weights as short floats (fp16), or emitted Q/DQ (int8).
        precision: what the model was formed as.
        float_type: what is computed on floats in fp16 and int8 engines.
        beyond_half: tensor → its largest magnitude, where that is too large for float16.
        axes: dynamic axis → its sizes; an axis with one size becomes fixed in the graph.
        backend: who compiles, for the text of errors.

    Raises:
        CompileError: naming the node: an operator that no TensorRT parses or that opset 17 has no words for, Q/DQ that
            is not symmetric int8 with float32 scales; a dynamic axis without sizes; a file of 2 GB or more.
        UsageError: sizes for an axis that the model does not have.
    """
    if precision == "fp32":
        float_type = "float32"
    draft = draft_of(_read(path, precision, backend), backend)
    notes = demand_known(draft)
    draft.look()
    lower(draft)
    profiles = apply_axes(draft.model, axes, backend)
    draft.look()
    settle_normalizations(draft)
    widen_constants(draft)
    pairs = settle_pairs(draft)
    weak = copied(draft)
    spell_out(weak)
    float32: dict[str, str] = {}
    typed = copied(draft)
    if float_type == "float16":
        float32 = float32_nodes(draft, beyond_half, pairs) | float32_nodes(weak, beyond_half, pairs)
        with_halves(typed, float32, pairs)
    store_as_floats(weak, pairs)
    for form in (weak, typed):
        _finish(form)
    return EngineForms(
        weak=weak.model,
        typed=typed.model,
        precision=precision,
        float_type=float_type,
        float32_nodes=float32,
        int8_nodes=pairs.integers,
        pairs=pairs.scales,
        profiles=profiles,
        notes=(*notes, *pairs.notes, *_told(draft, pairs, beyond_half, float32)),
    )


def _read(path: Path, precision: Precision, backend: str) -> ModelProto:
    import onnx

    if precision == "int8":
        return onnx.load(str(path), load_external_data=False)
    return read_form(path, backend).graph


def _finish(draft: Draft) -> None:
    """Check a form, so that no device is handed a graph that is none."""
    import onnx

    del draft.graph.value_info[:]
    size = draft.model.ByteSize()
    if size > _MAX_FILE_BYTES:
        raise CompileError(
            f"its ONNX form would have {size} bytes, and files of 2 GB and more are not supported",
            backend=draft.backend,
            hint="build a smaller model",
        )
    onnx.checker.check_model(draft.model)


def _told(draft: Draft, pairs: Pairs, beyond_half: Mapping[str, float], float32: Mapping[str, str]) -> tuple[str, ...]:
    notes = []
    stored = {name for node in draft.graph.node if node.op_type == "QuantizeLinear" for name in node.input[:1]}
    for node in draft.graph.node:
        if float32 and node.name in pairs.integers and node.output[0] in beyond_half.keys() - stored:
            notes.append(
                f"{node.name!r} computes on integers and its result reaches {beyond_half[node.output[0]]:.2g}: it "
                f"leaves as float32 from TensorRT 10 on, and 8 may choose float16, so check its answers there"
            )
    return tuple(notes)
