"""Lines out of a device's stream of bytes, with limits: their length, and how many wait to be read."""

from __future__ import annotations

import collections
import threading

# The longest line of the protocol is a warm-up that never settles: 5 s of inferences of 2 µs are 12 MB of numbers.
LONGEST_LINE_BYTES = 16 << 20
# What may lie unread before the sender is held back.
MOST_WAITING_BYTES = 32 << 20
# What a line costs beside its bytes, so that a flood of empty ones is bounded too.
_LINE_BYTES = 64


class Lines:
    """Lines on their way from the thread that reads a stream to the one that wants them.

    Attributes:
        problem: why the stream was given up, as a sentence; "" when it only ended, or still runs.
    """

    def __init__(self, longest: int = LONGEST_LINE_BYTES, waiting: int = MOST_WAITING_BYTES) -> None:
        self.problem = ""
        self._longest, self._most_waiting = longest, waiting
        self._lines: collections.deque[bytes] = collections.deque()
        self._waiting_bytes = 0
        self._unfinished = bytearray()
        self._is_ended = False
        self._changed = threading.Condition()

    def feed(self, data: bytes) -> None:
        """Take what the stream gave, and wait while the other thread lags behind: that holds the sender back.

        After the end it is thrown away, so that a process that is ending never hangs on a full pipe.
        """
        first, *rest = data.split(b"\n")
        with self._changed:
            if self._is_ended:
                return
            self._extend(first)
            for start in rest:
                if self.problem:
                    break
                self._finish()
                self._extend(start)
            self._is_ended = self._is_ended or bool(self.problem)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting_bytes <= self._most_waiting or self._is_ended)

    def _extend(self, part: bytes) -> None:
        self._unfinished += part
        if len(self._unfinished) > self._longest:
            self.problem = f"it sent a line of more than {self._longest} bytes, which no runner does"

    def _finish(self) -> None:
        line = bytes(self._unfinished)
        self._unfinished.clear()
        self._lines.append(line)
        self._waiting_bytes += len(line) + _LINE_BYTES

    def end(self) -> None:
        """Say that nothing more comes, or that nobody wants more; an unfinished line is dropped."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def get(self, timeout_s: float) -> bytes | None:
        """Return the next line, without its newline; None when none came in time.

        Raises:
            EOFError: there will be none any more.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._lines or self._is_ended, max(timeout_s, 0.0)):
                return None
            if not self._lines:
                raise EOFError(self.problem)
            line = self._lines.popleft()
            self._waiting_bytes -= len(line) + _LINE_BYTES
            self._changed.notify_all()
            return line
