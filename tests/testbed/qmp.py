"""The control channel of a virtual machine: QEMU's monitor in JSON, over a socket pair that nobody else can reach."""

from __future__ import annotations

import json
import socket
import time

from .cache import TestbedError

ANSWER_TIMEOUT_S = 60.0  # a snapshot of a gigabyte on a busy disk


class Qmp:
    """One conversation with one QEMU.

    Attributes:
        theirs: the end that QEMU inherits; closed here once it runs.
    """

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._ours.settimeout(ANSWER_TIMEOUT_S)
        self._stream = self._ours.makefile("rwb")

    def greet(self) -> None:
        """Begin, once QEMU runs."""
        self.theirs.close()
        self._read()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> object:
        """Have something done and return what QEMU answers.

        Raises:
            TestbedError: it refused, or it does not answer.
        """
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            self._stream.write(json.dumps(request).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise TestbedError(f"QEMU cannot be asked for {command!r}: {error}") from error
        while True:
            said = self._read()
            if "error" in said:
                raise TestbedError(f"QEMU refused {command!r}: {said['error']}")
            if "return" in said:
                return said["return"]

    def monitor(self, line: str) -> str:
        """Have a line of the monitor for people done: "savevm ready". What it prints is an error, or "".

        Raises:
            TestbedError: it said something.
        """
        said = str(self.execute("human-monitor-command", **{"command-line": line}))
        if said.strip():
            raise TestbedError(f"QEMU's answer to {line!r}: {said.strip()}")
        return said

    def wait_for(self, event: str, *, timeout_s: float) -> None:
        """Wait for an event, "RESET". Raises TestbedError when it does not come."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._read().get("event") == event:
                return
        raise TestbedError(f"QEMU did not say {event} within {timeout_s:g} s")

    def close(self) -> None:
        """End the conversation; twice is once."""
        self._stream.close()
        self._ours.close()
        self.theirs.close()

    def _read(self) -> dict[str, object]:
        try:
            line = self._stream.readline()
        except OSError as error:
            raise TestbedError(f"QEMU does not answer: {error}") from error
        if not line:
            raise TestbedError("QEMU has ended")
        said: dict[str, object] = json.loads(line)
        return said
