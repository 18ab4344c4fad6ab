"""Golden samples: inputs and answers that an artifact carries, replayed wherever it runs before a number counts."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgedeploy.backends import Backend, session_file, session_options
from edgedeploy.errors import CompileError, FidelityError, ModelError, VisitFailed
from edgedeploy.lab import bundle, visits
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import LocalTransport, Transport
from edgedeploy.lab.visits import Side
from edgedeploy.prepare.dataset import Samples, inference_batch
from edgedeploy.prepare.fidelity import compare
from edgedeploy.prepare.graph import Runner, read_graph
from edgedeploy.records.artifact import Artifact, Golden
from edgedeploy.records.device import Device
from edgedeploy.records.model import Fidelity, Model
from edgedeploy.records.target import Precision
from edgedeploy.storage import sha256_file, write_atomic

GOLDEN = "golden answers"
INPUTS, OUTPUTS = "golden-inputs.safetensors", "golden-outputs.safetensors"
# What a device's answers are called when they cannot be read.
FETCHED = "the outputs that came back from the device"
# A wrong axis, a lost branch or a broken kernel shows in the first answer; more would only make folders big.
_SAMPLES = 4
# Largest error in ratio to the largest answer. Float kernels of different runtimes add in different orders: 2e-6 was
# seen over EfficientNet-Lite0's 50 layers. Half floats have 11 bits.
_MOST_RELATIVE = {"fp32": 1e-4, "fp16": 5e-3}
# Root mean square of the error in ratio to that of the answers. Two right int8 runtimes round ties and factors apart:
# 0.07 was seen between TensorFlow Lite and ONNX Runtime on EfficientNet-Lite0, 0.9 and more where a kernel was wrong.
_MOST_NOISE = 0.1


def write_golden(form: Model, precision: Precision, samples: Samples, folder: Path) -> Golden:
    """Write the first samples and what the form of a model answers to them, computed as it is written.

    Args:
        form: fp32, or the explicit int8 form that the artifact is compiled from.
        precision: of the artifact.
        samples: inputs.
        folder: where the artifact is.
    """
    from safetensors.numpy import save

    from edgedeploy.prepare.emission.exact_products import exact_here

    path = Path(form.path)
    run = Runner(exact_here(read_graph(path)) or path, is_optimized=False)
    batch = inference_batch(form.inputs)
    count = max(batch, min(_SAMPLES, samples.count) // batch * batch)
    answers: dict[str, list[Any]] = {}
    for start in range(0, count, batch):
        for name, values in run(samples.batch(start, start + batch)).items():
            answers.setdefault(name, []).append(_rows(values, batch))
    write_atomic(folder / INPUTS, save(samples.batch(0, count)))
    write_atomic(
        folder / OUTPUTS, save({name: np.ascontiguousarray(np.concatenate(parts)) for name, parts in answers.items()})
    )
    return Golden(
        inputs_sha256=sha256_file(folder / INPUTS),
        outputs_sha256=sha256_file(folder / OUTPUTS),
        batch=batch,
        max_relative=_MOST_RELATIVE.get(precision),
        max_noise=None if precision in _MOST_RELATIVE else max(_MOST_NOISE, _own_noise(form)),
    )


def replay(agent: Agent, transport: Transport, side: Side, golden: Golden, folder: Path, *, where: str) -> Fidelity:
    """Have an artifact answer its golden inputs on a device, where everything has been shipped, and compare.

    Args:
        side: the artifact as it is measured.
        golden: what its folder holds.
        folder: of the artifact.
        where: what to call the device.

    Raises:
        FidelityError: its answers are not the golden ones.
        DeviceError: it did not answer.
    """
    side = dataclasses.replace(side, inputs_sha256=golden.inputs_sha256, batch=golden.batch)
    return _compared(answers_there(agent, transport, side), golden, folder, where)


def _compared(found: dict[str, Any], golden: Golden, folder: Path, where: str) -> Fidelity:
    expected = read_tensors(folder / OUTPUTS, f"{folder / OUTPUTS}", then="; compile again")
    if golden.max_relative is None:
        # One code more or less turns an index into any other: integers of an int8 model say nothing.
        indices = {name for name, values in expected.items() if values.dtype.kind != "f"}
        found = {name: values for name, values in found.items() if name not in indices}
        expected = {name: values for name, values in expected.items() if name not in indices}
    if not expected:
        return Fidelity(reference=GOLDEN, candidate=where, samples=0, sample_source="golden inputs", outputs=())
    result = compare(
        lambda _: expected, lambda _: found, [expected], names=(GOLDEN, where), sample_source="golden inputs"
    )
    for output in result.outputs:
        noise = _noise(output.sqnr_db)
        is_far = golden.max_relative is not None and output.max_relative > golden.max_relative
        if is_far or (golden.max_noise is not None and noise > golden.max_noise):
            limit = (
                f"a largest error of {golden.max_relative:.0e}, in ratio to the largest value"
                if golden.max_relative is not None
                else f"noise of {golden.max_noise:.2g} times the signal"
            )
            raise FidelityError(
                f"output {output.output!r} of {where} is not what the model answers to the artifact's golden inputs: "
                f"the largest error is {output.max_relative:.2g} of the largest value, the noise {noise:.2g} times the "
                f"signal (cosine {output.cosine:.4f}), and {limit} is allowed"
            )
    return result


def replay_here(runtime: Backend, artifact: Artifact, folder: Path) -> Fidelity | None:
    """Have an artifact answer its golden inputs on this machine; None where its runtime is not installed.

    Raises:
        CompileError: it crashes, does not load, or answers something else than the form that it was compiled from.
    """
    assert artifact.golden is not None, "the caller has written them"
    try:
        found = answers_here(artifact, folder / artifact.file, folder / INPUTS, batch=artifact.golden.batch)
        return _compared(found, artifact.golden, folder, f"{runtime.name} on this machine")
    except VisitFailed as error:
        if error.kind == "missing-runtime":
            return None
        raise CompileError(
            f"what it compiled to does not run: {error}", backend=runtime.name, hint=_advice(runtime)
        ) from error
    except FidelityError as error:
        raise CompileError(str(error), backend=runtime.name, hint=_advice(runtime)) from error


def answers_here(artifact: Artifact, file: Path, inputs: Path, *, batch: int) -> dict[str, Any]:
    """Run an artifact's device half in a process of its own on this machine, which may well crash.

    Args:
        artifact: what the manifest says.
        file: the binary.
        inputs: a safetensors file, one tensor an input, first axis = sample.
        batch: samples that are answered together.

    Returns:
        One array an output, first axis = sample.

    Raises:
        VisitFailed: it died, hung or was refused, or the runtime is missing here.
    """
    session = session_file(artifact.recipe.backend)
    side = Side(
        cell=artifact.name,
        artifact_sha256=artifact.sha256,
        session_sha256=sha256_file(session),
        options=session_options(artifact),
        inputs_sha256=sha256_file(inputs),
        batch=batch,
    )
    files = {side.session_sha256: session, side.artifact_sha256: file, side.inputs_sha256: inputs}
    with (
        tempfile.TemporaryDirectory(prefix="edgedeploy-") as root,
        LocalTransport("local") as transport,
        # A lease of its own: nothing is timed here, so that whoever measures on this machine need not be asked.
        bundle.connect(transport, Device(transport="local", root=root, lease_dir=root), device_name="local") as agent,
    ):
        bundle.ship(agent, transport, files)
        return answers_there(agent, transport, side)


def answers_there(agent: Agent, transport: Transport, side: Side) -> dict[str, Any]:
    """Return a side's answers to its inputs, computed on a device where everything has been shipped."""
    with tempfile.TemporaryDirectory(prefix="edgedeploy-") as scratch:
        fetched = Path(scratch) / "answers.safetensors"
        visits.compute_outputs(agent, transport, side, fetched)
        return read_tensors(fetched, FETCHED)


def _advice(runtime: Backend) -> str:
    return (
        f"{runtime.name} or its converter gets an operator of this model wrong: use another back end or precision, or "
        f"bisect the model by its inner outputs and replace that operator"
    )


def _rows(values: Any, batch: int) -> Any:
    """Return answers with the sample as first axis, as the runner writes them."""
    return values if values.ndim and values.shape[0] == batch else values[None]


def _own_noise(form: Model) -> float:
    """Return how far the int8 form itself lies from fp32: noise in ratio to the signal, of its worst output."""
    written = [one for one in form.fidelity if one.candidate == "int8 as written"]
    return max((_noise(output.sqnr_db) for one in written[-1:] for output in one.outputs), default=0.0)


def _noise(sqnr_db: float | None) -> float:
    """Return the root mean square of an error in ratio to the signal's; None: there is no error."""
    return 0.0 if sqnr_db is None else float(10 ** (-sqnr_db / 20))


def read_tensors(path: Path, what: str, *, then: str = "") -> dict[str, Any]:
    """Read a safetensors file.

    Args:
        path: the file.
        what: to call it in an error.
        then: what to do about it.

    Raises:
        ModelError: it is not whole.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    # numpy has no bfloat16 and no eight-bit floats, and says so in two ways.
    except (SafetensorError, OSError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"{what} cannot be read: {error}{then}") from error
