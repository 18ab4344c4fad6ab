"""pycuda.driver by its documentation: objects that free what they stand for once nobody refers to them."""

from __future__ import annotations

import builtins
import ctypes
from typing import Any

import numpy as np

_CUDA = ctypes.CDLL("libcudart.so.12")
for _name in ("cudaStreamSynchronize", "cudaStreamDestroy", "cudaFree", "cudaEventDestroy"):
    getattr(_CUDA, _name).argtypes = [ctypes.c_void_p]
_CUDA.cudaMalloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_CUDA.cudaMemcpyAsync.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_CUDA.cudaEventRecord.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_CUDA.cudaEventElapsedTime.argtypes = [ctypes.c_void_p] * 3


class Error(Exception):
    """Base class of all errors of pycuda."""


class MemoryError(Error, builtins.MemoryError):
    """The GPU's memory is full."""


class LogicError(Error, RuntimeError):
    """A call that the program should not have made."""


_HAS_CONTEXT = [0]


def _check(code: int) -> None:
    if _HAS_CONTEXT[0] < 1:
        raise LogicError("invalid device context")
    if code == 2:
        raise MemoryError("cuMemAlloc failed: out of memory")
    if code != 0:
        raise LogicError(f"CUDA error {code}")


def init() -> None:
    """Do what cuInit does, which has been done."""


class Context:
    def push(self) -> None:
        _HAS_CONTEXT[0] += 1

    @staticmethod
    def pop() -> None:
        if _HAS_CONTEXT[0] < 1:
            raise LogicError("context::pop failed: invalid device context")
        _HAS_CONTEXT[0] -= 1


class Device:
    def __init__(self, number: int) -> None:
        if number != 0:
            raise LogicError("cuDeviceGet failed: invalid device ordinal")

    def retain_primary_context(self) -> Context:
        return Context()


class Stream:
    def __init__(self) -> None:
        handle = ctypes.c_void_p()
        _check(_CUDA.cudaStreamCreate(ctypes.byref(handle)))
        self.handle = handle.value

    def synchronize(self) -> None:
        _check(_CUDA.cudaStreamSynchronize(self.handle))

    def __del__(self) -> None:
        _CUDA.cudaStreamDestroy(self.handle)


class Event:
    def __init__(self) -> None:
        handle = ctypes.c_void_p()
        _check(_CUDA.cudaEventCreate(ctypes.byref(handle)))
        self._handle = handle.value

    def record(self, stream: Stream) -> Event:
        _check(_CUDA.cudaEventRecord(self._handle, stream.handle))
        return self

    def time_till(self, event: Event) -> float:
        value = ctypes.c_float()
        _check(_CUDA.cudaEventElapsedTime(ctypes.byref(value), self._handle, event._handle))
        return value.value

    def __del__(self) -> None:
        _CUDA.cudaEventDestroy(self._handle)


class DeviceAllocation:
    def __init__(self, size: int) -> None:
        self._address = 0
        address = ctypes.c_void_p()
        _check(_CUDA.cudaMalloc(ctypes.byref(address), size))
        self._address = address.value

    def __int__(self) -> int:
        return self._address

    __index__ = __int__

    def free(self) -> None:
        _CUDA.cudaFree(self._address)
        self._address = 0

    def __del__(self) -> None:
        self.free()


mem_alloc = DeviceAllocation


def mem_get_info() -> tuple[int, int]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _check(_CUDA.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    return free.value, total.value


def pagelocked_empty(shape: int, dtype: Any) -> np.ndarray:
    return np.empty(shape, dtype)


def memcpy_htod_async(dest: int, src: np.ndarray, stream: Stream) -> None:
    _check(_CUDA.cudaMemcpyAsync(int(dest), src.ctypes.data, src.nbytes, 1, stream.handle))


def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Stream) -> None:
    _check(_CUDA.cudaMemcpyAsync(dest.ctypes.data, int(src), dest.nbytes, 2, stream.handle))
