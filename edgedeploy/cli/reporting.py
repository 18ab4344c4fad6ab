"""In which forms a verdict is written, for all verbs that have one; and report, which writes a stored one again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgedeploy.cli import console

_FORMS = {
    "html": "a self-contained HTML report",
    "markdown": "Markdown, for a comment on a pull request,",
    "junit": "JUnit XML",
    "sarif": "SARIF 2.1.0, for code scanning,",
    "csv": "every raw sample as CSV",
}
_KEYS = (*_FORMS, "report_url")


def _checked_address(context: click.Context, option: click.Parameter, given: str) -> str:
    """Refuse what is no address before anything is measured."""
    from edgedeploy.arguments import web_address

    return web_address(given)


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say in which forms a verdict is written; `report_forms` takes them out again."""
    for option in reversed(
        [
            *(
                click.option(f"--{form}", type=click.Path(path_type=Path, dir_okay=False), help=f"Write {what} here.")
                for form, what in _FORMS.items()
            ),
            click.option(
                "--report-url",
                default="",
                metavar="URL",
                callback=_checked_address,
                help="Where the HTML will be; Markdown links there.",
            ),
        ]
    ):
        command = option(command)
    return command


def report_forms(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of a command's options what `outcomes.write_reports` wants to know."""
    return {key: options.pop(key) for key in _KEYS}


@click.command(
    epilog="""\b
Examples:
  edgedeploy report bench_results/reports/20261122T231500Z-demo.json --markdown comment.md --sarif gate.sarif
  edgedeploy report verdict.json --results bench_results --html report.html
""",
)
@click.argument("verdict", type=click.Path(path_type=Path), metavar="VERDICT.json")
@report_options
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where its runs are kept. [default: where VERDICT lies, else bench_results]",
)
@console.quiet_option
@console.json_option
def report_command(verdict: Path, results: Path | None, quiet: bool, as_json: bool, **options: Any) -> None:
    """Render a stored VERDICT again: nothing is measured, nothing is judged.

    Without any of the forms it is printed. The exit code says whether that worked, and not what the verdict is.
    """
    from edgedeploy import outcomes

    outcome = outcomes.stored_outcome(
        verdict,
        results=results,
        elsewhere=Path(console.setting("results", "bench_results")),
        progress=console.progress(quiet),
    )
    outcomes.write_reports(outcome, **report_forms(options), is_stored=True)
    if as_json:
        files = {label: str(path) for label, path in outcome.files.items()}
        console.print_json({"format": "edgedeploy.report/1", "decision": outcome.verdict.decision, "files": files})
        return
    if not outcome.files:
        from edgedeploy.render.text import verdict_text

        shown = verdict_text(outcome.verdict, outcome.runs, color=console.uses_color(), width=console.terminal_width())
        click.echo(shown)
    for label, path in outcome.files.items():
        click.echo(f"{label}: {path}")
