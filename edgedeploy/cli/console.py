"""Where words go: data to stdout, talk to stderr; shared options of all commands."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgedeploy.errors import UsageError
from edgedeploy.records.artifact import OptionValue

# "40 of 512 samples": a loop's progress, of which a line now and then is enough to show that it lives.
_COUNT = re.compile(r": (?P<done>\d+) of (?P<all>\d+)\b")
_COUNT_PERIOD_S = 2.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
trust_pickle_option = click.option(
    "--trust-pickle", is_flag=True, help="Run the code inside pickled files: only for files you made."
)
weights_option = click.option(
    "--weights", type=click.Path(path_type=Path), help="A state_dict: .safetensors, or .pt of tensors only."
)
input_option = click.option(
    "--input", "inputs", multiple=True, metavar="NAME=SHAPE[:DTYPE]", help="E.g. image=1x3x224x224:float32; repeatable."
)
target_option = click.option(
    "--target", default="host", show_default=True, help="A kind of device; see: edgedeploy targets list."
)
backend_option = click.option(
    "--backend", default="onnxruntime", show_default=True, help="A runtime; see: edgedeploy backends list."
)
lab_option = click.option("--lab", type=click.Path(path_type=Path), help="The lab file. [default: user's lab.toml]")
results_option = click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=lambda: Path(setting("results", "bench_results")),
    show_default="bench_results",
    help="Where runs and baselines are kept.",
)


def setting(key: str, built_in: str) -> str:
    """Return a setting: EDGEDEPLOY_<KEY>, else [tool.edgedeploy] in ./pyproject.toml, else the built-in."""
    chosen = os.environ.get(f"EDGEDEPLOY_{key.upper()}")
    if chosen:
        return chosen
    try:
        import tomllib

        table = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8")).get("tool", {}).get("edgedeploy", {})
    except (FileNotFoundError, tomllib.TOMLDecodeError):
        table = {}
    return str(table.get(key, built_in))


def uses_color() -> bool:
    """Say whether stdout takes colour: NO_COLOR and FORCE_COLOR first, then whether it is a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def terminal_width() -> int | None:
    """Return the width of the terminal, or None when stdout is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_json(document: dict[str, Any]) -> None:
    """Print one document, whose first key is its format."""
    click.echo(json.dumps(document, indent=1, allow_nan=False))


def progress(quiet: bool) -> Callable[[str], None]:
    """Return the callback that library functions tell their progress: a line each, on stderr."""
    configure_logging()
    if quiet:
        return lambda text: None
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    last_count_s = 0.0

    def tell(text: str) -> None:
        nonlocal last_count_s
        if count := _COUNT.search(text):
            now_s = time.monotonic()
            if count["done"] != count["all"] and now_s - last_count_s < _COUNT_PERIOD_S:
                return
            last_count_s = now_s
        click.echo(click.style("· ", fg="cyan") + text if color else f"· {text}", err=True, color=color)

    return tell


def configure_logging() -> None:
    """Send our log to stderr at the level of EDGEDEPLOY_LOG (default: warning)."""
    level = os.environ.get("EDGEDEPLOY_LOG", "warning").upper()
    if level not in logging.getLevelNamesMapping():
        raise UsageError(f"EDGEDEPLOY_LOG={level.lower()} is not a log level; use debug, info, warning or error")
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    # What libraries miss on this machine (torchao: Triton, CUDA) says nothing about the model.
    for name in ("torchao", "onnxscript", "onnxslim"):
        logging.getLogger(name).setLevel(logging.ERROR if level == "WARNING" else logging.NOTSET)


def parse_pairs(pairs: tuple[str, ...]) -> dict[str, OptionValue]:
    """Parse repeated -O key=value.

    >>> parse_pairs(("threads=2", "name=x", "spin=true", "f=0.5"))
    {'threads': 2, 'name': 'x', 'spin': True, 'f': 0.5}
    """
    values: dict[str, OptionValue] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"-O {pair} is not of the form key=value")
        values[key] = _value(text)
    return values


def _value(text: str) -> OptionValue:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
