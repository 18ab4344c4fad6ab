"""A float ONNX graph becomes a float .tflite, and is shown to compute the same.

Which tensor of the file is which of the graph is found by what they hold for one random input, never by name: the
converter renames, moves and fuses, and its own report of that has gaps. The same run finds a wrong conversion, and
where it begins.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.backends.child import signal_name
from edgedeploy.backends.tflite.clamps import fuse_clamps
from edgedeploy.backends.tflite.flatbuffer import FlatGraph, inverse, transposition
from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.errors import CompileError
from edgedeploy.records.artifact import Port

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

_BACKEND = "tflite"
_SCRIPT = Path(__file__).parent / "convert.py"
_LIMIT_S = 1800.0
_LAST_LINES = 3
# Lengths of free axes in the trial: the first one is the batch, and 2 shows whether it is really free.
_TRIAL_BATCH, _TRIAL_LENGTH = 2, 24
# Of the largest value in a tensor. Two float32 programs differ by 1e-6 per layer; a wrong axis or pad by more than 0.1.
_TOLERANCE = 1e-3
_MAX_PERMUTED_RANK = 5


@dataclass(frozen=True, slots=True)
class Converted:
    """A float .tflite and how it relates to its ONNX graph.

    Attributes:
        graph: the file, opened.
        tensors: ONNX tensor → the tensors of the file that hold its values, in whatever order of axes.
        ports: the model's input or output → where the file has it.
        is_batch_fixed: whether a batch that is free in the model had to be fixed at 1.
    """

    graph: FlatGraph
    tensors: dict[str, tuple[int, ...]]
    ports: dict[str, Port]
    is_batch_fixed: bool = False


def convert(
    source: ModelProto,
    prepare: Callable[[ModelProto], ModelProto],
    tools: ToolEnvironment,
    *,
    rounded: Iterable[str] = (),
    keep_layout: bool = False,
    progress: Callable[[str], None] = lambda _text: None,
) -> Converted:
    """Convert a graph and check the result against it.

    A free batch is converted as 1 and freed afterwards: told that it is free, the converter computes the pads of
    convolutions in each inference. Where the trial, on two samples, shows that a graph does not bear it, it is told;
    and where that is of no use either (recurrent layers, which have time as first axis inside), the batch stays 1.

    Args:
        source: what the file has to compute: float32, without Q/DQ.
        prepare: says the same in the words that the converter understands.
        tools: the converter's environment.
        rounded: tensors that the file must have, because they will be rounded.
        keep_layout: inputs and outputs keep the order of their axes.
        progress: receives a line while the environment is made.

    Raises:
        CompileError: the converter refuses the graph, dies, or makes something else of it.
    """
    inputs = _trial_inputs(source)
    expected = _run_onnx(source, inputs)
    trial = _Trial(source, inputs, expected, tools.python(progress), frozenset(rounded), keep_layout)
    single = with_batch(source, 1)
    if single is None:
        return trial.convert(prepare(source))
    try:
        return trial.convert(prepare(single), frees_batch=True)
    except _NotThisWay:
        pass
    try:
        return trial.convert(prepare(source))
    except CompileError:
        fixed = convert(single, prepare, tools, rounded=rounded, keep_layout=keep_layout)
        return replace(fixed, is_batch_fixed=True)


def with_batch(source: ModelProto, batch: int) -> ModelProto | None:
    """Return a graph with the free first axis of its inputs fixed, None where none is free, or another axis is too."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(source)
    constants = {item.name for item in model.graph.initializer}
    axes = [value.type.tensor_type.shape.dim for value in model.graph.input if value.name not in constants]
    free = {
        (place, axis.dim_param) for shape in axes for place, axis in enumerate(shape) if not axis.HasField("dim_value")
    }
    if len(free) != 1 or {place for place, _ in free} != {0}:
        return None
    symbol = next(iter(free))[1]
    for shape in axes:
        if shape and not shape[0].HasField("dim_value"):
            shape[0].dim_value = batch
    for value in model.graph.output:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == symbol and symbol:
                axis.dim_value = batch
            elif not axis.HasField("dim_value"):
                value.type.tensor_type.ClearField("shape")
                break
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)


class _NotThisWay(CompileError):
    """A way to convert a graph does not do for it; there is another one."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """A graph to convert, and what it computes for one random input.

    Attributes:
        expected: each tensor of the graph, in the order of its nodes.
        interpreter: the Python that has the converter.
        rounded: tensors that must be found in the file.
    """

    source: ModelProto
    inputs: dict[str, NDArray[Any]]
    expected: dict[str, NDArray[Any]]
    interpreter: Path
    rounded: frozenset[str]
    keep_layout: bool

    def convert(self, prepared: ModelProto, *, frees_batch: bool = False) -> Converted:
        """Convert a graph, run it and compare."""
        keep = [value.name for value in prepared.graph.input if len(value.type.tensor_type.shape.dim) > 2]
        with tempfile.TemporaryDirectory(prefix="edgedeploy-") as name:
            folder = Path(name)
            (folder / "model.onnx").write_bytes(prepared.SerializeToString(deterministic=True))
            np.savez(folder / "inputs.npz", allow_pickle=False, **self.inputs)
            job = {
                "folder": name,
                "keep": keep,
                "tflite": str(folder / "float.tflite"),
                "inputs": str(folder / "inputs.npz"),
                "tensors": str(folder / "tensors.npz"),
                "error": str(folder / "error.txt"),
            }
            _child(self.interpreter, {**job, "steps": ["convert"]}, folder, prepared)
            graph = FlatGraph((folder / "float.tflite").read_bytes(), "the converted model")
            _refuse_custom(graph, prepared)
            if frees_batch:
                _free_batch(graph)
            (folder / "float.tflite").write_bytes(graph.packed())
            try:
                _child(self.interpreter, {**job, "steps": ["observe"]}, folder, prepared)
                with np.load(folder / "tensors.npz", allow_pickle=False) as file:
                    held = {int(index): file[index] for index in file.files}
                known = _match({**self.inputs, **self.expected}, held, graph)
                _demand_equal(self.source, self.expected, held, graph, known)
            except CompileError as error:
                if frees_batch:
                    raise _NotThisWay(str(error), backend=_BACKEND) from error
                raise
        fused = fuse_clamps(graph, {index for name in self.rounded for index in known.get(name, ())})
        held |= {chain[0]: held[tensor] for tensor, chain in fused.items()}
        known = _after(fused, known)
        ports = _ports(self.source, graph, self.expected, held, keep_layout=self.keep_layout)
        return Converted(graph, known, ports)


def _free_batch(graph: FlatGraph) -> None:
    """Free the first axis of all that is computed, in a graph whose batch is 1.

    A RESHAPE has the lengths of its result as a constant; its first one is left to be what remains.
    """
    computed = {int(index) for operator in graph.operators for index in operator.outputs}
    for index in computed | {int(index) for index in graph.graph.inputs}:
        shape = graph.shape(index)
        if shape and (shape[0] == 1 or index not in map(int, graph.graph.inputs)):
            graph.tensors[index].shapeSignature = np.asarray([-1, *shape[1:]], np.int32)
    for operator in graph.operators:
        if graph.operator_name(operator) != "RESHAPE" or len(operator.inputs) < 2:
            continue
        lengths = graph.constant(int(operator.inputs[1]))
        made = graph.shape(int(operator.outputs[0]))
        if lengths is None or not made or graph.constant(int(operator.inputs[0])) is not None:
            continue
        values = np.asarray([-1, *made[1:]], np.int32)
        name = f"{graph.name(int(operator.inputs[1]))}/free"
        operator.inputs[1] = graph.add_tensor(name, "int32", int(operator.inputs[1]), values=values)
        if operator.builtinOptions is not None:
            operator.builtinOptions.newShape = values


def _trial_inputs(source: ModelProto) -> dict[str, NDArray[Any]]:
    from onnx import helper

    random = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    constants = {item.name for item in source.graph.initializer}
    for value in source.graph.input:
        if value.name in constants:
            continue
        shape = _trial_shape(value)
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        if dtype.kind == "f":
            found[value.name] = random.normal(size=shape).astype(dtype)
        else:  # indices and switches: 0 and 1 are valid nearly everywhere
            found[value.name] = random.integers(0, 2, size=shape).astype(dtype)
    return found


def _trial_shape(value: ValueInfoProto) -> tuple[int, ...]:
    free = iter([_TRIAL_BATCH])
    return tuple(
        axis.dim_value if axis.HasField("dim_value") else next(free, _TRIAL_LENGTH)
        for axis in value.type.tensor_type.shape.dim
    )


def _run_onnx(source: ModelProto, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return what each tensor of a graph holds, in the order of its nodes."""
    import onnx
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(source)
    names = [name for node in source.graph.node for name in node.output if name]
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        order = [item.name for item in session.get_outputs()]
        values = dict(zip(order, session.run(order, dict(inputs)), strict=True))
    except Exception as error:  # onnxruntime has one exception class for each status code, and none in common
        raise CompileError(
            f"the model could not be tried on random inputs: {str(error).strip().splitlines()[0]}",
            backend=_BACKEND,
            hint="give its inputs fixed lengths with which it can run",
        ) from error
    return {name: np.asarray(values[name]) for name in names if isinstance(values[name], np.ndarray)}


def _child(interpreter: Path, job: Mapping[str, Any], folder: Path, prepared: ModelProto) -> None:
    step = job["steps"][0]
    task, log = folder / f"{step}.json", folder / f"{step}.log"
    task.write_text(json.dumps(dict(job)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TQDM_DISABLE": "1"}
    with log.open("wb") as stream:
        try:
            code = subprocess.run(
                [str(interpreter), "-I", str(_SCRIPT), str(task)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=_LIMIT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise CompileError(
                f"the converter had not finished after {_LIMIT_S / 60:.0f} min",
                backend=_BACKEND,
                hint="report the model",
            ) from error
    what = "onnx2tf" if step == "convert" else "a trial run of the converted model"
    if code < 0:
        raise CompileError(f"{what} was ended by {signal_name(-code)}", backend=_BACKEND, hint="report the model")
    if code != 0:
        said = Path(job["error"])
        text = said.read_text(encoding="utf-8") if said.is_file() else _last_lines(log)
        node = _named_in(text, prepared.graph.node)
        raise CompileError(
            f"{what} failed: {' '.join(text.split())[:600]}",
            backend=_BACKEND,
            node=node.name if node is not None else "",
            op=node.op_type if node is not None else "",
            hint="replace that operator in the model, or report it",
        )
    result = Path(job["tflite"] if step == "convert" else job["tensors"])
    if not result.is_file():
        raise CompileError(f"{what} said nothing and wrote no file", backend=_BACKEND, hint="report the model")


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:]) or "it said nothing"


def _named_in(text: str, nodes: Iterable[NodeProto]) -> NodeProto | None:
    """Return the node whose name an error mentions, the longest where several fit."""
    whole = r"(?<![\w./]){}(?![\w/])"  # "count" is not named where "max_trip_count" is
    named: list[NodeProto] = [
        node for node in nodes if node.name and re.search(whole.format(re.escape(node.name)), text)
    ]
    return max(named, key=lambda node: len(node.name), default=None)


def _refuse_custom(graph: FlatGraph, prepared: ModelProto) -> None:
    for operator in graph.operators:
        if not graph.is_custom(operator):
            continue
        name = graph.operator_name(operator)
        kind = name.removeprefix("ONNX_").replace("_", "").lower()
        nodes = [node for node in prepared.graph.node if node.op_type.lower() == kind]
        raise CompileError(
            f"TFLite has no such operator; the converter wrote a custom one ({name}), which no runtime has",
            backend=_BACKEND,
            node=nodes[0].name if nodes else graph.name(int(operator.outputs[0])),
            op=nodes[0].op_type if nodes else name,
            hint="replace it in the model by standard operators",
        )


def _match(
    expected: Mapping[str, NDArray[Any]], held: Mapping[int, NDArray[Any]], graph: FlatGraph
) -> dict[str, tuple[int, ...]]:
    """Return for each ONNX tensor the tensors of the file that hold the same values in some order."""
    prints: dict[int, list[tuple[int, NDArray[Any]]]] = {}
    for index, values in held.items():
        # Kernels have tensors of their own, behind those of the file.
        if values.dtype.kind == "f" and index < len(graph.tensors):
            prints.setdefault(values.size, []).append((index, np.sort(values, axis=None)))
    found = {}
    for name, values in expected.items():
        if values.dtype.kind != "f" or not values.size:
            continue
        ordered = np.sort(values, axis=None)
        alike = [index for index, other in prints.get(values.size, ()) if _is_close(ordered, other)]
        named = [index for index in alike if graph.name(index) == name]
        # One single value, as after a ReLU that nothing passes, may be anybody's: there the name has to do.
        found[name] = tuple(named if named and ordered[0] == ordered[-1] else alike)
    return found


def _after(fused: Mapping[int, tuple[int, ...]], known: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return which tensors hold what, after some of them hold what was only clamped from them before."""
    changed = {index for chain in fused.values() for index in chain}
    return {
        name: tuple(new for old in places if old not in changed for new in fused.get(old, (old,)))
        for name, places in known.items()
    }


def _is_close(expected: NDArray[Any], got: NDArray[Any]) -> bool:
    """Whether two arrays agree to a share of the largest finite value, with NaN and infinities in the same places.

    An infinity also agrees with what TFLite writes for it, the largest float32.
    """
    if expected.dtype.kind != "f":
        return bool(np.array_equal(expected, got))
    finite = np.isfinite(expected)
    if not finite.all():
        limit = np.finfo(np.float32).max
        same = (expected == got) | (np.isnan(expected) & np.isnan(got)) | (np.sign(expected) * limit == got)
        if not same[~finite].all():
            return False
        expected, got = expected[finite], got[finite]
    if not expected.size:
        return True
    scale = float(np.abs(expected).max())
    return bool(np.abs(expected - got).max() <= _TOLERANCE * scale + 1e-30)


def _demand_equal(
    source: ModelProto,
    expected: Mapping[str, NDArray[Any]],
    held: Mapping[int, NDArray[Any]],
    graph: FlatGraph,
    known: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise where an output differs, naming the node from which on nothing is right."""
    names = [value.name for value in source.graph.output]
    if len(names) != len(graph.graph.outputs):
        raise CompileError(
            f"the converted model has {len(graph.graph.outputs)} outputs, the model {len(names)}",
            backend=_BACKEND,
            hint="report the model",
        )
    for name, index in zip(names, graph.graph.outputs, strict=True):
        if name not in expected:  # an output that is an input or a constant
            continue
        if next(_orders(expected[name], held[int(index)]), None) is None:
            node = _first_wrong(source, known, expected)
            raise CompileError(
                f"the converted model computes something else than the model (output {name!r})",
                backend=_BACKEND,
                node=node.name if node is not None else "",
                op=node.op_type if node is not None else "",
                hint="replace that operator in the model, or report it",
            )


def _orders(expected: NDArray[Any], got: NDArray[Any]) -> Iterator[tuple[int, ...]]:
    """Yield the orders of axes in which a tensor of the file is the model's, the model's own first."""
    rank = expected.ndim
    if rank == 0 and got.shape == (1,) and _is_close(expected.reshape(1), got):
        yield ()  # the converter gives a single number an axis
    if got.ndim != rank:
        return
    own = tuple(range(rank))
    last = (0, *range(2, rank), 1) if rank > 2 else own
    rest = permutations(own) if 2 < rank <= _MAX_PERMUTED_RANK else iter(())
    for order in dict.fromkeys((own, last, *rest)):
        turned = expected.transpose(order)
        if turned.shape == got.shape and _is_close(turned, got):
            yield order


def _first_wrong(
    source: ModelProto, known: Mapping[str, tuple[int, ...]], expected: Mapping[str, NDArray[Any]]
) -> NodeProto | None:
    """Return the first node whose inputs the file has and from whose outputs on it has nothing."""
    constants = {item.name for item in source.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in source.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    right: dict[str, bool] = {}
    for node in reversed(source.graph.node):
        for name in node.output:
            # What is fused away is right when all that is made of it is.
            later = [item for reader in readers.get(name, ()) for item in reader.output]
            is_float = name in expected and expected[name].dtype.kind == "f"
            right[name] = bool(known.get(name)) or (bool(later) and all(right.get(item, False) for item in later))
            right[name] |= not is_float and not later
    nodes: list[NodeProto] = list(source.graph.node)
    for node in nodes:
        if all(right.get(name, True) or name in constants for name in node.input) and not all(
            right.get(name, True) for name in node.output
        ):
            return node
    return None


def _ports(
    source: ModelProto,
    graph: FlatGraph,
    expected: Mapping[str, NDArray[Any]],
    held: Mapping[int, NDArray[Any]],
    *,
    keep_layout: bool,
) -> dict[str, Port]:
    """Say where inputs and outputs are, after leaving turns of axes to whoever feeds and reads the model."""
    ports = {}
    constants = {item.name for item in source.graph.initializer}
    names = [value.name for value in source.graph.input if value.name not in constants]
    places = {graph.name(int(index)): int(index) for index in graph.graph.inputs}
    for name in names:
        if name not in places:
            raise CompileError(
                f"the converted model has no input {name!r} (it has {sorted(places)})",
                backend=_BACKEND,
                hint="an input that nothing reads must be removed from the model",
            )
        order = () if keep_layout else _drop_first_turn(graph, places[name])
        ports[name] = _port(name, order)
    for value, index in zip(source.graph.output, [int(i) for i in graph.graph.outputs], strict=True):
        own = tuple(range(held[index].ndim))
        order = next(_orders(expected[value.name], held[index]), own) if value.name in expected else own
        place = index
        if keep_layout and order != own:
            place, order = _turn_back(graph, index, order), own
        elif not keep_layout and order == own:
            place, order = _drop_last_turn(graph, index, own)
        ports[value.name] = _port(graph.name(place), order)
    return ports


def _port(tensor: str, order: tuple[int, ...]) -> Port:
    if order == tuple(range(len(order))):
        return Port(tensor=tensor)
    letters = "NCHW" if len(order) == 4 else "NCDHW" if len(order) == 5 else "NCW" if len(order) == 3 else ""
    return Port(tensor=tensor, layout="".join(letters[axis] for axis in order) if letters else "", permutation=order)


def _drop_first_turn(graph: FlatGraph, index: int) -> tuple[int, ...]:
    """Let an input enter in the order of axes that all its readers turn it to first."""
    readers = graph.readers().get(index, [])
    orders = {transposition(graph, reader) for reader in readers}
    order = orders.pop() if len(orders) == 1 else None
    made = {int(reader.outputs[0]) for reader in readers}
    if order is None or made & {int(i) for i in graph.graph.outputs}:
        return ()
    first = min(made)
    graph.operators = [operator for operator in graph.operators if operator not in readers]
    for operator in graph.operators:
        operator.inputs = np.asarray([first if int(i) in made else int(i) for i in operator.inputs], np.int32)
    graph.tensors[first].name = graph.tensors[index].name
    graph.tensors[index].name += b"/turned"
    graph.rename_ports({index: first})
    return order


def _drop_last_turn(graph: FlatGraph, index: int, own: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Let an output leave in the order of axes that it has before its last turn, if nothing reads the turned one."""
    maker: Any = graph.makers().get(index)
    order = transposition(graph, maker) if maker is not None else None
    if order is None or graph.readers().get(index):
        return index, own
    before = int(maker.inputs[0])
    taken = {int(i) for i in (*graph.graph.inputs, *graph.graph.outputs)}
    if before in taken or graph.constant(before) is not None:
        return index, own
    graph.operators = [operator for operator in graph.operators if operator is not maker]
    graph.tensors[before].name, graph.tensors[index].name = graph.tensors[index].name, graph.tensors[before].name
    graph.rename_ports({index: before})
    return before, inverse(order)


def _turn_back(graph: FlatGraph, index: int, order: tuple[int, ...]) -> int:
    """Put a TRANSPOSE behind an output, so that it has the model's order of axes."""
    back = inverse(order)
    turned = graph.add_tensor(f"{graph.name(index)}/model", graph.dtype(index), index)
    graph.tensors[turned].shape = np.asarray([graph.shape(index)[axis] for axis in back], np.int32)
    graph.tensors[turned].shapeSignature = np.asarray([graph.signature(index)[axis] for axis in back], np.int32)
    how = graph.add_tensor(f"{graph.name(index)}/order", "int32", index, values=np.asarray(back, np.int32))
    operator = graph.operator("TRANSPOSE", [index, how], [turned])
    graph.operators.append(operator)
    graph.tensors[index].name, graph.tensors[turned].name = graph.tensors[turned].name, graph.tensors[index].name
    graph.rename_ports({index: turned})
    return turned
