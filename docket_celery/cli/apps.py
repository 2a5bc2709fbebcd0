"""The app that ``-A`` names, with its tasks imported."""

from __future__ import annotations

import click
from celery import Celery

from docket_celery.errors import DocketError


def loaded_app(ctx: click.Context) -> Celery:
    """Return the app of ``celery -A APP``, with its task modules imported.

    Raises:
        ClickException: No app was named, or its ``docket_*`` settings cannot be used.
    """
    app: Celery = ctx.obj.app
    app.loader.import_default_modules()
    app.finalize()
    return app


def as_click(error: DocketError) -> click.ClickException:
    """Return *error* as Celery's command line shows errors: its text and exit status 1."""
    return click.ClickException(str(error))
