"""``python -m tests.integration.django_shop.commits``: submits in transactions; tells what was sent as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, cast

import django
from celery import signals

from tests.integration.django_shop.celery_app import app

django.setup()

from django.db import transaction  # noqa: E402 -- the ORM can be imported once Django is set up

from docket_celery import InvalidArguments  # noqa: E402
from tests.integration.django_shop.models import Line  # noqa: E402
from tests.integration.django_shop.tasks import plain, process, process_by_class  # noqa: E402
from tests.unit.protos.shop_pb2 import Order, Shipment  # noqa: E402

sent: list[str] = []


@signals.after_task_publish.connect  # type: ignore[misc, unused-ignore] # signals are untyped
def _note(sender: str = "", **_: object) -> None:
    sent.append(sender)


def write(number: str) -> None:
    """Write a line as the view that submits does."""
    Line.objects.create(order=number, step="view", site="", session=0, thread="")


def sent_by(submit: Callable[[], None]) -> dict[str, list[str]]:
    """Return what was sent inside the transaction, at its commit, and where it is rolled back."""
    told: dict[str, list[str]] = {}
    sent.clear()
    with transaction.atomic():
        submit()
        told["inside"] = list(sent)
    told["committed"] = list(sent)
    sent.clear()
    try:
        with transaction.atomic():
            submit()
            raise LookupError
    except LookupError:
        told["rolled back"] = list(sent)
    return told


def results() -> dict[str, Any]:
    """Return what a view and its task made together."""
    order = Order(order_id="changed")
    with transaction.atomic():
        write(order.order_id)
        process.apply_async_on_commit(
            (order,), task_id="on-commit", execution_id="changed", context={"site": "shop"}
        )
        order.order_id = "afterwards"
    shipment = process.AsyncResult("on-commit").get(timeout=30)
    assert isinstance(shipment, Shipment)
    rows = Line.objects.filter(order="changed").exclude(step="view")
    return {"counted": shipment.tracking_id, "sites": sorted(set(rows.values_list("site", flat=True)))}


def refused() -> str:
    """Return the error of a submission that cannot be run, raised where it was made."""
    try:
        with transaction.atomic():
            process.delay_on_commit("order 17")  # type: ignore[arg-type] # that is the mistake
            raise AssertionError("taken")
    except InvalidArguments as error:
        return str(error)


def main() -> None:
    """Print what happened."""
    told = {
        "typed": sent_by(lambda: process.delay_on_commit(Order(order_id="1"))),
        "class": sent_by(lambda: process_by_class.delay_on_commit(Order(order_id="2"))),
        "options": sent_by(lambda: process.apply_async_on_commit((Order(order_id="3"),), countdown=0.01)),
        "plain": sent_by(lambda: cast("Any", plain).delay_on_commit("4")),
        "results": results(),
        "refused": refused(),
    }
    sys.stdout.write(json.dumps(told))
    app.close()


if __name__ == "__main__":
    main()
