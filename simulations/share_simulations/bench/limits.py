"""What no hub can beat on this machine: files made durable, and the same bytes through gRPC and TLS for nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from share_core.errors import GO_AHEAD_KEY
from share_server.hub.options import HUB_OPTIONS
from share_simulations.bench.hub_load import SUBMIT
from share_simulations.bench.worker import read_job, serve_commands


def durable_files_per_second(folder: Path, size: int, threads: int, seconds: float) -> float:
    """Return how many files of ``size`` bytes some threads make durable per second in ``folder``.

    Each file is written, fsynced and renamed, then its directory is fsynced: the least that a receipt can mean. The
    files are removed afterwards.
    """
    place = folder / f"limit-{secrets.token_hex(4)}"
    place.mkdir()
    content = os.urandom(size)
    counts = [0] * threads
    start = threading.Barrier(threads + 1)
    end = [0.0]

    def work(number: int) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            start.wait()
        while time.monotonic() < end[0]:
            _write_durably(place, f"{number}-{counts[number]}", content)
            counts[number] += time.monotonic() < end[0]

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    try:
        for worker in workers:
            worker.start()
        end[0] = time.monotonic() + seconds
        start.wait()
        for worker in workers:
            worker.join()
    finally:  # interrupted: nobody may write into a directory that is being removed
        end[0] = 0.0
        start.abort()
        for worker in workers:
            if worker.is_alive():  # one that is only starting finds the end in the past, and writes nothing
                worker.join()
        shutil.rmtree(place)
    return sum(counts) / seconds


def _write_durably(folder: Path, name: str, content: bytes) -> None:
    temporary = folder / f"{name}.tmp"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, content)
        os.fsync(file)
    finally:
        os.close(file)
    temporary.rename(folder / name)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class _Counting(grpc.GenericRpcHandler):
    """Takes every Submit stream, counts its bytes and answers with nothing."""

    def __init__(self) -> None:
        self.bytes = 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method != SUBMIT:
            return None
        return grpc.stream_unary_rpc_method_handler(self._count)

    async def _count(self, messages: Any, context: Any) -> bytes:
        self.bytes += len(await anext(messages))
        await context.send_initial_metadata(((GO_AHEAD_KEY, "1"),))  # as the hub does when it has read the header
        async for message in messages:
            self.bytes += len(message)
        return b""


async def _main() -> None:
    """Be a bare server with the hub's own TLS and channel options; the job has the paths of the PEM files."""
    job = read_job()
    handler = _Counting()
    server = aio.server(options=HUB_OPTIONS)
    server.add_generic_rpc_handlers((handler,))
    key, certificate, ca = (Path(job[name]).read_bytes() for name in ("key", "certificate", "ca"))
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()

    async def count(command: dict[str, Any]) -> dict[str, Any]:
        return {"bytes": handler.bytes}

    try:
        await serve_commands(count, {"address": f"127.0.0.1:{port}"})
    finally:
        await server.stop(0.0)


if __name__ == "__main__":
    asyncio.run(_main())
