"""A session in a process of the emulated device, driven from a test: what it raises is raised there.

Run as a program it is the device's end: one pickled request after another on stdin, answers on descriptor 1.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Device:
    """One process of the emulated device, in which sessions are opened one after another."""

    def __init__(self, session: Path, variables: Mapping[str, str]) -> None:
        """Start the process; the session's module is imported by the first request."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(session)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **variables},
        )  # fmt: skip

    def ask(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Have the device do something and return what it answers, or raise what it raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((name, arguments, options), self._process.stdin)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def load(self, artifact: Path, **options: Any) -> Remote:
        """Open a session."""
        return Remote(self, self.ask("open", str(artifact), options))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Remote:
    """A session there; every method is called there."""

    def __init__(self, device: Device, number: int) -> None:
        self._device, self._number = device, number

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: self._device.ask("call", self._number, name, *arguments, **options)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exc: object) -> None:
        self._device.ask("call", self._number, "__exit__", None, None, None)


class Answerer:
    """The device's end."""

    def __init__(self, session: str) -> None:
        sys.path.insert(0, str(ROOT / "edgedeploy" / "ondevice"))
        from runner import load_device_half

        self.module = load_device_half(session)
        self.sessions: list[Any] = []

    def open(self, artifact: str, options: dict[str, Any]) -> int:
        self.sessions.append(self.module.Session(artifact, options))
        return len(self.sessions) - 1

    def call(self, number: int, name: str, *arguments: Any, **options: Any) -> Any:
        member = getattr(self.sessions[number], name)
        return member(*arguments, **options) if callable(member) else member

    def function(self, name: str, *arguments: Any) -> Any:
        """Call a function of the session's module."""
        return getattr(self.module, name)(*arguments)

    def set(self, name: str, value: str) -> None:
        """Change what EMULATED_... says, or with an empty value what it said."""
        os.environ[name] = value

    def free_bytes(self) -> int:
        """Return what is free of the GPU's memory."""
        import ctypes

        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.module.CUDA.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value


def main(session: str) -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answerer = None
    while True:
        try:
            name, arguments, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answerer = answerer or Answerer(session)
            answer = getattr(answerer, name)(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - raised on the other end
            # The exception's class may be one that only the device has.
            answer = error if type(error).__module__ == "builtins" else RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # what the device has is what PYTHONPATH says
    main(sys.argv[1])
