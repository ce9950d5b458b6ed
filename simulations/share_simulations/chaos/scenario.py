"""What a hub lives through in one crash experiment: a deterministic workload on its engine, in one process.

The child that :func:`live` runs in reports every acknowledgement and every published version by writing a line to the
marker descriptor, after ``receive`` has returned and after the feed has moved: what the line says is what a client or a
subscriber could know. Nothing here listens on a network, so one life costs milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from share_core.errors import DigestError, FedshareError, UnavailableError
from share_core.fingerprint import describe_space
from share_core.types import Core, Factors, SiteUpdate, Space, SpaceSpec, Update
from share_core.wire import encode_snapshot, encode_update
from share_proto.v1 import hub_pb2
from share_server.config import LimitConfig, MergeConfig, RetentionConfig, ServerConfig
from share_server.hub.access import Caller
from share_server.hub.engine import Engine
from share_server.local import member_of_no_hub, sign_header, submit_header
from share_server.store import journal
from share_server.store.records import UpdateState
from share_server.store.updates import list_updates

_SETTLE_S = 20.0
_MEMBERS = ("acme/alice", "acme/bob", "north/carol")
_ROWS = 10**9
_CHECKPOINT_BYTES = 2**18


@dataclass(frozen=True)
class Letter:
    """One update that some member sends."""

    update_id: str
    """32 hexadecimal digits."""
    member: str
    """``organisation/name``."""
    task_id: str
    """``organisation/name``."""
    payload: bytes
    """The update on the wire."""
    header: hub_pb2.SubmitHeader
    """Its header, signed."""

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the payload."""
        return hashlib.sha256(self.payload).hexdigest()


@dataclass(frozen=True)
class Plan:
    """One life of a hub."""

    store: Path
    """Directory of the store."""
    spec: SpaceSpec
    """The space."""
    config: ServerConfig
    """Limits and policies."""
    signing_key: bytes
    """Ed25519 private key, PEM."""
    letters: tuple[Letter, ...]
    """What is sent."""
    orderly: bool = False
    """Send one letter at a time and wait for its merge, instead of all at once."""


@dataclass
class Promised:
    """What the outside was told."""

    acks: dict[str, str] = field(default_factory=dict)
    """Acknowledged update ids and the digests of their payloads."""
    version: int = 0
    """Newest version that was published."""
    digest: str = ""
    """Digest of that version's snapshot."""
    failed: bool = False
    """Whether the hub said that its storage had failed."""
    closing: bool = False
    """Whether the hub had begun to close in good order."""

    def take(self, line: bytes) -> None:
        """Add what one marker line says."""
        for text in line.decode("ascii").splitlines():
            match text.split(" "):
                case ["ack", update_id, sha256]:
                    self.acks[update_id] = sha256
                case ["published", version, digest]:
                    if int(version) >= self.version:
                        self.version, self.digest = int(version), digest
                case ["failed"]:
                    self.failed = True
                case ["closing"]:
                    self.closing = True

    def copy(self) -> Promised:
        """Return an independent copy."""
        return Promised(dict(self.acks), self.version, self.digest, self.failed, self.closing)


def toy_spec() -> SpaceSpec:
    """Return a space of one small site; five to six adapters of rank 2 fill it, then it compacts."""
    weights = {"a": torch.randn(24, 16, generator=torch.Generator().manual_seed(7))}
    return describe_space("toy", weights, k_max=12, rank_limit=8)


def toy_config() -> ServerConfig:
    """Return limits under which a nearly full machine does not disturb an experiment."""
    return ServerConfig(
        limits=LimitConfig(free_space_bytes=2**20, upload_idle_s=10.0, upload_total_s=20.0),
        retention=RetentionConfig(horizon_versions=2, snapshot_every=2),
        merge=MergeConfig(batch=3, refits=2),
    )


def write_letters(
    spec: SpaceSpec, seed: int, count: int, space: Space | None = None, tasks: int = 2
) -> tuple[Letter, ...]:
    """Return ``count`` updates: every second one relative to ``space`` if that is given, the others free LoRA."""
    draw = random.Random(seed)
    letters = []
    for number in range(count):
        member = draw.choice(_MEMBERS)
        task = f"{member.split('/')[0]}/t{draw.randrange(tasks)}"
        base = space if number % 2 else None
        payload = make_payload(spec, draw.randrange(2**31), base)
        letters.append(write_letter(spec, f"{draw.getrandbits(128):032x}", member, task, payload))
    return tuple(letters)


def write_letter(spec: SpaceSpec, update_id: str, member: str, task_id: str, payload: bytes) -> Letter:
    """Return one update, signed once: whoever sends it, in whatever process, sends the same bytes."""
    header = submit_header(spec, task_id, payload, update_id=update_id)
    return Letter(update_id, member, task_id, payload, sign_header(header, member_of_no_hub(member)))


def make_payload(spec: SpaceSpec, seed: int, space: Space | None = None) -> bytes:
    """Return a random update of rank 2: free LoRA, or cores and one direction relative to ``space``."""
    draw = torch.Generator().manual_seed(seed)
    sites: dict[str, SiteUpdate] = {}
    for name, site in spec.sites.items():
        residual = Factors(torch.randn(site.d_out, 2, generator=draw), torch.randn(site.d_in, 2, generator=draw))
        core = None
        if space is not None and space.bases[name].k_out and space.bases[name].k_in:
            basis = space.bases[name]
            core = Core(torch.randn(basis.k_out, 2, generator=draw), torch.randn(basis.k_in, 2, generator=draw))
        sites[name] = SiteUpdate(core=core, residual=residual)
    return encode_update(Update(base_version=0 if space is None else space.version, sites=sites))


def say_to(marker: int) -> Callable[[str], None]:
    """Return a function that writes one line to the marker descriptor."""
    return lambda text: (os.write(marker, f"{text}\n".encode("ascii")), None)[1]


def after_fork() -> None:
    """Make PyTorch usable in a forked child: its thread pool is made anew here, before threads race to do it."""
    torch.set_num_threads(1)


def live(plan: Plan, say: Callable[[str], None]) -> int:
    """Open the hub, send everything, let it merge and publish, collect, close; return its exit code."""
    after_fork()
    journal._CHECKPOINT_BYTES = _CHECKPOINT_BYTES  # so that a short life has checkpoints in its middle too
    try:
        return asyncio.run(_live(plan, say))
    except FedshareError as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        return 1


async def _live(plan: Plan, say: Callable[[str], None]) -> int:
    engine = await Engine.open(plan.store, plan.spec, plan.config, plan.signing_key)
    merging = asyncio.create_task(engine.loop.run())
    watching = asyncio.create_task(_watch(engine, say))
    failing = asyncio.create_task(_await_failure(engine, say))
    sending = asyncio.create_task(_send_all(engine, plan, say))
    engine.loop.wake()
    try:
        await asyncio.wait({merging, failing, sending}, return_when=asyncio.FIRST_COMPLETED)
        broken = failing.done() or merging.done()
        if broken:  # everybody who still waits must be refused, and nobody acknowledged
            await asyncio.wait({sending}, timeout=5.0)
        else:
            await sending
            engine.loop.stop()
            await merging
            await engine.collector.collect_now()  # the merge loop, which else does this, has ended
            say("closing")
    finally:
        engine.feed.close()
        engine.loop.stop()
        sending.cancel()
        watching.cancel()
        ended = await asyncio.gather(merging, sending, watching, return_exceptions=True)
        failing.cancel()
        await engine.close()
    wrong = [e for e in ended if isinstance(e, Exception) and not isinstance(e, FedshareError)]
    if wrong:
        raise wrong[0]
    return 1 if broken or engine.store.failed.is_set() else 0


async def _send_all(engine: Engine, plan: Plan, say: Callable[[str], None]) -> None:
    letters = plan.letters
    if plan.orderly:
        for letter in letters:
            await send(engine, letter, say)
            engine.loop.wake()
            await settle(engine)
        return
    half = (len(letters) + 1) // 2
    # The first is sent twice at the same time, and again later: a client that lost its answer does that.
    await _send_together(engine, plan, (*letters[:half], letters[0]), say)
    engine.loop.wake()
    together = _send_together(engine, plan, (*letters[half:-1], letters[0]), say)
    await asyncio.gather(together, send_in_two(engine, letters[-1], say))
    engine.loop.wake()
    await settle(engine)


async def _send_together(engine: Engine, plan: Plan, letters: tuple[Letter, ...], say: Callable[[str], None]) -> None:
    await asyncio.gather(*(send(engine, letter, say) for letter in letters))


async def send(engine: Engine, letter: Letter, say: Callable[[str], None], offset: int = 0) -> bool | FedshareError:
    """Send one update from ``offset`` on; say it when it is acknowledged.

    Returns:
        Whether it was known, or the refusal.
    """
    try:
        _, duplicate = await engine.intake.receive(caller_of(letter.member), messages_of(letter, offset))
    except FedshareError as error:
        return error
    say(f"ack {letter.update_id} {letter.sha256}")
    return duplicate


async def resume(engine: Engine, letter: Letter, say: Callable[[str], None] = lambda _: None) -> bool | FedshareError:
    """Send one update from where an earlier connection left off, else from the start; see :func:`send`."""
    offset, row = await engine.intake.progress(caller_of(letter.member), letter.update_id)
    answer = await send(engine, letter, say, 0 if row is not None else min(offset, len(letter.payload) - 1))
    if isinstance(answer, DigestError | UnavailableError) and offset:
        answer = await send(engine, letter, say)
    return answer


async def send_in_two(engine: Engine, letter: Letter, say: Callable[[str], None]) -> None:
    """Lose the connection in the middle of an upload, then go on over another one."""
    half = messages_of(letter, 0, len(letter.payload) // 2)
    with contextlib.suppress(FedshareError):
        await engine.intake.receive(caller_of(letter.member), half)
    with contextlib.suppress(FedshareError):
        await resume(engine, letter, say)


async def settle(engine: Engine) -> None:
    """Wait until every accepted update is merged or refused; give up after a while, the checks will tell."""
    end = asyncio.get_running_loop().time() + _SETTLE_S
    while asyncio.get_running_loop().time() < end and not engine.store.failed.is_set():
        version = engine.feed.version
        rows = await engine.store.do(lambda rows: list_updates(rows, 0, _ROWS))
        if all(row.state is not UpdateState.ACCEPTED for row in rows):
            return
        await engine.feed.wait_after(version, 0.05)


async def _watch(engine: Engine, say: Callable[[str], None]) -> None:
    version = engine.feed.version
    while not engine.feed.closing:
        await engine.feed.wait_after(version, 3600.0)
        if engine.feed.version > version:
            space = engine.feed.state.space
            version = space.version
            say(f"published {version} {digest_of(space)}")


async def _await_failure(engine: Engine, say: Callable[[str], None]) -> None:
    await engine.store.failed.wait()
    say("failed")


def digest_of(space: Space) -> str:
    """Return the SHA-256 of a version written whole."""
    return hashlib.sha256(encode_snapshot(space)).hexdigest()


def caller_of(member: str) -> Caller:
    """Return a caller as the interceptor would make it; the engine asks only who it is and what key it has."""
    return member_of_no_hub(member).caller


async def messages_of(letter: Letter, offset: int = 0, end: int | None = None) -> AsyncIterator[hub_pb2.SubmitRequest]:
    """Yield the messages of one Submit: a header and two chunks of ``payload[offset:end]``."""
    message = hub_pb2.SubmitRequest(header=letter.header)
    message.header.offset = offset
    yield message
    rest = letter.payload[offset:end]
    middle = len(rest) // 2
    for part in (rest[:middle], rest[middle:]):
        await asyncio.sleep(0)
        yield hub_pb2.SubmitRequest(chunk=part)
