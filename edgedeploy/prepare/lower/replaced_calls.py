"""Runs a module's forward with some of torch's functions replaced by others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def replace_calls(module: nn.Module, replaced: Callable[[Call], Call]) -> None:
    """Let a module's forward call something else, in place and also while it is traced by torch.export.

    Args:
        replaced: what forward calls (function, arguments, keywords) → what is called in its place.
    """
    from torch.overrides import TorchFunctionMode

    class Replaced(TorchFunctionMode):
        def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            function, given, named = replaced((call, args, kwargs or {}))
            return function(*given, **named)

    kind = type(module)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Replaced():
            return kind.forward(self, *args, **kwargs)

    # A class of its own, as torch's parametrizations do it: an attribute would not survive a copy of the module.
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
