"""The project's own tests, run by Django's test runner: eager tasks, and every step on the test's thread."""

from __future__ import annotations

import threading

from django.db import connection
from django.test import TestCase, TransactionTestCase

import docket_celery
from tests.integration.django_shop.models import Line
from tests.integration.django_shop.tasks import orders, process
from tests.unit.protos.shop_pb2 import Order, Shipment


def write(number: str) -> None:
    """Write a line as a fixture does."""
    Line.objects.create(order=number, step="fixture", site="", session=0, thread="")


class InlineCase(TestCase):
    """Inside the test's transaction, with ``docket_threads`` of 0."""

    def test_steps_of_an_eager_task_see_the_rows_of_the_test(self) -> None:
        """Four lines of the steps, one of the fixture: all in the transaction of the test."""
        write("7")
        shipment = process.delay(Order(order_id="7")).get()
        assert shipment == Shipment(tracking_id="5")
        assert connection.in_atomic_block

    def test_steps_in_process_see_the_rows_of_the_test(self) -> None:
        """`Graph.execute`, as code under test calls it."""
        write("7")
        shipment = orders.execute(Shipment, Order(order_id="7"))
        assert shipment.tracking_id == "5"
        threads = set(Line.objects.exclude(step="fixture").values_list("thread", flat=True))
        assert threads == {threading.current_thread().name}

    def test_the_connection_of_the_test_is_left_alone(self) -> None:
        """Neither closed nor replaced around steps: the test would lose its transaction."""
        before = connection.connection
        process.delay(Order(order_id="8")).get()
        process(Order(order_id="9"))
        assert connection.connection is before
        sessions = set(Line.objects.values_list("session", flat=True))
        assert sessions == {before.info.backend_pid}

    def test_what_steps_wrote_is_rolled_back_with_the_test(self) -> None:
        """Each of these tests begins with an empty table, in whichever order they run."""
        assert Line.objects.count() == 0
        process.delay(Order(order_id="7")).get()
        assert Line.objects.count() == 4

    def test_a_submission_on_commit_is_run_by_captured_callbacks(self) -> None:
        """As the tests of any Django project run what waits for a commit."""
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            process.delay_on_commit(Order(order_id="7"))
            assert Line.objects.count() == 0
        assert (len(callbacks), Line.objects.count()) == (1, 4)


class ThreadsCase(TransactionTestCase):
    """Committed rows, with threads."""

    def setUp(self) -> None:
        docket_celery.settings(threads=2)
        self.addCleanup(docket_celery.settings, threads=None)

    def test_steps_on_threads_see_what_is_committed_over_sessions_of_their_own(self) -> None:
        """And leave none behind: the test database can be dropped."""
        write("7")
        shipment = process.delay(Order(order_id="7")).get()
        assert shipment.tracking_id == "5"
        sessions = set(Line.objects.exclude(step="fixture").values_list("session", flat=True))
        assert connection.connection.info.backend_pid not in sessions
