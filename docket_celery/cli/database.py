"""``celery docket migrate``."""

from __future__ import annotations

import click

from docket_celery import lifecycle
from docket_celery.cli.apps import as_click, loaded_app
from docket_celery.errors import DocketError
from docket_celery.store import SQLStore


@click.command()
@click.option("--url", help="Database to migrate instead of docket_database_url.")
@click.pass_context
def migrate(ctx: click.Context, url: str | None) -> None:
    """Create or upgrade the docket tables. Safe to repeat, and to run from several places at once."""
    app = loaded_app(ctx)
    try:
        url = url or lifecycle.check_settings(app).database_url
        if url is None:
            raise click.ClickException(
                "no database: set docket_database_url (or DOCKET_CELERY_DATABASE_URL), or pass --url"
            )
        store = SQLStore(url)
        try:
            version = store.migrate()
        finally:
            store.close()
    except DocketError as error:
        raise as_click(error) from error
    click.echo(f"{store!r}: docket tables of version {version}")
