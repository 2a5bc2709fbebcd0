"""Stand-ins for three remote services: each takes a network's time, and the carrier can be out of order."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

LATENCY_S = 0.1


class CarrierDown(Exception):
    """The carrier did not answer; asking again may help."""


@dataclass(slots=True)
class Payments:
    """A payment provider that honours idempotency keys, and remembers every call.

    Attributes:
        calls: The key of each call received.
        charges: The charge made for each key.
    """

    calls: list[str] = field(default_factory=list[str])
    charges: dict[str, str] = field(default_factory=dict[str, str])

    def charge(self, amount_cents: int, idempotency_key: str) -> str:
        """Charge a card, once per key, and return the charge's name."""
        time.sleep(LATENCY_S)
        self.calls.append(idempotency_key)
        return self.charges.setdefault(idempotency_key, f"ch-{len(self.charges) + 1}-{amount_cents}")


@dataclass(slots=True)
class Inventory:
    """A stock that always has enough, and that honours idempotency keys.

    Attributes:
        calls: Calls received.
        reservations: The reservation made for each key.
    """

    calls: int = 0
    reservations: dict[str, str] = field(default_factory=dict[str, str])

    def reserve(self, idempotency_key: str) -> str:
        """Set goods aside, once per key, and return the reservation's name."""
        time.sleep(LATENCY_S)
        self.calls += 1
        return self.reservations.setdefault(idempotency_key, f"res-{len(self.reservations) + 1}")


@dataclass(slots=True)
class Carrier:
    """A carrier that may be out of order.

    Attributes:
        down: Whether calls fail.
        calls: Calls received, the failed ones included.
        parcels: The parcel sent for each key.
    """

    down: bool = False
    calls: int = 0
    parcels: dict[str, str] = field(default_factory=dict[str, str])

    def ship(self, reservation_id: str, idempotency_key: str) -> str:
        """Hand the goods over, once per key, and return the tracking number.

        Raises:
            CarrierDown: It is out of order.
        """
        time.sleep(LATENCY_S)
        self.calls += 1
        if self.down:
            raise CarrierDown("the carrier does not answer")
        return self.parcels.setdefault(idempotency_key, f"track-{reservation_id}")
