"""A process that looks at payloads and holds nothing that anybody could want.

It was forked before the hub read its keys or opened its store, has one socket to the hub and no other file, and limits
itself before the first payload: memory, processor time per payload, no files written, no processes, no core dumps. For
each payload it gets a descriptor to read from and answers in a few plain values. What it cannot survive ends it and not
the hub.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path

import torch

from share_core.errors import PayloadError
from share_core.spec_file import spec_from_toml
from share_core.types import SpaceSpec
from share_core.wire import examine_update
from share_server.hub.gate import answers

ORDER = struct.Struct(">Q")
"""One piece of work: the size of the payload; its descriptor comes along."""

_OPEN_FILES = 16
_LEFT_ALONE = (0, 1, 2)


class Missing(Exception):
    """The file is shorter than it was: another connection has taken the upload over."""


class FileBytes:
    """The bytes of an open file; a slice is read when it is asked for."""

    def __init__(self, file: int, size: int) -> None:
        self._file = file
        self._size = size

    def __len__(self) -> int:
        """Return the size of the file."""
        return self._size

    def __getitem__(self, where: slice) -> bytes:
        """Return the bytes of a slice without a step.

        Raises:
            Missing: they are not all there.
        """
        start, end, _ = where.indices(self._size)
        data = os.pread(self._file, max(0, end - start), start)
        while len(data) < end - start:
            more = os.pread(self._file, end - start - len(data), start + len(data))
            if not more:
                raise Missing
            data += more
        return data


def work(hub: socket.socket) -> None:
    """Answer what comes over ``hub`` until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the hub drains when it is told to end, and needs its parsers for it
    keep_only(hub.fileno())
    hello = answers.read_frame(hub)
    if hello is None:
        return
    order = answers.read_hello(hello)
    spec = spec_from_toml(order.spec, "the hub's space")
    torch.set_num_threads(1)
    _limit(order.memory_bytes)
    while True:
        data, files, _, _ = socket.recv_fds(hub, ORDER.size, 1)
        if not data:
            return
        _allow_seconds(order.cpu_s)
        try:
            answer = look(files[0], ORDER.unpack(data)[0], spec)
        finally:
            for file in files:
                os.close(file)
        answers.write_frame(hub, answer)


def look(file: int, size: int, spec: SpaceSpec) -> bytes:
    """Return the answer for the payload in an open file."""
    try:
        facts = examine_update(FileBytes(file, size), spec)
    except PayloadError as error:
        return answers.refusal(type(error).__name__, str(error))
    except MemoryError:
        return answers.refusal(answers.NO_MEMORY, "")
    except Missing:
        return answers.refusal(answers.GONE, "")
    return answers.acceptance(facts)


def keep_only(*kept: int) -> None:
    """Close every file but standard input, output, error and those in ``kept``."""
    low = 3
    for file in sorted({*kept, *_LEFT_ALONE} - set(_LEFT_ALONE)):
        os.closerange(low, file)
        low = file + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _limit(memory_bytes: int) -> None:
    """Give up what parsing does not need, for good; memory beyond what this process has already is ``memory_bytes``."""
    if sys.platform.startswith("linux"):  # elsewhere these two do not mean what they say
        pages = [int(field) for field in Path("/proc/self/statm").read_text("ascii").split()]
        page = resource.getpagesize()
        for what, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
            _lower(what, used * page + memory_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_NPROC, 0)  # root is not bound by it
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)


def _lower(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    least = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (least, least))


def _allow_seconds(seconds: int) -> None:
    """Let the kernel end this process after so many more seconds of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))
