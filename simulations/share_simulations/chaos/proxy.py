"""A TCP proxy between clients and hub that makes a bad network: seeded, steerable, counted.

TLS goes through untouched: the proxy holds no key and understands nothing. It runs in a thread of its own with an event
loop of its own; every method may be called from any thread.

==============  ====================================================================================================
fault           what happens
==============  ====================================================================================================
latency         every piece arrives later by a delay drawn anew, order kept
slices          pieces leave in segments of a random small size
bandwidth       each direction of a connection passes so many bytes per second
reset           both ends of a connection get a RST, at a random byte of what the client sends or when asked
blackhole       for some seconds nothing passes and new connections hang; nothing that was sent is lost
half-open       the hub's end is gone and the client is not told: nothing takes what it sends any more
corrupt         one bit is changed in what passes
==============  ====================================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self, TypeVar

_T = TypeVar("_T")

_PIECE = 32 * 2**10
_BUFFER = 64 * 2**10
"""Bytes of one direction that may be on their way inside the proxy, and in each socket's buffer, as in a network."""
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Conditions:
    """What the network is like for every connection, until other conditions are set."""

    latency_s: float = 0.0
    """Mean delay of each direction in seconds."""
    jitter_s: float = 0.0
    """Most that a delay differs from the mean, in seconds."""
    slice_bytes: int = 0
    """Largest segment in bytes; 0: no slicing."""
    bytes_per_s: float = 0.0
    """Bytes per second of each direction of a connection; 0: no limit."""
    reset_every_bytes: int = 0
    """Mean number of bytes a client sends between two resets; 0: no resets by themselves."""
    corrupt_every_bytes: int = 0
    """Mean number of bytes from client to hub between two changed bits; 0: none."""


CALM = Conditions()
"""A network without faults."""


class Proxy:
    """Listens on a free port of loopback and forwards to ``target`` ("host:port"). Use it as a context manager."""

    def __init__(self, target: str, seed: int, conditions: Conditions = CALM) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._open: set[_Connection] = set()
        self._passing = asyncio.Event()
        self.conditions = conditions
        self.faults: Counter[str] = Counter()
        """Faults by kind, as they happened."""
        self.bytes_up = 0
        """Bytes that clients sent, whether they arrived or not."""
        self.bytes_down = 0
        """Bytes that the hub sent."""
        self.address = ""
        """``host:port`` that clients connect to."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *error: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def set(self, conditions: Conditions) -> None:
        """Change the conditions, also of connections that are open."""
        self.conditions = conditions

    def reset(self, share: float = 1.0) -> int:
        """Reset every open connection with probability ``share``; return how many."""
        return self._call(self._each(share, lambda connection: connection.reset()))

    def half_open(self, share: float = 1.0) -> int:
        """Let the hub's end of connections vanish without a word to the client; return how many."""
        return self._call(self._each(share, lambda connection: connection.lose_hub()))

    def blackhole(self, seconds: float) -> None:
        """Let nothing pass for ``seconds``; returns at once."""
        self._call(self._close_for(seconds))

    async def _start(self) -> None:
        self._passing.set()
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        # Small buffers, inherited by what is accepted: loopback would swallow megabytes that no network holds.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._server = await asyncio.start_server(self._accept, sock=listener, limit=_PIECE)
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self._passing.set()
        for connection in list(self._open):
            connection.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, self._random.getrandbits(64), reader, writer)
        self._open.add(connection)
        try:
            await connection.run(self._target)
        except asyncio.CancelledError:
            connection.abort()  # only _stop cancels; asyncio would report a cancelled handler as a fault
        finally:
            self._open.discard(connection)

    async def _each(self, share: float, act: Callable[[_Connection], bool]) -> int:
        chosen = [c for c in list(self._open) if self._random.random() < share]
        return sum(act(connection) for connection in chosen)

    async def _close_for(self, seconds: float) -> None:
        self.faults["blackhole"] += 1
        self._passing.clear()
        self._loop.call_later(seconds, self._passing.set)

    async def passing(self) -> None:
        """Wait until the blackhole is over."""
        await self._passing.wait()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


class _Connection:
    """One client's connection and ours to the hub."""

    def __init__(self, proxy: Proxy, seed: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._random = random.Random(seed)
        self._client = (reader, writer)
        self._hub_writer: asyncio.StreamWriter | None = None
        self._lost = False
        self._until_reset = self._draw(proxy.conditions.reset_every_bytes)
        self._until_corrupt = self._draw(proxy.conditions.corrupt_every_bytes)

    async def run(self, target: tuple[str, int]) -> None:
        """Forward both directions until either ends."""
        await self._proxy.passing()
        try:
            hub_reader, self._hub_writer = await asyncio.open_connection(*target, limit=_PIECE)
        except OSError:
            self._reset_writer(self._client[1])  # as a host does on whose port nobody listens
            return
        raw = self._hub_writer.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        both = [
            asyncio.create_task(self._pump(self._client[0], self._hub_writer, up=True)),
            asyncio.create_task(self._pump(hub_reader, self._client[1], up=False)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if self._lost:  # the client still talks to nobody; it has to find out by itself
                await asyncio.wait(both, return_when=asyncio.ALL_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            self.abort()

    def reset(self) -> bool:
        """Send a RST to both ends."""
        self._proxy.faults["reset"] += 1
        for writer in (self._client[1], self._hub_writer):
            if writer is not None:
                self._reset_writer(writer)
        return True

    def lose_hub(self) -> bool:
        """Reset the hub's end only; False if it is not open."""
        if self._hub_writer is None or self._lost:
            return False
        self._proxy.faults["half_open"] += 1
        self._lost = True
        self._reset_writer(self._hub_writer)
        return True

    def abort(self) -> None:
        """Close both ends at once."""
        for writer in (self._client[1], self._hub_writer):
            if writer is not None:
                writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool) -> None:
        """Forward one direction: read here, deliver in :meth:`_deliver` when each piece is due."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(max(1, _BUFFER // _PIECE))
        delivering = asyncio.create_task(self._deliver(pieces, writer, up))
        clock = asyncio.get_running_loop().time
        due = 0.0
        try:
            with contextlib.suppress(ConnectionError):
                while not delivering.done() and (piece := await reader.read(_PIECE)):
                    if up and self._lost:
                        # Taken by nobody from now on, as behind a dead line, until the client's end is gone too.
                        await self._client[1].wait_closed()
                        break
                    due = max(due, clock() + self._delay())
                    await self._put(pieces, (due, self._count(piece, up)), delivering)
            await self._put(pieces, (due, b""), delivering)
            await delivering
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)

    async def _put(
        self, pieces: asyncio.Queue[tuple[float, bytes]], item: tuple[float, bytes], taker: asyncio.Task[None]
    ) -> None:
        """Put one piece; do not wait for a taker that has ended."""
        if not pieces.full():
            pieces.put_nowait(item)
            return
        putting = asyncio.create_task(pieces.put(item))
        try:
            await asyncio.wait({putting, taker}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            putting.cancel()

    async def _deliver(
        self, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, up: bool
    ) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due, piece = await pieces.get()
            if not piece:
                break
            if (wait := due - clock()) > 0:
                await asyncio.sleep(wait)
            await self._proxy.passing()
            if up and self._lost:
                continue
            if up:
                piece, dies = self._damage(piece)
                if dies:
                    return
            try:
                await self._write(piece, writer)
            except ConnectionError:
                if up and self._lost:
                    continue
                return
        if not self._lost:
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()

    async def _write(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        conditions = self._proxy.conditions
        at = 0
        while at < len(piece):
            most = self._random.randint(1, conditions.slice_bytes) if conditions.slice_bytes else len(piece)
            writer.write(piece[at : at + most])
            await writer.drain()
            if conditions.slice_bytes:
                await asyncio.sleep(0)
            at += most
        if conditions.slice_bytes:
            self._proxy.faults["sliced_pieces"] += 1
        if conditions.bytes_per_s:
            await asyncio.sleep(len(piece) / conditions.bytes_per_s)

    def _count(self, piece: bytes, up: bool) -> bytes:
        if up:
            self._proxy.bytes_up += len(piece)
        else:
            self._proxy.bytes_down += len(piece)
        return piece

    def _damage(self, piece: bytes) -> tuple[bytes, bool]:
        """Return what is left of a piece, and whether the connection was reset in the middle of it."""
        conditions = self._proxy.conditions
        if conditions.corrupt_every_bytes:
            self._until_corrupt -= len(piece)
            if self._until_corrupt <= 0:
                self._until_corrupt = self._draw(conditions.corrupt_every_bytes)
                self._proxy.faults["corrupt"] += 1
                at = self._random.randrange(len(piece))
                piece = piece[:at] + bytes([piece[at] ^ (1 << self._random.randrange(8))]) + piece[at + 1 :]
        if conditions.reset_every_bytes:
            self._until_reset -= len(piece)
            if self._until_reset <= 0:
                self._until_reset = self._draw(conditions.reset_every_bytes)
                self.reset()
                return b"", True
        return piece, False

    def _delay(self) -> float:
        conditions = self._proxy.conditions
        if not conditions.latency_s and not conditions.jitter_s:
            return 0.0
        self._proxy.faults["delayed_pieces"] += 1
        return max(0.0, conditions.latency_s + self._random.uniform(-1, 1) * conditions.jitter_s)

    def _draw(self, mean: int) -> int:
        return round(self._random.uniform(0.5, 1.5) * mean)

    @staticmethod
    def _reset_writer(writer: asyncio.StreamWriter) -> None:
        """Close with a RST: the kernel drops what is unsent and tells the other end so."""
        raw = writer.transport.get_extra_info("socket")
        if raw is not None and raw.fileno() >= 0:
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()
