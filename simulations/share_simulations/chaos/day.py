"""``share-sim chaos day``: a day in ten minutes, with everything that can happen in one.

Clients (real processes with the real session) join with tokens, leave, are killed and start again, train until their
version is no longer kept, and send the same update twice; the network between them and the hub is a bad one; the hub is
killed every scaled hour. In the evening every client brings its outbox to its end, and everything is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpc import aio

from share_core.errors import ConfigError, UnavailableError
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.config import RetentionConfig
from share_server.local import LocalHub
from share_simulations.chaos.day_client import ClientPlan
from share_simulations.chaos.day_crew import Crew
from share_simulations.chaos.day_report import Diary, Sample, day_report
from share_simulations.chaos.endcheck import Book, Verdict, check_hub
from share_simulations.chaos.load import ROOMY, Victim, configure, follow, open_channel, toy_space
from share_simulations.chaos.planted import write_hub
from share_simulations.chaos.proxy import CALM, Conditions, Proxy
from share_simulations.chaos.show import Meter
from share_simulations.chaos.verify import Verified, verify_directory
from share_simulations.interrupts import reporting, run_tasks

_HOURS = 24
_SAMPLE_S = 0.2
_EVENING_S = 240.0
"""Longest wait for all clients to bring their outboxes to the end."""

_NETWORK = Conditions(latency_s=0.003, jitter_s=0.003)


@dataclass(frozen=True)
class DayOptions:
    """One day."""

    minutes: float = 10.0
    """How long the 24 hours last."""
    clients: int = 12
    """Members that take part, not all of them all day."""
    tasks: int = 3
    """Tasks of each."""
    pace_s: float = 10.0
    """Seconds until the data of a task changes and is trained again."""
    hub_kills: int = _HOURS
    """SIGKILLs of the hub."""
    seed: int = 0
    """Seed of everything."""
    directory: Path | None = None
    """Where the directories are made; None: the system's place for temporary files."""
    planted: str | None = None
    """Name of a bug planted in the hub."""

    @property
    def seconds(self) -> float:
        """Length of the day in seconds."""
        return 60 * self.minutes

    @property
    def retention(self) -> RetentionConfig:
        """A horizon that a slow training outlives, in a short day too."""
        horizon = 24 if self.minutes >= 5 else 8
        return RetentionConfig(horizon_versions=horizon, snapshot_every=horizon // 4)


def run_day(options: DayOptions, out: Path | None = None) -> dict[str, Any]:
    """Live through the day and return its report; write report and picture into ``out``.

    Raises:
        ConfigError: the numbers make no day.
        Interrupted: with the report of what was reached.
    """
    if options.minutes <= 0 or options.clients < 2:
        raise ConfigError("expected a positive number of minutes and at least two clients")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedshare-day-", dir=options.directory) as folder:
        server = _server(options, Path(folder))
        crew = Crew(server, options.clients, lambda number: _plan(options, Path(folder), number), options.seed)
        book, diary = Book(), Diary(options.seconds)
        verdict: Verdict | None = None
        replay = Verified(None, "not replayed")

        def figures() -> dict[str, Any]:
            if not book.sent:  # the day ended before the evening, in which the book is filled
                crew.fill(book)
            report = day_report(crew, book, diary, verdict, replay)
            own = {"minutes": options.minutes, "seed": options.seed, "seconds": round(time.monotonic() - began, 1)}
            return report | own

        with reporting(figures), Meter("chaos day") as meter:
            try:
                verdict = run_tasks(_live(options, server, crew, book, diary, meter))
            except UnavailableError as error:
                diary.failure = str(error)
            diary.over = True
            meter.note("the day is over: its journal is replayed")
            replay = verify_directory(server.layout.root, replay=True)
        report = figures()
    if out is not None:
        from share_simulations.chaos.day_plot import write_day

        write_day(report, diary, out)
    return report


def _server(options: DayOptions, folder: Path) -> LocalHub:
    script = None if options.planted is None else write_hub(options.planted, folder)
    server = LocalHub(folder / "server", toy_space(), ROOMY, script=script)
    configure(server, retention=options.retention)
    return server


def _plan(options: DayOptions, folder: Path, number: int) -> ClientPlan:
    retention = options.retention
    return ClientPlan(
        root=folder / f"client{number}",
        board=folder / "newest",
        address="",
        began=time.time(),
        pace_s=options.pace_s,
        think_s=0.5,
        stale=0.1,
        stale_versions=retention.horizon_versions + 2 * retention.snapshot_every,
        tasks=options.tasks,
        seed=options.seed * 1000 + number,
    )


async def _live(options: DayOptions, server: LocalHub, crew: Crew, book: Book, diary: Diary, meter: Meter) -> Verdict:
    """Live through the day and the evening.

    Raises:
        UnavailableError: the hub does not start any more, or could not be asked at the end.
    """
    victim = Victim(server)
    await victim.start()
    reader = await asyncio.to_thread(server.enrol, "readers/one", "reader")
    with Proxy(server.config.local_hub_address, options.seed, _NETWORK) as proxy:
        crew.address = proxy.address
        diary.begin()
        try:
            async with _background(follow(server, reader, book, options.seed), _watch(server, crew, diary, meter)):
                async with _background(_kill_hub(options, victim, diary), _weather(options, proxy, diary)):
                    await crew.day(diary)
                proxy.set(CALM)
                if not victim.alive:
                    await victim.start()
                await crew.evening(diary, _EVENING_S)
                crew.fill(book)
                diary.faults = proxy.faults
                verdict = await asyncio.to_thread(check_hub, server, book)
            diary.hub_exit = await victim.stop()
            return verdict
        finally:
            crew.kill_all()
            victim.kill()


@contextlib.asynccontextmanager
async def _background(*work: Any) -> AsyncIterator[None]:
    """Run coroutines as long as the block runs; what one of them raises is raised here."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


async def _kill_hub(options: DayOptions, victim: Victim, diary: Diary) -> None:
    """Kill the hub once in every scaled hour."""
    draw = random.Random(options.seed + 3)
    hour = options.seconds / max(1, options.hub_kills)
    for number in range(options.hub_kills):
        await asyncio.sleep(max(0.0, hour * (number + draw.uniform(0.3, 0.8)) - diary.now()))
        victim.kill()
        diary.mark("hub killed")
        # Shielded: the evening may begin meanwhile, and must find a hub that is there or is not.
        await asyncio.shield(victim.start())


async def _weather(options: DayOptions, proxy: Proxy, diary: Diary) -> None:
    """Change the network all day."""
    draw = random.Random(options.seed + 4)
    half_open_at = options.seconds / 4
    while True:
        await asyncio.sleep(draw.uniform(0.5, 3.0))
        scene = draw.choice(("far", "slices", "blackhole", "reset", "reset"))
        if diary.now() > half_open_at and options.minutes >= 5:
            scene, half_open_at = "half_open", float("inf")  # once: found out by pings, after more than a minute
        diary.mark(scene)
        if scene == "far":
            proxy.set(replace(_NETWORK, latency_s=0.06, jitter_s=0.05))
        elif scene == "slices":
            proxy.set(replace(_NETWORK, slice_bytes=300))
        elif scene == "blackhole":
            await asyncio.to_thread(proxy.blackhole, draw.uniform(0.5, 3.0))
        elif scene == "reset":
            await asyncio.to_thread(proxy.reset, 0.5)
        else:
            await asyncio.to_thread(proxy.half_open, 0.2)
        await asyncio.sleep(draw.uniform(0.5, 2.0))
        proxy.set(_NETWORK)


async def _watch(server: LocalHub, crew: Crew, diary: Diary, meter: Meter) -> None:
    """Ask the hub how it is, note it, and tell the clients the newest version."""
    async with open_channel(server, server.own("operator")) as channel:
        hub = hub_pb2_grpc.HubStub(channel)
        while True:
            try:
                status = await hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=1.0)
            except aio.AioRpcError:
                diary.samples.append(Sample(diary.now(), None, None, crew.alive))
            else:
                diary.samples.append(Sample(diary.now(), status.version, status.accepted, crew.alive))
                crew.tell(status.version)
                hour = min(_HOURS, _HOURS * diary.now() / diary.seconds)
                meter.show(
                    f"hour {hour:.1f}: version {status.version}, {status.merged} merged, {status.accepted} waiting, "
                    f"{crew.alive} clients, hub killed {diary.count('hub killed')} times"
                )
            await asyncio.sleep(_SAMPLE_S)
