"""Compiles the emulated CUDA of cuda_stubs.c, for tests that need a variant of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "cuda_stubs.c"


def build_stubs(folder: Path, *, cuda: str = "12", with_runtime: bool = True) -> Path:
    """Compile libcuda.so.1 and libcudart into a folder and return it; skip the test where there is no compiler.

    Args:
        folder: where they go; made where it is not there.
        cuda: "12", or "11" for what was other in CUDA 11.0.
        with_runtime: leave it out for a machine that has a driver and nothing else.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for the emulated CUDA libraries; apt-get install gcc")
    folder.mkdir(parents=True, exist_ok=True)
    runtime, eleven = ("libcudart.so.12", []) if cuda == "12" else ("libcudart.so.11.0", ["-DCUDA_11"])
    made = {"libcuda.so.1": ["-DDRIVER"], **({runtime: ["-DRUNTIME", *eleven]} if with_runtime else {})}
    for name, flags in made.items():
        command = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *flags]
        subprocess.run([*command, f"-Wl,-soname,{name}", "-o", str(folder / name), str(SOURCE)], check=True)
    return folder
