"""Eager-mode static quantization (QuantStub, prepare, convert), PTQ and QAT, becomes float layers with markers."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from edgedeploy.errors import ModelError
from edgedeploy.records.model import FoundCompression

if TYPE_CHECKING:
    from torch import nn


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Replace eager-mode quantized modules; one that is still prepared is converted first.

    Raises:
        ModelError: prepared without having seen data, or with a layer that has no quantized or no ONNX form.
    """
    # A module can only hold quantized parts when somebody imported them.
    if "torch.ao.nn.quantized" not in sys.modules:
        return module, ()
    import torch

    from edgedeploy.prepare.lower import packed, static_layers

    if isinstance(module, torch.fx.GraphModule):
        return module, ()
    was_trained, was_prepared = _state_of(module)
    if was_prepared:
        module = _converted(module)
    parts = static_layers.static_parts(module, into_graphs=False)
    if not parts:
        return module, ()
    stubs: set[Any] = {part.dtype for part in parts.values() if type(part).__name__ == "Quantize"}
    detail = static_layers.details_of(parts)
    module = static_layers.lower_static(module, parts, static_layers.activation_dtype(stubs))
    packed.track_grids(module)
    return module, (
        FoundCompression(
            kind="QAT int8" if was_trained else "static int8",
            layers=packed.layer_names(parts),
            detail=f"eager mode, {'converted by us' if was_prepared else 'converted'}, {detail}",
            lowering="packed parameters became stored weights and trained grids",
            note="" if was_prepared else CONVERTED_NOTE,
        ),
    )


CONVERTED_NOTE = "a converted model does not say whether it was calibrated (PTQ) or trained (QAT)"


def demand_calibrated(module: nn.Module, of_weights: frozenset[str] = frozenset()) -> None:
    """Check that every observer of activations has seen data.

    Args:
        of_weights: paths of observers of weights, which conversion itself shows their data.

    Raises:
        ModelError: one has not; it names them.
    """
    import torch

    blind = []
    for path, part in module.named_modules(remove_duplicate=False):
        low = getattr(part, "min_val", None)
        is_weight = (
            "weight_fake_quant" in path.split(".") or path.removesuffix(".activation_post_process") in of_weights
        )
        if isinstance(low, torch.Tensor) and not is_weight and (low.numel() == 0 or not low.isfinite().all()):
            blind.append(path.removesuffix(".activation_post_process"))
    if blind:
        shown = ", ".join(dict.fromkeys(blind[:5])) + (f" and {len(blind) - 5} more" if len(blind) > 5 else "")
        raise ModelError(
            f"the model is prepared for quantization, but these observers have seen no data: {shown}; run it on "
            f"calibration samples (or train it) before it is compiled, and remove modules that forward never uses"
        )


def keep_trained_scales(module: nn.Module) -> None:
    """Let conversion take the scales that training saw.

    A fused fake-quantizer computes its scale in a way of its own; conversion would ask its observer, which answers with
    a scale that is up to 0.4 % another one, so that half of the weights land on other codes (seen in torch 2.13).
    """
    import torch
    from torch.ao.quantization import FakeQuantizeBase

    for part in module.modules():
        if not isinstance(part, FakeQuantizeBase) or not part.fake_quant_enabled[0]:
            continue
        scale, zero_point = getattr(part, "scale", None), getattr(part, "zero_point", None)
        if isinstance(scale, torch.Tensor) and isinstance(zero_point, torch.Tensor):
            part.observer_enabled[0] = 0
            trained = scale.detach().clone(), zero_point.detach().clone()
            vars(part)["calculate_qparams"] = partial(_given, trained)


def _given(numbers: Any) -> Any:
    return numbers


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; torch's go on for pages."""
    return str(error).strip().partition("\n")[0] or "no reason given"


def _state_of(module: nn.Module) -> tuple[bool, bool]:
    """Return whether a module holds QAT layers, and whether it is prepared and not yet converted."""
    from torch.ao.quantization import FakeQuantizeBase, ObserverBase

    trained = prepared = False
    for part in _outside_graphs(module):
        prepared = prepared or isinstance(part, (FakeQuantizeBase, ObserverBase))
        trained = trained or isinstance(part, FakeQuantizeBase)
    return trained, prepared


def _outside_graphs(module: nn.Module) -> Any:
    import torch

    if isinstance(module, torch.fx.GraphModule):
        return
    yield module
    for child in module.children():
        yield from _outside_graphs(child)


def _converted(module: nn.Module) -> nn.Module:
    from torch.ao.quantization import FakeQuantizeBase, ObserverBase, convert

    demand_calibrated(module)
    keep_trained_scales(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = convert(module.eval(), inplace=True)  # type: ignore[no-untyped-call]
    except Exception as error:  # conversion asserts and raises whatever a layer's own class thinks of
        raise ModelError(
            f"the model is prepared for quantization and torch.ao.quantization.convert fails on it: "
            f"{type(error).__name__}: {first_line(error)}; convert "
            f"it in PyTorch, or leave the layer at fault in float (qconfig = None)"
        ) from error
    left = [path for path, part in made.named_modules() if isinstance(part, (FakeQuantizeBase, ObserverBase))]
    if left:
        raise ModelError(
            f"after torch.ao.quantization.convert these fake-quantizers or observers are left: {', '.join(left[:5])}; "
            f"their layers have no quantized form: leave them in float (qconfig = None)"
        )
    return made
