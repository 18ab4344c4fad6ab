"""The command line: parses, calls one pipeline function, prints, chooses the exit code. Nothing else prints."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from typing import Any

import click

import edgedeploy
from edgedeploy.errors import EdgedeployError, InternalError

# verb → the module of edgedeploy.cli that holds it: --help must not import what no verb on screen needs.
_VERBS = {
    "init": "release",
    "run": "release",
    "doctor": "doctor",
    "inspect": "building",
    "compile": "building",
    "sensitivity": "quantizing",
    "verify": "verifying",
    "bench": "measuring",
    "compare": "measuring",
    "gate": "measuring",
    "baseline": "baselines",
    "explain": "explaining",
    "report": "reporting",
    "history": "history",
    "serve": "serving",
    "bundle": "evidence",
    "install": "installing",
    "rollback": "installing",
    "reproduce": "installing",
    "export": "exporting",
    "targets": "catalogue",
    "devices": "devices",
    "backends": "catalogue",
}
_SUMMARIES = {
    "init": "Write a commented edgedeploy.toml.",
    "run": "Build, measure and judge every cell of a release file.",
    "doctor": "Say what is missing here and the command that fixes it.",
    "inspect": "Say what a model or artifact is and what compression it carries.",
    "compile": "Turn a model into an artifact for one target.",
    "sensitivity": "Show what layers left in float would gain in int8, and cost.",
    "verify": "Compare a model's source, its ONNX form and an artifact; with --key, check a bundle.",
    "bench": "Measure one artifact on a device.",
    "compare": "Show how candidate B differs from baseline A.",
    "gate": "Judge a candidate against a baseline; the exit code is the verdict.",
    "baseline": "Bless a run as the reference, or show the blessed ones.",
    "explain": "Say why one artifact is slower or less accurate than another, layer by layer.",
    "report": "Render a stored verdict again: HTML, Markdown, JUnit, SARIF, CSV.",
    "history": "Show the trend of every cell, and which release moved it.",
    "serve": "Show verdicts, trends and devices in a browser, read-only.",
    "bundle": "Pack a release and its evidence into one signed file.",
    "install": "Put a bundle's artifact in place on a device.",
    "rollback": "Go back to what was installed before.",
    "reproduce": "Rebuild a bundle's artifacts and say which came out the same.",
    "export": "Send results to where people already look (MLflow).",
    "targets": "The kinds of device that can be built for.",
    "devices": "The physical devices that can be reached.",
    "backends": "The runtimes that can be compiled for.",
}


class _ReaderLeft(Exception):
    """The reader of our stdout has gone (| head)."""


class _Verbs(click.Group):
    """Lists every verb without importing it."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError as error:  # click would make a sys.exit of it, which looks like one of the model's
            raise _ReaderLeft from error

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(f"edgedeploy.cli.{_VERBS[name]}"), f"{name}_command")
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0] if arguments else ""
        if name and not name.startswith("-") and name not in _VERBS:
            from edgedeploy.documents import closest

            context.fail(f"there is no command {name!r}{closest(name, _VERBS)}")
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUMMARIES.items()))


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 passed, 1 the gate says no, 2 wrong usage, 3 could not build or measure, 4 inconclusive, "
    "70 a bug in edgedeploy.",
)
@click.version_option(edgedeploy.__version__, prog_name="edgedeploy")
def cli() -> None:
    """Compile compressed PyTorch models for edge devices, measure them there, and gate releases.

    A first verdict: edgedeploy init, then edgedeploy run.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; every error becomes one sentence on stderr."""
    try:
        result: Any = cli.main(args=arguments, prog_name="edgedeploy", standalone_mode=False)
    except EdgedeployError as error:
        return _complain(str(error), type(error).__name__, error.exit_code, arguments)
    except click.UsageError as error:
        hint = f"\nTry: {error.ctx.command_path} --help" if error.ctx else ""
        return _complain(f"{error.format_message()}{hint}", "UsageError", 2, arguments)
    except click.ClickException as error:
        return _complain(error.format_message(), "UsageError", 2, arguments)
    except (click.Abort, KeyboardInterrupt):
        return _complain(
            "interrupted; nothing half-written is left, and the device is released", "Interrupted", 130, arguments
        )
    except SystemExit as error:
        text = f"the model's own code ended the program (sys.exit: {error.code}); take that call out of what it imports"
        return _complain(text, "ModelError", EdgedeployError.exit_code, arguments)
    except ModuleNotFoundError as error:
        if (error.name or "edgedeploy").partition(".")[0] == "edgedeploy":
            return _complain_of_bug(error, arguments)
        text = (
            f"the package {error.name} is not installed here; pip install 'edgedeploy[torch,onnxruntime]' brings what "
            f"building needs, and edgedeploy doctor says what else is missing"
        )
        return _complain(text, "BackendMissing", EdgedeployError.exit_code, arguments)
    except _ReaderLeft:
        # Writing more, even at exit, would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE  # as programs end that know nothing of pipes: a verdict was perhaps not read
    except OSError as error:
        # A copy that fails names what it read first and what it wrote second.
        path = error.filename2 or error.filename
        where = f" at {path}" if path else ""
        text = f"{error.strerror or error}{where}"
        if error.errno == errno.ENOSPC:
            text += (
                "; nothing that was there before is lost: free some space, or move the output (-o), the cache "
                "(EDGEDEPLOY_CACHE_DIR) or the results (--results) to another disk"
            )
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            text += "; nothing that was there before is lost: give a folder that you may write to"
        return _complain(text, "OSError", 3, arguments)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug is reported as one
        return _complain_of_bug(error, arguments)
    return result if isinstance(result, int) else 0


def _complain_of_bug(error: Exception, arguments: list[str]) -> int:
    if os.environ.get("EDGEDEPLOY_LOG", "").lower() == "debug":
        raise error
    text = (
        f"a bug in edgedeploy: {type(error).__name__}: {error}; please report it with the output of the same command "
        f"under EDGEDEPLOY_LOG=debug"
    )
    return _complain(text, "InternalError", InternalError.exit_code, arguments)


def _complain(text: str, kind: str, code: int, arguments: list[str]) -> int:
    if "--json" in arguments:
        import json

        click.echo(json.dumps({"format": "edgedeploy.error/1", "kind": kind, "message": text, "exit_code": code}))
    from edgedeploy.render.figures import printable

    click.echo(f"edgedeploy: {printable(text)}", err=True)  # it may quote what a device or a library said
    return code
