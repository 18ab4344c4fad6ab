"""Which sizes an engine accepts: -O axes=... read, and optimization profiles made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgedeploy.documents import closest
from edgedeploy.errors import CompileError, UsageError
from edgedeploy.records.model import TensorSpec

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

Range = tuple[int, int, int]
Profile = dict[str, list[int]]

_HOW = "write NAME=MIN:OPT:MAX, or NAME=SIZE for a fixed one, with commas between axes: -O axes=batch=1:4:8,length=128"
# What stands in a hint for the sizes of an axis, which only the person knows: the smallest range that is no fixed size.
_EXAMPLE = "1:1:8"


def parse_axes(text: str) -> dict[str, Range]:
    """Read `-O axes=`, for example "batch=1:4:8,length=128".

    Returns:
        axis → (smallest, the one that kernels are chosen for, largest); a single size counts for all three.

    Raises:
        UsageError: it cannot be read, a size is below 1, sizes that do not ascend, or an axis that is named twice.
    """
    axes: dict[str, Range] = {}
    for part in text.split(",") if text.strip() else []:
        name, _, written = (piece.strip() for piece in part.rpartition("="))
        sizes = [int(size) if size.isascii() and size.isdigit() else 0 for size in written.split(":")]
        if not name or len(sizes) not in (1, 3) or not all(sizes):
            raise UsageError(f"-O axes: {part.strip()!r} is no axis with its sizes; {_HOW}")
        low, best, high = sizes * 3 if len(sizes) == 1 else sizes
        if not low <= best <= high:
            raise UsageError(f"-O axes: the sizes of {name!r} do not ascend ({low}, {best}, {high}); {_HOW}")
        if name in axes:
            raise UsageError(f"-O axes: the axis {name!r} is given twice; give it once")
        axes[name] = (low, best, high)
    return axes


def demand_one_sample(inputs: Sequence[TensorSpec], axes: Mapping[str, Range], backend: str) -> None:
    """Raise where an engine could not be given one sample, by which it is checked and measured.

    Raises:
        CompileError: its hint says what to do instead.
    """
    for spec in inputs:
        first = spec.shape[0] if spec.shape else 1
        low, _, high = axes.get(str(first), (1, 1, 1))
        if low > 1:
            raise CompileError(
                f"-O axes takes no {first} below {low}, and engines are checked and measured with one sample",
                backend=backend,
                hint=f"let it start at 1, as in {first}=1:{low}:{high}, or fix it in the model with --input "
                f"{spec.name}=... and {low} in place of {first}",
            )


def apply_axes(model: ModelProto, axes: Mapping[str, Range], backend: str) -> dict[str, Profile]:
    """Fix the axes that have one size, in the graph itself, and return the profiles of the inputs that stay dynamic.

    A name that several inputs have is one axis with one range. An axis without a name is called after its input and
    its place, as the model's manifest does: "image_2".

    Returns:
        input → "min", "opt" and "max", each with a size for every axis.

    Raises:
        CompileError: dynamic axes without a range; its hint is what to type.
        UsageError: a range for an axis that the model does not have.
    """
    constants = {item.name for item in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    dynamic = {value.name: _dynamic_axes(value) for value in inputs}
    names = list(dict.fromkeys(name for own in dynamic.values() for name in own.values()))
    for name in axes:
        if name not in names:
            known = f"it has: {', '.join(names)}" if names else "all its axes are fixed"
            raise UsageError(f"-O axes: the model has no dynamic axis {name!r}{closest(name, names)} ({known})")
    if missing := [name for name in names if name not in axes]:
        given = [f"{name}={':'.join(map(str, axes[name]))}" for name in names if name in axes]
        wanted = ",".join([*given, *(f"{name}={_EXAMPLE}" for name in missing)])
        holders = [value.name for value in inputs if set(missing) & set(dynamic[value.name].values())]
        raise CompileError(
            f"{'axis' if len(missing) == 1 else 'axes'} {', '.join(missing)} of {', '.join(holders)} "
            f"{'has' if len(missing) == 1 else 'have'} no sizes, and an engine is built for a smallest, a usual and a "
            f"largest one",
            backend=backend,
            hint=f"give them as -O axes={wanted} (smallest:usual:largest, or one fixed size)",
        )
    fixed = {name: best for name, (low, best, high) in axes.items() if low == high}
    profiles = {}
    for value in inputs:
        own = dynamic[value.name]
        for place, name in own.items():
            if name in fixed:
                value.type.tensor_type.shape.dim[place].dim_value = fixed[name]
        if set(own.values()) - set(fixed):
            profiles[value.name] = _profile(value, own, axes)
    _fix_outputs(model, fixed)
    return profiles


def _dynamic_axes(value: ValueInfoProto) -> dict[int, str]:
    return {
        place: size.dim_param or f"{value.name}_{place}"
        for place, size in enumerate(value.type.tensor_type.shape.dim)
        if not size.HasField("dim_value")
    }


def _profile(value: ValueInfoProto, own: Mapping[int, str], axes: Mapping[str, Range]) -> Profile:
    sizes = [
        axes[own[place]] if place in own and not size.HasField("dim_value") else (int(size.dim_value),) * 3
        for place, size in enumerate(value.type.tensor_type.shape.dim)
    ]
    low, best, high = (list(column) for column in zip(*sizes, strict=True))
    return {"min": low, "opt": best, "max": high}


def _fix_outputs(model: ModelProto, fixed: Mapping[str, int]) -> None:
    """Write fixed sizes into outputs; an expression such as 2*batch is left to whoever infers shapes."""
    for value in model.graph.output:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in fixed:
                size.dim_value = fixed[size.dim_param]
    del model.graph.value_info[:]
