"""A load process of ``share-sim bench hub``: many clients that each send update after update.

Every client has a connection and a certificate of its own. Messages are prepared bytes and the stubs have no
serialisers, so that most of the time goes to gRPC. Job: ``ca``, ``space`` (paths), ``clients`` (PEM pairs with their
tasks), ``rank``, ``seed``.

The command ``connect`` opens every client's connection to an address. A phase is: ``address``, ``begin`` (monotonic
seconds at which all load processes start), ``ramp`` (seconds that do not count), ``seconds``, ``per_client``
(concurrent submitters on one connection), ``keep`` (whether receipts are promises to check), ``finish`` (seconds to
wait for calls in progress at the end). Its answer: see :class:`_Tally`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from share_core.errors import ERROR_KEY, GO_AHEAD_KEY, RETRY_KEY
from share_core.spec_file import read_spec
from share_proto.v1 import hub_pb2
from share_server.local import Holder
from share_simulations.bench.payloads import Prepared, Source
from share_simulations.bench.worker import read_job, serve_commands

SUBMIT = "/share_proto.v1.Hub/Submit"
DESCRIBE = "/share_proto.v1.Hub/DescribeSpace"

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for every client
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # the load generator decides itself, and counts
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_SOURCES = 8
"""Different payloads per load process."""
_REBASE_S = 2.0
"""How often updates are put on the newest version: no hub keeps all of them."""
_CONNECTING = 16
"""Handshakes at once."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_SHED = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_AGAIN = (*_SHED, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)
"""Answers after which the same update is sent again."""


@dataclass
class _Tally:
    """What happened in one phase."""

    start: float
    """Monotonic time from which on things count."""
    end: float
    acks: int = 0
    """Receipts within the counted time."""
    latencies_ms: list[float] = field(default_factory=list)
    """From the first attempt to the receipt, refusals and waits included."""
    shed: int = 0
    """Refused attempts that may be tried again, within the counted time."""
    shed_ms: list[float] = field(default_factory=list)
    """How long the hub took to refuse."""
    hints: int = 0
    """Refusals that said when to try again."""
    promised: list[list[str]] = field(default_factory=list)
    """[update id, SHA-256] of every receipt, whenever it came."""
    errors: Counter[str] = field(default_factory=Counter)
    """Every failed attempt by status and class."""

    def ack(self, began: float, update: Prepared, keep: bool) -> None:
        now = time.monotonic()
        if keep:
            self.promised.append([update.update_id, update.sha256])
        if self.start <= now < self.end:
            self.acks += 1
            self.latencies_ms.append(round(1000 * (now - began), 3))

    def refused(self, began: float, hinted: bool) -> None:
        now = time.monotonic()
        if self.start <= now < self.end:
            self.shed += 1
            self.hints += hinted
            self.shed_ms.append(round(1000 * (now - began), 3))


class _Client:
    """One member with its connection."""

    def __init__(self, job: dict[str, Any], ca: bytes) -> None:
        self.tasks: list[str] = job["tasks"]
        self.holder = Holder(job["key"].encode(), job["certificate"].encode())
        """Who it is."""
        self._credentials = grpc.ssl_channel_credentials(ca, self.holder.key, self.holder.certificate)
        self._channels: dict[str, aio.Channel] = {}

    async def channel(self, address: str) -> aio.Channel:
        """Return the connection to ``address``, made at first use."""
        if address not in self._channels:
            channel = aio.secure_channel(address, self._credentials, CHANNEL_OPTIONS)
            self._channels[address] = channel
            await asyncio.wait_for(channel.channel_ready(), 60.0)
        return self._channels[address]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


class Load:
    """All clients of this process."""

    def __init__(self, job: dict[str, Any]) -> None:
        spec = read_spec(Path(job["space"]))
        ca = Path(job["ca"]).read_bytes()
        self._clients = [_Client(one, ca) for one in job["clients"]]
        self._sources = [Source(spec, job["rank"], job["seed"] + number) for number in range(_SOURCES)]
        self._next = 0

    @property
    def payload_bytes(self) -> int:
        """Size of every update."""
        return self._sources[0].size

    async def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        if "connect" in command:
            await self._connect(command["connect"])
            return {"connected": len(self._clients)}
        return await self._phase(command)

    async def _phase(self, command: dict[str, Any]) -> dict[str, Any]:
        address, begin = command["address"], float(command["begin"])
        tally = _Tally(begin + command["ramp"], begin + command["ramp"] + command["seconds"])
        await asyncio.sleep(max(0.0, begin - time.monotonic()))
        tasks = [
            asyncio.create_task(self._submit_on(client, address, number, command["keep"], tally))
            for client in self._clients
            for number in range(command["per_client"])
        ]
        rebasing = asyncio.create_task(self._follow(address)) if command["keep"] else None
        done, rest = await asyncio.wait(tasks, timeout=tally.end + command["finish"] - time.monotonic())
        for task in [*rest, *([rebasing] if rebasing else [])]:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for task in done:
            task.result()  # a fault of the load generator must not look like a slow hub
        return {key: value for key, value in vars(tally).items() if key not in {"start", "end"}}

    async def close(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(client.close() for client in self._clients))

    async def _connect(self, address: str) -> None:
        gate = asyncio.Semaphore(_CONNECTING)

        async def one(client: _Client) -> None:
            async with gate:
                await client.channel(address)

        await asyncio.gather(*(one(client) for client in self._clients))

    async def _submit_on(self, client: _Client, address: str, number: int, keep: bool, tally: _Tally) -> None:
        """Send updates one after the other until the phase ends; an unfinished one is sent again until it is taken."""
        submit: Any = (await client.channel(address)).stream_unary(SUBMIT)
        while time.monotonic() < tally.end:
            task_id = client.tasks[number % len(client.tasks)]
            number += 1
            await self._deliver(submit, client.holder, task_id, keep, tally)

    async def _deliver(self, submit: Any, holder: Holder, task_id: str, keep: bool, tally: _Tally) -> None:
        began, wait = time.monotonic(), _FIRST_WAIT_S
        update = self._prepare(task_id, holder)
        while True:
            attempt = time.monotonic()
            try:
                answer = await _send(submit(), update)
            except aio.AioRpcError as error:
                hint = _hint_s(error)
                name = _trailing(error, ERROR_KEY) or "gRPC"
                if name == "gRPC" and f"{error.code().name} {name}" not in tally.errors:
                    print(f"{error.code().name}: {error.details()}", file=sys.stderr)  # goes to the log
                tally.errors[f"{error.code().name} {name}"] += 1
                if error.code() not in _AGAIN:
                    update = self._prepare(task_id, holder)  # too old by now: a new one on the newest version
                    await asyncio.sleep(wait)
                    continue
                if error.code() in _SHED:
                    tally.refused(attempt, hint is not None)
                if time.monotonic() > tally.end:
                    return
                await asyncio.sleep(random.uniform(1.0, 1.5) * hint if hint else random.uniform(0.5, 1.0) * wait)
                wait = min(_LONGEST_WAIT_S, 2 * wait)
                continue
            if answer and hub_pb2.SubmitResponse.FromString(answer).update_id != update.update_id:
                raise AssertionError(f"the receipt for {update.update_id} names another update")
            tally.ack(began, update, keep)
            return

    def _prepare(self, task_id: str, holder: Holder) -> Prepared:
        self._next += 1
        return self._sources[self._next % _SOURCES].prepare(task_id, holder)

    async def _follow(self, address: str) -> None:
        """Keep the payloads on the newest version."""
        describe: Any = (await self._clients[0].channel(address)).unary_unary(DESCRIBE)
        while True:
            with contextlib.suppress(aio.AioRpcError):
                answer = await describe(b"", timeout=10.0)
                version = hub_pb2.DescribeSpaceResponse.FromString(answer).version
                for source in self._sources:
                    source.rebase(version)
                    await asyncio.sleep(0)
            await asyncio.sleep(_REBASE_S)


async def _send(call: Any, update: Prepared) -> bytes:
    """Send one update as the real client does: the payload only after the hub's word, so that a refusal costs none.

    Raises:
        AioRpcError: the call has failed.
    """
    with contextlib.suppress(asyncio.InvalidStateError):  # it ended between two messages; its status says why
        await call.write(update.header)
        # A refused call never says this word; writing to one would hide the refusal behind an internal error of gRPC.
        if any(key == GO_AHEAD_KEY for key, _ in await call.initial_metadata()):
            for chunk in update.chunks():
                await call.write(chunk)
            await call.done_writing()
    answer: bytes = await call
    return answer


def _trailing(error: aio.AioRpcError, key: str) -> str | None:
    for name, value in error.trailing_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None


def _hint_s(error: aio.AioRpcError) -> float | None:
    """Return the seconds after which the hub wants to be asked again, if it said so."""
    text = _trailing(error, RETRY_KEY)
    try:
        return max(0.0, float(text) / 1000) if text is not None else None
    except ValueError:
        return None


async def _main() -> None:
    load = Load(read_job())
    try:
        await serve_commands(load.handle, {"ready": True, "payload_bytes": load.payload_bytes})
    finally:
        await load.close()


if __name__ == "__main__":
    asyncio.run(_main())
