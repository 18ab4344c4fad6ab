"""Runs a script of a back end in a child process: however that ends, it is a sentence and what was printed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


def run_script(script: Path, task: Path, limit_s: float) -> tuple[str, str]:
    """Run a script of ours with this interpreter on a task, in the task's folder.

    Args:
        script: imports nothing of ours.
        task: the file that it is given.
        limit_s: after which it is killed.

    Returns:
        How it broke down, as in "it died of SIGSEGV", or "" where it ended well; and all that it printed.
    """
    # -P: the script's folder must not be searched for modules, lest a file there shadow another's.
    command = [sys.executable, "-P", str(script), str(task.resolve())]
    try:
        done = subprocess.run(
            command, cwd=task.parent, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        return f"it did not end within {limit_s:g} s", _text(error.stdout) + _text(error.stderr)
    said = _text(done.stdout) + _text(done.stderr)
    if done.returncode < 0:
        return f"it died of {signal_name(-done.returncode)}", said
    return (f"it ended with exit code {done.returncode}" if done.returncode else ""), said


def signal_name(number: int) -> str:
    """Return what a signal is called.

    >>> signal_name(11), signal_name(200)
    ('SIGSEGV', 'signal 200')
    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _text(output: bytes | str | None) -> str:
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""
