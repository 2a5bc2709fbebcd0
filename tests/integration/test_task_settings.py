"""A worker that could not keep its promises does not start, and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pytest
from sqlalchemy import make_url

from tests.conftest import StartWorker
from tests.integration.apps.faulty import app, ship_order
from tests.unit.protos.shop_pb2 import Order, Shipment

pytestmark = pytest.mark.integration
APP = "tests.integration.apps.faulty"
BATCHES = "tests.integration.apps.batches"
DATABASE = "DOCKET_CELERY_DATABASE_URL"


class Refusal(Protocol):
    """The type of the `refusal` fixture."""

    def __call__(self, *, pool: str = "prefork", app: str = APP, **env: str) -> str:
        """Start a worker that must refuse, and return what it printed."""
        ...


@pytest.fixture
def refusal(start_worker: StartWorker) -> Refusal:
    """A function that starts a worker which must end by itself, with a status that says so."""

    def refuse(*, pool: str = "prefork", app: str = APP, **env: str) -> str:
        with pytest.raises(RuntimeError, match=r"worker ended with status [1-9]") as caught:
            start_worker(pool, 1, app, env=env)
        text = str(caught.value)
        assert "docket_celery refuses to start this worker" in text
        assert "Traceback" not in text
        return text

    return refuse


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"FAULT": "setting"}, ["docket_lease_secods", "did you mean docket_lease_seconds?"]),
        ({"FAULT": "namespace"}, ["docket_databse_url", "did you mean docket_database_url?"]),
        ({"FAULT": "value"}, ["docket_threads", "'many'"]),
        ({"DOCKET_CELERY_DATABSE_URL": "x"}, ["did you mean DOCKET_CELERY_DATABASE_URL?"]),
        ({"DOCKET_CELERY_LEASE_SECONDS": "0"}, ["DOCKET_CELERY_LEASE_SECONDS", "at least 1"]),
        (
            {"FAULT": "memory"},
            ["faulty.ship", "MemoryStore", "set docket_database_url, or use the solo pool"],
        ),
        ({DATABASE: "nowhere://user:s3cret@host/name"}, ["docket_database_url", "'nowhere'"]),
        ({DATABASE: "no url, s3cret"}, ["docket_database_url", "is not a URL"]),
        ({"FAULT": "wiring"}, ["faulty.reserve", "docket.tests.unit.Money"]),
    ],
    ids=["setting", "namespace", "value", "variable", "environment", "memory", "driver", "url", "wiring"],
)
def test_a_worker_refuses_what_cannot_work(refusal: Refusal, env: dict[str, str], said: list[str]) -> None:
    """Each fault is named with what it concerns."""
    text = refusal(**env)
    for words in said:
        assert words in text
    assert "s3cret" not in text


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("", "need a result backend, and the app has none"),
        ("rpc://", "the rpc result backend"),
        ("cache+memory://", "the in-memory"),
    ],
    ids=["none", "rpc", "memory"],
)
def test_a_batch_without_a_backend_that_joins_chords_is_refused(
    refusal: Refusal, backend: str, words: str
) -> None:
    """Its chunks would all be done, and nobody would ever go on; each batch task is named."""
    text = refusal(app=BATCHES, CELERY_RESULT_BACKEND=backend)
    for name in (f"{BATCHES}.place_all", f"{BATCHES}.summarize", "batches.context_of"):
        assert f"task {name}: its items are spread over the workers by chords, which {words}" in text
    assert "set result_backend to Redis or a database" in text


def test_a_missing_store_names_the_setting(refusal: Refusal, worker_env: dict[str, str]) -> None:
    """A step persists and there is no database."""
    del worker_env[DATABASE]
    text = refusal()
    assert "task faulty.ship" in text
    assert "set docket_database_url (or DOCKET_CELERY_DATABASE_URL)" in text


def test_tables_that_are_missing_name_the_command(refusal: Refusal, empty_database_url: str) -> None:
    """And never the password."""
    text = refusal(**{DATABASE: empty_database_url})
    assert "docket migrate" in text
    assert str(make_url(empty_database_url).password) not in text


def test_a_memory_store_serves_a_solo_worker(
    start_worker: StartWorker, connect_app: Callable[[object], object]
) -> None:
    """One process sees all of it."""
    connect_app(app)
    with start_worker("solo", 1, APP, env={"FAULT": "memory"}):
        assert ship_order.delay(Order(order_id="7")).get(timeout=20) == Shipment(tracking_id="7")


def test_djangos_settings_reach_a_worker(
    start_worker: StartWorker, connect_app: Callable[[object], object], database_url: str
) -> None:
    """CELERY_DOCKET_DATABASE_URL with namespace="CELERY" is all that a Django project sets."""
    connect_app(app)
    env = {"FAULT": "django", "DJANGO_DATABASE_URL": database_url, "DOCKET_CELERY_DATABASE_URL": "nowhere://"}
    with start_worker("solo", 1, APP, env=env):
        assert ship_order.delay(Order(order_id="8")).get(timeout=20) == Shipment(tracking_id="8")
