"""A process that never outlives its owner: it is killed when we stop it, and when we are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

# The shell waits until its stdin closes, which the kernel does for us even after SIGKILL, then kills the program. Should
# the shell itself be killed, the kernel kills the program. A thread's death, unlike a process's, means nothing to it.
_KEEPER = """\
setpriv --pdeathsig KILL -- "$@" </dev/null >&2 &
echo $!
exec >&-
read -r _
kill -KILL $!
wait
"""


class Kept:
    """A program and its keeper; what the program says goes to a log."""

    def __init__(self, argv: Sequence[str | Path], log: Path, *, pass_fds: Sequence[int] = ()) -> None:
        self.log = log
        with log.open("wb") as stream:
            self._keeper = subprocess.Popen(
                ["sh", "-c", _KEEPER, "sh", *map(str, argv)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C is for the tests
            )
        assert self._keeper.stdout is not None
        with self._keeper.stdout as said:
            self.pid = int(said.readline())

    def is_alive(self) -> bool:
        """Return whether the program still runs."""
        return self._keeper.returncode is None and state_of(self.pid) not in {"", "Z", "X"}

    def said(self) -> str:
        """Return the end of what the program printed."""
        return self.log.read_text(errors="replace")[-2000:].strip()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            if self.is_alive():
                os.kill(self.pid, number)

    def stop(self) -> None:
        """Kill the program and wait for its end; twice is once."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()


def state_of(process: int) -> str:
    """Return the letter that the kernel has for a process's state, or "" where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def name_of(process: int) -> str:
    """Return what a process is called, or "" where there is none."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def offspring(process: int) -> list[int]:
    """Return a process's children, and theirs."""
    found, todo = [], [process]
    while todo:
        with contextlib.suppress(OSError):  # it ended meanwhile
            for task in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
                children = [int(child) for child in task.read_text().split()]
                found += children
                todo += children
    return found
