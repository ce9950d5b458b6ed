"""The bad network: what it does to bytes and connections, fault by fault."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from share_simulations.chaos.proxy import Conditions, Proxy


class Echo:
    """Sends back what it gets, and remembers how each connection ended."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.endings: list[str] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while piece := connection.recv(65536):
                    connection.sendall(piece)
                self.endings.append("closed")
            except OSError:
                self.endings.append("reset")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    made.settimeout(20)
    return made


def exchange(client: socket.socket, data: bytes) -> bytes:
    """Send everything while reading what comes back."""
    sender = threading.Thread(target=client.sendall, args=(data,), daemon=True)
    sender.start()
    back = bytearray()
    while len(back) < len(data):
        piece = client.recv(65536)
        if not piece:
            break
        back += piece
    return bytes(back)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("conditions", "fault"),
    [
        (Conditions(), ""),
        (Conditions(latency_s=0.01, jitter_s=0.01), "delayed_pieces"),
        (Conditions(slice_bytes=500), "sliced_pieces"),
        (Conditions(bytes_per_s=4e6), ""),
        (Conditions(latency_s=0.002, jitter_s=0.002, slice_bytes=900, bytes_per_s=4e6), "sliced_pieces"),
    ],
)
def test_a_slow_network_changes_no_byte_and_no_order(echo: Echo, conditions: Conditions, fault: str) -> None:
    data = random.Random(1).randbytes(600_000)
    with Proxy(echo.address, 1, conditions) as proxy, connect(proxy) as client:
        assert exchange(client, data) == data
        assert proxy.bytes_up == len(data)
        assert proxy.bytes_down == len(data)
        assert not fault or proxy.faults[fault] > 0
        assert proxy.faults["reset"] == 0


def test_resets_come_at_random_bytes_and_both_ends_see_them(echo: Echo) -> None:
    with Proxy(echo.address, 2, Conditions(reset_every_bytes=100_000)) as proxy:
        with connect(proxy) as client, pytest.raises(ConnectionError):
            for _ in range(1000):
                client.sendall(bytes(10_000))
                client.recv(100_000)
        assert proxy.faults["reset"] == 1
        until(lambda: len(echo.endings) == 1)
        assert echo.endings == ["reset"]
        assert 50_000 <= proxy.bytes_up <= 150_000 + 100_000


def test_a_reset_that_is_asked_for_hits_every_connection(echo: Echo) -> None:
    with Proxy(echo.address, 3) as proxy, connect(proxy) as one, connect(proxy) as two:
        assert exchange(one, b"a") == b"a"
        assert exchange(two, b"b") == b"b"
        assert proxy.reset() == 2
        for client in (one, two):
            with pytest.raises(ConnectionError):
                client.recv(1)
        until(lambda: echo.endings == ["reset", "reset"])


def test_nothing_is_lost_in_a_blackhole(echo: Echo) -> None:
    with Proxy(echo.address, 4) as proxy, connect(proxy) as client:
        assert exchange(client, b"before") == b"before"
        proxy.blackhole(0.5)
        begin = time.monotonic()
        with connect(proxy) as newcomer:
            assert exchange(newcomer, b"new") == b"new"
        assert exchange(client, b"after") == b"after"
        assert time.monotonic() - begin >= 0.4
        assert proxy.faults == {"blackhole": 1}


def test_half_open_the_client_is_not_told_and_nothing_takes_what_it_sends(echo: Echo) -> None:
    with Proxy(echo.address, 5) as proxy, connect(proxy) as client:
        assert exchange(client, b"x") == b"x"
        assert proxy.half_open() == 1
        until(lambda: echo.endings == ["reset"])
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(50_000_000))
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert proxy.bytes_up < 200_000


def test_a_half_open_connection_that_is_reset_has_ended(echo: Echo) -> None:
    with Proxy(echo.address, 5) as proxy, connect(proxy) as client:
        assert exchange(client, b"x") == b"x"
        assert proxy.half_open() == 1
        client.sendall(b"to nobody")
        until(lambda: proxy.bytes_up == 1 and echo.endings == ["reset"])
        time.sleep(0.1)  # what was sent is read by now
        assert proxy.reset() == 1
        with pytest.raises(ConnectionError):
            client.recv(1)
        until(lambda: proxy.reset() == 0)


def test_a_changed_bit_is_one_bit(echo: Echo) -> None:
    data = bytes(300_000)
    with Proxy(echo.address, 6, Conditions(corrupt_every_bytes=200_000)) as proxy, connect(proxy) as client:
        back = exchange(client, data)
        changed = [byte for byte in back if byte]
        assert len(changed) == proxy.faults["corrupt"] > 0
        assert all(byte.bit_count() == 1 for byte in changed)


def test_nobody_listens_is_a_reset_as_from_a_real_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    with Proxy(nobody, 7) as proxy, pytest.raises(ConnectionError), connect(proxy) as client:
        client.recv(1)
        client.recv(1)
