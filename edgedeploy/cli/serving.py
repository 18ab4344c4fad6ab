"""The verb that shows verdicts, trends and devices in a browser: serve."""

from __future__ import annotations

from pathlib import Path

import click

from edgedeploy.cli import console
from edgedeploy.cli.history import store_option
from edgedeploy.dashboard.server import DEFAULT_HOST, DEFAULT_PORT


@click.command(
    epilog="""\b
Examples:
  edgedeploy serve --open
  edgedeploy serve --results bench_results --port 0
  edgedeploy serve --store postgresql://lab@db.example/edgedeploy
""",
)
@console.results_option
@store_option
@click.option("--host", default=DEFAULT_HOST, show_default=True, help="Address of this machine to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0: any that is free."
)
@click.option(
    "--allow-name", "names", multiple=True, metavar="NAME", help="A name of this machine in its network; repeatable."
)
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser of this desktop.")
@console.lab_option
@console.quiet_option
@console.json_option
def serve_command(
    results: Path,
    store: str,
    host: str,
    port: int,
    names: tuple[str, ...],
    opens: bool,
    lab: Path | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Show verdicts, trends and devices in a browser, read-only, until it is interrupted (Ctrl-C).

    Whoever reaches the address may read everything: there is no login. By default only this machine reaches it.
    """
    from edgedeploy.dashboard import server
    from edgedeploy.dashboard.source import open_source

    server.demand_extra()
    tell = console.progress(quiet)
    bound = server.bind(host, port)
    try:
        with open_source(results, store, lab, progress=tell) as source:
            from edgedeploy.dashboard.app import application

            url = server.url_of(bound)
            if not server.is_loopback(host):
                click.echo(
                    f"edgedeploy: {host} can be reached from other machines, and there is no login: whoever reaches it "
                    f"reads every verdict, trend and device; --host {DEFAULT_HOST} keeps it to this machine",
                    err=True,
                )
            if as_json:
                console.print_json({"format": "edgedeploy.serve/1", "url": url})
            else:
                click.echo(f"{url}  (Ctrl-C ends it)")
            if opens:
                click.launch(url)
            server.serve(application(source, names=(host, *names)), bound)
    finally:
        bound.close()
    return 0
