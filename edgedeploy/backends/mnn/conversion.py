"""Runs MNN's converter and runtime in a child; however that ends, it is a file or a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedeploy.backends.child import run_script
from edgedeploy.errors import CompileError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

SCRIPT = Path(__file__).parent / "convert.py"
# A conversion of 20 MB takes half a second on one core; what takes this long does not end.
TIME_LIMIT_S = 600.0
# To convert one node takes 50 ms; the search for a culprit ends after so many kinds of operator.
_NODE_LIMIT_S = 30.0
_MOST_KINDS = 60
_SUCCESS = "Converted Success!"
_NOT_SUPPORTED = re.compile(r"These Op Not Support:\s*(?P<names>[^\n]*)")
# What the converter prints whether or not anything is wrong.
_CHATTER = re.compile(
    r"^(The device supports|Start to|\[[\d:]+\] :4[67]: ONNX Model|inputTensors|outputTensors|Don't has bizCode|"
    r"Converted|True|False|MNN use|CPU Group|.*has empty input, the index)"
)
_NO_KERNEL_HINT = "replace that operator in the model, or build for another back end"


@dataclass(frozen=True, slots=True)
class Executed:
    """What the runtime did with a file.

    Attributes:
        operators: name and type of each operator that it executed, in order.
        inputs: name → sizes that it ran with.
        outputs: name → sizes.
    """

    operators: tuple[tuple[str, str], ...]
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]


def convert(graph: ModelProto, folder: Path, options: Sequence[str], *, limit_s: float | None = None) -> bytes:
    """Convert a float ONNX graph to the bytes of a .mnn file.

    Args:
        graph: what to convert.
        folder: where files of the conversion are put; the converter writes into it too.
        options: further words of the converter's command line.
        limit_s: seconds after which it is ended.

    Raises:
        CompileError: whatever went wrong, naming the operator where it can be found.
    """
    import onnx

    source, made = folder / "model.onnx", folder / "model.mnn"
    onnx.save(graph, str(source))
    made.unlink(missing_ok=True)
    words = ["-f", "ONNX", "--modelFile", source.name, "--MNNModel", made.name, "--bizCode", "edgedeploy", *options]
    ended = _child({"do": "convert", "arguments": words}, folder, limit_s or TIME_LIMIT_S)
    if found := _NOT_SUPPORTED.search(ended.said):
        raise _not_supported(found["names"], graph)
    if ended.how or ended.result is None:
        raise _crashed(ended.how or "it ended without an answer", ended.said, graph, folder)
    if not ended.result["answer"] or _SUCCESS not in ended.said or not made.is_file():
        raise CompileError(
            f"its converter gave up: {_last_words(ended.said) or 'it did not say why'}",
            backend="mnn",
            hint="check that the file is a plain ONNX model",
        )
    return made.read_bytes()


def run_once(
    file: Path, shapes: Mapping[str, Sequence[int]], folder: Path, *, limit_s: float | None = None
) -> Executed:
    """Load a .mnn file and run it on zeros.

    Args:
        file: the .mnn.
        shapes: input name → sizes; an open axis of an input without an entry becomes 1.
        folder: for the job's files.
        limit_s: seconds after which it is ended.

    Raises:
        CompileError: the runtime cannot load or run it.
    """
    job = {"do": "run", "file": str(file.resolve()), "shapes": {name: list(size) for name, size in shapes.items()}}
    ended = _child(job, folder, limit_s or TIME_LIMIT_S)
    if ended.how or ended.result is None:
        raise CompileError(
            f"the file was written, but the runtime cannot run it: {ended.how or 'it gave no answer'}"
            f"{_also(_last_words(ended.said))}",
            backend="mnn",
            hint="simplify the model around what it names, or build for another back end",
        )
    return Executed(
        tuple((name, kind) for name, kind in ended.result["executed"]),
        {name: tuple(sizes) for name, sizes in ended.result["inputs"].items()},
        {name: tuple(sizes) for name, sizes in ended.result["outputs"].items()},
    )


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a child ended: "" and its result, or a phrase for how it died; what it printed in any case."""

    how: str
    said: str
    result: dict[str, Any] | None


def _child(job: Mapping[str, Any], folder: Path, limit_s: float) -> _Ended:
    task, answer = folder / "job.json", folder / "result.json"
    answer.unlink(missing_ok=True)
    task.write_text(json.dumps({**job, "result": str(answer.resolve())}), encoding="utf-8")
    how, said = run_script(SCRIPT, task, limit_s)
    if not how and not answer.is_file():
        how = "it ended without an answer"
    return _Ended(how, said, None if how else json.loads(answer.read_text(encoding="utf-8")))


def _last_words(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip() and not _CHATTER.match(line.strip())]
    return lines[-1][:300] if lines else ""


def _also(words: str) -> str:
    return f" (it said: {words})" if words else ""


def _not_supported(names: str, graph: ModelProto) -> CompileError:
    """Name the first of the operators in a list like "ONNX::Det | ONNX::MyOp" and a node of its kind."""
    kinds = [part.strip().removeprefix("ONNX::") for part in names.split("|") if part.strip()]
    node = next((item for item in graph.graph.node if kinds and item.op_type == kinds[0]), None)
    return CompileError(
        f"its converter does not know {'these operators' if len(kinds) > 1 else 'the operator'} {', '.join(kinds)}",
        backend="mnn",
        node=node.name if node else "",
        op=kinds[0] if kinds else "",
        hint=_NO_KERNEL_HINT,
    )


def _crashed(how: str, said: str, graph: ModelProto, folder: Path) -> CompileError:
    culprit = _culprit(graph, folder)
    return CompileError(
        f"its converter broke down: {how}{_also(_last_words(said))}",
        backend="mnn",
        node=culprit.name if culprit else "",
        op=culprit.op_type if culprit else "",
        hint=_NO_KERNEL_HINT if culprit else "no operator breaks it alone; build for another back end, and report this",
    )


def _culprit(graph: ModelProto, folder: Path) -> NodeProto | None:
    """Return the first node that the converter breaks down on when it gets that node alone."""
    import onnx

    known = onnx.shape_inference.infer_shapes(graph).graph
    values = {item.name: item for item in [*known.input, *known.value_info, *known.output]}
    constants = {item.name: item for item in graph.graph.initializer}
    seen: set[tuple[str, int]] = set()
    nodes: list[NodeProto] = list(graph.graph.node)
    for node in nodes:
        kind = (node.op_type, sum(bool(name) for name in node.input))
        if kind in seen or len(seen) >= _MOST_KINDS:
            continue
        seen.add(kind)
        alone = onnx.ModelProto(ir_version=graph.ir_version, opset_import=graph.opset_import)
        alone.graph.name = "alone"
        alone.graph.node.append(node)
        names = dict.fromkeys(name for name in node.input if name)
        alone.graph.initializer.extend(constants[name] for name in names if name in constants)
        alone.graph.input.extend(values[name] for name in names if name in values and name not in constants)
        alone.graph.output.extend(values[name] for name in node.output if name in values)
        source = folder / "alone.onnx"
        onnx.save(alone, str(source))
        words = ["-f", "ONNX", "--modelFile", source.name, "--MNNModel", "alone.mnn", "--bizCode", "edgedeploy"]
        if _child({"do": "convert", "arguments": words}, folder, _NODE_LIMIT_S).how:
            return node
    return None
