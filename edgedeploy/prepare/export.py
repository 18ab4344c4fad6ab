"""A loaded model becomes canonical fp32 ONNX that is shown, on samples, to compute what its source computes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.documents import closest
from edgedeploy.errors import FidelityError, ModelError, UsageError
from edgedeploy.prepare.compression import compression_report
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.fidelity import compare
from edgedeploy.prepare.graph import Runner, opset_of, specs_of, stamp_oldest, write_graph
from edgedeploy.prepare.load import Loaded
from edgedeploy.prepare.silence import silenced
from edgedeploy.records.model import Fidelity, Model, TensorSpec
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
# Enough to meet every branch that data can choose between; more costs minutes on large models.
FIDELITY_SAMPLES = 128


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

    with torch.no_grad(), silenced("export"):
        traced = _trace_module(loaded, inputs, samples) if loaded.kind == "module" else _adopt(loaded, inputs, samples)
        graph = _converted(loaded, traced)
    write_graph(graph, out)
    with torch.no_grad(), silenced("comparison with PyTorch"):
        fidelity = compare(
            traced.reference,
            Runner(out),
            samples.batches(traced.inputs, FIDELITY_SAMPLES),
            names=("PyTorch", "fp32 ONNX"),
            sample_source=samples.name,
        )
    _demand_faithful(loaded, fidelity)
    return _model(loaded, out, traced.inputs, fidelity)


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
        reference: named inputs → named outputs, computed by PyTorch.
    """

    program: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    reference: Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def _trace_module(loaded: Loaded, given: Sequence[TensorSpec] | None, samples: Samples) -> _Traced:
    import torch

    if not given:
        raise UsageError(
            f"{loaded.source} comes from Python, so its inputs must be named; give --input NAME=1x3x224x224"
        )
    module: nn.Module = loaded.program.eval()
    inputs, by_name = _in_forward_order(module, given)
    example = _example(inputs, samples)
    names = [spec.name for spec in inputs]

    def call(tensors: Mapping[str, Tensor]) -> Any:
        ordered = [tensors[name] for name in names]
        return module(**dict(zip(names, ordered, strict=True))) if by_name else module(*ordered)

    try:
        answer = call(example)
    except Exception as error:  # the person's forward may fail in any way
        raise ModelError(
            f"{loaded.source} cannot run on {_shapes(example)}: {type(error).__name__}: {error}; check the inputs' "
            f"names and shapes"
        ) from error
    outputs = _output_names(loaded, answer)
    bake(module)
    dims = {size: torch.export.Dim(size) for spec in inputs for size in spec.shape if isinstance(size, str)}
    axes = [{i: dims[size] for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs]
    try:
        program = torch.export.export(
            module,
            () if by_name else tuple(example[name] for name in names),
            {name: example[name] for name in names} if by_name else None,
            dynamic_shapes=dict(zip(names, axes, strict=True)) if by_name else tuple(axes),
        )
    except Exception as error:  # torch.export raises whatever it meets in the person's code
        raise ModelError(
            f"{loaded.source} cannot be exported: {type(error).__name__}: {_beginning(error)}; where an axis is at "
            f"fault, give it a number instead of a name"
        ) from error

    def reference(batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = {name: torch.from_numpy(batch[name]) for name in names}
        return {name: leaf.numpy() for name, leaf in zip(outputs, _leaves(call(tensors)), strict=True)}

    return _Traced(program, inputs, outputs, reference)


def _adopt(loaded: Loaded, given: Sequence[TensorSpec] | None, samples: Samples) -> _Traced:
    """Take a program that was exported elsewhere; its shapes are fixed in it."""
    import torch
    from torch.utils import _pytree as pytree

    program: ExportedProgram = loaded.program
    declared = _program_inputs(program)
    inputs = _agreed(loaded, declared, given) if given else declared
    module = program.module()
    in_spec = program.call_spec.in_spec

    def call(tensors: Sequence[Tensor]) -> Any:
        arguments, keywords = pytree.tree_unflatten(list(tensors), in_spec)
        return module(*arguments, **keywords)

    example = _example(inputs, samples)
    try:
        answer = call([example[spec.name] for spec in inputs])
    except Exception as error:  # whatever its operators raise on inputs that they do not take
        raise ModelError(
            f"{loaded.source} cannot run on {_shapes(example)}: {type(error).__name__}: {_beginning(error)}"
        ) from error
    outputs = _output_names(loaded, answer)

    def reference(batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        answer = call([torch.from_numpy(batch[spec.name]) for spec in inputs])
        return {name: leaf.numpy() for name, leaf in zip(outputs, _leaves(answer), strict=True)}

    return _Traced(program, inputs, outputs, reference)


def bake(module: nn.Module) -> None:
    """Make pruning masks permanent: weight = original * mask is computed once, and the hook that did it is removed.

    Left in place, the mask of a large layer is exported as a multiplication at run time, which also keeps batch
    normalisation from being folded.
    """
    from torch.nn.utils import prune

    for part in module.modules():
        hooks = [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
        for hook in hooks:
            prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]  # torch has no types there


def _in_forward_order(module: nn.Module, given: Sequence[TensorSpec]) -> tuple[tuple[TensorSpec, ...], bool]:
    """Return the inputs in the order of forward's arguments, and whether they are passed by name."""
    parameters = inspect.signature(module.forward).parameters
    order = [name for name, item in parameters.items() if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    by_name = {spec.name: spec for spec in given}
    if all(name in order for name in by_name):
        return tuple(by_name[name] for name in order if name in by_name), True
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
        steps = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", "")))) for step in path]
        name = "_".join(steps) or "output"
        names.append(f"output_{name}" if name[0].isdigit() else name)
    if not names:
        raise ModelError(f"{loaded.source} returns nothing; its forward must return tensors")
    return tuple(names)


def _leaves(answer: Any) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    return [leaf.detach().contiguous() for leaf in pytree.tree_leaves(answer)]


def _converted(loaded: Loaded, traced: _Traced) -> ModelProto:
    import torch

    names = [spec.name for spec in traced.inputs]
    if clash := set(names) & set(traced.outputs):
        raise ModelError(f"{loaded.source} has inputs and outputs of the same name ({', '.join(clash)}); rename one")
    try:
        exported = torch.onnx.export(
            traced.program,
            dynamo=True,
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
            raise UsageError(f"{loaded.source} has the inputs {_names(declared)}, and {_names(given)} were given")
    for value, spec in zip(graph.graph.input, inputs, strict=True):
        for size, wanted in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(wanted, str):
                size.dim_param = wanted
            else:
                size.dim_value = wanted
    write_graph(graph, out)
    reference = onnx.ModelProto()
    reference.CopyFrom(original)
    stamp_oldest(reference)
    fidelity = compare(
        Runner(reference.SerializeToString()),
        Runner(out),
        samples.batches(inputs, FIDELITY_SAMPLES),
        names=(loaded.source, "fp32 ONNX"),
        sample_source=samples.name,
    )
    _demand_faithful(loaded, fidelity)
    return _model(loaded, out, inputs, fidelity)


def _demand_faithful(loaded: Loaded, fidelity: Fidelity) -> None:
    for output in fidelity.outputs:
        if output.max_relative > MAX_RELATIVE:
            raise FidelityError(
                f"the ONNX form of {loaded.source} differs from it in output {output.output!r} by {output.max_abs:.3g} "
                f"({output.max_relative:.2g} of its largest value, {MAX_RELATIVE:g} is allowed) on {fidelity.samples} "
                f"samples of {fidelity.sample_source}; look for randomness or training-mode layers in forward"
            )


def _model(loaded: Loaded, out: Path, inputs: Sequence[TensorSpec], fidelity: Fidelity) -> Model:
    from edgedeploy.prepare.graph import read_graph

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
        compression=compression_report(out),
        fidelity=(fidelity,),
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
