"""`aexecute` with a real httpx.AsyncClient that was made on the caller's loop, against a real HTTP server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from docket_celery import Graph, StepContext
from tests.unit.protos.shop_pb2 import Address, Charge, Label, Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]
WAIT_S = 20.0


class Service(ThreadingHTTPServer):
    """Answers ``/meet/NAME`` when three clients have asked, ``/hang`` never, and anything else at once.

    Attributes:
        asked: The paths, in their order.
        hanging: Set when a client waits for ``/hang``.
        hung_up: Set when that client has closed its connection.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.meet = threading.Barrier(3)
        self.asked: list[str] = []
        self.hanging, self.hung_up = threading.Event(), threading.Event()
        self.connections = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One connection, kept open between requests."""

    protocol_version = "HTTP/1.1"
    server: Service

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        """Answer with the path."""
        self.server.asked.append(self.path)
        if self.path == "/hang":
            self.server.hanging.set()
            # A client that goes away is the end of the stream.
            if self.connection.recv(1) == b"":
                self.server.hung_up.set()
            self.close_connection = True
            return
        if self.path.startswith("/meet/"):
            self.server.meet.wait(WAIT_S)
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's name
        """Stay quiet."""


@pytest.fixture
def service() -> Generator[Service]:
    """A running service of this test."""
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join(WAIT_S)


def fetching(client: httpx.AsyncClient) -> Graph:
    """Return a graph of three fetches over *client* and a synchronous step that joins them."""
    graph = Graph("fetching")

    async def get(path: str) -> str:
        response = await client.get(path)
        return response.raise_for_status().text

    @graph.step
    async def fetch_label(order: Order) -> Label:
        return Label(text=await get("/meet/label"))

    @graph.step
    async def fetch_address(order: Order) -> Address:
        return Address(street=await get("/meet/address"))

    @graph.step
    async def fetch_charge(order: Order) -> Charge:
        return Charge(charge_id=await get("/meet/charge"))

    @graph.step
    def join(label: Label, address: Address, charge: Charge) -> Shipment:
        return Shipment(tracking_id=f"{label.text} {address.street} {charge.charge_id}")

    return graph


def test_three_fetches_over_the_callers_client_overlap(service: Service) -> None:
    """None is answered before all three are asked; a second run uses the client's open connections."""

    async def handle() -> list[Shipment]:
        async with httpx.AsyncClient(base_url=service.url, timeout=WAIT_S) as client:
            graph = fetching(client)
            return [await graph.aexecute(Shipment, Order()) for _ in range(2)]

    shipped = asyncio.run(handle())
    assert shipped == [Shipment(tracking_id="/meet/label /meet/address /meet/charge")] * 2
    assert service.connections == 3
    assert len(service.asked) == 6


def test_handlers_of_one_loop_share_a_client(service: Service) -> None:
    """As those of a web framework do that makes its client at start-up: each gets the answer to its own request."""
    graph = Graph("shared")

    @graph.step
    async def fetch(order: Order, ctx: StepContext) -> Label:
        client: httpx.AsyncClient = ctx.values["client"]
        response = await client.get(f"/orders/{order.order_id}")
        return Label(text=response.text)

    @graph.step
    def ship(label: Label) -> Shipment:
        return Shipment(tracking_id=f"shipped {label.text}")

    async def handle(client: httpx.AsyncClient, number: int) -> str:
        shipment = await graph.aexecute(Shipment, Order(order_id=str(number)), context={"client": client})
        return shipment.tracking_id

    async def serve() -> list[str]:
        limits = httpx.Limits(max_connections=5)
        async with httpx.AsyncClient(base_url=service.url, timeout=WAIT_S, limits=limits) as client:
            return await asyncio.gather(*(handle(client, number) for number in range(40)))

    assert asyncio.run(serve()) == [f"shipped /orders/{number}" for number in range(40)]
    assert service.connections <= 5


def test_a_cancelled_handler_hangs_up_and_leaves_the_client_usable(service: Service) -> None:
    """The request in flight is given up: the server sees the connection close, and the next run is answered."""
    graph, ended = Graph("cancelled"), list[str]()

    @graph.step
    async def fetch(order: Order, ctx: StepContext) -> Label:
        client: httpx.AsyncClient = ctx.values["client"]
        try:
            response = await client.get(order.order_id)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return Label(text=response.text)

    async def handle() -> Label:
        async with httpx.AsyncClient(base_url=service.url, timeout=WAIT_S) as client:
            context = {"client": client}
            running = asyncio.create_task(graph.aexecute(Label, Order(order_id="/hang"), context=context))
            assert await asyncio.to_thread(service.hanging.wait, WAIT_S)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert await asyncio.to_thread(service.hung_up.wait, WAIT_S)
            return await graph.aexecute(Label, Order(order_id="/again"), context=context)

    assert asyncio.run(handle()) == Label(text="/again")
    assert ended == ["cancelled"]
    assert service.asked == ["/hang", "/again"]
