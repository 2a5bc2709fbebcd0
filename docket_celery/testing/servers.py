"""The test run's servers: those that pytest's configuration names, else private ones, started when first needed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from docket_celery.devserver import start_dev_servers
from docket_celery.errors import ServersUnavailable


@contextmanager
def server(given: str, option: str) -> Generator[str]:
    """Yield *given*, or the URL of a server that is started here and stopped afterwards.

    Servers that the environment names are left alone: they may be in real use.

    Args:
        given: The URL that pytest's configuration sets, or ''.
        option: The name of that setting.

    Raises:
        ServersUnavailable: None can be started; the text says what to install or set.
    """
    if given:
        yield given
        return
    postgres = option == "docket_database_url"
    try:
        started = start_dev_servers(postgres=postgres, redis=not postgres, private=True)
    except ServersUnavailable as error:
        fix = (
            f"{error.problem}. Tests use none that the environment names: install 'docket-celery[dev]', or set "
            f"{option} in pytest's configuration to the URL of a server for tests"
        )
        raise ServersUnavailable(error.what, fix) from error
    try:
        yield started.database_url if postgres else started.broker_url
    finally:
        started.stop()
