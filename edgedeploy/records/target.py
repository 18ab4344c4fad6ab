"""A kind of device: its hardware, which runtimes and precisions may be built for it, and by which rules."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from edgedeploy.documents import Record, closest, line_of, read_toml
from edgedeploy.errors import DocumentError, UsageError

# History of edgedeploy.target:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.target/1"

Precision = Literal["fp32", "fp16", "int8"]


class QuantizationRules(Record, frozen=True, kw_only=True):
    """How a back end on this target wants its int8 form: `[quantization.<backend>]` in the target's file.

    Attributes:
        activation_dtype: storage of quantized activations.
        activation_symmetric: zero-point fixed (0 for int8, 128 for uint8).
        weight_bits: 7 where the hardware's int8 multiply-add saturates (AVX2 without VNNI), else 8.
        weight_per_channel: one scale per output channel.
        weight_range: the integers that weights may have: "full" with -128, or "narrow" without.
        bias: "int32" at input scale times weight scale, or "float32" where the back end rounds it itself.
        residual_add: which inputs of an Add are quantized: "all", or "skip" (only the branch that does not end in a
            convolution, so that the sum is fused into it).
        clamps: whether a Relu or Clip before a quantized tensor stays ("kept") or is left out where the integers
            cannot leave its range ("absorbed").
        product_outputs: whether a Gemm or MatMul that nothing quantized reads answers in float ("float"), as the
            integer kernels of some runtimes can, or is rounded too ("integer"), without which others compute in float.
        excluded_operators: what is never quantized for this back end.
        weight_only: how integer weights of a node that computes in float are stored: "MatMulNBits" (ONNX Runtime's
            operator, which keeps them small in memory too, where it fits; else DequantizeLinear), "DequantizeLinear",
            or "refused" where the back end would expand them.
        dynamic: how activations that are quantized anew in each inference are written, or "refused".
        why: the measurement or document that the choice rests on.
    """

    activation_dtype: Literal["int8", "uint8"]
    activation_symmetric: bool
    weight_bits: Literal[7, 8] = 8
    weight_per_channel: bool = True
    weight_range: Literal["full", "narrow"] = "full"
    bias: Literal["int32", "float32"] = "int32"
    residual_add: Literal["all", "skip"] = "all"
    clamps: Literal["kept", "absorbed"] = "kept"
    product_outputs: Literal["float", "integer"] = "float"
    excluded_operators: tuple[str, ...] = ()
    weight_only: Literal["MatMulNBits", "DequantizeLinear", "refused"] = "DequantizeLinear"
    dynamic: Literal["DynamicQuantizeLinear", "refused"] = "refused"
    why: str = ""


class BackendRules(Record, frozen=True, kw_only=True):
    """What one back end may build for a target.

    Attributes:
        options: defaults for the back end's options (-O key=value overrides them).
        int8_slower: why int8 is known, or was measured, to be slower than fp32 here; "" where it is not.
    """

    precisions: tuple[Precision, ...]
    int8_slower: str = ""
    options: dict[str, str | int | float | bool] = {}


class Resolution(Record, frozen=True, kw_only=True):
    """For a target that is "whatever this machine is": use `target` when every named ISA feature is there.

    Attributes:
        machine: uname -m.
        isa: feature names as /proc/cpuinfo spells them, all of which must be present.
        any_isa: at least one of these must be present (empty: no demand).
    """

    machine: str
    isa: tuple[str, ...] = ()
    any_isa: tuple[str, ...] = ()
    target: str


class ConditionLimits(Record, frozen=True, kw_only=True):
    """When a number counts.

    Attributes:
        max_foreign_load: CPU time of other processes during a visit, in cores; above it the visit is marked.
        max_temperature_celsius: likewise for the hottest thermal zone.
    """

    max_foreign_load: float = 0.5
    max_temperature_celsius: float = 80.0


class Target(Record, frozen=True, kw_only=True):
    """A target file, `targets/<name>.toml`; the file name is the target's name.

    Attributes:
        isa: what its processor has, as /proc/cpuinfo spells it; any_isa: of these, at least one.
        resolve: not empty for `host`: which real target this machine is, first match wins.
        quantization: back end → how it wants its int8 form; also for back ends that `backends` does not allow.
    """

    format: str
    name: str
    description: str
    machine: str = ""
    isa: tuple[str, ...] = ()
    any_isa: tuple[str, ...] = ()
    resolve: tuple[Resolution, ...] = ()
    backends: dict[str, BackendRules] = {}
    quantization: dict[str, QuantizationRules] = {}
    conditions: ConditionLimits = ConditionLimits()


def is_target(target: Target, *, machine: str, isa: Collection[str]) -> bool:
    """Return whether a machine is of the kind that a target describes, as far as its processor goes."""
    has_any = not target.any_isa or any(feature in isa for feature in target.any_isa)
    return target.machine in ("", machine) and has_any and all(feature in isa for feature in target.isa)


def target_folders() -> list[Path]:
    """Return where target files are looked for, first hit wins: EDGEDEPLOY_TARGETS, ./targets, those shipped."""
    chosen = os.environ.get("EDGEDEPLOY_TARGETS")
    package = Path(__file__).parent.parent
    # A wheel carries the files inside the package; in a checkout they stand beside it.
    shipped = [package / "targets", package.parent / "targets"]
    return [folder for folder in ([Path(chosen)] if chosen else []) + [Path("targets"), *shipped] if folder.is_dir()]


def target_files() -> dict[str, Path]:
    """Return every known target file by name."""
    files: dict[str, Path] = {}
    for folder in target_folders():
        for path in sorted(folder.glob("*.toml")):
            files.setdefault(path.stem, path)
    return files


def load_target(name: str, *, machine: str, isa: Collection[str]) -> Target:
    """Read a target; one that is "whatever this machine is" becomes the target that this machine really is.

    Args:
        name: the file name without .toml.
        machine: uname -m of this machine.
        isa: its ISA features as /proc/cpuinfo spells them.

    Raises:
        UsageError: unknown name, or nothing in the target's `resolve` list fits this machine.
        DocumentError: the file is malformed.
    """
    files = target_files()
    if name not in files:
        raise UsageError(f"there is no target {name!r}{closest(name, files)} (known: {', '.join(files) or 'none'})")
    target = read_toml(files[name], Target, FORMAT)
    if target.name != name:
        raise DocumentError(f'{line_of(files[name], "name")}: the name "{target.name}" differs from the file name')
    if not target.resolve:
        return target
    for option in target.resolve:
        has_any = not option.any_isa or any(feature in isa for feature in option.any_isa)
        if option.machine == machine and has_any and all(feature in isa for feature in option.isa):
            return load_target(option.target, machine=machine, isa=isa)
    raise UsageError(
        f"no rule of target {name!r} in {files[name]} fits this machine ({machine}); name a target yourself"
    )
