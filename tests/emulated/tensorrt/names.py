"""Which names one version of TensorRT's Python has, so that the emulation has no others."""

from __future__ import annotations

import ctypes
import json
import os
import signal
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parents[2] / "data" / "tensorrt_api_names.json"
VERSION = os.environ.get("EMULATED_TENSORRT", "10.3.0")
FAULT = os.environ.get("EMULATED_FAULT", "")
MAJOR = int(VERSION.split(".")[0])


def api_of(version: str) -> dict[str, Any]:
    """Return what was recorded of a version's module: "names", "classes" and "enums"."""
    recorded = json.loads(RECORDED.read_text())
    keys = [key for key in recorded if f"{key}.".startswith(f"{version}.")]
    if len(keys) != 1:
        raise ImportError(f"EMULATED_TENSORRT is {version!r}; recorded are {', '.join(recorded)}")
    return dict(recorded[keys[0]])


API = api_of(VERSION)


def has(kind: str, name: str) -> bool:
    """Return whether this version's class has an attribute."""
    return name in API["classes"].get(kind, ())


def only(kind: type) -> type:
    """Take from a class what this version's does not have; what it has and we do not is an error, not an absence."""
    allowed = set(API["classes"][kind.__name__])
    for name in list(vars(kind)):
        if not name.startswith("_") and name not in allowed:
            delattr(kind, name)

    def __getattr__(self: object, name: str) -> Any:
        if name in allowed:
            raise NotImplementedError(f"TensorRT {VERSION} has {kind.__name__}.{name}, and this emulation does not")
        raise AttributeError(f"'tensorrt.tensorrt.{kind.__name__}' object has no attribute {name!r}")

    def __setattr__(self: object, name: str, value: object) -> None:
        # A pybind11 object takes no attributes that its class does not have; a Python subclass of it does.
        if type(self) is kind and not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"'tensorrt.tensorrt.{kind.__name__}' object has no attribute {name!r}")
        object.__setattr__(self, name, value)

    kind.__getattr__ = __getattr__  # type: ignore[attr-defined]
    kind.__setattr__ = __setattr__  # type: ignore[assignment, method-assign]
    return kind


class Member:
    """One member of an enumeration of pybind11: it has a name and a number, and no order."""

    def __init__(self, kind: str, name: str, value: int) -> None:
        self.kind, self.name, self.value = kind, name, value

    def __int__(self) -> int:
        return self.value

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Member) and (self.kind, self.value) == (other.kind, other.value)

    def __hash__(self) -> int:
        return hash((self.kind, self.value))

    def __repr__(self) -> str:
        return f"<{self.kind}.{self.name}: {self.value}>"

    def __str__(self) -> str:
        return f"{self.kind}.{self.name}"


def enumeration(kind: str, members: dict[str, int]) -> type:
    """Return an enumeration; a second name of a number is an alias of the first."""
    made: dict[str, Member] = {}
    by_value: dict[int, Member] = {}
    for name, value in members.items():
        made[name] = by_value.setdefault(value, Member(kind, name, value))
    return type(kind, (), {**made, "__members__": made})


_ENUMS: dict[str, type] = {}


def enum(kind: str) -> Any:
    """Return an enumeration of this version; the same object every time."""
    if kind not in _ENUMS:
        _ENUMS[kind] = enumeration(kind, API["enums"][kind])
    return _ENUMS[kind]


def driver_works() -> bool:
    """Return whether there is a driver with a GPU, as CUDA sees it."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def demand_driver(kind: str, logger: Any) -> None:
    """Behave as the real class does where there is no driver: measured with 8.5.3.1, 8.6.0 and 11.4 lean."""
    if driver_works():
        return
    logger.log(enum_severity("WARNING"), "CUDA initialization failure with error: 35")
    if kind == "Runtime" and VERSION.startswith("8.6"):
        os.kill(os.getpid(), signal.SIGSEGV)
    raise TypeError("pybind11::init(): factory function returned nullptr")


Severity = enumeration("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})


def enum_severity(name: str) -> Any:
    """Return a severity of the logger."""
    return getattr(Severity, name)
