"""``share-sim chaos kill``: SIGKILL at random moments under load; no acknowledged update is lost or merged twice.

The campaign runs in rounds, each with a server directory of its own, because a start verifies everything that was ever
stored. A round brings a fixed number of updates to their acknowledgement while the hub is killed and started again,
sometimes in the middle of its recovery, and then checks every promise.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from share_core.errors import ConfigError, UnavailableError
from share_server.config import RetentionConfig
from share_server.local import LocalHub
from share_simulations.chaos.endcheck import Book, Verdict, check_hub
from share_simulations.chaos.load import ROOMY, Crowd, Swarm, Victim, configure, follow, toy_space
from share_simulations.chaos.planted import BUGS, write_hub
from share_simulations.chaos.show import Meter
from share_simulations.chaos.verify import verify_directory
from share_simulations.interrupts import reporting, run_tasks

_PAUSE_S = 0.1
_K_MAX = 32
"""More than the sites have dimensions: merges are quick, so that the journal is what the kills hit."""

_SOON = RetentionConfig(horizon_versions=200, snapshot_every=32)
"""Old versions are collected many times in a round, so that kills hit the collection too."""

_MOST_TOLD = 3
"""Broken promises of a round that are told at once; the report has more."""

_IN_RECOVERY = 0.1
"""Share of the kills that hit a hub that is starting."""


@dataclass(frozen=True)
class KillOptions:
    """One campaign."""

    acks: int = 100_000
    """Acknowledgements in all."""
    kills: int = 300
    """SIGKILLs in all."""
    per_round: int = 10_000
    """Acknowledgements of one round, that is of one server directory."""
    crowd: Crowd = field(default_factory=Crowd)
    """Who sends."""
    seed: int = 0
    """Seed of the payloads and of the moments."""
    replay: bool = False
    """Whether every version is made again at the end of a round, in one thread."""
    mutants: bool = False
    """Whether the planted bugs are tried as well."""
    directory: Path | None = None
    """Where server directories are made; None: the system's place for temporary files."""


@dataclass
class _Round:
    """What one round brought, or has brought so far."""

    kills: int = 0
    recoveries: list[float] = field(default_factory=list)
    """Seconds until the hub served, of every start."""
    retries: int = 0
    loaded_s: float = 0.0
    """Seconds in which the hub served and clients sent."""
    verdict: Verdict | None = None
    """What the hub kept; None if it was not asked."""
    verified: bool | None = None
    """What ``share-server verify`` said of the directory; None if it was not asked."""
    problems: list[str] = field(default_factory=list)
    book: Book = field(default_factory=Book)

    @property
    def acks(self) -> int:
        """Acknowledged updates."""
        return len(self.book.receipts)


def run_kill(options: KillOptions) -> dict[str, Any]:
    """Run the campaign and return its report; ``problems`` is empty when every promise was kept.

    Raises:
        ConfigError: the numbers make no campaign.
        Interrupted: with the report of what was reached; the round under way is in it as its clients saw it.
    """
    if min(options.acks, options.per_round) < 1 or options.kills < 0:
        raise ConfigError("expected at least one acknowledgement, in all and per round, and no negative kills")
    began = time.monotonic()
    rounds: list[_Round] = []
    caught: dict[str, list[str]] = {}

    def report() -> dict[str, Any]:
        return _report(options, rounds, caught, began)

    with reporting(report), Meter("chaos kill") as meter:
        for plan in _plans(options):
            rounds.append(_Round())
            _run(plan, rounds[-1], meter, None)
        for bug in BUGS if options.mutants else ():
            caught[bug] = catch(options, bug, meter)
    return report()


def _plans(options: KillOptions) -> list[KillOptions]:
    """Deal acknowledgements and kills to rounds as evenly as possible."""
    count = -(-options.acks // options.per_round)
    return [
        replace(
            options,
            acks=options.acks * (n + 1) // count - options.acks * n // count,
            kills=options.kills * (n + 1) // count - options.kills * n // count,
            seed=options.seed * 1000 + n + 1,
        )
        for n in range(count)
    ]


def catch(options: KillOptions, bug: str, meter: Meter) -> list[str]:
    """Return what a short campaign holds against a hub with a planted bug."""
    crowd = replace(options.crowd, clients=min(options.crowd.clients, 40), twice=0.2)
    plan = replace(
        options, acks=min(400, options.acks), kills=min(4, options.kills), crowd=crowd, seed=options.seed * 1000 + 77
    )
    result = _Round()
    _run(plan, result, meter, bug)
    meter.note(f"planted bug {bug}: {'caught: ' + result.problems[0] if result.problems else 'NOT CAUGHT'}")
    return result.problems


def _run(plan: KillOptions, result: _Round, meter: Meter, bug: str | None) -> None:
    """Live through one round and write it into ``result``."""
    with tempfile.TemporaryDirectory(prefix="fedshare-kill-", dir=plan.directory) as folder:
        script = None if bug is None else write_hub(bug, Path(folder))
        server = LocalHub(Path(folder) / "server", toy_space(_K_MAX), ROOMY, script=script)
        configure(server, retention=_SOON)
        try:
            run_tasks(_round(server, plan, result, meter, bug))
        except KeyboardInterrupt:  # a hub that has not settled is not held to anything
            result.problems = list(result.book.broken if result.verdict is None else result.verdict.problems)
            raise
        if not result.problems:
            verified = verify_directory(server.layout.root, replay=plan.replay)
            result.verified = verified.sound
            result.problems += [] if verified.sound is not False else [f"share-server verify: {verified.text}"]
    if bug is None:
        rate = result.acks / max(result.loaded_s, 1e-9)
        meter.note(
            f"round over: {result.acks} acks, {result.kills} kills, {rate:.0f} acks/s while it served, "
            f"{len(result.problems)} broken promises"
        )
        for text in result.problems[:_MOST_TOLD]:
            meter.note(text)


async def _round(server: LocalHub, plan: KillOptions, result: _Round, meter: Meter, bug: str | None) -> None:
    victim = Victim(server)
    try:
        result.recoveries.append(await victim.start())
        async with _clients(server, plan, result.book) as swarm:
            await _storm(victim, swarm, plan, result, meter)
            # Inside: the follower must see the versions that are made of what was sent last.
            result.verdict = await asyncio.to_thread(check_hub, server, result.book, 60.0 if bug is None else 10.0)
        result.problems = list(result.verdict.problems)
        if result.acks != plan.acks:
            result.problems.append(f"{result.acks} updates were acknowledged of {plan.acks}: some clients gave up")
        if (code := await victim.stop()) != 0:
            result.problems.append(f"the hub ended with exit code {code} when it was asked to stop")
    except UnavailableError as error:
        result.problems = [*result.book.broken, str(error)]
    finally:
        victim.kill()


@contextlib.asynccontextmanager
async def _clients(server: LocalHub, plan: KillOptions, book: Book) -> AsyncIterator[Swarm]:
    """Enrol everybody; a follower listens as long as the block runs."""
    members = range(plan.crowd.organisations)
    holders = [await asyncio.to_thread(server.enrol, f"org{n}/sender") for n in members]
    reader = await asyncio.to_thread(server.enrol, "readers/one", "reader")
    following = asyncio.create_task(follow(server, reader, book, plan.seed))
    async with Swarm(server, holders, plan.crowd, book, plan.seed) as swarm:
        try:
            yield swarm
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def _storm(victim: Victim, swarm: Swarm, plan: KillOptions, result: _Round, meter: Meter) -> None:
    """Let the clients send everything while the hub dies ``plan.kills`` times."""
    draw = random.Random(plan.seed)
    moments = sorted(draw.randrange(plan.acks) for _ in range(plan.kills))
    sending = asyncio.create_task(swarm.run(plan.acks))
    began = time.monotonic()
    try:
        for moment in moments:
            while result.acks < moment and not sending.done() and victim.alive:
                meter.show(f"{result.acks} of {plan.acks} acks, {result.kills} of {plan.kills} kills")
                await asyncio.sleep(0.005)
            await asyncio.sleep(draw.uniform(0, _PAUSE_S))
            result.loaded_s += time.monotonic() - began
            result.recoveries.append(await _kill(victim, result, draw))
            await swarm.adopt()
            began = time.monotonic()
        while not sending.done() and victim.alive:
            meter.show(f"{result.acks} of {plan.acks} acks, {result.kills} of {plan.kills} kills")
            await asyncio.sleep(0.05)
        if not victim.alive:
            raise UnavailableError(f"the hub ended by itself: {victim.log_tail()}")
        await sending
        result.loaded_s += time.monotonic() - began
    finally:
        result.retries = swarm.retries
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _kill(victim: Victim, result: _Round, draw: random.Random) -> float:
    """Kill the hub and return how long it took to serve again; some of them die once more while they recover."""
    if not victim.alive:
        raise UnavailableError(f"the hub ended by itself: {victim.log_tail()}")
    victim.kill()
    result.kills += 1
    if draw.random() < _IN_RECOVERY:
        victim.launch()
        await asyncio.sleep(draw.uniform(0, 3 * result.recoveries[-1]) / 2)
        victim.kill()
    return await victim.start()


def _report(options: KillOptions, rounds: list[_Round], caught: dict[str, list[str]], began: float) -> dict[str, Any]:
    recoveries = [seconds for one in rounds for seconds in one.recoveries[1:]]
    verdicts = [one.verdict for one in rounds if one.verdict is not None]
    problems = [f"round {number + 1}: {text}" for number, one in enumerate(rounds) for text in one.problems]
    acks, loaded = sum(one.acks for one in rounds), sum(one.loaded_s for one in rounds)
    surviving = [bug for bug, signs in caught.items() if not signs]
    return {
        "campaign": "kill",
        "seed": options.seed,
        "acks": acks,
        "kills": sum(one.kills for one in rounds),
        "rounds": len(rounds),
        "checked_rounds": len(verdicts),
        "lost": sum(verdict.lost for verdict in verdicts),
        "double": sum(verdict.double for verdict in verdicts),
        "answered_duplicates": sum(one.book.duplicates for one in rounds),
        "updates": sum(verdict.updates for verdict in verdicts),
        "versions": sum(verdict.versions for verdict in verdicts),
        "versions_followed": sum(len(one.book.versions) for one in rounds),
        "refused": sum(verdict.refused for verdict in verdicts),
        "retries": sum(one.retries for one in rounds),
        "verified_rounds": sum(one.verified is True for one in rounds),
        "acks_per_s": round(acks / loaded, 1) if loaded else 0.0,
        "recovery_p50_s": _quantile(recoveries, 50),
        "recovery_p99_s": _quantile(recoveries, 99),
        "mutants": len(caught),
        "mutants_caught": len(caught) - len(surviving),
        "mutants_by_name": {bug: signs[:1] for bug, signs in caught.items()},
        "surviving": surviving,
        "problems": problems[:20],
        "crowd": asdict(options.crowd),
        "seconds": round(time.monotonic() - began, 1),
        "complete": True,
        "ok": not problems and not surviving,
    }


def _quantile(values: list[float], percent: int) -> float:
    return round(float(np.percentile(values, percent)), 3) if values else 0.0
