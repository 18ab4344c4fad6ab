"""Bakes the masks of torch.nn.utils.prune into the weights, and recognises zeros that are already baked.

Left in place, the mask of a large layer is exported as a multiplication at run time, which also keeps batch
normalisation from being folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgedeploy.prepare.lower.private_copy import private_copy
from edgedeploy.records.model import FoundCompression

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.utils.prune import BasePruningMethod

# Below this share of exact zeros a layer is not called sparse: dead channels of trained networks reach a few percent.
SPARSE_SHARE = 0.2


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Make pruning masks permanent in a copy: weight = original * mask is computed once, and its hook is removed.

    Raises:
        ModelError: the module cannot be copied.
    """
    if not any(_masks(part) for part in module.modules()):
        return module, sparsity(plain_weights(module))
    from torch.nn.utils import prune

    module = private_copy(module)
    unstructured: list[str] = []
    structured: list[str] = []
    masked: set[str] = set()
    zeros = total = 0
    for path, part in module.named_modules():
        for method in _masks(part):
            name = method._tensor_name
            (structured if _is_structured(method) else unstructured).append(f"{path}.{name}".lstrip("."))
            masked.add(path)
            prune.remove(part, name)  # type: ignore[no-untyped-call]  # torch has no types there
            value: Tensor = getattr(part, name)
            zeros, total = zeros + int((value == 0).sum()), total + value.numel()
    found = FoundCompression(
        kind="pruning masks",
        layers=tuple(unstructured + structured),
        detail=f"torch.nn.utils.prune, {len(unstructured)} unstructured and {len(structured)} structured masks, "
        f"{zeros / total:.1%} of {total} weights are zero",
        lowering="masks multiplied into the weights",
        note="structured masks set whole channels to zero; the tensors stay as large as they were, so nothing gets "
        "faster or smaller before the channels are cut out"
        if structured
        else "",
    )
    weights = plain_weights(module)
    rest = sparsity({path: weight for path, weight in weights.items() if path not in masked})
    pairs = sparsity({path: weight for path, weight in weights.items() if path in masked})
    return module, (found, *(item for item in pairs if item.kind == "2:4 sparsity"), *rest)


def plain_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return module path → `weight` of layers that hold an ordinary dense float matrix or kernel."""
    import torch
    from torch.nn.utils import parametrize

    found = {}
    for path, part in module.named_modules():
        weight = part._parameters.get("weight")
        if (
            weight is None
            or weight.ndim < 2
            or isinstance(part, torch.nn.Embedding)
            or parametrize.is_parametrized(part)
        ):
            continue
        if type(weight.data) is torch.Tensor and weight.layout == torch.strided and weight.is_floating_point():
            found[path] = weight.detach()
    return found


def sparsity(weights: Mapping[str, Tensor]) -> tuple[FoundCompression, ...]:
    """Say which weights are sparse, and by what pattern.

    Args:
        weights: layer → weight of shape (out, in, ...).

    Returns:
        "2:4 sparsity" for layers where each group of four along the input axis has at least two zeros, "unstructured
        sparsity" for other layers with `SPARSE_SHARE` of zeros or more.
    """
    pairs: dict[str, float] = {}
    loose: dict[str, float] = {}
    for layer, weight in weights.items():
        share = float((weight == 0).float().mean()) if weight.numel() else 0.0
        if SPARSE_SHARE <= share < 1:
            (pairs if is_two_of_four(weight) else loose)[layer] = share
    found = []
    for layers, kind, pattern in (
        (pairs, "2:4 sparsity", "of every four weights along the input axis at least two are zero"),
        (loose, "unstructured sparsity", "zeros without a pattern"),
    ):
        if layers:
            low, high = min(layers.values()), max(layers.values())
            shares = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
            found.append(
                FoundCompression(
                    kind=kind,  # type: ignore[arg-type]  # both are literals of the loop's tuple
                    layers=tuple(layers),
                    detail=f"{pattern}, {shares} of a layer",
                )
            )
    return tuple(found)


def is_two_of_four(weight: Tensor) -> bool:
    """Return whether each group of four neighbours along axis 1 (inputs; input channels of a kernel) has two zeros.

    Source: NVIDIA's definition for sparse tensor cores, arXiv 2104.08378 §2.
    """
    channels = weight.shape[1]
    if channels % 4:
        return False
    groups = (weight == 0).movedim(1, -1).reshape(-1, 4)
    return bool((groups.sum(1) >= 2).all())


def _masks(part: nn.Module) -> list[BasePruningMethod]:
    hooks = part._forward_pre_hooks
    if not hooks:
        return []
    from torch.nn.utils import prune

    return [hook for hook in hooks.values() if isinstance(hook, prune.BasePruningMethod)]


def _is_structured(method: BasePruningMethod) -> bool:
    inner: Any = getattr(method, "_pruning_methods", (method,))
    return any(item.PRUNING_TYPE == "structured" for item in inner)
