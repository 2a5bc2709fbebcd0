"""What steps and tasks in workers tell the tests: lines in Redis, beside the results where those lie there."""

from __future__ import annotations

import os
from dataclasses import dataclass

import redis

from tests.infra.processes import wait_until

RESULTS = "CELERY_RESULT_BACKEND"
JOURNALS = "DOCKET_TEST_JOURNALS"
"""Names the Redis of the journals, where it is not that of the results."""


def note(journal: str, line: object) -> int:
    """Write *line* into a journal and return how many it has now; called by steps in workers."""
    url = os.environ.get(JOURNALS) or os.environ[RESULTS]
    with redis.Redis.from_url(url) as client:
        return int(client.rpush(f"journal:{journal}", str(line)))  # type: ignore[arg-type, unused-ignore]


@dataclass(frozen=True, slots=True)
class Journals:
    """What steps noted, as tests read it."""

    url: str

    def read(self, journal: str) -> list[str]:
        """Return the lines of *journal* so far."""
        with redis.Redis.from_url(self.url, decode_responses=True) as client:
            return [str(line) for line in client.lrange(f"journal:{journal}", 0, -1)]  # type: ignore[union-attr, unused-ignore]

    def wait(self, journal: str, lines: int, *, within_s: float = 15.0) -> list[str]:
        """Wait until *journal* has as many *lines*, and return them.

        Raises:
            TimeoutError: Not in time.
        """
        wait_until(
            lambda: len(self.read(journal)) >= lines, within_s=within_s, what=f"{lines} lines in {journal}"
        )
        return self.read(journal)
