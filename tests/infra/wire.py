"""Round trips to Postgres, counted on the wire: a TCP proxy on loopback that reads what the client sends.

How a statement reaches the driver does not matter here, nor who sends it: a ping, the begin of a transaction and a
pipeline are all seen. What a connection does once is left out: its log-in, and to have a statement prepared.
The messages are those of https://www.postgresql.org/docs/current/protocol-message-formats.html.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from sqlalchemy import make_url

_READ_BYTES = 65_536
_SHOWN_CHARS = 80
_TYPE_AND_SIZE, _SIZE = 5, 4


class Messages:
    """Reads what one client sends, and tells each time that it has asked for an answer.

    It has after a simple Query, and after a Sync for the statements that were bound since the Sync before.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._started = False
        self._prepared: dict[bytes, str] = {}
        self._bound: list[str] = []

    def feed(self, data: bytes) -> list[str]:
        """Return the round trips that *data* completes, each as the beginnings of its statements."""
        self._buffer += data
        trips: list[str] = []
        while (message := self._next()) is not None:
            kind, body = message
            if kind == b"Q":
                trips.append(_shown(body.rstrip(b"\0")))
            elif kind == b"P":
                name, sql, _ = body.split(b"\0", 2)
                self._prepared[name] = _shown(sql)
            elif kind == b"B":
                _portal, name, _ = body.split(b"\0", 2)
                self._bound.append(self._prepared[name])
            elif kind == b"S" and self._bound:
                trips.append("; ".join(self._bound))
                self._bound.clear()
        return trips

    def _next(self) -> tuple[bytes, bytes] | None:
        """Take one message from the buffer, if it is whole. The first one has no type."""
        head = _TYPE_AND_SIZE if self._started else _SIZE
        if len(self._buffer) < head:
            return None
        (size,) = struct.unpack_from("!i", self._buffer, head - _SIZE)
        end = head - _SIZE + size
        if len(self._buffer) < end:
            return None
        kind, body = bytes(self._buffer[: head - _SIZE]), bytes(self._buffer[head:end])
        del self._buffer[:end]
        self._started = True
        return kind, body


def _shown(sql: bytes) -> str:
    return " ".join(sql.decode().split())[:_SHOWN_CHARS]


class Wire:
    """A proxy before the Postgres of a URL; a context manager that ends it and all connections over it.

    Attributes:
        url: SQLAlchemy URL of the same database, over the proxy and without encryption.
    """

    def __init__(self, database_url: str) -> None:
        given = make_url(database_url)
        self._server = (given.host or "127.0.0.1", given.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        plain = {"sslmode": "disable", "gssencmode": "disable"}
        proxied = given.set(host="127.0.0.1", port=self._listener.getsockname()[1])
        self.url = proxied.update_query_dict(plain).render_as_string(hide_password=False)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._counts: list[list[str]] = []
        self._ended = False

    @contextmanager
    def counted(self) -> Generator[list[str]]:
        """Collect the round trips of the block, each as the beginnings of its statements."""
        trips: list[str] = []
        with self._lock:
            self._counts.append(trips)
        try:
            yield trips
        finally:
            with self._lock:
                self._counts = [each for each in self._counts if each is not trips]

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        socket.create_connection(self._listener.getsockname()).close()  # wakes the thread that accepts
        self._threads[0].join()
        self._listener.close()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()

    def _start(self, call: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=call, args=arguments, name="wire", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._ended:
                client.close()
                return
            server = socket.create_connection(self._server)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += client, server
            self._start(self._forward, client, server, Messages())
            self._start(self._forward, server, client, None)

    def _forward(self, source: socket.socket, target: socket.socket, messages: Messages | None) -> None:
        """Send on what comes; what a client sends is counted before the server can answer it."""
        with suppress(OSError):
            while data := source.recv(_READ_BYTES):
                if messages is not None:
                    trips = messages.feed(data)
                    with self._lock:
                        for count in self._counts:
                            count.extend(trips)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
