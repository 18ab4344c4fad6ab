"""The source of a model, as its author gave it, run beside the canonical ONNX under the ONNX's names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import ModelError
from edgedeploy.prepare.emission.exact_products import exact_here
from edgedeploy.prepare.graph import Runner, stamp_oldest
from edgedeploy.prepare.load import Loaded
from edgedeploy.prepare.lower.half_floats import float_dtype
from edgedeploy.prepare.plain_torch import plain_torch
from edgedeploy.prepare.silence import silenced
from edgedeploy.records.model import Model, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

Tensors = Mapping[str, NDArray[Any]]
Run = Callable[[Tensors], Tensors]


def source_run(loaded: Loaded, model: Model) -> Run:
    """Return a function from named inputs to named outputs, computed by PyTorch, or ONNX Runtime for a .onnx.

    Args:
        loaded: what `load` returned for the source of `model`; its modules are run, their observers switched off.
        model: the canonical form of the same source: its order of inputs and outputs is that of the source.

    Raises:
        ModelError: when called: the source fails, or has another number of outputs than its canonical form.
    """
    if loaded.kind == "onnx":
        return _onnx_run(loaded, model)
    call = module_call(loaded.program, model.inputs) if loaded.kind == "module" else program_call(loaded.program)
    names = [spec.name for spec in model.outputs]

    def run(batch: Tensors) -> Tensors:
        import torch

        tensors = [torch.from_numpy(np.ascontiguousarray(batch[spec.name])) for spec in model.inputs]
        try:
            with torch.no_grad(), plain_torch(), silenced(loaded.source):
                answer = call(tensors)
        except Exception as error:  # the person's forward may fail in any way
            raise ModelError(
                f"{loaded.source} cannot run on these samples: {type(error).__name__}: {error}; check their shapes"
            ) from error
        leaves = _leaves(answer)
        if len(leaves) != len(names):
            raise ModelError(
                f"{loaded.source} returns {len(leaves)} tensors and its ONNX form {len(names)} ({', '.join(names)}); "
                f"its outputs must not depend on the data"
            )
        return dict(zip(names, leaves, strict=True))

    return run


def stop_observers(module: nn.Module) -> None:
    """Keep trained ranges as they are: fake quantization goes on observing, and moves its grid, in evaluation mode."""
    import torch

    for part in module.modules():
        flag = getattr(part, "observer_enabled", None)
        if isinstance(flag, torch.Tensor):
            flag.zero_()


def _onnx_run(loaded: Loaded, model: Model) -> Run:
    import onnx

    original = onnx.ModelProto()
    original.CopyFrom(loaded.program)
    stamp_oldest(original)
    # As it is written: a runtime's optimiser may change what a quantized graph computes, and products of 8-bit integers
    # saturate on x86 without VNNI, which is the machine's fault and not the model's.
    written = exact_here(original) or original.SerializeToString()
    return Runner(written, is_optimized=model.quantization is None)


def module_call(module: nn.Module, inputs: Sequence[TensorSpec]) -> Callable[[Sequence[Tensor]], Any]:
    """Return a function from tensors, in the order of `inputs`, to what a module answers; its observers are stopped.

    Floating inputs are given in the short float that the module computes in, by name where forward has the names.
    """
    stop_observers(module)
    parameters = inspect.signature(module.forward).parameters
    named = {name for name, item in parameters.items() if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
    names = [spec.name for spec in inputs]
    short = float_dtype(module)

    def call(tensors: Sequence[Tensor]) -> Any:
        values = [value.to(short) if short is not None and value.is_floating_point() else value for value in tensors]
        return module(**dict(zip(names, values, strict=True))) if named.issuperset(names) else module(*values)

    return call


def program_call(program: ExportedProgram) -> Callable[[Sequence[Tensor]], Any]:
    """Return a function from tensors, in the order of the program's inputs, to what it answers."""
    from torch.utils import _pytree as pytree

    module = program.module()
    in_spec = program.call_spec.in_spec

    def call(tensors: Sequence[Tensor]) -> Any:
        arguments, keywords = pytree.tree_unflatten(list(tensors), in_spec)
        return module(*arguments, **keywords)

    return call


def _leaves(answer: Any) -> list[NDArray[Any]]:
    """Return the tensors of an answer as arrays; short floats as float32, because numpy has no bfloat16."""
    from torch.utils import _pytree as pytree

    found = []
    for leaf in pytree.tree_leaves(answer):
        plain = leaf.detach().dequantize() if leaf.is_quantized else leaf.detach()
        array: NDArray[Any] = (plain.float() if plain.is_floating_point() else plain).contiguous().numpy()
        found.append(array)
    return found
