"""Stand-ins for the services that the steps call; put your own clients in their place.

Each call takes a network's time, half on the way there and half on the way back: a caller that dies in
between does not know what it did. The payment provider keeps its books in Postgres, a row for each call that
reached it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from workers import settings

_LEDGER = """
CREATE TABLE IF NOT EXISTS demo_payment_ledger (
    call_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    called_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    idempotency_key text NOT NULL,
    order_id text NOT NULL,
    amount_cents bigint NOT NULL,
    charge_id text NOT NULL,
    charged boolean NOT NULL, -- false: the key came before, and its charge was the answer
    caller_pid bigint NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS demo_payment_ledger_charge
    ON demo_payment_ledger (idempotency_key) WHERE charged
"""
_CHARGE = """
INSERT INTO demo_payment_ledger (idempotency_key, order_id, amount_cents, charge_id, charged, caller_pid)
SELECT %(key)s, %(order_id)s, %(amount_cents)s, coalesce(earlier, %(charge_id)s), earlier IS NULL, %(pid)s
FROM (SELECT min(charge_id) AS earlier FROM demo_payment_ledger WHERE idempotency_key = %(key)s) AS same_key
RETURNING charge_id
"""
# Any number, the same in all callers.
_LEDGER_LOCK = 4_242_017


class ProviderUnavailable(Exception):
    """The service did not answer; asking again may help."""


class PaymentDeclined(Exception):
    """The provider refuses the charge; asking again will not help."""


@contextmanager
def _network() -> Generator[None]:
    """Let the request and the answer travel."""
    time.sleep(settings.PROVIDER_LATENCY_S / 2)
    yield
    time.sleep(settings.PROVIDER_LATENCY_S / 2)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


class Payments:
    """Charges cards, once for each idempotency key.

    Args:
        ledger_url: Where it keeps its books, ``postgresql://...``; SQLAlchemy's form is understood too.
    """

    def __init__(self, ledger_url: str) -> None:
        self._ledger_url = ledger_url.replace("postgresql+psycopg://", "postgresql://")

    def charge(self, order_id: str, amount_cents: int, *, idempotency_key: str) -> str:
        """Charge the card of an order and return the charge's name; a repeated key gets the first charge's.

        Raises:
            PaymentDeclined: The amount is not positive.
            ProviderUnavailable: No answer.
        """
        if amount_cents <= 0:
            raise PaymentDeclined(f"order {order_id!r}: cannot charge {amount_cents} cents")
        call: dict[str, str | int] = {
            "key": idempotency_key,
            "order_id": order_id,
            "amount_cents": amount_cents,
            "charge_id": f"ch-{_digest(idempotency_key)}",
            "pid": os.getpid(),
        }
        with _network():
            try:
                return self._book(call)
            except psycopg.OperationalError as error:
                raise ProviderUnavailable("payments") from error

    def _book(self, call: dict[str, str | int]) -> str:
        with psycopg.connect(self._ledger_url, connect_timeout=5) as ledger:
            # One call at a time: of two with the same key the second must see the first.
            ledger.execute("SELECT pg_advisory_xact_lock(%s)", [_LEDGER_LOCK])
            ledger.execute(_LEDGER)
            row = ledger.execute(_CHARGE, call).fetchone()
        assert row is not None
        return str(row[0])


class Warehouse:
    """Reserves and ships; a repeated key names the same reservation or parcel.

    While a file that the settings name exists it is closed and shipments wait: so the demo and the tests hold
    a run between paying and shipping.
    """

    def reserve(self, skus: Sequence[str], *, idempotency_key: str) -> str:
        """Set goods aside and return the reservation's name."""
        with _network():
            return f"res-{_digest(idempotency_key, *skus)}"

    def ship(self, reservation_id: str, *, idempotency_key: str, sleep: Callable[[float], None]) -> str:
        """Send reserved goods and return the tracking number; *sleep* waits some seconds or raises."""
        closed = settings.WAREHOUSE_CLOSED_FILE
        with _network():
            while closed is not None and Path(closed).exists():
                sleep(0.02)
            return f"track-{_digest(idempotency_key, reservation_id)}"


class Profile(NamedTuple):
    """What the profile service knows."""

    name: str
    email: str


class Preferences(NamedTuple):
    """What the preferences service knows."""

    theme: str
    language: str


class Users:
    """Three services that know something of a user each."""

    def profile(self, user_id: str) -> Profile:
        """Return who the user is."""
        with _network():
            return Profile(name=f"User {user_id}", email=f"{user_id}@shop.example")

    def preferences(self, user_id: str) -> Preferences:
        """Return what the user chose."""
        with _network():
            return Preferences(theme="dark" if len(user_id) % 2 else "light", language="en")

    def logins(self, user_id: str) -> int:
        """Return how often the user logged in."""
        with _network():
            return len(user_id)


class Media:
    """Stores, transcodes and reads films."""

    def fetch(self, url: str) -> bytes:
        """Download a film."""
        with _network():
            return f"the film at {url}".encode()

    def transcode(self, content_digest: str, codec: str) -> str:
        """Transcode a film and return the name of the result."""
        with _network():
            return f"asset-{_digest(content_digest, codec)}"

    def frames(self, asset_id: str) -> list[str]:
        """Cut frames out and return their names."""
        with _network():
            return [f"{asset_id}/frame-{number}" for number in range(3)]

    def labels(self, frame_ids: Sequence[str]) -> list[str]:
        """Ask the model what the frames show."""
        with _network():
            return [f"label-{_digest(frame_id)[:4]}" for frame_id in frame_ids]

    def upload(self, asset_id: str, labels: Sequence[str], *, idempotency_key: str) -> str:
        """Publish a film with its labels and return its address; a repeated key gives the same one."""
        with _network():
            return f"https://videos.example/{_digest(asset_id, *labels, idempotency_key)}"
