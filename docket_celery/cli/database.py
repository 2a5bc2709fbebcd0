"""``celery docket migrate`` and ``celery docket purge``."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import click

from docket_celery.cli import loaded_app
from docket_celery.errors import DocketError
from docket_celery.store import SQLStore
from docket_celery.store.records import Purged
from docket_celery.task import app_settings


@click.command()
@click.option("--url", help="Database to migrate instead of docket_database_url.")
@click.pass_context
def migrate(ctx: click.Context, url: str | None) -> None:
    """Create or upgrade the docket tables. Safe to repeat, and to run from several places at once."""
    with _store(ctx, url) as store:
        click.echo(f"{store!r}: docket tables of version {store.migrate()}")


@click.command()
@click.option("--url", help="Database to purge instead of docket_database_url.")
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    help="Most rows of a table that go in one transaction.",
)
@click.pass_context
def purge(ctx: click.Context, url: str | None, batch: int) -> None:
    """Delete ended runs past docket_retention and checkpoints past their ttl.

    A live or unfinished run is never touched. Safe to repeat, to interrupt, and to run from several places at once.
    """
    with _store(ctx, url) as store:
        store.check_schema()
        total = Purged()
        try:
            while deleted := store.purge(batch):
                total += deleted
        finally:
            # Each batch is committed: what was done before an error or Ctrl-C stays done.
            click.echo(f"{store!r}: {_shown(total)}")


@contextmanager
def _store(ctx: click.Context, url: str | None) -> Generator[SQLStore]:
    """Open the database that the command is about."""
    app = loaded_app(ctx)
    try:
        url = url or app_settings.check_settings(app).database_url
        if url is None:
            raise click.ClickException(
                "no database: set docket_database_url (or DOCKET_CELERY_DATABASE_URL), or pass --url"
            )
        store = SQLStore(url)
        try:
            yield store
        finally:
            store.close()
    except DocketError as error:
        raise click.ClickException(str(error)) from error


def _shown(purged: Purged) -> str:
    if not purged:
        return "nothing to purge"
    counts = {
        "run": purged.runs,
        "checkpoint": purged.checkpoints,
        "step execution": purged.executions,
        "batch chunk": purged.chunks,
        "dead claim": purged.claims,
    }
    shown = [f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts.items() if count]
    return f"purged {', '.join(shown)}"
