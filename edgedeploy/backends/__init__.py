"""Back ends: one folder is one runtime, a host half (compile) and a device half (session.py).

Discovery is a scan of this folder plus the entry points `edgedeploy.backends`; nothing else in the package changes when
a folder is added.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.documents import closest, complaint, to_builtins
from edgedeploy.errors import BackendMissing, UsageError
from edgedeploy.records.artifact import Artifact, LayerReport
from edgedeploy.records.model import Model
from edgedeploy.records.runtime import DeviceRuntime
from edgedeploy.records.target import Precision, Target

ENTRY_POINT_GROUP = "edgedeploy.backends"


class Backend(Protocol):
    """The host half of a runtime; `session.py` in the same folder is the device half.

    A back end does not hash, cache, log progress, choose paths, add flags or write manifests: the pipeline does. It may
    have `check(model, options)`, which is given the canonical model before anything is calibrated and raises what
    `compile` would raise minutes later; `device_runtimes`, DeviceRuntime records in the order of preference, where its
    runtime can be put on a device from here; and `profiled_layers(artifact, executed)`, which gives layers that its
    session timed (name and kind of each) the names of the model.

    Attributes:
        name: folder, extra and --backend all use this one word.
        suffix: of the compiled file, with its dot.
        precisions: what it can build at all; a target may allow less.
        builds_on: "host", or "device" where the compiled file is tied to the device.
        options: a frozen dataclass; its fields are the -O keys, their defaults and types.
        packages: distributions whose versions decide the artifact's bytes; they enter the recipe.
        tools: the environment that its converter runs in, whose versions enter the recipe too; None: this one.
        computes: whether its sessions compute the model, so that golden answers can be expected of them.
        computes_in_half: whether fp16, and what stays float in int8, is computed in half floats, which overflow: the
            pipeline then says in Model.beyond_half which tensors would.
        int8_is_portable: whether int8 made for another processor gives the same answers on this machine.
    """

    name: str
    suffix: str
    precisions: frozenset[Precision]
    builds_on: Literal["host", "device"]
    options: type
    packages: tuple[str, ...]
    tools: ToolEnvironment | None
    computes: bool
    computes_in_half: bool
    int8_is_portable: bool

    def missing(self) -> str | None:
        """Say what to install to compile here, or None; must not import the toolchain."""

    def compile(self, model: Model, target: Target, options: Any, out: Path) -> None:
        """Write the artifact to `out`.

        `model` is already in the form that this back end asked for: fp32, or explicit Q/DQ by the target's rules.

        Raises:
            CompileError: naming operator and node.
        """

    def inspect(self, artifact: Path) -> LayerReport:
        """Say what precision each layer of a compiled file really got."""


class DeviceBuilt(Backend, Protocol):
    """A runtime whose artifacts are tied to the device: `compile` writes a kit, which a builder there works from.

    Attributes:
        builder: the file that is shipped; it has probe() and build(), as ondevice/runner.py says.
        engine_options: names of the options that decide what is built of a kit; the others are the session's, or have
            already shaped the kit.
    """

    builder: Path
    engine_options: frozenset[str]

    def built_report(self, kit: Path, made: Mapping[str, Path], options: Any) -> LayerReport:
        """Say what precision each layer of a built artifact got, from what its builder made beside it."""


def load_backends() -> tuple[dict[str, Backend], dict[str, str]]:
    """Return every back end by name, and the errors of those that could not be loaded.

    A broken plugin never breaks other commands: it is listed with its error.
    """
    found: dict[str, Backend] = {}
    broken: dict[str, str] = {}
    for entry in pkgutil.iter_modules(__path__):
        if entry.ispkg:
            found[entry.name] = importlib.import_module(f"{__name__}.{entry.name}").BACKEND
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            found.setdefault(point.name, point.load())
        except Exception as error:  # noqa: BLE001 - a third party's plugin may fail in any way
            broken[point.name] = f"{type(error).__name__}: {error}"
    return found, broken


def backend(name: str) -> Backend:
    """Return one back end.

    Raises:
        UsageError: no such back end.
        BackendMissing: a plugin of that name is installed but broken.
    """
    found, broken = load_backends()
    if name in found:
        return found[name]
    if name in broken:
        raise BackendMissing(f"the plugin for back end {name!r} is installed but broken: {broken[name]}")
    raise UsageError(f"there is no back end {name!r}{closest(name, found)} (known: {', '.join(sorted(found))})")


def session_file(name: str) -> Path:
    """Return the device half of a back end, which is shipped as it is.

    It is session.py of its folder, or what the back end names as `device_half` (one for several back ends).
    """
    if shared := getattr(backend(name), "device_half", None):
        return Path(shared)
    module = importlib.import_module(type(backend(name)).__module__)
    assert module.__file__ is not None
    return Path(module.__file__).parent / "session.py"


def device_runtimes(name: str) -> tuple[DeviceRuntime, ...]:
    """Return what can be provisioned for a back end's device half, preferred first; empty: the device brings it."""
    found: tuple[DeviceRuntime, ...] = getattr(backend(name), "device_runtimes", ())
    return found


def session_options(artifact: Artifact) -> dict[str, Any]:
    """Return what the device half of an artifact is opened with: its options, and what its tensors are called and hold.

    Some runtimes answer int32 where the model says int64 or bool; the session gives back what the model says. A device
    half that serves several back ends is told which; one whose artifacts are tied to a device, to which.
    """
    ports: dict[str, dict[str, Any]] = {name: dict(to_builtins(port)) for name, port in artifact.layers.ports.items()}
    for output in artifact.outputs:
        if output.dtype != "float32":
            ports.setdefault(output.name, {})["dtype"] = output.dtype
    engine = artifact.engine
    return {
        **artifact.recipe.options,
        **({"ports": ports} if ports else {}),
        **({"module": artifact.recipe.backend} if hasattr(backend(artifact.recipe.backend), "device_half") else {}),
        **({"fingerprint": dict(to_builtins(engine.fingerprint))} if engine else {}),
    }


def parse_options(kind: type, given: Mapping[str, str | int | float | bool]) -> Any:
    """Turn -O key=value pairs into a back end's frozen options record.

    Raises:
        UsageError: unknown key or a value of the wrong type, naming the intended key, or what the value may be.
    """
    import dataclasses
    import typing

    import msgspec

    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in hints:
            raise UsageError(
                f"unknown option -O {key}={value}{closest(key, known)} (known: {', '.join(known) or 'none'})"
            )
        try:
            values[key] = msgspec.convert(value, hints[key], strict=False)
        except msgspec.ValidationError as error:
            raise UsageError(f"option -O {key}={value} is not valid: {complaint(error, hints[key])}") from error
    return kind(**values)
