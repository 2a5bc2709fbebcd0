"""What the demo says is checked before it is said, and what it waits for has a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class ClaimFailed(Exception):
    """Something that the demo was about to claim did not hold."""


def claim(text: str, holds: bool) -> None:
    """Print *text* if it *holds*.

    Raises:
        ClaimFailed: It does not.
    """
    if not holds:
        raise ClaimFailed(text)
    print(f"   [ok] {text}")


def wait_for(what: str, look: Callable[[], T | None], *, within_s: float = 60.0) -> T:
    """Return what *look* finds, once it finds anything but None.

    Raises:
        ClaimFailed: It found nothing for *within_s* seconds.
    """
    deadline = time.monotonic() + within_s
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise ClaimFailed(f"{what} within {within_s:g} s")
        time.sleep(0.05)
    return found
