"""``celery docket check`` and ``celery docket plan``."""

from __future__ import annotations

import click

from docket_celery.cli import loaded_app
from docket_celery.errors import DocketError
from docket_celery.task import checks


@click.command()
@click.option("--no-database", is_flag=True, help="Check settings and wiring alone, as where no database is.")
@click.pass_context
def check(ctx: click.Context, no_database: bool) -> None:
    """Check the settings, the wiring of every GraphTask, and the database's tables. Exit status 1 if at fault.

    Steps that are in no task's plan are reported as warnings.
    """
    app = loaded_app(ctx)
    tasks = list(checks.graph_tasks(app))
    faults = checks.find_faults(app, database=not no_database)
    for fault in faults:
        click.echo(fault, err=True)
    if faults:
        raise click.ClickException(f"{len(faults)} fault{'s' if len(faults) != 1 else ''}")
    for unused in checks.find_unused(app):
        click.echo(f"warning: {unused}", err=True)
    for task in tasks:
        click.echo(f"{task.name}: {task.plan()!r}")
    click.echo(f"{len(tasks)} GraphTask{'s' if len(tasks) != 1 else ''} checked")


@click.command()
@click.argument("task")
@click.option("--mermaid", is_flag=True, help="Print a Mermaid flowchart instead.")
@click.pass_context
def plan(ctx: click.Context, task: str, mermaid: bool) -> None:
    """Show the steps of TASK in their order, and what may run together."""
    app = loaded_app(ctx)
    found = {one.name: one for one in checks.graph_tasks(app)}
    named = found.get(task) or next(
        (one for name, one in found.items() if name.rpartition(".")[2] == task), None
    )
    if named is None:
        known = ", ".join(found) or "none"
        raise click.ClickException(f"no GraphTask is called {task!r}; known: {known}")
    try:
        compiled = named.plan()
    except DocketError as error:
        raise click.ClickException(str(error)) from error
    if mermaid:
        click.echo(compiled.mermaid())
        return
    click.echo(f"{named.name}: {', '.join(map(str, compiled.given))} -> {compiled.target}")
    for number, level in enumerate(compiled.levels, 1):
        click.echo(f"  {number}. {', '.join(level)}")
