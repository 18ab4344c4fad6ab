"""Copies a module, so that what is rewritten for export can be compared with what the person gave."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgedeploy.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn


def private_copy(module: nn.Module, replacements: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Copy a module with its weights; parameters that were shared are shared in the copy too.

    Hooks (torch.nn.utils.prune, weight_norm) keep the weight that they compute as a plain attribute, which
    `copy.deepcopy` refuses as long as it hangs on an autograd graph; such a tensor is cut off.

    Args:
        replacements: id of a tensor of the module → what stands in its place in the copy.

    Raises:
        ModelError: the module holds something that cannot be copied.
    """
    import torch

    memo: dict[int, Any] = dict(replacements or {})
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # a person's module may hold locks, files, handles: anything
        raise ModelError(
            f"{type(module).__name__} cannot be copied, which its compression needs before export "
            f"({type(error).__name__}: {error}); keep open files, locks and handles out of the module"
        ) from error
