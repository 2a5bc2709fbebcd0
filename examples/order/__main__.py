"""``python -m examples.order``: one order, submitted until it arrives, charged once."""

from __future__ import annotations

import tempfile
from pathlib import Path

from docket_celery import StepFailed
from docket_celery.store import SQLStore
from examples.order.graph import carrier, checkout, inventory, payments
from examples.order.order_pb2 import Order, Shipment


def submit(store: SQLStore, order: Order) -> None:
    """Run the order under its business key, and print how it went."""
    try:
        shipment = checkout.execute(Shipment, order, execution_id=f"order-{order.order_id}", store=store)
        print(f"   shipped: {shipment.tracking_number}")
    except StepFailed as failure:
        print(f"   failed:  step {failure.step} after {failure.attempts} attempts")
    print(
        f"   card: {len(payments.calls)} call, {len(payments.charges)} charge; "
        f"inventory: {inventory.calls} call; carrier: {carrier.calls} calls\n"
    )


def main() -> None:
    """Submit one order three times: the carrier is down, the carrier is back, all is done already."""
    order = Order(order_id="17", amount_cents=1000, skus=["mug", "tea"])
    with tempfile.TemporaryDirectory(prefix="docket-order-") as folder:
        # A file here, Postgres in a service: the graph does not know.
        store = SQLStore(f"sqlite:///{Path(folder) / 'checkpoints.db'}")
        store.migrate()
        try:
            print("1. The carrier is down: card and goods are booked, shipping fails.")
            carrier.down = True
            submit(store, order)
            print(
                "2. The carrier is back, same order again: charge and reservation are restored, only shipping runs."
            )
            carrier.down = False
            submit(store, order)
            print("3. The same order once more: its stored result, nothing runs.")
            submit(store, order)
        finally:
            store.close()


if __name__ == "__main__":
    main()
