"""One cell of the conformance table: a micro-net compiled for a back end and a precision, run by its device half, judged.

Everything happens in a worker process, and the device half in a visit of the runner: whatever crashes, the cell is told.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).parent.parent
TARGET = "x86-64"
# Back ends whose artifacts are for another kind of device than this machine's processor.
TARGETS = {"tensorrt_rtx": "nvidia-rtx"}
# One cell takes seconds; the first of a back end may install its converter.
CELL_LIMIT_S = 540.0
SAMPLES = 8
# Samples that a batch holds where the batch axis is open: one, and a number that does not divide the samples.
OPEN_BATCHES = (1, 3)
# Largest error in ratio to the largest value of the output.
MOST_RELATIVE = {"fp32": 1e-4, "fp16": 5e-3}
# Of int8 against its own form, computed as it is written: cosine of all answers, and root mean square of the error in ratio
# to that of the answers, since a cosine does not see a wrong scale.
LEAST_COSINE, MOST_NOISE = 0.99, 0.15
# Indices (arg-max, top k) that may differ, as a share: two values may lie closer than the precision can tell.
MOST_OTHER_INDICES = {"fp32": 0.0, "fp16": 0.02, "int8": 0.15}
# The fake runtime belongs to no real target.
FAKE_RULES = """
[backends.fake]
precisions = ["fp32", "int8"]

[quantization.fake]
activation_dtype = "int8"
activation_symmetric = false
"""

Word = Literal["right", "built", "refused", "wrong", "crashed", "silent", "vague", "missing"]
FAILURES: frozenset[str] = frozenset({"wrong", "crashed", "silent", "vague"})
# What a cell that was compiled says where no device can run it; one sentence for all of them.
NOT_RUN = (
    "compiled, and its layers are as promised; nothing that was at hand could run it, so its answers were not seen"
)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        word: "right"; "built", where it was compiled and no device here can run it, which says nothing of its answers;
            "refused" with a sentence that names the operator and says what to do; "wrong" answers;
            "crashed", hung or raised what is no sentence; "silent": float where int8 was promised, or an operator that no
            runtime has; "vague": refused without naming the operator or what to do; "missing": not installed here.
        why: the sentence, or what is wrong.
        is_mixed: whether operators of an int8 artifact compute in float, as its manifest says.
        error: the largest error, in ratio to the largest value (float), or the noise (int8).
        made_with: package → version.
    """

    word: Word
    why: str = ""
    is_mixed: bool = False
    error: float = 0.0
    made_with: dict[str, str] = field(default_factory=dict)


def columns() -> list[tuple[str, str]]:
    """Return (back end, precision) of every column: what a back end builds on a host and its target allows."""
    from edgedeploy.backends import load_backends
    from edgedeploy.documents import read_toml
    from edgedeploy.records.target import FORMAT, Target

    text = (ROOT / "targets" / f"{TARGET}.toml").read_text() + FAKE_RULES
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{TARGET}.toml"
        path.write_text(text)
        target = read_toml(path, Target, FORMAT)
    others = {name: read_toml(ROOT / "targets" / f"{other}.toml", Target, FORMAT) for name, other in TARGETS.items()}
    found, broken = load_backends()
    assert not broken, broken
    return [
        (name, precision)
        for name, runtime in sorted(found.items())
        for precision in ("fp32", "fp16", "int8")
        if runtime.builds_on == "host"
        and (rules := others.get(name, target)).backends.get(name) is not None
        and precision in runtime.precisions
        and precision in rules.backends[name].precisions
        and (precision != "int8" or name in rules.quantization)
    ]


def agrees(found: Outcome, known: Outcome) -> bool:
    """Return whether a cell is what a table says of it; only a machine with the right device runs what others build."""
    return found.word == known.word or {found.word, known.word} == {"built", "right"}


def absent(backend: str) -> str | None:
    """Return why a back end's cells cannot be tried here, or None."""
    from edgedeploy.backends import load_backends

    runtime = load_backends()[0][backend]
    if reason := runtime.missing():
        return reason
    return None if runtime.tools is None else runtime.tools.missing()


class Worker:
    """A process that judges cells one after another, and is started again when one of them kills it.

    Args:
        folder: scratch, which several workers may share; the exported nets in it serve all cells.
        limit_s: of one cell.
    """

    def __init__(self, folder: Path, limit_s: float = CELL_LIMIT_S) -> None:
        self._folder, self._limit_s = folder, limit_s
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def judge(self, net: str, backend: str, precision: str) -> Outcome:
        """Return what becomes of one cell."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send((net, backend, precision))
            if not self._pipe.poll(self._limit_s):
                self._end(patience_s=0.0)
                return Outcome("crashed", f"nothing came of it within {self._limit_s:g} s")
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            status = self._process.exitcode
            self._end()
            return Outcome("crashed", f"compiling it killed the process (exit code {status})")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        if str(ROOT) not in sys.path:  # the child inherits it, and finds this module there
            sys.path.insert(0, str(ROOT))
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._folder), daemon=False)
        self._process.start()
        theirs.close()

    def _end(self, patience_s: float = 20.0) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.join(patience_s)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = None


def _serve(pipe: Any, folder: Path) -> None:
    """Judge what comes through a pipe until it is closed."""
    from edgedeploy.backends.toolenv import TOOLS_VARIABLE
    from edgedeploy.storage import cache_dir, write_atomic

    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    shipped = (ROOT / "targets" / f"{TARGET}.toml").read_text(encoding="utf-8")
    write_atomic(folder / "targets" / f"{TARGET}.toml", (shipped + FAKE_RULES).encode())
    os.environ["EDGEDEPLOY_TARGETS"] = str(folder / "targets")
    # Converters are not installed anew for each scratch folder.
    os.environ.setdefault(TOOLS_VARIABLE, str(cache_dir() / "tools"))
    os.environ["EDGEDEPLOY_CACHE_DIR"] = str(folder / "cache")
    # What exporters print is no part of the table.
    sys.stdout.flush()
    os.dup2(2, 1)
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError):
        bench = Bench(folder, stack)
        while True:
            pipe.send(bench.judge(*pipe.recv()))


class Bench:
    """A runner on this machine, and the judgement of what it answers."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        from edgedeploy.lab.bundle import connect
        from edgedeploy.lab.transport import LocalTransport
        from edgedeploy.records.device import Device

        self._folder = folder
        self._own = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        self._transport = stack.enter_context(LocalTransport("here"))
        device = Device(transport="local", root=str(self._own / "device"))
        self._agent = stack.enter_context(connect(self._transport, device, device_name="here"))

    def judge(self, net: str, backend: str, precision: str) -> Outcome:
        """Compile, run, compare."""
        from edgedeploy.errors import DeviceError, EdgedeployError, FidelityError

        if reason := _tools_missing(backend):
            return Outcome("missing", reason)
        try:
            built = self._compile(net, backend, precision)
        except EdgedeployError as error:
            if isinstance(error, FidelityError) or isinstance(error.__cause__, FidelityError):
                return Outcome("wrong", f"noticed when it was compiled: {error}")
            if isinstance(error.__cause__, DeviceError):
                return Outcome("crashed", f"noticed when it was compiled: {error}")
            text = str(error)
            return refusal(error, lambda: self._operators(net, text))
        except Exception as error:  # noqa: BLE001 - whatever is no sentence of ours is what the table is for
            return Outcome("crashed", f"{type(error).__name__} instead of a sentence: {error}")
        made_with = built.artifact.recipe.toolchain
        if found := _broken_promise(built):
            return replace(found, made_with=made_with)
        try:
            outcome = self._compared(net, built)
        except DeviceError as error:
            is_missing = getattr(error, "kind", "") == "missing-runtime"
            outcome = Outcome("built", NOT_RUN) if is_missing else Outcome("crashed", f"on the device: {error}")
        is_mixed = bool(built.artifact.layers.float_islands)
        return replace(outcome, is_mixed=is_mixed and precision == "int8", made_with=made_with)

    def _compile(self, net: str, backend: str, precision: str) -> Any:
        from edgedeploy.build import build

        return build(self._request(net, backend, precision), lambda text: None)

    def _request(self, net: str, backend: str, precision: Any) -> Any:
        from edgedeploy.arguments import parse_inputs
        from edgedeploy.backends import backend as backend_of
        from edgedeploy.build import BuildRequest
        from tests.backends import micro_nets

        calibration = self._folder / "calibration" / f"{net}.npz"
        if not calibration.exists():
            calibration.parent.mkdir(exist_ok=True)
            np.savez(calibration, **micro_nets.samples_of(net))
        has_ranges = any(field.name == "axes" for field in fields(backend_of(backend).options))
        return BuildRequest(
            name=net,
            source=f"tests.backends.micro_nets:{net}",
            base=ROOT,
            target=TARGETS.get(backend, TARGET),
            backend=backend,
            precision=precision,
            inputs=parse_inputs(micro_nets.input_texts(net)),
            calibration=calibration,
            # An engine has a range of sizes for each open axis.
            options={"axes": "batch=1:3:8"} if has_ranges and micro_nets.NETS[net].dynamic_batch else {},
        )

    def _operators(self, net: str, text: str) -> set[str]:
        """Return the operators that a refusal may name: the model's own, or torch's where it could not be exported."""
        from edgedeploy.build import canonical_model
        from edgedeploy.errors import EdgedeployError

        try:
            model = canonical_model(self._request(net, "onnxruntime", "fp32"), lambda text: None)
        except EdgedeployError:
            return set(re.findall(r"aten[.:\w]+", text))
        return set(model.compression.operators)

    def _compared(self, net: str, built: Any) -> Outcome:
        from edgedeploy.backends import backend
        from tests.backends.micro_nets import NETS, samples_of

        feeds = samples_of(net, SAMPLES, seed=2)
        precision = built.artifact.recipe.precision
        if not backend(built.artifact.recipe.backend).computes:
            expected = None
        elif precision == "int8":
            expected = _form_answers(built, feeds)
        else:
            expected = _torch_answers(net, feeds)
        errors = []
        for batch in OPEN_BATCHES if NETS[net].dynamic_batch else (1,):
            found, is_repeatable = self._run(built, feeds, batch)
            if not is_repeatable:
                return Outcome("wrong", f"the same inputs gave other answers the second time, in batches of {batch}")
            if set(found) != set(NETS[net].output_names):
                return Outcome("wrong", f"its outputs are {sorted(found)}, not {sorted(NETS[net].output_names)}")
            for name in found if expected is not None else ():
                complaint, error = difference(expected[name], found[name], precision)
                if complaint:
                    return Outcome("wrong", f"output {name!r} in batches of {batch}: {complaint}")
                errors.append(error)
        return Outcome("right", error=max(errors, default=0.0))

    def _run(self, built: Any, feeds: dict[str, Any], batch: int) -> tuple[dict[str, Any], bool]:
        from safetensors.numpy import load_file, save_file

        from edgedeploy.backends import session_file, session_options
        from edgedeploy.lab.bundle import ship
        from edgedeploy.lab.visits import Schedule, Side, compute_outputs
        from edgedeploy.storage import sha256_file

        inputs, outputs = self._own / "inputs.safetensors", self._own / "outputs.safetensors"
        save_file(feeds, inputs)
        paths = [built.file, session_file(built.artifact.recipe.backend), inputs]
        digests = [sha256_file(path) for path in paths]
        artifact, session, given = digests
        side = Side(built.artifact.name, artifact, session, session_options(built.artifact), given, batch=batch)
        ship(self._agent, self._transport, dict(zip(digests, paths, strict=True)))
        answer = compute_outputs(self._agent, self._transport, side, outputs, Schedule(outputs_timeout_s=60))
        return load_file(outputs), answer.is_repeatable


def _tools_missing(name: str) -> str:
    """Return why a back end's converter cannot be installed here, "" where it is there."""
    from edgedeploy.backends import backend
    from edgedeploy.errors import ToolchainError

    tools = backend(name).tools
    try:
        if tools is not None:
            tools.python()
    except ToolchainError as error:
        return str(error)
    return ""


def refusal(error: Exception, operators: Callable[[], set[str]]) -> Outcome:
    """Return a refusal as what it is: a sentence that names the operator and says what to do, or a vague one.

    Args:
        error: one of ours.
        operators: says what may be named.
    """
    from edgedeploy.errors import CompileError

    text = str(error)
    op, hint = getattr(error, "op", ""), getattr(error, "hint", "")
    if not isinstance(error, CompileError):
        op = next((name for name in sorted(operators()) if re.search(rf"\b{re.escape(name)}\b", text)), "")
        hint = text.partition("; ")[2]
    if not op or not hint:
        lacks = " and ".join(["the operator"] * (not op) + ["what to do"] * (not hint))
        return Outcome("vague", f"{type(error).__name__} does not say {lacks}: {text}")
    return Outcome("refused", re.sub(r" at node '[^']*'", "", text))


def _broken_promise(built: Any) -> Outcome | None:
    """Return what an artifact does that its precision did not promise, and nobody was told."""
    from edgedeploy.build import QUANTIZATION
    from edgedeploy.documents import read_json
    from edgedeploy.records.quantization import FORMAT, QuantizationTable

    artifact = built.artifact
    custom = [name for name in artifact.layers.operators if re.match(r"custom|onnx_|extra$", name, re.IGNORECASE)]
    if custom:
        return Outcome("silent", f"it has operators that no runtime knows: {', '.join(custom)}")
    table = built.folder / QUANTIZATION
    if not table.exists():
        return None
    nodes = read_json(table, QuantizationTable, FORMAT).nodes
    is_told = any("float" in note for note in artifact.notes)
    if nodes and not artifact.layers.quantized and not is_told:
        return Outcome("silent", f"nothing in it computes on integers, and {', '.join(nodes)} should")
    return None


def _torch_answers(net: str, feeds: dict[str, Any]) -> dict[str, Any]:
    """Return PyTorch's answers to samples, one by one, first axis = sample."""
    import torch

    from tests.backends.micro_nets import NETS

    module = NETS[net].make()
    rows = []
    for index in range(SAMPLES):
        with torch.no_grad():
            made = module(*(torch.from_numpy(value[index : index + 1]) for value in feeds.values()))
        values = made.values() if isinstance(made, dict) else made if isinstance(made, tuple) else (made,)
        rows.append([value.numpy() for value in values])
    return {
        name: np.stack(column) for name, column in zip(NETS[net].output_names, zip(*rows, strict=True), strict=True)
    }


def _form_answers(built: Any, feeds: dict[str, Any]) -> dict[str, Any]:
    """Return the answers of the int8 form that an artifact was compiled from, computed in float as it is written."""
    from edgedeploy.prepare.emission.exact_products import exact_here
    from edgedeploy.prepare.graph import Runner, read_graph

    form = built.folder / "quantized.onnx"
    run = Runner(exact_here(read_graph(form)) or form, is_optimized=False)
    rows = [run({name: value[index : index + 1] for name, value in feeds.items()}) for index in range(SAMPLES)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def difference(expected: Any, found: Any, precision: str) -> tuple[str, float]:
    """Return what is wrong about an output, "" where nothing is, and its error.

    Args:
        expected, found: first axis = sample; a batch axis of 1 behind it may be there or not.
        precision: decides how much is allowed.
    """
    if expected.size != found.size or [n for n in expected.shape if n != 1] != [n for n in found.shape if n != 1]:
        return f"its shape is {found.shape}, not {expected.shape}", np.inf
    if expected.dtype.kind != found.dtype.kind:
        return f"its type is {found.dtype}, not {expected.dtype}", np.inf
    expected, found = expected.ravel(), found.ravel()
    if expected.dtype.kind != "f":
        other = float(np.mean(expected != found))
        is_far = other > MOST_OTHER_INDICES[precision]
        return (f"{other:.0%} of its integers are others" if is_far else ""), other
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    if not np.isfinite(found).all():
        return "it is NaN or infinite", np.inf
    if precision in MOST_RELATIVE:
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        return (f"error {error:.2g} of the largest value" if error > MOST_RELATIVE[precision] else ""), error
    norms = float(np.linalg.norm(expected) * np.linalg.norm(found))
    cosine = float(expected @ found) / norms if norms else float((expected == found).all())
    noise = float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), np.finfo(np.float32).tiny))
    is_far = cosine < LEAST_COSINE or noise > MOST_NOISE
    return (f"cosine {cosine:.4f}, noise {noise:.2g} of the signal" if is_far else ""), noise
