"""Hands payloads to parsers and lives through their deaths.

A parser that ends, says something that no parser says, or takes too long is replaced, and the update is not accepted.
Nothing of it is kept: the hub would meet it again at every start and every merge, in the process that must not die.
What happens to the sender depends on whose fault it may be:

==========================================  ====================================================================
the parser                                  the update
==========================================  ====================================================================
met its limit of memory                     is refused for good (ParserError)
met its limit of processor time             is refused for good (ParserError)
ended otherwise, or said nonsense           is given to one more parser; if that one ends too, refused for good
did not answer in time (a busy machine)     may be sent again (UnavailableError)
==========================================  ====================================================================
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from share_core.errors import ParserError, UnavailableError
from share_core.spec_file import spec_to_toml
from share_core.types import SpaceSpec
from share_core.wire import UpdateFacts, examine_update
from share_server.config import LimitConfig
from share_server.hub import log
from share_server.hub.gate import answers
from share_server.hub.gate.nursery import Nursery
from share_server.hub.gate.worker import ORDER
from share_server.hub.metrics import Metrics
from share_server.store.blobs import Staged
from share_server.store.store import Store

_TRIES = 2
_OUT_OF_TIME = "SIGXCPU"


class ParseGate(Protocol):
    """Decides whether a received payload is an acceptable update."""

    async def examine(self, staged: Staged) -> UpdateFacts:
        """Return what there is to know about the payload.

        Raises:
            PayloadError: it is refused. UnavailableError: it may be sent again.
        """

    async def close(self) -> None:
        """End; no call of :meth:`examine` may be waiting."""


class OwnThread:
    """Parses on a thread of this process: for tools and experiments that take only their own payloads."""

    def __init__(self, store: Store, spec: SpaceSpec) -> None:
        self._store = store
        self._spec = spec

    async def examine(self, staged: Staged) -> UpdateFacts:
        """Do as :meth:`ParseGate.examine` says."""
        return await self._store.io(lambda: examine_update(staged.read(), self._spec))

    async def close(self) -> None:
        """Do nothing."""


def in_this_process(store: Store, spec: SpaceSpec, metrics: Metrics) -> ParseGate:
    """Return a gate without processes."""
    return OwnThread(store, spec)


class _Lost(Exception):
    """A parser that is of no use any more."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again
        """Whether the sender may try again later."""


@dataclass(frozen=True)
class _Parser:
    """A running parser."""

    pid: int
    connection: socket.socket


class Parsers:
    """A few parsers, each used by one thread at a time."""

    def __init__(self, nursery: Nursery, store: Store, spec: SpaceSpec, limits: LimitConfig, metrics: Metrics) -> None:
        """Start all parsers, which takes milliseconds.

        Raises:
            UnavailableError: the nursery is gone.
        """
        self._nursery = nursery
        self._store = store
        self._spec = spec
        self._metrics = metrics
        self._wall_s = limits.parser_wall_s
        self._hello = answers.hello(
            answers.Hello(spec_to_toml(spec), limits.parser_memory_bytes, max(1, round(limits.parser_cpu_s)))
        )
        self._threads = ThreadPoolExecutor(limits.parsers, "parsers")
        self._idle: queue.SimpleQueue[_Parser | None] = queue.SimpleQueue()
        for _ in range(limits.parsers):
            self._idle.put(self._fresh())

    async def examine(self, staged: Staged) -> UpdateFacts:
        """Do as :meth:`ParseGate.examine` says."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._examine, staged)

    async def close(self) -> None:
        """End every parser."""
        await asyncio.to_thread(self._threads.shutdown)
        while not self._idle.empty():
            parser = self._idle.get()
            if parser is not None:
                parser.connection.close()

    def _examine(self, staged: Staged) -> UpdateFacts:
        """Ask one parser, and another one if that ended without a word; runs on a thread of its own."""
        for _ in range(_TRIES):
            try:
                return self._ask_one(staged)
            except _Lost as lost:
                log.warning("a parser was lost", reason=str(lost), sha256=staged.sha256, bytes=staged.size)
                self._metrics.parser_lost()
                if lost.again:
                    raise UnavailableError(
                        f"the hub could not parse this payload in {self._wall_s:g} s: send it again later"
                    ) from lost
                if str(lost) == _OUT_OF_TIME:
                    raise ParserError(
                        "parsing this payload takes more time than the hub allows: it was not taken"
                    ) from lost
        raise ParserError(f"this payload ended {_TRIES} parsers of the hub: it was not taken")

    def _ask_one(self, staged: Staged) -> UpdateFacts:
        free = self._idle.get()
        kept = None
        try:
            kept = parser = free or self._fresh()
            file = self._store.here(staged.reader)
            try:
                frame = self._ask(parser, file, staged.size)
                return answers.read_answer(frame, self._spec, staged.size)
            except (_Lost, answers.BadAnswer) as error:
                kept = None
                lost = self._buried(parser, error)
                kept = self._fresh()
                raise lost from error
            finally:
                os.close(file)
        finally:
            self._idle.put(kept)

    def _ask(self, parser: _Parser, file: int, size: int) -> bytes:
        peer, end = parser.connection, time.monotonic() + self._wall_s
        peer.settimeout(self._wall_s)
        try:
            socket.send_fds(peer, [ORDER.pack(size)], [file])
            frame = answers.read_frame(peer)
        except TimeoutError:
            raise _Lost("no answer in time", again=True) from None
        except OSError as error:
            raise _Lost(f"no connection: {error.strerror}") from error
        if time.monotonic() > end:
            raise _Lost("no answer in time", again=True)
        if frame is None:
            raise _Lost("it ended")
        return frame

    def _buried(self, parser: _Parser, error: Exception) -> _Lost:
        """End a parser and return why it was lost."""
        parser.connection.close()
        how = self._nursery.bury(parser.pid)
        if isinstance(error, _Lost):
            return _Lost(str(error), again=True) if error.again else _Lost(how)
        return _Lost(f"bad answer: {error}")

    def _fresh(self) -> _Parser:
        pid, connection = self._nursery.parser()
        with suppress(OSError):  # one that has ended already is found out by its first payload
            answers.write_frame(connection, self._hello)
        return _Parser(pid, connection)
