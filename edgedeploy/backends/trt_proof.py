"""Shows on the host how far a form for TensorRT lies from the model that it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.backends.trt_graph import FLOAT, FLOAT16, Draft, attributes, copied
from edgedeploy.errors import CompileError
from edgedeploy.records.model import Model
from edgedeploy.records.target import Precision

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from edgedeploy.backends.trt_forms import EngineForms

# Largest difference in ratio to the largest answer. The order of sums alone gave 2.4e-7; half floats 2e-3 on
# EfficientNet-Lite0; codes that flip where half floats lie between roundings 1.2e-2.
_MOST: Mapping[Precision, float] = {"fp32": 1e-5, "fp16": 2e-2, "int8": 1e-1}


def demand_same_answers(forms: EngineForms, model: Model, backend: str) -> None:
    """Raise where a form answers otherwise than the model that it was made of.

    Args:
        forms: both are checked.
        model: with samples to check on; nothing is checked without.

    Raises:
        CompileError: a form's answers lie too far off.
    """
    if not model.check_inputs:
        return
    from safetensors.numpy import load_file

    samples = load_file(model.check_inputs)
    batch = next((spec.shape[0] for spec in model.inputs if spec.shape), 1)
    size = batch if isinstance(batch, int) else 1
    count = min(len(values) for values in samples.values())
    feeds = [
        {
            spec.name: samples[spec.name][at : at + size] if spec.shape else samples[spec.name][at]
            for spec in model.inputs
        }
        for at in range(0, count - size + 1, size)
    ]
    for name, form, most in (
        ("weakly typed", forms.weak, _MOST["fp32"]),
        ("strongly typed", forms.typed, _MOST[forms.precision]),
    ):
        found = disagreement(form, Path(model.path), feeds)
        if not found <= most:
            raise CompileError(
                f"its {name} form answers otherwise than the model: the largest difference is {found:.2g} of the "
                f"largest answer, and {most:g} is allowed",
                backend=backend,
                hint="keep floats in float32 with -O float_type=float32, or build it as fp32",
            )


def disagreement(form: ModelProto, reference: Path, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> float:
    """Return how far a form lies from the model that it was made of, computed by ONNX Runtime as both are written.

    Every float16 tensor is rounded to float16 where it is made. Left to itself ONNX Runtime computes most float16
    nodes on a CPU in float32 and passes values on unrounded, so that nothing would ever overflow. Sums inside a node
    are float32, as they are in TensorRT's products.

    Args:
        form: the weak or the typed one.
        reference: the .onnx that `engine_forms` read.
        feeds: inputs of several inferences.

    Returns:
        The largest |form - reference| of all outputs and inferences, as a part of that output's largest |reference|
        over all of them (or absolute, where that is 0); infinite where one is NaN or infinite and the other is not, or
        shapes differ.
    """
    mine, theirs = _runner(rounded(form).SerializeToString()), _runner(str(reference))
    worst: dict[str, float] = {}
    largest: dict[str, float] = {}
    for feed in feeds:
        wanted, got = theirs(feed), mine(feed)
        for name, values in wanted.items():
            worst[name] = max(worst.get(name, 0.0), _farthest(got[name], values))
            finite = np.abs(values[np.isfinite(values)].astype(np.float64))
            largest[name] = max(largest.get(name, 0.0), float(finite.max(initial=0.0)))
    return max((far / (largest[name] or 1.0) for name, far in worst.items()), default=0.0)


def rounded(form: ModelProto) -> ModelProto:
    """Return a float32 graph in which each value that was float16 is cast to it and back; bodies are left alone.

    A model whose own inputs or outputs are float16 comes back as it is.
    """
    draft = copied(Draft(form, ""))
    ports = {value.name for value in (*draft.graph.input, *draft.graph.output)}
    halves = {name for name, kind in draft.kinds.items() if kind == FLOAT16}
    if not halves or halves & ports:
        return form
    for name in sorted(halves):
        if draft.has_constant(name):
            _widen(draft, name)
    nodes: list[NodeProto] = []
    for node in draft.graph.node:
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in halves:
                nodes += _round(draft, node, place, name)
    draft.replace_nodes(nodes)
    del draft.graph.value_info[:]
    return draft.model


def _widen(draft: Draft, name: str) -> None:
    from onnx import numpy_helper

    value = draft.value(name)
    assert value is not None
    draft.constant(name).CopyFrom(numpy_helper.from_array(np.asarray(value, np.float32), name))


def _round(draft: Draft, node: NodeProto, place: int, name: str) -> list[NodeProto]:
    """Return the casts behind an output; a node that is a cast to float16 itself needs the second only."""
    from onnx import helper

    node.output[place] = draft.fresh(f"{name}/exact")
    if node.op_type == "Cast" and attributes(node)["to"] == FLOAT16:
        return [helper.make_node("Cast", [node.output[place]], [name], to=FLOAT)]
    half = draft.fresh(f"{name}/rounded")
    return [
        helper.make_node("Cast", [node.output[place]], [half], to=FLOAT16),
        helper.make_node("Cast", [half], [name], to=FLOAT),
    ]


def _farthest(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    ours, theirs = got.astype(np.float64).reshape(-1), wanted.astype(np.float64).reshape(-1)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        far = np.where(same, 0.0, np.abs(ours - theirs))
    return float(np.where(np.isnan(far), np.inf, far).max(initial=0.0))


def _runner(source: bytes | str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The optimiser has kernels of its own for Q/DQ, and computes some pairs with float16 wrongly (1.31.1).
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(zip(names, session.run(names, dict(feed)), strict=True))

    return run
