"""The command lines that made a verdict, and those that make it again. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from edgedeploy.records.verdict import CellVerdict, Policy, Verdict
from edgedeploy.render.figures import one_line


def command_line(verb: str, operands: Sequence[object], options: Mapping[str, object]) -> str:
    """Return a command line of edgedeploy, quoted for a shell.

    Args:
        verb: such as "run".
        operands: what stands without an option's name.
        options: name without dashes → value; True is a flag, a list repeats the option, and what is empty, None or
            False is left out.

    >>> command_line("gate", ["build/my int8"], {"margin": ["latency_p50=+5%"], "baseline": "", "json": True})
    "edgedeploy gate 'build/my int8' --margin latency_p50=+5% --json"
    """
    words = ["edgedeploy", verb, *(one_line(str(operand)) for operand in operands)]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
            continue
        for one in value if isinstance(value, list | tuple) else (value,):
            if one is not None and one is not False and one not in ("", 0):
                words += [f"--{name}", one_line(str(one))]
    return shlex.join(words)


def in_lines(command: str) -> str:
    r"""Return a command line with an option a line, as it may be pasted into a shell.

    >>> print(in_lines("edgedeploy gate new --baseline old"))
    edgedeploy gate new \
      --baseline old
    """
    try:
        words = shlex.split(command)
    except ValueError:  # somebody else wrote it
        return command
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def again(cell: CellVerdict, policy: Policy) -> str:
    """Return the command that judges a cell's stored runs again, alone; "" where a run is missing."""
    if not cell.baseline_run or not cell.candidate_run:
        return ""
    margins = [f"{metric}={margin.text}" for metric, margin in policy.margins.items()]
    options = {"baseline": cell.baseline_run, "margin": margins, "max-blocks": policy.max_blocks}
    options["allow-stored-pass"] = policy.allow_stored_pass
    return command_line("gate", [cell.candidate_run], options)


def commands(verdict: Verdict) -> list[tuple[str, str]]:
    """Return (what it does, command) for a whole verdict; nothing where it does not say how it was made."""
    return [("This verdict was made by", verdict.command)] if verdict.command else []
