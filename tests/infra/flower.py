"""A real Flower as a local process."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from docket_celery.devserver.processes import free_port
from tests.infra.processes import GuardedProcess, wait_until

_READY_WITHIN_S = 30.0
_STOP_WITHIN_S = 5.0
_PORT_TRIES = 3


class FlowerProcess:
    """A running Flower whose API asks for no password.

    Attributes:
        url: Base URL, without a slash at the end.

    Args:
        app: Module with the Celery app.
        directory: For its log.
        env: The whole environment; CELERY_BROKER_URL names the broker.
        args: More arguments of ``celery flower``.

    Raises:
        RuntimeError: It ended instead of becoming ready; with its last output.
        TimeoutError: It did not become ready.
    """

    def __init__(
        self, app: str, *, directory: Path, env: Mapping[str, str], args: Sequence[str] = ()
    ) -> None:
        self._env = {**env, "FLOWER_UNAUTHENTICATED_API": "true"}
        self._argv = [sys.executable, "-m", "celery", "-A", app, "flower", "--address=127.0.0.1", *args]
        for tries_left in reversed(range(_PORT_TRIES)):
            port = free_port()
            self.url = f"http://127.0.0.1:{port}"
            self._process = GuardedProcess(
                [*self._argv, f"--port={port}"], log=directory / f"flower-{port}.log", env=self._env
            )
            try:
                self._wait_until_ready()
                return
            except BaseException as error:
                taken = "Address already in use" in self._process.read_log()
                self._process.close()
                # Between the choice of a port and Flower's bind another process may take it.
                if not (isinstance(error, RuntimeError) and taken and tries_left):
                    raise

    @property
    def log(self) -> Path:
        """File with its output."""
        return self._process.log

    def get(self, path: str) -> Any:
        """Return the JSON that Flower answers at *path*, ``/api/workers`` for instance."""
        with urlopen(self.url + path, timeout=20.0) as answer:  # noqa: S310 -- our own http URL
            return json.load(answer)

    def stop(self) -> None:
        """End it. May be called again."""
        try:
            self._process.stop(_STOP_WITHIN_S)
        finally:
            self._process.close()

    def _wait_until_ready(self) -> None:
        wait_until(
            lambda: self._answers() or not self._process.running,
            within_s=_READY_WITHIN_S,
            what=f"Flower at {self.url}; see {self._process.log}",
        )
        if not self._process.running:
            raise RuntimeError(f"Flower ended:\n{self._process.log_tail()}")

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/healthcheck", timeout=2.0) as answer:  # noqa: S310 -- our own http URL
                return bool(answer.status == http.client.OK)
        except (URLError, ConnectionError, TimeoutError):
            return False
