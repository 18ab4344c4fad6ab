"""Runs TensorRT-RTX's parser and builder in a child; however that ends, it is an engine or a sentence."""

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
    from onnx import ModelProto

SCRIPT = Path(__file__).parent / "convert.py"
BACKEND = "tensorrt_rtx"

_ELSEWHERE = "replace that operator in the model, or build for another back end"
# What is said → what to do about it; the first that fits.
_REMEDIES = (
    (r"zero point|UINT8", "quantize it for this target: int8, symmetric, zero-points 0"),
    (r"type Int32 but must have type", 'keep the bias in float (bias = "float32" in the target\'s rules)'),
    (r"Turing|SM75", "leave 7.5 out of compute_capabilities, or build it as fp16 or int8"),
    (r"dynamic|profile", "give each open axis a range, -O axes=batch=1:4:8"),
    # Behind a Cast of the model's own, 1.7.1 mistakes the shape of what an LSTM or GRU reads.
    (
        r"Mismatched number of elements|same input types|DataType|type mismatch",
        "give -O float_type=float32, and report this",
    ),
    (r"cudaError", 'name the GPUs to build for instead of "current", -O compute_capabilities=8.6'),
    (r"memory|alloc", "build on a machine with more memory, or a smaller model"),
)
_SEVERITY = re.compile(r"^\[(?P<letter>[EWIV])\] ")
_PARSING = re.compile(r"^\[V\] Parsing node: (?P<node>.*) \[(?P<op>[^\[\]]*)\]$")
# TensorRT's own trace: where in its sources it gave up.
_SOURCES = re.compile(r"\[[\w./]+\.(?:cpp|h):[^\]]*\]\s*|\bIn \w+ at [\w/.]+:\d+|\b\w+\.(?:cpp|h):\d+:?")
_OWN_NAMES = re.compile(r"\b__([a-z]+)\d+\b")
_LONGEST = 500


@dataclass(frozen=True, slots=True)
class Made:
    """What a child made.

    Attributes:
        engine: the plan's bytes.
        log: what TensorRT said, line by line, its severity's letter before each message.
        parse_s: seconds.
        build_s: seconds.
    """

    engine: bytes
    log: list[str]
    parse_s: float
    build_s: float


def build_engine(
    graph: ModelProto,
    folder: Path,
    *,
    compute_capabilities: Sequence[str],
    profiles: Mapping[str, Mapping[str, Sequence[int]]],
    tf32: bool,
    limit_s: float,
) -> Made:
    """Build an engine.

    Args:
        graph: strongly typed.
        folder: for the files of the job.
        compute_capabilities: names as trt.ComputeCapability has them.
        profiles: input with open axes → its "min", "opt" and "max" shape.
        tf32: whether float32 products may be shortened.
        limit_s: seconds after which it is ended.

    Raises:
        CompileError: whatever went wrong, naming the operator where TensorRT says which.
    """
    import onnx

    paths = {name: str(folder / name) for name in ("source", "engine", "log", "result")}
    onnx.save(graph, paths["source"])
    job = {
        **paths,
        "compute_capabilities": list(compute_capabilities),
        "profiles": {name: {key: list(shape) for key, shape in one.items()} for name, one in profiles.items()},
        "tf32": tf32,
    }
    task = folder / "job.json"
    task.write_text(json.dumps(job), encoding="utf-8")
    how, said = run_script(SCRIPT, task, limit_s)
    log = _read_log(Path(paths["log"]))
    result = Path(paths["result"])
    if how or not result.is_file():
        raise _died(how or "it ended without an answer", said, log)
    outcome: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if outcome["errors"]:
        raise _not_parsed(outcome["errors"][0])
    if not outcome["engine_bytes"]:
        raise _not_built(log, graph)
    return Made(Path(paths["engine"]).read_bytes(), log, outcome["parse_s"], outcome["build_s"])


def _read_log(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _died(how: str, said: str, log: Sequence[str]) -> CompileError:
    """Name the node that was parsed last, or what was being done when the parser was through."""
    parsed = [found for line in log if (found := _PARSING.match(line))]
    # How many layers there are is said once, when the optimizer begins.
    is_parsed = any(line.startswith("[V] Original: ") for line in log)
    last = parsed[-1] if parsed and not is_parsed else None
    words = [line for line in [*log, *said.splitlines()] if line.strip()][-1:]
    return CompileError(
        f"the builder broke down: {how}{f' (it said last: {words[0][:_LONGEST]})' if words else ''}",
        backend=BACKEND,
        node=last["node"] if last else "",
        op=last["op"] if last else "",
        hint=_ELSEWHERE if last else "give it more time (-O time_limit_s) or memory, or build for another back end",
    )


def _not_parsed(error: Mapping[str, str]) -> CompileError:
    """Say what the parser does not take, and why, in words of its own where it has any."""
    text = _plain(error["text"])
    is_unknown = error["code"] == "UNSUPPORTED_NODE" or "Plugin not found" in text
    if is_unknown:
        why = f" ({text})" if text not in ("", "false") and "Plugin" not in text else ""
        text = f"its parser does not know this operator, or not in this form{why}"
    return CompileError(
        text or "its parser refused it without saying why",
        backend=BACKEND,
        node=error["node"],
        op=error["op"],
        hint=_ELSEWHERE if is_unknown else _remedy(text, "simplify the model around it, or build for another back end"),
    )


def _not_built(log: Sequence[str], graph: ModelProto) -> CompileError:
    """Say why there is no engine, naming the node that TensorRT's message names."""
    errors = _errors(log)
    text = _plain(errors[0]) if errors else "it made no engine and did not say why"
    named = [node for node in graph.graph.node if node.name and re.search(_named(node.name), text)]
    node = max(named, key=lambda item: len(item.name), default=None)
    return CompileError(
        text,
        backend=BACKEND,
        node=node.name if node else "",
        op=node.op_type if node else "",
        hint=_remedy(text, "simplify the model there, or build for another back end"),
    )


def _errors(log: Sequence[str]) -> list[str]:
    """Return messages of errors, which may have several lines."""
    found: list[str] = []
    is_inside = False
    for line in log:
        if is_start := _SEVERITY.match(line):
            is_inside = is_start["letter"] == "E"
            found += [line[is_start.end() :]] if is_inside else []
        elif is_inside:
            found[-1] += f" {line}"
    return found


def _named(name: str) -> str:
    """Return a pattern for a node's name; what TensorRT makes of a node is called after it ("/fc/Gemm_11")."""
    return rf"(?<![A-Za-z0-9_/.]){re.escape(name)}(?![A-Za-z0-9/])"


def _plain(text: str) -> str:
    """Return a message without the places in TensorRT's sources that it was raised at."""
    plain = " ".join(_SOURCES.sub("", text).split()).replace("( (", "(").replace(" )", ")")
    # What it calls its own operations is counted anew in each build, and says nothing to others.
    plain = _OWN_NAMES.sub(r"\1", plain.partition("Error is: ")[2] or plain)
    return plain[:_LONGEST].rstrip(" .")


def _remedy(text: str, otherwise: str) -> str:
    return next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, text)), otherwise)
