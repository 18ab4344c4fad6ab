"""Bakes weights that are computed from other parameters in each forward: parametrizations, weight and spectral norm.

A product of two small factors is the exception: it is left to `low_rank`, which sees it in the exported graph, because
baked it would be as large as the dense weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgedeploy.errors import ModelError
from edgedeploy.prepare.lower.private_copy import private_copy
from edgedeploy.prepare.lower.pruning_masks import plain_weights, sparsity
from edgedeploy.records.model import FoundCompression

if TYPE_CHECKING:
    from torch import nn


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Compute each parametrized tensor once, in a copy, and remove what computed it.

    Raises:
        ModelError: a parametrization cannot be computed, or the module cannot be copied.
    """
    if not any(_parametrized(part) or _hooks(part) for part in module.modules()):
        return module, ()
    module = private_copy(module)
    baked: dict[str, list[str]] = {}
    changed = set()
    for path, part in module.named_modules():
        for name in _parametrized(part):
            if _may_be_low_rank(part, name, path):
                continue
            steps = " and ".join(_class_name(step) for step in part.parametrizations[name])
            _bake(part, name, path)
            baked.setdefault(steps, []).append(f"{path}.{name}".lstrip("."))
            changed.add(path)
        for hook in _hooks(part):
            _remove_hook(part, hook)
            baked.setdefault(f"{type(hook).__name__} hook", []).append(f"{path}.{hook.name}".lstrip("."))
    found = tuple(
        FoundCompression(kind="parametrization", layers=tuple(layers), detail=steps, lowering="computed once")
        for steps, layers in baked.items()
    )
    return module, found + sparsity({path: weight for path, weight in plain_weights(module).items() if path in changed})


def _parametrized(part: nn.Module) -> list[str]:
    from torch.nn.utils import parametrize

    return list(part.parametrizations) if parametrize.is_parametrized(part) else []  # type: ignore[arg-type]  # a ModuleDict


def _hooks(part: nn.Module) -> list[Any]:
    """Return the hooks of the older torch.nn.utils.weight_norm and spectral_norm."""
    if not part._forward_pre_hooks:
        return []
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    return [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, SpectralNorm | WeightNorm)]


def _may_be_low_rank(part: nn.Module, name: str, path: str) -> bool:
    """Return whether a tensor is computed from two matrices that are smaller than it in sum.

    One that is not their product after all is folded by `constant_parameters`, so a false yes costs nothing.
    """
    source: Any = part.parametrizations[name]  # type: ignore[index]  # a ModuleDict
    try:
        size = getattr(part, name).numel()
    except Exception as error:  # a person's parametrization may fail in any way
        raise _failure(source, name, path, error) from error
    parts = [*source.parameters(), *source.buffers()]
    factors = sorted(item.numel() for item in parts if item.ndim >= 2 and item.numel() < size)
    return len(factors) >= 2 and sum(factors[-2:]) < size


def _bake(part: nn.Module, name: str, path: str) -> None:
    import torch
    from torch.nn.utils import parametrize

    source: Any = part.parametrizations[name]  # type: ignore[index]  # a ModuleDict
    if isinstance(source._parameters.get("original"), torch.nn.Parameter):
        # Baking overwrites the original; where two layers share it, the second would start from the first's result.
        source.original = torch.nn.Parameter(source.original.detach().clone(), requires_grad=False)
    # The class carries the parametrized property, and the module that this one was copied from has the same class.
    kind: Any = type(part)
    own = {key: item for key, item in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    part.__class__ = type(kind.__name__, kind.__bases__, own)
    try:
        parametrize.remove_parametrizations(part, name, leave_parametrized=True)
    except Exception as error:  # torch refuses some, such as those that change the type of a tensor
        raise _failure(source, name, path, error) from error


def _failure(source: Any, name: str, path: str, error: Exception) -> ModelError:
    steps = ", ".join(_class_name(step) for step in source)
    return ModelError(
        f"the parametrization {steps} of {path or 'the model'} ({name}) cannot be computed: {type(error).__name__}: "
        f"{error}; remove it with torch.nn.utils.parametrize.remove_parametrizations first"
    )


def _remove_hook(part: nn.Module, hook: Any) -> None:
    from torch.nn.utils import remove_spectral_norm, remove_weight_norm
    from torch.nn.utils.weight_norm import WeightNorm

    (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(part, hook.name)


def _class_name(step: nn.Module) -> str:
    return type(step).__name__.lstrip("_")
