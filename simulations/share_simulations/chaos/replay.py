"""Captured submissions, sent again and changed: whoever sends them, nothing may come of it.

A hub's engine takes a few signed updates and merges them. Then what was on the wire is sent to it again, as it was and
in every way in which a thief could use it: by another member, under another name of the update, task or member, with
another number, with the signature of another update, cut short, longer, from another offset. And of one submission that
the hub has taken, and of one that never arrived, every byte is changed, of the header and of the payload. After each
attempt the whole state is compared: every row of the journal, its chain, every payload file, every file in staging. An
attempt may only be refused, or be answered with the first receipt of an update that is known.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from share_core.errors import FedshareError
from share_core.identity import Identity, make_authority, make_signer
from share_core.privacy import SampleNoise, declaration_to_text
from share_proto.v1 import hub_pb2
from share_server.hub.access import Caller
from share_server.hub.chunks import SubmitPart, read_submit_request
from share_server.hub.engine import Engine
from share_server.local import member_of_no_hub, sign_header
from share_server.store.journal import Journal
from share_simulations.chaos.checks import Finding
from share_simulations.chaos.report import Caught, Tally, assemble
from share_simulations.chaos.scenario import Letter, make_payload, settle, toy_config, toy_spec
from share_simulations.chaos.show import Meter
from share_simulations.chaos.thefts import MUTANTS, THEFTS, Mutant
from share_simulations.interrupts import reporting

_TAKEN = 6
_MUTANT_ROUNDS = 5
"""How often every byte is changed before a planted bug counts as unnoticed."""
_CHUNK = 256
_SCHEMA = "5c" * 32
_DECLARED = SampleNoise(epsilon=8.0, delta=1e-5, noise_multiplier=1.1, max_grad_norm=1.0, steps=100, sample_rate=0.01)


@dataclass(frozen=True)
class ReplayOptions:
    """One campaign."""

    replays: int = 10_000
    """Submissions that are sent again."""
    seed: int = 0
    """Of every choice."""
    mutants: bool = False
    """Also show that the planted bugs are caught."""
    folder: Path | None = None
    """Where the store lies; default: the system's place for temporary files."""
    stride: int = 1
    """Of the payloads every so-manieth byte is changed; of the headers always every one."""


@dataclass(frozen=True)
class Attempt:
    """One call that may change nothing."""

    kind: str
    """What it is, in a word or two."""
    caller: Caller
    """Who calls."""
    header: bytes
    """The first message as it is on the wire."""
    payload: bytes
    """What follows."""


@dataclass(frozen=True)
class Answer:
    """What the hub said."""

    error: str
    """Name of the refusal; empty for a receipt."""
    receipt: tuple[str, int, str] | None = None
    """(update id, ingest number, entry hash)."""


class Scene:
    """A hub that has taken some submissions, one that it never saw, and the state that must not change."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.draw = random.Random(seed)
        letters = [_write(self.draw, number) for number in range(_TAKEN + 1)]
        self.taken, self.unseen = letters[:-1], letters[-1]
        self.receipts: dict[str, tuple[str, int, str]] = {}
        self.state = ""

    async def begin(self) -> None:
        """Let the hub take and merge all but one."""
        merging = asyncio.create_task(self.engine.loop.run())
        for letter in self.taken:
            answer = await self.call(honest(letter))
            if answer.receipt is None:
                raise AssertionError(f"an honest update was refused: {answer.error}")
            self.receipts[letter.update_id] = answer.receipt
        self.engine.loop.wake()
        await settle(self.engine)
        self.engine.loop.stop()
        await merging
        self.state = await self.look()

    async def call(self, attempt: Attempt) -> Answer:
        """Send one submission as gRPC hands it over: a message that cannot be read ends the call before it begins."""
        try:
            first = read_submit_request(attempt.header)
            row, _ = await self.engine.intake.receive(attempt.caller, _messages(first, attempt.payload))
        except (DecodeError, FedshareError) as error:
            return Answer(type(error).__name__)
        return Answer("", (row.new.update_id, row.ingest_seq, row.entry_hash))

    async def look(self) -> str:
        """Return a digest of every row, of the names in staging and of the moments when a payload came or went."""
        rows = await self.engine.store.do(_rows)
        blobs, staging = (self.engine.store.root / name for name in ("blobs", "staging"))
        folders = [(entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(blobs)]
        waiting = [(entry.name, entry.stat().st_size) for entry in os.scandir(staging)]
        return hashlib.sha256(repr((rows, sorted(folders), sorted(waiting))).encode()).hexdigest()

    def payloads(self) -> dict[str, str]:
        """Return the digest of every payload file by its name."""
        files = [path for path in (self.engine.store.root / "blobs").rglob("*") if path.is_file()]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    async def attempt(self, attempt: Attempt) -> tuple[Answer, list[Finding]]:
        """Make one attempt; return what the hub said and what is wrong with it."""
        answer = await self.call(attempt)
        found = []
        if answer.receipt is not None and self.receipts.get(answer.receipt[0]) != answer.receipt:
            found.append(Finding("admitted", f"{attempt.kind}: answered with a receipt that is not the first one"))
        if (state := await self.look()) != self.state:
            found.append(Finding("changed", f"{attempt.kind}: the state of the hub is another one afterwards"))
            self.state = state
        return answer, found


def honest(letter: Letter) -> Attempt:
    """Return a submission as its member sends it."""
    header = hub_pb2.SubmitRequest(header=letter.header).SerializeToString()
    return Attempt("as it was", member_of_no_hub(letter.member).caller, header, letter.payload)


def changed_bytes(letter: Letter, draw: random.Random, stride: int = 1) -> Iterator[Attempt]:
    """Yield the submission with every byte changed, one at a time: the header's message first, then the payload.

    A number may be written in several ways. What still says the same is the same submission, and changed otherwise.
    """
    whole = honest(letter)
    for at in range(len(whole.header)):
        header = _changed(whole.header, at, draw)
        while _says(header) == letter.header:
            header = _changed(whole.header, at, draw)
        yield Attempt(f"byte {at} of the header", whole.caller, header, whole.payload)
    for at in range(0, len(whole.payload), stride):
        yield Attempt(f"byte {at} of the payload", whole.caller, whole.header, _changed(whole.payload, at, draw))


def replays(scene: Scene) -> Iterator[Attempt]:
    """Yield captured submissions for ever, as they were and as a thief would use them."""
    while True:
        letter = scene.draw.choice(scene.taken)
        theft = scene.draw.choice(THEFTS)
        stolen = theft.steal(letter, scene.draw.choice(scene.taken), scene.draw)
        header = hub_pb2.SubmitRequest(header=stolen.header).SerializeToString()
        yield Attempt(theft.name, stolen.caller, header, stolen.payload)


def run_replay(options: ReplayOptions) -> dict[str, Any]:
    """Run the campaign and return its report.

    Raises:
        Interrupted: with the report of what was reached.
    """
    began = time.monotonic()
    tally, caught, answers = Tally(), list[Caught](), dict[str, Counter[str]]()

    def report() -> dict[str, Any]:
        return assemble("replay", options.seed, _figures(answers), tally, caught, began)

    with reporting(report):
        _on_a_hub(options, lambda scene: _campaign(scene, options, tally, answers))
        for mutant in MUTANTS if options.mutants else ():
            caught.append(hunt(mutant, options))
    return report()


def hunt(mutant: Mutant, options: ReplayOptions) -> Caught:
    """Plant one bug and attempt until something is wrong."""
    signs: list[tuple[int, str]] = []

    async def work(scene: Scene) -> None:
        changed = (one for _ in range(_MUTANT_ROUNDS) for one in changed_bytes(scene.unseen, scene.draw))
        for number, attempts in enumerate(zip(changed, replays(scene), strict=False), start=1):
            for attempt in attempts:
                try:
                    _, found = await scene.attempt(attempt)
                except Exception as error:  # a hub that dies of it has not refused it
                    found = [Finding("unclear", f"{attempt.kind}: {type(error).__name__}: {error}")]
                if found:
                    signs.append((2 * number, found[0].text))
                    return

    with ExitStack() as stack:
        mutant.plant(stack)  # before anything is signed
        _on_a_hub(options, work)
    after, sign = signs[0] if signs else (0, "")
    return Caught(mutant.name, mutant.what, after, sign)


async def _campaign(scene: Scene, options: ReplayOptions, tally: Tally, answers: dict[str, Counter[str]]) -> None:
    attempts: list[tuple[str, Iterator[Attempt]]] = [
        ("bytes of a known submission", changed_bytes(scene.taken[0], scene.draw, options.stride)),
        ("bytes of an unseen submission", changed_bytes(scene.unseen, scene.draw, options.stride)),
        ("replays", (attempt for attempt, _ in zip(replays(scene), range(options.replays), strict=False))),
    ]
    with Meter("attempts") as meter:
        for name, source in attempts:
            counts = answers.setdefault(name, Counter())
            for attempt in source:
                answer, found = await scene.attempt(attempt)
                counts[answer.error or "first receipt"] += 1
                tally.add(found, attempt.kind)
                meter.show(f"{name} {counts.total()}, {tally.broken} not harmless")
    damaged = [name for name, digest in scene.payloads().items() if name != digest]
    tally.add([Finding("changed", f"payload {name} has other bytes") for name in damaged], "at the end")
    # What was changed byte by byte was good before: unchanged it is taken.
    last = await scene.call(honest(scene.unseen))
    tally.add([] if last.receipt else [Finding("unclear", f"the unseen one is refused: {last.error}")], "unchanged")


def _figures(answers: dict[str, Counter[str]]) -> dict[str, Any]:
    return {
        "attempts": sum(counts.total() for counts in answers.values()),
        "replays": answers.get("replays", Counter()).total(),
        "changed_bytes": sum(counts.total() for name, counts in answers.items() if name.startswith("bytes")),
        "answers": {name: dict(sorted(counts.items())) for name, counts in answers.items()},
    }


def _on_a_hub(options: ReplayOptions, work: Callable[[Scene], Any]) -> None:
    """Run ``work`` with a fresh scene on a store that is removed in the end."""
    root = Path(tempfile.mkdtemp(prefix="share-replay-", dir=options.folder))

    async def run() -> None:
        now = datetime.now(UTC)
        signing_key = make_signer(*make_authority("replay", now), Identity("signer", "hub", "signer"), now, 30.0)[1]
        engine = await Engine.open(root / "store", toy_spec(), toy_config(), signing_key)
        try:
            scene = Scene(engine, options.seed)
            await scene.begin()
            await work(scene)
        finally:
            engine.feed.close()
            await engine.close()

    try:
        asyncio.run(run())
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _write(draw: random.Random, number: int) -> Letter:
    """Return a submission of which no field of the header is empty, signed."""
    member = draw.choice(("acme/alice", "acme/bob", "north/carol"))
    payload = make_payload(toy_spec(), draw.randrange(2**31))
    header = hub_pb2.SubmitHeader(
        update_id=f"{draw.getrandbits(128):032x}",
        space_id=toy_spec().space_id,
        task_id=f"{member.split('/')[0]}/t{number}",
        create=True,
        payload_size=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        lease_id=secrets.token_hex(16),
        rows=draw.randrange(1, 1000),
        sharing=hub_pb2.TaskSharing(open=True, organisations=["bolt", "east"]),
        schema_sha256=_SCHEMA,
        privacy=declaration_to_text(_DECLARED),
    )
    sign_header(header, member_of_no_hub(member))
    return Letter(header.update_id, member, header.task_id, payload, header)


def _says(message: bytes) -> hub_pb2.SubmitHeader | None:
    try:
        return hub_pb2.SubmitRequest.FromString(message).header
    except DecodeError:
        return None


def _changed(data: bytes, at: int, draw: random.Random) -> bytes:
    """Change one byte: its last bit, or any bits. A digit whose last bit is another is a digit still."""
    mask = draw.choice((1, draw.randrange(1, 256)))
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


async def _messages(first: SubmitPart, payload: bytes) -> AsyncIterator[SubmitPart]:
    yield first
    for start in range(0, len(payload), _CHUNK):
        yield hub_pb2.SubmitRequest(chunk=payload[start : start + _CHUNK])


def _rows(journal: Journal) -> list[Any]:
    """Return every row of every table."""
    tables = [row[0] for row in journal.rows("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
    return [(table, [tuple(row) for row in journal.rows(f"SELECT * FROM {table}")]) for table in tables]
