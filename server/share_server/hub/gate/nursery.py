"""A process that forks parsers: it is the hub as it was before it opened anything.

Starting Python and importing torch takes seconds, a fork takes milliseconds. But a fork of a running hub would inherit
its keys, its store, its connections and the locks of its threads. So the hub forks once, first of all, and the copy
forks parsers whenever one is needed. It holds one socket and does nothing else. It ends with the hub, and its parsers
end with it, also after a SIGKILL (:mod:`share_core.lifeline`).
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import struct
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from share_core.errors import UnavailableError
from share_core.lifeline import arm
from share_server.hub.gate.worker import keep_only, work

_ORDER = struct.Struct(">cQ")
_ANSWER = struct.Struct(">Q")
_FORK, _BURY = b"f", b"b"


class Nursery:
    """The hub's end of the nursery. Safe to call from every thread."""

    def __init__(self, channel: socket.socket, life: socket.socket, pid: int) -> None:
        self._channel = channel
        self._life = life  # nothing is ever said here; it closes when the nursery ends
        self._life.setblocking(False)
        self._turn = threading.Lock()
        self.pid = pid
        """Process id of the nursery."""

    @classmethod
    def start(cls) -> Nursery:
        """Fork it. Call this while the process has one thread and has opened nothing of worth."""
        ours, theirs = socket.socketpair()
        life, its_life = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            _be(lambda: _serve(theirs, its_life.fileno()), parent)
        theirs.close()
        its_life.close()
        return cls(ours, life, pid)

    async def ended(self) -> None:
        """Wait until the nursery has ended, which nobody asked it to."""
        await asyncio.get_running_loop().sock_recv(self._life, 1)

    def parser(self) -> tuple[int, socket.socket]:
        """Fork a parser; return its process id and the connection to it.

        Raises:
            UnavailableError: the nursery is gone.
        """
        ours, theirs = socket.socketpair()
        try:
            return self._ask(_FORK, 0, [theirs.fileno()]), ours
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    def bury(self, pid: int) -> str:
        """End a parser if it has not ended; return how it ended, in words.

        Raises:
            UnavailableError: the nursery is gone.
        """
        status = self._ask(_BURY, pid)
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return f"exit code {os.waitstatus_to_exitcode(status)}"

    def close(self) -> None:
        """End the nursery and every parser."""
        with self._turn:
            self._channel.close()
            self._life.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _ask(self, order: bytes, pid: int, files: list[int] | None = None) -> int:
        with self._turn:
            try:
                socket.send_fds(self._channel, [_ORDER.pack(order, pid)], files or [])
                answer = self._channel.recv(_ANSWER.size)
            except OSError:
                answer = b""
        if len(answer) != _ANSWER.size:
            raise UnavailableError("the hub has lost the process that makes its parsers: it must be started again")
        return int(_ANSWER.unpack(answer)[0])


def _be(run: Callable[[], None], parent: int) -> None:
    """Be a forked process that does ``run`` and ends with its parent. Never returns."""
    code = 1
    try:
        arm(parent)
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(hub: socket.socket, life: int) -> None:
    """Fork and bury until the hub closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a drain needs parsers; the end comes over the socket
    keep_only(hub.fileno(), life)
    gc.collect()
    gc.freeze()  # parsers share what the collector does not touch
    own = os.getpid()
    while True:
        data, files, _, _ = socket.recv_fds(hub, _ORDER.size, 1)
        if not data:
            return
        order, pid = _ORDER.unpack(data)
        if order == _FORK:
            pid = os.fork()
            if not pid:
                hub.close()
                _be(partial(work, socket.socket(fileno=files[0])), own)
            os.close(files[0])
            hub.sendall(_ANSWER.pack(pid))
        else:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            hub.sendall(_ANSWER.pack(os.waitpid(pid, 0)[1]))
