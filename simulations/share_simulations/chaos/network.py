"""``share-sim chaos network``: large updates and followers through a bad network, until everything has arrived.

The clients are the real ones: :class:`share_client.link.HubLink` uploads and continues where the hub's disk is,
:class:`share_client.feed.VersionFeed` follows. One proxy stands before the uploads and counts their bytes, another one
before the followers.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from share_client.link import HubLink
from share_core.errors import ConfigError, UnavailableError
from share_proto.v1 import hub_pb2
from share_server.local import LocalHub
from share_simulations.chaos.endcheck import Book, Verdict, check_hub
from share_simulations.chaos.load import ROOMY, toy_space
from share_simulations.chaos.members import Diet, Follower, Uploader, credentials_of
from share_simulations.chaos.planted import write_hub
from share_simulations.chaos.proxy import Conditions, Proxy
from share_simulations.chaos.show import Meter
from share_simulations.interrupts import reporting

MIB = 2**20
MOST_RESENT = 1.1
"""Bytes sent for each byte of payload, at most."""

_SPACE = ((256, 256), (256, 192), (128, 128))
_PATIENCE_S = 240.0
"""Longest wait for the last updates after the time is over."""
BASE = Conditions(latency_s=0.005, jitter_s=0.004, bytes_per_s=3e6, reset_every_bytes=24 * MIB)
"""The network between the scenes."""


@dataclass(frozen=True)
class NetworkOptions:
    """One campaign."""

    seconds: float = 120.0
    """How long new updates are begun."""
    clients: int = 4
    """Uploading members, one connection each."""
    followers: int = 3
    """Members that follow through the network."""
    diet: Diet = field(default_factory=lambda: Diet(6 * MIB, 15 * MIB))
    """What is uploaded."""
    seed: int = 0
    """Seed of payloads and faults."""
    scenes: bool = True
    """Whether the network changes all the time; False keeps it as :data:`BASE` says."""
    mutants: bool = False
    """Whether the planted bugs are tried as well."""
    directory: Path | None = None
    """Where the server directory is made; None: the system's place for temporary files."""
    followers_s: float = 150.0
    """Longest wait for the followers; one whose connection is half open finds out by its pings after up to 80 s."""


@dataclass(frozen=True)
class Planted:
    """What is wrong on purpose."""

    name: str = ""
    hub: str | None = None
    """Bug of the hub, by its name in :mod:`share_simulations.chaos.planted`."""
    link: type[HubLink] = HubLink
    """The client's link."""
    deaf_after: int | None = None
    """Followers take over no version after this one."""
    corrupt_every_bytes: int = 0
    """The network changes a bit so often."""
    reset_every_bytes: int = BASE.reset_every_bytes
    """The network resets a connection so often."""


class ForgetfulLink(HubLink):
    """A client that begins every attempt at the first byte."""

    def get_upload(self, update_id: str) -> hub_pb2.GetUploadResponse:
        """Say that nothing of the upload has arrived."""
        return hub_pb2.GetUploadResponse()


PLANTED = (
    Planted("restarts_at_zero", link=ForgetfulLink, reset_every_bytes=10 * MIB),
    Planted("no_dedupe", hub="no_dedupe"),
    Planted("deaf_follower", deaf_after=2),
    Planted("corrupting_network", corrupt_every_bytes=8 * MIB),
)
"""Bugs that the campaign must show; the last one is a bug of the network, which TLS must refuse."""


@dataclass(frozen=True)
class Outcome:
    """What one campaign brought, or has brought so far."""

    updates: int
    """Updates that were begun."""
    delivered: int
    """Updates that were acknowledged."""
    bytes_payload: int
    """Bytes of the delivered payloads."""
    bytes_sent: int
    """Bytes that left the uploading clients."""
    interruptions: int
    """Attempts that ended without an answer."""
    reuploads: int
    """Updates that were sent once more after they were acknowledged."""
    answered_duplicates: int
    """Receipts that said the update had been durable before."""
    faults: Counter[str]
    """Faults of the network by kind."""
    verdict: Verdict | None
    """What the hub kept; None if it was not asked."""
    problems: tuple[str, ...]
    """Every broken promise in words."""

    @property
    def resend_ratio(self) -> float:
        """Bytes that left the uploading clients, TLS and all, for each byte of delivered payload."""
        return self.bytes_sent / max(1, self.bytes_payload)


@dataclass
class _Stand:
    """Everything of one campaign that has figures."""

    book: Book = field(default_factory=Book)
    uploaders: list[Uploader] = field(default_factory=list)
    proxies: list[Proxy] = field(default_factory=list)
    """The first one is before the uploads."""

    def outcome(self, verdict: Verdict | None, problems: Iterable[str]) -> Outcome:
        """Return the figures of now."""
        return Outcome(
            updates=sum(uploader.updates for uploader in self.uploaders),
            delivered=sum(uploader.delivered for uploader in self.uploaders),
            bytes_payload=sum(uploader.payload_bytes for uploader in self.uploaders),
            bytes_sent=self.proxies[0].bytes_up if self.proxies else 0,
            interruptions=sum(uploader.interruptions for uploader in self.uploaders),
            reuploads=sum(uploader.reuploads for uploader in self.uploaders),
            answered_duplicates=self.book.duplicates,
            faults=sum((proxy.faults for proxy in self.proxies), Counter[str]()),
            verdict=verdict,
            problems=tuple(problems),
        )


def run_network(options: NetworkOptions) -> dict[str, Any]:
    """Run the campaign and return its report; ``problems`` is empty when every promise was kept.

    Raises:
        ConfigError: the numbers make no campaign.
        Interrupted: with the report of what was reached.
    """
    if options.seconds <= 0 or options.clients < 1 or options.followers < 1:
        raise ConfigError("expected a positive time, at least one client and at least one follower")
    began = time.monotonic()
    stand = _Stand()
    outcome: Outcome | None = None
    caught: dict[str, list[str]] = {}

    def report() -> dict[str, Any]:
        # A hub that was not asked at the end is held to what its clients saw.
        return _report(options, outcome or stand.outcome(None, stand.book.broken), caught, began)

    with reporting(report), Meter("chaos network") as meter:
        outcome = campaign(options, Planted(), meter, stand)
        for planted in PLANTED if options.mutants else ():
            caught[planted.name] = catch(options, planted, meter)
    return report()


def catch(options: NetworkOptions, planted: Planted, meter: Meter) -> list[str]:
    """Return what a short campaign notices of a planted bug."""
    short = replace(options, seconds=min(options.seconds, 12.0), clients=3, followers=1, scenes=False, followers_s=5.0)
    outcome = campaign(short, planted, meter)
    signs = list(outcome.problems)
    if planted.corrupt_every_bytes:
        corrupted = outcome.faults["corrupt"]
        refused = corrupted > 0 and outcome.interruptions >= corrupted and not signs
        signs = [f"TLS refused {corrupted} changed bits and every update arrived whole"] if refused else []
    meter.note(f"planted bug {planted.name}: {'caught: ' + signs[0] if signs else 'NOT CAUGHT'}")
    return signs


def campaign(options: NetworkOptions, planted: Planted, meter: Meter, stand: _Stand | None = None) -> Outcome:
    """Run one campaign with or without something wrong in it; ``stand`` has its figures meanwhile."""
    with tempfile.TemporaryDirectory(prefix="fedshare-network-", dir=options.directory) as folder:
        script = None if planted.hub is None else write_hub(planted.hub, Path(folder))
        server = LocalHub(Path(folder) / "server", toy_space(24, _SPACE), ROOMY, script=script)
        try:
            server.start()
            return _through(server, options, planted, meter, stand or _Stand())
        finally:
            if server.running:
                server.kill()


def _through(server: LocalHub, options: NetworkOptions, planted: Planted, meter: Meter, stand: _Stand) -> Outcome:
    target = server.config.local_hub_address
    base = replace(BASE, corrupt_every_bytes=planted.corrupt_every_bytes, reset_every_bytes=planted.reset_every_bytes)
    with ExitStack() as stack:
        uploads = stack.enter_context(Proxy(target, options.seed, base))
        follows = stack.enter_context(Proxy(target, options.seed + 1, replace(base, reset_every_bytes=MIB)))
        stand.proxies += (uploads, follows)
        stand.uploaders += [
            Uploader(
                stack.enter_context(_link(server, f"org{n}/uploader", "trainer", uploads.address, planted.link)),
                server.spec,
                f"org{n}/t{n}",
                options.diet,
                stand.book,
                options.seed * 1_000_000 + n * 10_000,
            )
            for n in range(options.clients)
        ]
        followers = [
            Follower(
                stack.enter_context(_link(server, f"far{n}/reader", "reader", follows.address)),
                server.spec,
                planted.deaf_after,
            )
            for n in range(options.followers)
        ]
        direct = Follower(stack.enter_context(_link(server, "near/reader", "reader", target)), server.spec)
        for uploader in stand.uploaders:
            stack.callback(uploader.close)
        for follower in (*followers, direct):
            follower.start()
            stack.callback(follower.close)
        with _weather(options, (uploads, follows)):
            _upload(stand.uploaders, options, uploads, meter)
        outcome = _judged(server, options, stand, direct, followers)
    if server.stop() != 0:
        return replace(outcome, problems=(*outcome.problems, "the hub did not end cleanly when it was asked to stop"))
    return outcome


def _link(server: LocalHub, member: str, role: str, address: str, kind: type[HubLink] = HubLink) -> HubLink:
    return kind(address, credentials_of(server, server.enrol(member, role)))


def _upload(uploaders: list[Uploader], options: NetworkOptions, proxy: Proxy, meter: Meter) -> None:
    """Let everybody send for the given time, and wait until what was begun has arrived."""
    end = time.monotonic() + options.seconds
    for uploader in uploaders:
        uploader.start()
    while any(uploader.is_alive() for uploader in uploaders):
        now = time.monotonic()
        for uploader in uploaders:
            if now > end:
                uploader.enough.set()
            if now > end + _PATIENCE_S:
                uploader.give_up.set()
        delivered = sum(uploader.delivered for uploader in uploaders)
        meter.show(f"{delivered} delivered, {proxy.bytes_up / MIB:.0f} MiB sent, {proxy.faults['reset']} resets")
        time.sleep(0.05)


@contextmanager
def _weather(options: NetworkOptions, proxies: tuple[Proxy, ...]) -> Iterator[None]:
    """Change the network all the time while the block runs."""
    over = threading.Event()
    thread = threading.Thread(target=_change, args=(options, proxies, over), name="weather", daemon=True)
    if options.scenes:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if options.scenes:
            thread.join()


def _change(options: NetworkOptions, proxies: tuple[Proxy, ...], over: threading.Event) -> None:
    draw = random.Random(options.seed + 7)
    base = {proxy: proxy.conditions for proxy in proxies}
    half_open_at = time.monotonic() + options.seconds / 4
    while not over.wait(draw.uniform(1.0, 3.0)):
        scene = draw.choice(("far", "slices", "narrow", "blackhole", "reset"))
        if time.monotonic() > half_open_at:
            # Once only: a client finds out by its pings, which takes more than a minute.
            scene, half_open_at = "half_open", float("inf")
        for proxy in proxies:
            _scene(proxy, scene, base[proxy], draw)
        over.wait(draw.uniform(1.0, 4.0))
        for proxy in proxies:
            proxy.set(base[proxy])


def _scene(proxy: Proxy, scene: str, base: Conditions, draw: random.Random) -> None:
    if scene == "far":
        proxy.set(replace(base, latency_s=0.08, jitter_s=0.06))
    elif scene == "slices":
        proxy.set(replace(base, slice_bytes=1200))
    elif scene == "narrow":
        proxy.set(replace(base, bytes_per_s=4e5))
        proxy.faults["narrow"] += 1
    elif scene == "blackhole":
        proxy.blackhole(draw.uniform(0.5, 3.0))
    elif scene == "reset":
        proxy.reset(0.3)
    else:
        proxy.half_open(0.3)


def _judged(
    server: LocalHub, options: NetworkOptions, stand: _Stand, direct: Follower, followers: list[Follower]
) -> Outcome:
    """Return the outcome of a campaign in which everybody has sent."""
    problems = list(_failures(stand.uploaders))
    try:
        verdict = check_hub(server, stand.book)
    except UnavailableError as error:
        return stand.outcome(None, [*problems, *stand.book.broken, str(error)])
    problems += [*_compare(direct, followers, verdict.versions, options.followers_s), *verdict.problems]
    outcome = stand.outcome(verdict, problems)
    if outcome.resend_ratio <= MOST_RESENT:
        return outcome
    ratio = f"{outcome.resend_ratio:.2f} bytes were sent for each byte of payload, at most {MOST_RESENT} are expected"
    return replace(outcome, problems=(*outcome.problems, ratio))


def _failures(uploaders: list[Uploader]) -> Iterator[str]:
    for uploader in uploaders:
        if uploader.failure is not None:
            yield f"{uploader.name} ended with {type(uploader.failure).__name__}: {uploader.failure}"
        elif uploader.delivered != uploader.updates:
            yield f"{uploader.name} delivered {uploader.delivered} of {uploader.updates} updates"


def _compare(direct: Follower, followers: list[Follower], newest: int, patience_s: float) -> Iterator[str]:
    """Wait for the followers and say where they do not hold what the direct one holds."""
    end = time.monotonic() + patience_s
    everybody = [direct, *followers]
    while any(follower.space.version < newest for follower in everybody) and time.monotonic() < end:
        time.sleep(0.05)
    for number, follower in enumerate(everybody):
        who = f"follower {number}" if number else "the direct follower"
        follower.close()
        if follower.failure is not None:
            yield f"{who} ended with {type(follower.failure).__name__}: {follower.failure}"
        elif follower.space.version != newest:
            yield f"{who} is at version {follower.space.version}, the newest is {newest}"
        elif follower.digest() != direct.digest():
            yield f"{who} holds other bytes of version {newest} than the direct one"


def _report(options: NetworkOptions, outcome: Outcome, caught: dict[str, list[str]], began: float) -> dict[str, Any]:
    surviving = [name for name, signs in caught.items() if not signs]
    verdict = outcome.verdict
    return {
        "campaign": "network",
        "seed": options.seed,
        "updates": outcome.updates,
        "delivered": outcome.delivered,
        "duplicates": None if verdict is None else verdict.double,
        "lost": None if verdict is None else verdict.lost,
        "versions": None if verdict is None else verdict.versions,
        "bytes_payload": outcome.bytes_payload,
        "bytes_sent": outcome.bytes_sent,
        "resend_ratio": round(outcome.resend_ratio, 4),
        "interruptions": outcome.interruptions,
        "reuploads": outcome.reuploads,
        "answered_duplicates": outcome.answered_duplicates,
        "faults": dict(sorted(outcome.faults.items())),
        "mutants": len(caught),
        "mutants_caught": len(caught) - len(surviving),
        "mutants_by_name": {name: signs[:1] for name, signs in caught.items()},
        "surviving": surviving,
        "problems": list(outcome.problems[:20]),
        "clients": options.clients,
        "followers": options.followers,
        "diet": asdict(options.diet),
        "seconds": round(time.monotonic() - began, 1),
        "complete": True,
        "ok": not outcome.problems and not surviving,
    }
