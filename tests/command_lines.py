"""Parses a command line as edgedeploy does, without running it: for commands that documents show."""

import click

import edgedeploy.cli


def parse(words):
    """Return the parameters of a verb, or of the verb of a group; raises click's errors where one does not exist."""
    command, context = edgedeploy.cli.cli, click.Context(edgedeploy.cli.cli, info_name="edgedeploy")
    rest = list(words)
    while isinstance(command, click.Group):
        with context:
            name, command, rest = command.resolve_command(context, rest)
            is_last = not isinstance(command, click.Group)
            context = (
                command.make_context(name, list(rest), parent=context)
                if is_last
                else click.Context(command, parent=context)
            )
    return context.params
