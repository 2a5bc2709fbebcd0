"""pytest-celery's nodes: over Docker where an engine answers, else over local processes.

DOCKET_TEST_INFRA=docker or process decides otherwise. A test asks for ``celery_setup`` and may override
``worker_spec``; ``node_database`` gives workers a database.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import Any

import docker
import pytest
from pytest_celery import CELERY_REDIS_BACKEND, CELERY_REDIS_BROKER, CeleryTestBackend, CeleryTestBroker
from pytest_docker_tools import build, container, fxtr

from tests.conftest import LASTING
from tests.infra import leaks, servers
from tests.infra.nodes import (
    POSTGRES_ENV,
    POSTGRES_PORT,
    STOCK_APP,
    DocketSetup,
    DocketWorkerContainer,
    NodeDatabase,
    PostgresContainer,
    PostgresNode,
)
from tests.infra.process_docker import ProcessDockerClient, process_client, uses_docker
from tests.infra.processes import ROOT
from tests.infra.rabbitmq import RabbitMQ
from tests.infra.workers import WorkerSpec
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, own_urls

# The versions of compose.yaml.
REDIS_IMAGE = "redis:8.2.1-bookworm"
POSTGRES_IMAGE = "postgres:17.6-bookworm"
WORKER_IMAGE = "docket-celery-tests/worker:latest"
# In Docker the checkout is mounted, tests included; the image holds what it needs to run.
CHECKOUT_IN_CONTAINER = "/src"


@pytest.fixture(scope="session")
def docker_client(
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[docker.DockerClient | ProcessDockerClient]:
    """The one door of pytest-celery to Docker."""
    if uses_docker():
        with contextlib.closing(docker.from_env()) as client:
            yield client
    else:
        with process_client(tmp_path_factory.mktemp("nodes")) as client:
            yield client


@pytest.fixture(scope="session")
def rabbitmq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[RabbitMQ]:
    """A RabbitMQ of this process, which takes some 10 s to start; for tests with the mark ``rabbitmq``."""
    before = leaks.child_pids()
    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as started:
        # It stays, though a test may have been the first to ask.
        request.config.stash[LASTING].update(leaks.child_pids() - before)
        yield started


@pytest.fixture(params=[CELERY_REDIS_BROKER])
def celery_broker(request: pytest.FixtureRequest) -> Generator[CeleryTestBroker]:
    """The stock fixture over Redis alone; its parameters are a list, since xdist compares their order."""
    broker: CeleryTestBroker = request.getfixturevalue(request.param)
    yield broker
    _configure_django()
    broker.teardown()


@pytest.fixture(params=[CELERY_REDIS_BACKEND])
def celery_backend(request: pytest.FixtureRequest) -> Generator[CeleryTestBackend]:
    """The stock fixture over Redis alone; its parameters are a list, since xdist compares their order."""
    backend: CeleryTestBackend = request.getfixturevalue(request.param)
    yield backend
    _configure_django()
    backend.teardown()


def _configure_django() -> None:
    """Let the settings of a Django that some test has imported be looked at.

    pytest-celery asks every object of the process for its class, and unconfigured settings answer that with
    an error.
    """
    conf: Any = sys.modules.get("django.conf")
    if conf is not None and not conf.settings.configured:
        conf.settings.configure()


@pytest.fixture
def celery_setup_cls() -> type[DocketSetup]:
    """The class of ``celery_setup``."""
    return DocketSetup


@pytest.fixture
def default_redis_broker_image() -> str:
    """A fixed version instead of the stock ``latest``."""
    return REDIS_IMAGE


@pytest.fixture
def default_redis_backend_image() -> str:
    """A fixed version instead of the stock ``latest``."""
    return REDIS_IMAGE


@pytest.fixture
def worker_spec() -> WorkerSpec:
    """How ``celery_setup.worker`` runs; tests override or parametrize it. By default with the stock app."""
    return WorkerSpec(app=STOCK_APP)


@pytest.fixture
def default_worker_container_cls() -> type[DocketWorkerContainer]:
    """The class of a worker node's container."""
    return DocketWorkerContainer


@pytest.fixture
def default_worker_command(worker_spec: WorkerSpec) -> list[str]:
    """The command line of a worker node."""
    return DocketWorkerContainer.command_for(worker_spec)


@pytest.fixture
def default_worker_env(
    worker_spec: WorkerSpec, celery_worker_cluster_config: dict[str, Any]
) -> dict[str, str]:
    """The environment of a worker node."""
    stock = DocketWorkerContainer.initial_env(celery_worker_cluster_config)
    path = f"{stock['PYTHONPATH']}:{CHECKOUT_IN_CONTAINER}" if uses_docker() else stock["PYTHONPATH"]
    return {**stock, "PYTHONPATH": path, **worker_spec.env}


@pytest.fixture
def default_worker_volumes(default_worker_volume: Any) -> dict[str, dict[str, str]]:
    """What a worker node sees of the host: the stock files, and in Docker the checkout."""
    stock = {default_worker_volume.name: {"bind": "/app", "mode": "rw"}}
    checkout = {str(ROOT): {"bind": CHECKOUT_IN_CONTAINER, "mode": "ro"}}
    return {**stock, **checkout} if uses_docker() else stock


# This project's image: the stock one has an older Python than we support.
celery_base_worker_image = build(path=str(ROOT), tag=WORKER_IMAGE)

default_worker_container = container(
    image="{celery_base_worker_image.id}",
    environment=fxtr("default_worker_env"),
    network="{default_pytest_celery_network.name}",
    volumes=fxtr("default_worker_volumes"),
    wrapper_class=DocketWorkerContainer,
    timeout=60,
    command=fxtr("default_worker_command"),
)

postgres_container = container(
    image=POSTGRES_IMAGE,
    ports={POSTGRES_PORT: None},
    environment=POSTGRES_ENV,
    network="{default_pytest_celery_network.name}",
    wrapper_class=PostgresContainer,
    timeout=60,
)


@pytest.fixture
def celery_postgres(postgres_container: PostgresContainer) -> Generator[PostgresNode]:
    """A Postgres node of its own, empty."""
    node = PostgresNode(postgres_container)
    yield node
    node.teardown()


@pytest.fixture
def node_database(request: pytest.FixtureRequest) -> NodeDatabase:
    """A database with this release's tables that worker nodes reach.

    Where nodes are processes, the test run's own (`database_url`); in Docker, a Postgres node's.
    """
    if not uses_docker():
        url: str = request.getfixturevalue("database_url")
        return NodeDatabase(url=url, host_url=url)
    config = request.getfixturevalue("celery_postgres").config()
    servers.migrate(config["host_url"])
    return NodeDatabase(url=config["url"], host_url=config["host_url"])


@pytest.fixture(scope="module")
def urls(_celery_connections: None, server_urls: servers.ServerUrls, session_database_url: str) -> Urls:
    """This module's servers."""
    return own_urls(server_urls, session_database_url)


@pytest.fixture
def journals(urls: Urls) -> Journals:
    """What steps noted."""
    return Journals(urls.results)
