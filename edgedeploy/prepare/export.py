"""A loaded model becomes canonical fp32 ONNX that is shown, on samples, to compute what its source computes."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from edgedeploy.documents import closest
from edgedeploy.errors import FidelityError, ModelError, UsageError
from edgedeploy.prepare.count.compression import compression_report
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.fidelity import compare
from edgedeploy.prepare.graph import Runner, opset_of, read_graph, specs_of, write_graph
from edgedeploy.prepare.load import Loaded
from edgedeploy.prepare.lower import lower_module, lower_program
from edgedeploy.prepare.markers import translations
from edgedeploy.prepare.plain_torch import plain_attention, plain_torch
from edgedeploy.prepare.silence import silenced
from edgedeploy.prepare.source.absorb import absorb, short_float_weights
from edgedeploy.prepare.source.recognize import found_in_onnx
from edgedeploy.prepare.source.reference import module_call, program_call, source_run
from edgedeploy.prepare.source.replay import replay
from edgedeploy.records.model import Fidelity, FoundCompression, Model, TensorSpec
from edgedeploy.records.quantization import SourceQuantization
from edgedeploy.storage import sha256_file

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn
    from torch.export import ExportedProgram

# The exporter's operator library is written for 18, so nothing is converted, and ONNX Runtime reads it since 1.14.
OPSET = 18
# An ONNX file that is given may be as old as this: everything we emit exists in it.
_OLDEST_OPSET = 17
# Largest error allowed, relative to the largest value of the output. Sums in another order differ by 1e-6 to 1e-5 in
# deep float32 networks; a folded normalisation or a lost branch is off by 1e-2 and more.
MAX_RELATIVE = 1e-3
# The same for sources that compute in short floats, whose own rounding is 2**-11 or 2**-8 an operation; our float32
# form is the more exact one.
_MAX_RELATIVE_SHORT = {"float16": 1e-2, "bfloat16": 5e-2, "autocast": 5e-2}
# Least signal-to-noise ratio of a source that quantizes its activations: where a value lies between two codes, another
# order of summation takes the other one. 40 dB and more were seen; a lost scale or a missing clamp ends below 15.
_MIN_SQNR_DB = 25.0
# Deep networks on coarse grids amplify one changed code: EfficientNet-Lite0 by FX, 117 grids, has the source's codes in
# its first layers and ends at 21.8 dB. There a model may lie as far from its source as from itself when sums are taken
# in another order, and so much farther (a source has kernels of its own), but never below the second number.
_FARTHER_DB, _LEAST_SQNR_DB = 6.0, 15.0
# Enough to meet every branch that data can choose between; more costs minutes on large models.
FIDELITY_SAMPLES = 128
# From which likeness on (of 1) a name that forward does not have is taken for a misspelt one.
_ALMOST = 0.8
_SHORT_FLOATS: dict[str, Literal["float16", "bfloat16"]] = {"float16": "float16", "bfloat16": "bfloat16"}


def export(loaded: Loaded, inputs: Sequence[TensorSpec] | None, samples: Samples, out: Path) -> Model:
    """Export a model to ONNX and compare it with its source.

    Args:
        loaded: what `load` returned.
        inputs: names, types and shapes; the first axis is the batch. None: what the file itself says (.onnx, .pt2).
        samples: real inputs, one array per name.
        out: the .onnx to write.

    Raises:
        UsageError: a Python model without `inputs`, or inputs that are not the model's.
        ModelError: the model cannot be run or exported.
        FidelityError: the ONNX computes something else.
    """
    if loaded.kind == "onnx":
        return _export_onnx(loaded, inputs, samples, out)
    import torch

    with torch.no_grad(), plain_attention(), silenced("export"):
        traced = _trace_module(loaded, inputs, samples) if loaded.kind == "module" else _adopt(loaded, inputs, samples)
        program, more = lower_program(traced.program)
        found = (*traced.found, *more)
        graph, quantization = absorb(_converted(loaded, program, traced))
    for kind, storage in _SHORT_FLOATS.items():
        if any(item.kind == kind for item in found):
            own = quantization or SourceQuantization()
            weights = short_float_weights(graph, storage) | own.weights
            quantization = msgspec.structs.replace(own, weights=weights)
    write_graph(graph, out)
    model = _model(loaded, out, traced.inputs, found, quantization)
    return _proven(loaded, model, graph, samples, "PyTorch")


def _proven(loaded: Loaded, model: Model, graph: ModelProto, samples: Samples, source: str) -> Model:
    """Compare a canonical form with its source, and note how far it lies from it."""
    fidelity = compare(
        source_run(loaded, model),
        _candidate(graph, model.quantization),
        samples.batches(model.inputs, FIDELITY_SAMPLES),
        names=(source, _form(model.quantization)),
        sample_source=samples.name,
    )
    _demand_faithful(loaded, model, fidelity, lambda: _own_noise(graph, model, samples))
    return msgspec.structs.replace(model, fidelity=(fidelity,))


def _candidate(graph: ModelProto, quantization: SourceQuantization | None) -> Runner:
    whole = replay(graph, quantization) if quantization else graph
    return Runner(whole.SerializeToString(), is_optimized=quantization is None)


def _own_noise(graph: ModelProto, model: Model, samples: Samples) -> Fidelity:
    """Compare a quantized graph with itself, computed by a runtime that sums in another order."""
    whole = (replay(graph, model.quantization) if model.quantization else graph).SerializeToString()
    return compare(
        Runner(whole, is_optimized=False),
        Runner(whole, is_optimized=True),
        samples.batches(model.inputs, FIDELITY_SAMPLES),
        names=("as written", "as optimised"),
        sample_source=samples.name,
    )


def _form(quantization: SourceQuantization | None) -> str:
    return "fp32 ONNX and its quantization" if quantization else "fp32 ONNX"


def declared_inputs(loaded: Loaded) -> tuple[TensorSpec, ...] | None:
    """Return the inputs that a file itself declares, or None for a Python model, whose inputs must be given."""
    if loaded.kind == "onnx":
        return specs_of(_real_inputs(loaded.program))
    return _program_inputs(loaded.program) if loaded.kind == "exported" else None


@dataclass(frozen=True, slots=True)
class _Traced:
    """An exported program with names for everything, and the original to compare with.

    Attributes:
        inputs: in the order of the program's placeholders.
        outputs: names, in the order of the program's outputs.
        found: what compression was recognised, and lowered, in the module.
    """

    program: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    found: tuple[FoundCompression, ...] = ()


def _trace_module(loaded: Loaded, given: Sequence[TensorSpec] | None, samples: Samples) -> _Traced:
    import torch

    if not given:
        raise UsageError(
            f"{loaded.source} comes from Python, so its inputs must be named; give --input NAME=1x3x224x224"
        )
    module: nn.Module = loaded.program
    inputs, by_name = _in_forward_order(module, given)
    example = _example(inputs, samples)
    names = [spec.name for spec in inputs]
    # Before it runs for the first time: what observers have seen is part of a prepared model.
    call = module_call(module, inputs)
    lowered, found = lower_module(_copy(loaded, module))
    try:
        with plain_torch():
            answer = call([example[name] for name in names])
    except Exception as error:  # the person's forward may fail in any way
        raise ModelError(
            f"{loaded.source} cannot run on {_shapes(example)}: {type(error).__name__}: {error}; check the inputs' "
            f"names and shapes"
        ) from error
    outputs = _output_names(loaded, answer)
    dims = {size: torch.export.Dim(size) for spec in inputs for size in spec.shape if isinstance(size, str)}
    axes = [{i: dims[size] for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs]
    try:
        program = torch.export.export(
            lowered,
            () if by_name else tuple(example[name] for name in names),
            {name: example[name] for name in names} if by_name else None,
            dynamic_shapes=dict(zip(names, axes, strict=True)) if by_name else tuple(axes),
        )
    except Exception as error:  # torch.export raises whatever it meets in the person's code
        raise ModelError(f"{loaded.source} cannot be exported: {_export_complaint(error)}") from error

    _demand_named_axes(loaded, program, inputs)
    return _Traced(program, inputs, outputs, found)


def _copy(loaded: Loaded, module: nn.Module) -> nn.Module:
    """Copy a module, so that the original stays what the result is compared with."""
    import torch

    for part in module.modules():
        for name, value in list(vars(part).items()):
            # Hooks leave results of autograd behind, which cannot be copied.
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                setattr(part, name, value.detach())
    try:
        return copy.deepcopy(module)
    except Exception as error:  # modules may hold anything: locks, generators, open files
        raise ModelError(
            f"{loaded.source} cannot be copied, which lowering needs: {type(error).__name__}: {_beginning(error)}; "
            f"keep what is no part of the network out of the module"
        ) from error


_FIXED_AXIS = re.compile(r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_AT_LINE = re.compile(r"Caused by: \((\S+:\d+) in \w+\)")


def _export_complaint(error: Exception) -> str:
    """Say what torch.export stumbled over, and what to do: its own texts go on for pages about its inside."""
    text = str(error)
    if "data-dependent" in text:
        where = _AT_LINE.search(text)
        at = f" at {where[1]}" if where and "torch" not in where[1] and "_export" not in where[1] else ""
        return (
            f"its forward decides by the values in a tensor (if, while, .item(), int(...)){at}, and a graph has no "
            f"such decisions; compute both ways and choose by torch.where, or use torch.cond"
        )
    if fixed := _FIXED_AXIS.search(text):
        return (
            f"its forward fixes the axis {fixed[1]!r} to {fixed[2]}; give that axis the number {fixed[2]} instead of a "
            f"name, or reshape by -1"
        )
    return f"{type(error).__name__}: {_beginning(error)}; where an axis is at fault, give it a number instead of a name"


def _demand_named_axes(loaded: Loaded, program: ExportedProgram, inputs: Sequence[TensorSpec]) -> None:
    """Refuse a batch size that was fixed silently: a graph captured before keeps its sizes."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    for spec, name in zip(inputs, program.graph_signature.user_inputs, strict=True):
        for axis, (wanted, size) in enumerate(zip(spec.shape, values[name].shape, strict=True)):
            if isinstance(wanted, str) and isinstance(size, int):
                raise ModelError(
                    f"axis {axis} ({wanted}) of input {spec.name!r} of {loaded.source} is fixed to {size} in its "
                    f"graph; capture the graph with dynamic_shapes, or give the axis that number"
                )


def _adopt(loaded: Loaded, given: Sequence[TensorSpec] | None, samples: Samples) -> _Traced:
    """Take a program that was exported elsewhere; its shapes are fixed in it."""
    program: ExportedProgram = loaded.program
    declared = _program_inputs(program)
    inputs = _agreed(loaded, declared, given) if given else declared
    example = _example(inputs, samples)
    try:
        answer = program_call(program)([example[spec.name] for spec in inputs])
    except Exception as error:  # whatever its operators raise on inputs that they do not take
        raise ModelError(
            f"{loaded.source} cannot run on {_shapes(example)}: {type(error).__name__}: {_beginning(error)}"
        ) from error
    return _Traced(program, inputs, _output_names(loaded, answer))


def _in_forward_order(module: nn.Module, given: Sequence[TensorSpec]) -> tuple[tuple[TensorSpec, ...], bool]:
    """Return the inputs in the order of forward's arguments, and whether they are passed by name."""
    parameters = inspect.signature(module.forward).parameters
    order = [name for name, item in parameters.items() if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    by_name = {spec.name: spec for spec in given}
    if all(name in order for name in by_name):
        return tuple(by_name[name] for name in order if name in by_name), True
    # Where no name is forward's, the order counts; a mixture, or a name that is almost one, is a slip.
    unknown = [name for name in by_name if name not in order]
    slips = [name for name in unknown if difflib.get_close_matches(name, order, n=1, cutoff=_ALMOST)]
    if slips or len(unknown) < len(by_name):
        odd = (slips or unknown)[0]
        raise UsageError(
            f"forward has no argument {odd!r}{closest(odd, order)} (it has: {', '.join(order)}); name inputs as "
            f"forward does"
        )
    return tuple(given), False


def _example(inputs: Sequence[TensorSpec], samples: Samples) -> dict[str, Tensor]:
    """Return a batch to trace with: real samples, contiguous, and at least 2, as torch takes a size of 1 for fixed."""
    import torch

    fixed = [spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)]
    size = int(max(fixed)) if fixed else 2
    batch = samples.batch(0, min(size, samples.count))
    rows = np.arange(size) % len(next(iter(batch.values())))
    return {spec.name: torch.from_numpy(np.ascontiguousarray(batch[spec.name][rows])) for spec in inputs}


def _output_names(loaded: Loaded, answer: Any) -> tuple[str, ...]:
    """Name outputs: a dictionary's or data class's keys; output_0, output_1 … of a tuple; output, when alone."""
    import torch
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_flatten_with_path(answer)[0]
    names = []
    for path, leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise ModelError(
                f"{loaded.source} returns a {type(leaf).__name__} beside tensors; return tensors only (wrap the model)"
            )
        if leaf.is_complex():
            raise ModelError(
                f"{loaded.source} returns complex numbers, which no runtime takes; return torch.view_as_real of them"
            )
        steps = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", "")))) for step in path]
        name = "_".join(steps) or "output"
        names.append(f"output_{name}" if name[0].isdigit() else name)
    if not names:
        raise ModelError(f"{loaded.source} returns nothing; its forward must return tensors")
    return tuple(names)


def _converted(loaded: Loaded, program: ExportedProgram, traced: _Traced) -> ModelProto:
    import torch

    names = [spec.name for spec in traced.inputs]
    if clash := set(names) & set(traced.outputs):
        raise ModelError(f"{loaded.source} has inputs and outputs of the same name ({', '.join(clash)}); rename one")
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=translations(),
            opset_version=OPSET,
            input_names=names,
            output_names=list(traced.outputs),
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # the exporter raises whatever its operator functions meet
        raise ModelError(
            f"{loaded.source} cannot be written as ONNX: {type(error).__name__}: {_beginning(error)}"
        ) from error
    assert exported is not None
    graph: ModelProto = exported.model_proto
    _name_axes(graph, traced.inputs)
    return graph


def _name_axes(graph: ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Give dynamic axes the names that the person chose, also inside expressions such as 2*s40."""
    chosen: dict[str, str] = {}
    by_name = {spec.name: spec for spec in inputs}
    for value in graph.graph.input:
        for size, name in zip(value.type.tensor_type.shape.dim, by_name[value.name].shape, strict=True):
            if size.dim_param and isinstance(name, str):
                chosen.setdefault(size.dim_param, name)
    for value in [*graph.graph.input, *graph.graph.output]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda match: chosen.get(match[0], match[0]), size.dim_param)


def _program_inputs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    wanted = list(program.graph_signature.user_inputs)
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for name in wanted:
        value = values.get(name)
        if value is None or not hasattr(value, "shape"):
            raise ModelError(f"the exported program takes {name!r}, which is no tensor; export it with tensors only")
        shape = [
            size if isinstance(size, int) else "batch" if axis == 0 else str(size)
            for axis, size in enumerate(value.shape)
        ]
        specs.append(TensorSpec(name=str(name), dtype=str(value.dtype).removeprefix("torch."), shape=tuple(shape)))  # type: ignore[arg-type]  # a type that we do not carry is refused when the graph is read
    return tuple(specs)


def _agreed(loaded: Loaded, declared: Sequence[TensorSpec], given: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the declared inputs with the person's names for their axes, in the declared order.

    Names are matched; where none matches, the order counts.
    """
    known = [spec.name for spec in declared]
    if len(given) != len(declared):
        raise UsageError(
            f"{loaded.source} has the inputs {', '.join(known)}; {len(given)} were given ({_names(given)})"
        )
    matching = [spec.name in known for spec in given]
    if any(matching) and not all(matching):
        odd = next(spec.name for spec in given if spec.name not in known)
        raise UsageError(f'{loaded.source} has no input "{odd}"{closest(odd, known)} (it has: {", ".join(known)})')
    by_name = {spec.name: spec for spec in given}
    pairs = zip(declared, (by_name[name] for name in known) if all(matching) else given, strict=True)
    for own, wished in pairs:
        same_rank = len(own.shape) == len(wished.shape)
        if not same_rank or any(isinstance(a, int) and a != b for a, b in zip(own.shape, wished.shape, strict=True)):
            raise UsageError(
                f'input "{own.name}" of {loaded.source} has shape {_shape(own)}, which is fixed in the file, and '
                f"{_shape(wished)} was given; give the file's shape"
            )
        if own.dtype != wished.dtype:
            raise UsageError(f'input "{own.name}" of {loaded.source} is {own.dtype}, and {wished.dtype} was given')
    return tuple(given) if not all(matching) else tuple(by_name[name] for name in known)


def _real_inputs(graph: ModelProto) -> list[Any]:
    """Return the inputs that are fed: old files list their weights as inputs too."""
    constants = {item.name for item in graph.graph.initializer}
    return [value for value in graph.graph.input if value.name not in constants]


def _export_onnx(loaded: Loaded, given: Sequence[TensorSpec] | None, samples: Samples, out: Path) -> Model:
    import onnx

    original: ModelProto = loaded.program
    graph = onnx.ModelProto()
    graph.CopyFrom(original)
    fed = _real_inputs(graph)
    del graph.graph.input[:]
    graph.graph.input.extend(fed)
    if opset_of(graph) < _OLDEST_OPSET:
        try:
            graph = onnx.version_converter.convert_version(graph, OPSET)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{loaded.source} uses opset {opset_of(original)} and cannot be upgraded to {OPSET}: "
                f"{_beginning(error)}; export it again with opset {_OLDEST_OPSET} or newer"
            ) from error
    declared = specs_of(graph.graph.input)
    inputs = declared
    if given:
        inputs = _agreed(loaded, declared, given)
        if [spec.name for spec in inputs] != [spec.name for spec in declared]:
            odd = next((spec.name for spec in inputs if spec.name not in {own.name for own in declared}), "")
            raise UsageError(
                f"{loaded.source} has the inputs {_names(declared)}, and {_names(given)} were given"
                f"{closest(odd, [spec.name for spec in declared])}"
            )
    for value, spec in zip(graph.graph.input, inputs, strict=True):
        for size, wanted in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(wanted, str):
                size.dim_param = wanted
            else:
                size.dim_value = wanted
    graph, quantization = absorb(graph)
    write_graph(graph, out)
    model = _model(loaded, out, inputs, found_in_onnx(quantization), quantization)
    return _proven(loaded, model, graph, samples, loaded.source)


def _demand_faithful(loaded: Loaded, model: Model, fidelity: Fidelity, own_noise: Callable[[], Fidelity]) -> None:
    allowed = max([MAX_RELATIVE, *(_MAX_RELATIVE_SHORT.get(item.kind, 0.0) for item in model.kinds)])
    quantization = model.quantization
    has_grids = quantization is not None and bool(quantization.activations or quantization.dynamic)
    for output in fidelity.outputs:
        if output.max_relative <= allowed:
            continue
        if has_grids and (output.sqnr_db is None or output.sqnr_db >= _MIN_SQNR_DB):
            continue
        if has_grids and output.sqnr_db is not None and output.sqnr_db >= _LEAST_SQNR_DB:
            own = {one.output: one.sqnr_db for one in own_noise().outputs}[output.output]
            if own is not None and output.sqnr_db >= own - _FARTHER_DB:
                continue
        ratio = "" if output.sqnr_db is None else f", {output.sqnr_db:.1f} dB"
        raise FidelityError(
            f"the ONNX form of {loaded.source} differs from it in output {output.output!r} by {output.max_abs:.3g} "
            f"({output.max_relative:.2g} of its largest value, {allowed:g} is allowed{ratio}) on {fidelity.samples} "
            f"samples of {fidelity.sample_source}; look for randomness or training-mode layers in forward"
        )


def _model(
    loaded: Loaded,
    out: Path,
    inputs: Sequence[TensorSpec],
    found: tuple[FoundCompression, ...],
    quantization: SourceQuantization | None,
) -> Model:
    graph = read_graph(out)
    layouts = {spec.name: spec.layout for spec in inputs}
    return Model(
        path=str(out),
        sha256=sha256_file(out),
        source=loaded.source,
        weights_sha256=loaded.weights_sha256,
        opset=opset_of(graph),
        inputs=tuple(
            TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape, layout=layouts.get(spec.name, ""))
            for spec in specs_of(graph.graph.input)
        ),
        outputs=specs_of(graph.graph.output),
        compression=compression_report(out, table=quantization),
        kinds=found,
        quantization=quantization,
    )


def _beginning(error: BaseException) -> str:
    """Return the first lines of an error; torch's go on for pages."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:3])


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {'×'.join(str(size) for size in tensor.shape)}" for name, tensor in tensors.items())


def _shape(spec: TensorSpec) -> str:
    return "×".join(str(size) for size in spec.shape)


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)
