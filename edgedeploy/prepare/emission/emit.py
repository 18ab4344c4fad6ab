"""Writes the explicit int8 form of a model: the float graph, a QuantizationTable and a target's rules, in one .onnx.

Each rounded activation is a QuantizeLinear and DequantizeLinear pair behind the node that makes it, after its Relu or
Clip; weights are integer constants behind a DequantizeLinear, biases int32 or float. Computed as it is written, in
float, such a graph gives the numbers that an integer runtime should give up to rounding. Weights of nodes that compute
in float, and products whose activations are rounded anew in each inference, become what the rules name for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from edgedeploy.errors import FidelityError, InternalError, ModelError
from edgedeploy.prepare.count.compression import compression_report
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.emission.activations import activation_grids, activation_pair, superfluous_clamps
from edgedeploy.prepare.emission.draft import NAMES, Draft
from edgedeploy.prepare.emission.exact_products import exact_here
from edgedeploy.prepare.emission.products import (
    dynamic_lstm,
    dynamic_product,
    fits_dynamic,
    fits_dynamic_lstm,
    fits_packed,
    packed_product,
)
from edgedeploy.prepare.emission.stay_float import keep_float
from edgedeploy.prepare.emission.weights import (
    codes_by_the_rules,
    write_bias,
    write_dequantized,
    write_integer_weights,
    write_short_float,
)
from edgedeploy.prepare.export import FIDELITY_SAMPLES
from edgedeploy.prepare.fidelity import Remembering, compare
from edgedeploy.prepare.graph import Runner, drop_unused_constants, read_graph, view, write_graph
from edgedeploy.prepare.grid import ActivationGrid
from edgedeploy.records.model import Fidelity, Model
from edgedeploy.records.quantization import QuantizationTable, WeightQuantization
from edgedeploy.records.target import QuantizationRules
from edgedeploy.storage import sha256_file

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# What a short float can hold.
_LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2**-7) * 2.0**127}
# How far, in dB against fp32, the form that ONNX Runtime optimises may lie from the same form computed as written.
# Fixed-point factors move a code by one step here and there: 0.01 dB at most in 70 pairs of small networks and rules,
# 0.3 in EfficientNet-Lite0. A miscompiled graph loses 20 dB and more.
_MAX_DISAGREEMENT_DB = 0.5
# Above it no disagreement counts: 8-bit forms end near 50 dB, and float kernels differ among themselves from 100 dB on.
_QUIET_DB = 45.0


@dataclass(frozen=True, slots=True)
class Emitted:
    """A model in a back end's form.

    Attributes:
        notes: sentences for a person: what the form changes, where it was allowed to, and how it computes.
    """

    model: Model
    notes: tuple[str, ...] = ()


Form = Literal["integer", "packed", "dequantized", "short", "dynamic", "dynamic lstm", "float"]


def emit(
    model: Model,
    table: QuantizationTable,
    rules: QuantizationRules,
    samples: Samples,
    out: Path,
    *,
    allow_change: bool = False,
) -> Emitted:
    """Write the form that a back end wants and compare it with fp32.

    Args:
        model: the fp32 model that `table` refers to.
        table: what is quantized and how.
        rules: how the back end wants it.
        samples: inputs to compare with fp32 on, and to check that ONNX Runtime's optimiser keeps the meaning.
        out: the .onnx to write.
        allow_change: replace what the rules cannot keep, with a note, instead of refusing the model.

    Returns:
        The model with two more fidelity records (as written, in float arithmetic, and on integer kernels here) and what
        a person should know about it.

    Raises:
        ModelError: the table belongs to another model, or holds what the rules cannot keep.
        FidelityError: the optimiser changes what the graph computes by more than integer rounding can.
    """
    if table.model_sha256 != model.sha256:
        raise ModelError(f"the quantization table was made for another model than {model.path}; quantize it again")
    graph = read_graph(Path(model.path))
    notes = _rewrite(graph, table, rules, allow_change=allow_change)
    guarded = keep_float(graph)
    # A back end that wants float biases is not ONNX Runtime, which alone needs the guard and checks the form here.
    write_graph(guarded if rules.bias == "int32" else graph, out)
    fp32 = Remembering(Runner(Path(model.path)))
    as_written = Runner(exact_here(graph) or out, is_optimized=False)
    written = _compare(model, fp32, as_written, samples, "int8 as written")
    optimized = Runner(out if rules.bias == "int32" else guarded.SerializeToString())
    run = _compare(model, fp32, optimized, samples, "int8 on integer kernels")
    _demand_kept_meaning(model, written, run)
    return Emitted(_written(model, out, written, run), notes)


def shorten(model: Model, storage: Literal["float16", "bfloat16"], out: Path, samples: Samples) -> Emitted:
    """Store a model's weights in 16 bits, widened by the form when it is loaded; a runtime may compute in half floats.

    Args:
        model: canonical fp32.
        storage: the short float.
        out: the .onnx to write.
        samples: inputs to compare with fp32 on.

    Raises:
        ModelError: there is nothing to store.
    """
    graph = read_graph(Path(model.path))
    seen = view(graph.graph)
    candidates = [
        name
        for name, value in seen.constants.items()
        if value.dtype == np.float32 and value.ndim > 1 and name not in seen.outputs
    ]
    largest = _LARGEST[storage]
    # A mask of attention holds the lowest float32 there is; -inf in its place would make NaN of a row without a key.
    names = [name for name in candidates if float(np.abs(seen.constants[name]).max(initial=0.0)) <= largest]
    too_large = [name for name in candidates if name not in names]
    if not names:
        raise ModelError(f"{model.source} has no float32 weights to store in {storage}; build it as fp32")
    kept = {
        name: WeightQuantization(bits=16, axis=None, scales=(), storage=storage, origin="max-abs") for name in names
    }
    table = QuantizationTable(
        model_sha256=model.sha256,
        calibration="",
        calibration_sha256="",
        samples=0,
        method=storage,
        nodes=(),
        activations={},
        weights=kept,
    )
    rules = QuantizationRules(activation_dtype="int8", activation_symmetric=False)
    notes = (
        f"weights are stored in {storage}, half the bytes",
        *([f"{', '.join(too_large)}: kept in float32, values beyond {largest:.3g}"] if too_large else []),
        *_rewrite(graph, table, rules, allow_change=False),
    )
    write_graph(graph, out)
    fp32 = Remembering(Runner(Path(model.path)))
    written = _compare(model, fp32, Runner(out), samples, f"{storage} weights")
    return Emitted(_written(model, out, written), notes)


def _written(model: Model, out: Path, *fidelity: Fidelity) -> Model:
    return msgspec.structs.replace(
        model,
        path=str(out),
        sha256=sha256_file(out),
        compression=compression_report(out),
        fidelity=(*model.fidelity, *fidelity),
    )


def _rewrite(
    model: ModelProto, table: QuantizationTable, rules: QuantizationRules, *, allow_change: bool
) -> tuple[str, ...]:
    """Write a form into a model and return what a person should know about it."""
    seen = view(model.graph)
    names = {node.name for node in model.graph.node}
    unknown = [name for name in table.nodes if name not in names]
    unknown += [name for name in table.weights if name not in seen.constants]
    if unknown:
        raise InternalError(f"the quantization table names what the model does not have: {', '.join(unknown)}")
    excluded = {node.name for node in model.graph.node if node.op_type in rules.excluded_operators}
    active = frozenset(table.nodes) - excluded
    draft = Draft(model, seen, table, rules, active, allow_change)
    grids = activation_grids(draft)
    forms = {name: _form(draft, name, excluded) for name in table.weights}
    kept_grids = {name: _write_weights(draft, name, form) for name, form in forms.items()}
    writer = _NodeWriter(draft, grids, forms, kept_grids, excluded)
    draft.finish(writer.nodes())
    drop_unused_constants(model)
    return draft.sentences()


def _form(draft: Draft, name: str, excluded: set[str]) -> Form:
    """Decide how weights are stored; all nodes that read them read the same form."""
    grid = draft.table.weights[name]
    readers = [node for node in draft.seen.consumers.get(name, ()) if node.name not in excluded]
    if not readers:
        return "float"
    if grid.storage != "integer":
        return "short"
    if name in draft.table.dynamic:
        return _dynamic_form(draft, name, readers)
    if any(node.name in draft.active for node in readers):
        return "integer"
    return _weight_only_form(draft, name, readers)


def _dynamic_form(draft: Draft, name: str, readers: list[NodeProto]) -> Form:
    grid = draft.table.weights[name]
    if draft.rules.dynamic == "refused":
        draft.changed(
            f"the activations that the weights {NAMES} multiply are rounded in each inference, which this target has "
            f"no form for, and would stay float",
            name,
        )
        return _weight_only_form(draft, name, readers)
    if all(fits_dynamic_lstm(node, draft) for node in readers):
        return "dynamic lstm"
    is_small = grid.bits <= 4 or bool(grid.block)
    if (
        is_small
        and draft.rules.weight_only == "MatMulNBits"
        and all(fits_packed(node, name, draft) for node in readers)
    ):
        return "packed"
    if not is_small and all(fits_dynamic(node, name, draft) for node in readers):
        return "dynamic"
    draft.changed(
        f"the activations that the weights {NAMES} multiply are rounded in each inference, which no operator does for "
        f"a {readers[0].op_type} with these scales, and would stay float",
        name,
    )
    return _weight_only_form(draft, name, readers)


def _weight_only_form(draft: Draft, name: str, readers: list[NodeProto]) -> Form:
    grid = draft.table.weights[name]
    if draft.rules.weight_only == "refused":
        draft.changed(
            f"the {grid.bits}-bit weights {NAMES} belong to a node that computes in float; this target would expand "
            f"them, and they would be stored as float32",
            name,
        )
        return "float"
    if draft.rules.weight_only == "MatMulNBits" and all(fits_packed(node, name, draft) for node in readers):
        return "packed"
    if grid.bits <= 4:
        draft.changed(
            f"the {grid.bits}-bit weights {NAMES} have no packed form here and would be stored in whole bytes, with "
            f"the same values",
            name,
        )
    return "dequantized"


def _write_weights(draft: Draft, name: str, form: Form) -> WeightQuantization:
    """Store what stands in front of all nodes, and return the grid that the weights lie on."""
    grid = draft.table.weights[name]
    if form == "integer":
        return write_integer_weights(draft, name)
    if form == "dequantized":
        write_dequantized(draft, name, codes_by_the_rules(draft, name, grid), grid, np.dtype(np.int8))
    elif form == "short":
        write_short_float(draft, name)
    return grid


class _NodeWriter:
    """Writes the nodes of a graph anew, in their order."""

    def __init__(
        self,
        draft: Draft,
        grids: dict[str, ActivationGrid],
        forms: dict[str, Form],
        weights: dict[str, WeightQuantization],
        excluded: set[str],
    ) -> None:
        self._draft, self._grids, self._forms, self._weights, self._excluded = draft, grids, forms, weights, excluded
        self._absorbed = superfluous_clamps(draft, grids) if draft.rules.clamps == "absorbed" else frozenset()
        # What a tensor is called where it is read: rounded, and before it was.
        self._rounded: dict[str, str] = {}
        self._unrounded: dict[str, str] = {}

    def nodes(self) -> list[NodeProto]:
        """Return the new nodes."""
        nodes: list[NodeProto] = []
        for value in self._draft.model.graph.input:
            if value.name in self._grids:
                self._rounded[value.name] = f"{value.name}/dequantized"
                nodes += self._pair(value.name, value.name, f"{value.name}/dequantized")
        for node in list(self._draft.model.graph.node):
            if node.name in self._absorbed:
                nodes += self._pair(node.output[0], node.input[0], node.output[0])
                continue
            sources = list(node.input)
            names = self._unrounded if node.name in self._excluded else self._rounded
            for index, name in enumerate(sources):
                node.input[index] = names.get(name, name)
            rounded = [name for name in node.output if name in self._grids]
            for index, name in enumerate(node.output):
                if name in self._grids:
                    # The pair takes over the name, so that everything that read the tensor reads what was stored.
                    node.output[index] = self._unrounded[name] = f"{name}/float"
            nodes += self._written(node, sources)
            for name in rounded:
                nodes += self._pair(name, f"{name}/float", name)
        return nodes

    def _pair(self, tensor: str, source: str, result: str) -> list[NodeProto]:
        return activation_pair(self._draft, tensor, source, result, self._grids[tensor])

    def _written(self, node: NodeProto, sources: list[str]) -> list[NodeProto]:
        """Return what stands for a node; `sources` are its inputs' names in the fp32 graph."""
        weight = sources[1] if len(sources) > 1 else ""
        form = self._forms.get(weight)
        if node.name in self._excluded:
            return [node]
        if form == "packed":
            return packed_product(self._draft, node, weight)
        if form == "dynamic":
            return dynamic_product(self._draft, node, weight)
        if form == "dynamic lstm":
            return dynamic_lstm(self._draft, node)
        if form == "integer" and node.name in self._draft.active:
            write_bias(self._draft, node, self._weights[weight], self._grids.get(sources[0]))
        return [node]


def _compare(model: Model, fp32: Remembering, form: Runner, samples: Samples, name: str) -> Fidelity:
    return compare(
        fp32.over(),
        form,
        samples.batches(model.inputs, FIDELITY_SAMPLES),
        names=("fp32 ONNX", name),
        sample_source=samples.name,
    )


def _demand_kept_meaning(model: Model, written: Fidelity, run: Fidelity) -> None:
    for meant, got in zip(written.outputs, run.outputs, strict=True):
        meant_db, got_db = (math.inf if item.sqnr_db is None else item.sqnr_db for item in (meant, got))
        if min(meant_db, got_db) < _QUIET_DB and not abs(got_db - meant_db) <= _MAX_DISAGREEMENT_DB:
            raise FidelityError(
                f"ONNX Runtime's optimiser breaks the int8 form of {model.source}: output {meant.output!r} has "
                f"{meant_db:.1f} dB as written and {got_db:.1f} dB when optimised; build fp32, and report the model"
            )
