"""``celery -A APP docket ...``: this group is what Celery's ``celery.commands`` entry point loads.

Every ``celery`` command imports this file, so each subcommand's module is imported when it is called.
"""

from __future__ import annotations

import importlib
from typing import Final

import click
from celery import Celery

_COMMANDS: Final = {
    "check": "docket_celery.cli.graphs",
    "migrate": "docket_celery.cli.database",
    "plan": "docket_celery.cli.graphs",
    "purge": "docket_celery.cli.database",
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports them on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- the same
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(importlib.import_module(module), cmd_name)
        return command


@click.group(cls=LazyGroup)
def docket() -> None:
    """Graphs of typed steps: check, plan, and their database."""


def loaded_app(ctx: click.Context) -> Celery:
    """Return the app of ``celery -A APP``, with its task modules imported.

    Raises:
        ClickException: No app was named, or its ``docket_*`` settings cannot be used.
    """
    app: Celery = ctx.obj.app
    app.loader.import_default_modules()
    app.finalize()
    return app
