"""pytest-celery's node classes for what the stock ones lack: Postgres, and workers as a `WorkerSpec` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery import Celery
from pytest_celery import CeleryTestContainer, CeleryTestNode, CeleryTestSetup, CeleryWorkerContainer

from tests.infra.workers import WorkerSpec

STOCK_APP = "app"
"""The module that pytest-celery writes into a worker's container, with its own tasks."""
STOCK_TASKS = "pytest_celery.vendors.worker.tasks"
POSTGRES_ENV = {"POSTGRES_USER": "nodes", "POSTGRES_PASSWORD": "docket-tests", "POSTGRES_DB": "nodes"}
POSTGRES_PORT = "5432/tcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDatabase:
    """A database for worker nodes.

    Attributes:
        url: SQLAlchemy URL for the workers.
        host_url: For the tests themselves; the same where nodes are processes.
    """

    url: str
    host_url: str


class PostgresContainer(CeleryTestContainer):  # type: ignore[misc, unused-ignore] # pytest-celery is untyped
    """A Postgres with the role and database of `POSTGRES_ENV`."""

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {"url": self._url(self.attrs["Config"]["Hostname"]), "host_url": self.host_url}

    @property
    def host_url(self) -> str:
        """SQLAlchemy URL for the tests."""
        return self._url(f"127.0.0.1:{self._wait_port(POSTGRES_PORT)}")

    @property
    def ready_prompt(self) -> str:
        return "ready to accept connections"

    def _url(self, server: str) -> str:
        user, password, database = POSTGRES_ENV.values()
        return f"postgresql+psycopg://{user}:{password}@{server}/{database}"


class PostgresNode(CeleryTestNode):  # type: ignore[misc, unused-ignore] # pytest-celery is untyped
    """A Postgres node; ``config()`` has ``url`` and ``host_url``."""


class DocketWorkerContainer(CeleryWorkerContainer):  # type: ignore[misc, unused-ignore] # pytest-celery is untyped
    """A worker container that runs as a `WorkerSpec` says."""

    @classmethod
    def command_for(cls, spec: WorkerSpec) -> list[str]:
        """Return the command line; the stock tasks are there with every app, for ``setup.ready(ping=True)``."""
        extra = () if spec.app == STOCK_APP else (f"--include={STOCK_TASKS}",)
        command: list[str] = cls.command("--without-mingle", "--without-gossip", *extra, *spec.arguments())
        return [spec.app if part == STOCK_APP else part for part in command]

    @classmethod
    def utils_module(cls) -> Any:
        from tests.infra import container_utils

        return container_utils


class DocketSetup(CeleryTestSetup):  # type: ignore[misc, unused-ignore] # pytest-celery is untyped
    """The stock setup; a connection that was lost with a restarted broker is not kept for the next task."""

    @classmethod
    def update_app_config(cls, app: Celery) -> None:
        app.conf.broker_connection_retry_on_startup = True
