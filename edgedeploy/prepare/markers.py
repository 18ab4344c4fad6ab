"""Three operators that carry quantization from PyTorch into ONNX, where `absorb` reads and removes them.

Exporters fold, unfold or refuse the many ways in which PyTorch libraries write quantization, and what they do depends
on the size of a tensor. A lowering writes these operators instead: nothing folds them, in PyTorch they compute what
they mean, and in ONNX they are nodes of the domain `edgedeploy` that never reach a back end.

    dequantize_weight(codes, scale, zero_point, axis, block, bits) -> float32
        Constant weights of the shape of `codes` (int8, uint8, float16, bfloat16 or float8_e4m3fn):
        (codes - zero_point) * scale.
        `scale` and `zero_point` (int32) have one entry, or one per channel of `axis`, or with `block` > 0 the shape
        (channels, blocks): `block` neighbours along the other axis of a matrix share one. axis -1: one entry.
    fake_quantize(x, scale, zero_point, axis, low_code, high_code) -> like x
        A trained grid on an activation, or on a float weight.
    dynamic_quantize(x, bits, symmetric, per_token) -> like x
        An activation that is quantized in each inference from its own values; per token: over the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DOMAIN = "edgedeploy"


@cache
def operators() -> Any:
    """Register the operators with torch once and return their namespace, torch.ops.edgedeploy."""
    import torch

    @torch.library.custom_op(
        f"{DOMAIN}::dequantize_weight",
        mutates_args=(),
        schema="(Tensor codes, Tensor scale, Tensor zero_point, int axis, int block, int bits) -> Tensor",
    )
    def dequantize_weight(
        codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, block: int, bits: int
    ) -> torch.Tensor:
        wide = [_spread(part, codes, axis, block) for part in (scale, zero_point)]
        return ((codes.float() - wide[1].float()) * wide[0].float()).contiguous()

    @torch.library.custom_op(
        f"{DOMAIN}::fake_quantize",
        mutates_args=(),
        schema="(Tensor x, Tensor scale, Tensor zero_point, int axis, int low_code, int high_code) -> Tensor",
    )
    def fake_quantize(
        x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, low_code: int, high_code: int
    ) -> torch.Tensor:
        step, zero = (_spread(part, x, axis, 0) for part in (scale, zero_point))
        codes = torch.clamp(torch.round(x / step) + zero, low_code, high_code)
        return ((codes - zero) * step).to(x.dtype).contiguous()

    @torch.library.custom_op(
        f"{DOMAIN}::dynamic_quantize",
        mutates_args=(),
        schema="(Tensor x, int bits, bool symmetric, bool per_token) -> Tensor",
    )
    def dynamic_quantize(x: torch.Tensor, bits: int, symmetric: bool, per_token: bool) -> torch.Tensor:
        if per_token:
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        else:
            low, high = x.min(), x.max()
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        top = 2 ** (bits - 1) - 1
        tiny = torch.finfo(x.dtype).tiny
        on_grid: torch.Tensor
        if symmetric:
            step = (torch.maximum(-low, high) / top).clamp(min=tiny)
            on_grid = torch.clamp(torch.round(x / step), -top, top) * step
        else:
            step = ((high - low) / (2**bits - 1)).clamp(min=tiny)
            zero = torch.round(-low / step)
            on_grid = (torch.clamp(torch.round(x / step) + zero, 0, 2**bits - 1) - zero) * step
        return on_grid.contiguous()

    dequantize_weight.register_fake(lambda codes, *_: torch.empty(codes.shape, dtype=torch.float32))
    fake_quantize.register_fake(lambda x, *_: torch.empty(x.shape, dtype=x.dtype))
    dynamic_quantize.register_fake(lambda x, *_: torch.empty(x.shape, dtype=x.dtype))
    return torch.ops.edgedeploy


def _spread(values: torch.Tensor, like: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """Return one value for each element of `like`, or something that broadcasts to that."""
    if block:
        whole = values.repeat_interleave(block, dim=1)[:, : like.shape[1 - axis]]
        return whole if axis == 0 else whole.T
    if axis < 0 or values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if index == axis else 1 for index in range(like.ndim)])


@cache
def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export(custom_translation_table=...)` needs to write the operators as ONNX nodes."""
    import onnxscript
    from onnx import defs

    schema, parameter, attribute = defs.OpSchema, defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    integer = schema.AttrType.INT
    floats = ("F", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")
    stored = ["int8", "uint8", "float16", "bfloat16", "float8e4m3fn"]
    for name, inputs, settings, constraints in (
        (
            "DequantizeWeight",
            [parameter("codes", "S"), parameter("scale", "tensor(float)"), parameter("zero_point", "tensor(int32)")],
            ("axis", "block", "bits"),
            [("S", [f"tensor({kind})" for kind in stored], "")],
        ),
        (
            "FakeQuantize",
            [parameter("x", "F"), parameter("scale", "tensor(float)"), parameter("zero_point", "tensor(int32)")],
            ("axis", "low_code", "high_code"),
            [floats],
        ),
        ("DynamicQuantize", [parameter("x", "F")], ("bits", "symmetric", "per_token"), [floats]),
    ):
        made = parameter("y", "tensor(float)" if name == "DequantizeWeight" else "F")
        defs.register_schema(
            schema(
                name,
                DOMAIN,
                1,
                inputs=inputs,
                outputs=[made],
                type_constraints=constraints,
                attributes=[attribute(key, integer, "") for key in settings],
            )
        )
    ours = onnxscript.values.Opset(DOMAIN, 1)

    def dequantize_weight(codes: Any, scale: Any, zero_point: Any, axis: int, block: int, bits: int) -> Any:
        return ours.DequantizeWeight(codes, scale, zero_point, axis=axis, block=block, bits=bits)

    def fake_quantize(x: Any, scale: Any, zero_point: Any, axis: int, low_code: int, high_code: int) -> Any:
        return ours.FakeQuantize(x, scale, zero_point, axis=axis, low_code=low_code, high_code=high_code)

    def dynamic_quantize(x: Any, bits: int, symmetric: bool, per_token: bool) -> Any:
        return ours.DynamicQuantize(x, bits=bits, symmetric=int(symmetric), per_token=int(per_token))

    known = operators()
    return {
        known.dequantize_weight.default: dequantize_weight,
        known.fake_quantize.default: fake_quantize,
        known.dynamic_quantize.default: dynamic_quantize,
    }
