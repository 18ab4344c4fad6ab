"""Where words go: data to stdout, talk to stderr; shared options of all commands."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from edgedeploy.documents import Record, as_document, to_builtins
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


def _waiting_s(context: click.Context, option: click.Parameter, text: str) -> float:
    from edgedeploy.units import parse_waiting

    try:
        return parse_waiting(text)
    except ValueError as error:
        raise UsageError(f"--wait {text}: {error}") from error


wait_option = click.option(
    "--wait",
    "wait_s",
    default="0",
    metavar="TIME",
    callback=_waiting_s,
    help="How long to queue for a busy device, such as 30s, 10m or 2h. [default: do not wait]",
)
no_explain_option = click.option(
    "--no-explain", is_flag=True, help="Do not look for the reason where a latency or the accuracy failed."
)


def _budget_s(context: click.Context, option: click.Parameter, text: str) -> float:
    from edgedeploy.units import parse_waiting

    if not text:
        return 0.0
    try:
        seconds = parse_waiting(text)
    except ValueError as error:
        raise UsageError(f"--budget {text}: {error}") from error
    if seconds <= 0:
        raise UsageError(f"--budget {text}: give the time that each device may measure, such as 20m")
    if text.strip()[-1].isdigit():
        raise UsageError(f"--budget {text}: say which unit is meant, such as {text}m or {text}s")
    return seconds


budget_option = click.option(
    "--budget",
    "budget_s",
    default="",
    metavar="TIME",
    callback=_budget_s,
    help="How long each device may measure, such as 20m: spent over the cells by their noise. [default: no limit]",
)
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


def print_list(
    noun: str, columns: Sequence[str], rows: list[list[str]], documents: Sequence[Any], as_json: bool
) -> None:
    """Print a table of records, or one JSON document that holds them under `noun`."""
    if as_json:
        items = [to_builtins(one) if isinstance(one, Record) else one for one in documents]
        print_json({"format": f"edgedeploy.{noun}/1", noun: items})
        return
    print_table(noun.capitalize(), columns, rows)


def print_table(title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    """Print a table, as wide as the terminal is."""
    from edgedeploy.render.text import table

    click.echo(table(title, columns, rows, color=uses_color(), width=terminal_width()))


def print_record(record: Record, as_json: bool) -> None:
    """Print one record, as a table of its keys or as a JSON document."""
    if as_json:
        print_json(as_document(record))
        return
    rows = [[key, _flat(value)] for key, value in to_builtins(record).items() if value not in ("", [], {}, None)]
    print_table("", ("key", "value"), rows)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_flat(inner)}" for key, inner in value.items() if inner not in ("", [], {}, None))
    if isinstance(value, list):
        return ", ".join(_flat(inner) for inner in value)
    return str(value)


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


class Board:
    """Progress of work on many devices, told from many threads: a call is a line, `device` gives a line of its own.

    On a terminal each device keeps one line that changes, below what scrolls by; elsewhere every line names its device.
    """

    def __init__(self, tell: Callable[[str], None], *, is_live: bool) -> None:
        self._tell, self._is_live = tell, is_live
        self._lock = threading.RLock()
        self._lines: dict[str, str] = {}
        self._live: Any = None

    def __call__(self, text: str) -> None:
        """Tell something about no device in particular."""
        with self._lock:
            if self._live is None:
                self._tell(text)
            else:
                self._live.console.print(f"· {_printable(text)}", markup=False, highlight=False)

    def device(self, name: str) -> Callable[[str], None]:
        """Return what tells about one device."""

        def tell(text: str) -> None:
            said = text.removeprefix(f"{name}: ")
            with self._lock:
                if not self._is_live:
                    self._tell(f"{name}: {said}")
                    return
                self._lines[name] = said.split("\n")[0]
                self._show()

        return tell

    def _show(self) -> None:
        """Draw the devices' lines anew, ten times a second at most."""
        from rich.console import Console
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=Console(stderr=True), auto_refresh=True, refresh_per_second=10)
            self._live.start()
        self._live.update(self._table())

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, text in self._lines.items():
            table.add_row(Text(name, style="cyan"), Text(_printable(text)))
        return table

    def close(self) -> None:
        """Leave the lines as they are and draw no more."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
            self._is_live = False


def _printable(text: str) -> str:
    from edgedeploy.render.figures import printable

    return printable(text)


@contextlib.contextmanager
def board(quiet: bool) -> Iterator[Board]:
    """Give what the progress of work on many devices is told to, while the block lasts."""
    shown = Board(progress(quiet), is_live=not quiet and sys.stderr.isatty())
    try:
        yield shown
    finally:
        shown.close()


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
