"""One flipped bit in one file of a closed or killed store: the next start must refuse it, before it serves anything.

Flipped are only bytes that are state: payloads that a row refers to, the journal, its write-ahead log, its page sums
and its anchor. Not the lock, and not what staging holds, which nobody was promised. A flip that opens is silent damage,
unless everything that the hub can read is exactly as it was: a page of the journal of which the log has a newer copy
is read from the log and then overwritten. Those are counted as ``unneeded``.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import sqlite3
import time
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError, StorageError
from share_server.hub.engine import Engine
from share_server.store.journal import Journal
from share_simulations.chaos.checks import Finding, ask
from share_simulations.chaos.lab import Lab, Start, Witness, copy_store, open_lab, seeds
from share_simulations.chaos.mutants import Mutant, mutants_of
from share_simulations.chaos.ptrace import GO, KILL, Call, Verdict
from share_simulations.chaos.report import Caught, Tally, assemble
from share_simulations.chaos.scenario import Plan, Promised, digest_of
from share_simulations.chaos.show import Meter
from share_simulations.interrupts import reporting

_MUTANT_FLIPS = 600
_REFUSALS = frozenset({StorageError.__name__, ConfigError.__name__})
_NAMES = {"journal.db": "journal", "journal.db-wal": "log", "journal.sums": "page sums", "anchor": "anchor"}
_OPENED = ""


@dataclass(frozen=True)
class BitflipOptions:
    """One campaign."""

    flips: int = 10_000
    """Flipped bits in all."""
    seed: int = 0
    """Of the stores and of the bits."""
    mutants: bool = False
    """Also show that the planted bugs are caught."""
    folder: Path | None = None
    """Where the stores lie; default: memory."""


@dataclass(frozen=True)
class Victim:
    """A store to damage."""

    name: str
    """How it was left."""
    plan: Plan
    """To open it with."""
    folder: Path
    """Its copy."""
    kinds: dict[str, list[str]]
    """Files that are state, by kind, relative to the store."""
    content: str
    """Digest of everything that a hub reads in it."""


@dataclass(frozen=True)
class Flip:
    """One flipped bit and what came of it."""

    kind: str
    """Kind of file."""
    unneeded: bool
    """Whether the store opened with exactly its old content."""
    findings: list[Finding]
    """Broken promises."""


class _KillInMerge(Witness):
    """Kills before the payload of a merge is begun: an update waits, and everything that was told is anchored."""

    def __init__(self, promised: Promised, number: int) -> None:
        super().__init__(promised)
        self._number = number
        self.merges = 0

    def entered(self, call: Call) -> Verdict:
        if call.name == "openat" and "/staging/t-" in call.path:
            self.merges += 1
            if self.merges == self._number:
                return KILL
        return GO


def run_bitflip(options: BitflipOptions) -> dict[str, Any]:
    """Run the campaign and return its report.

    Raises:
        ConfigError: this machine cannot trace, or the hub does not even work without a fault.
        Interrupted: with the report of what was reached.
    """
    began = time.monotonic()
    tally, caught = Tally(), list[Caught]()
    kinds, unneeded, misses = Counter[str](), Counter[str](), Counter[str]()

    def report() -> dict[str, Any]:
        return assemble("bitflip", options.seed, _figures(kinds, unneeded, misses), tally, caught, began)

    with reporting(report), open_lab(options.folder) as lab:
        victims = make_victims(lab, options.seed)
        draw = random.Random(options.seed)
        with Meter("flipped bits", options.flips) as meter:
            for number in range(options.flips):
                done = flip(lab, victims[number % len(victims)], draw)
                kinds[done.kind] += 1
                unneeded[done.kind] += done.unneeded
                misses[done.kind] += bool(done.findings)
                tally.add(done.findings, done.kind)
                meter.step(f"{tally.broken} not refused")
        for mutant in mutants_of("bitflip") if options.mutants else ():
            caught.append(hunt(lab, mutant, victims, options.seed))
    return report()


def _figures(kinds: Counter[str], unneeded: Counter[str], misses: Counter[str]) -> dict[str, Any]:
    """Return the flips by what came of them, in all and by kind of file."""
    detected = {kind: kinds[kind] - unneeded[kind] - misses[kind] for kind in kinds}
    return {
        "flips": kinds.total(),
        "detected": sum(detected.values()),
        "unneeded": unneeded.total(),
        "missed": misses.total(),
        "by_kind": {
            kind: {
                "flips": kinds[kind],
                "detected": detected[kind],
                "unneeded": unneeded[kind],
                "missed": misses[kind],
            }
            for kind in sorted(kinds)
        },
    }


def make_victims(lab: Lab, seed: int) -> list[Victim]:
    """Return a store that was closed, one killed early (all in the log) and one killed late.

    Raises:
        ConfigError: the hub does not even work without a fault.
    """
    empty, filled = lab.starts[0], lab.starts[1]
    found = []
    for name, start, workload in zip(("closed", "young", "old"), (filled, empty, filled), seeds(seed), strict=False):
        plan = lab.plan(start, workload, orderly=True)
        lab.put_back(start)
        if name == "closed":
            lab.run(plan, Witness(Promised()))
        else:
            counter = _KillInMerge(Promised(), 0)
            lab.run(plan, counter)
            _kill_late(lab, plan, start, counter.merges)
        folder = lab.folder / f"victim-{name}"
        copy_store(plan.store, folder)
        error, text, content = _open(lab, plan)
        if error != _OPENED:
            raise ConfigError(f"the store to damage does not even open undamaged: {error}: {text}")
        found.append(Victim(name, plan, folder, _kinds_of(folder, lab.folder / "look"), content))
    return found


def _kill_late(lab: Lab, plan: Plan, start: Start, number: int) -> None:
    """Run from ``start`` and kill in the merge with this number, or in the last one if this life has fewer.

    How many there are depends on which updates arrive together.
    """
    while True:
        lab.put_back(start)
        killer = _KillInMerge(Promised(), number)
        lab.run(plan, killer)
        if killer.merges == number:
            return
        number = killer.merges


def _kinds_of(store: Path, scratch: Path) -> dict[str, list[str]]:
    """Return the files of a store that are state, by kind; the journal is asked in a copy."""
    kinds: dict[str, list[str]] = defaultdict(list)
    copy_store(store, scratch)
    of: dict[str, str] = {}
    with closing(sqlite3.connect(scratch / "journal.db")) as db:
        for kind, query in (
            ("update", "SELECT sha256 FROM updates"),
            ("original", "SELECT original_sha256 FROM updates"),
            ("delta", "SELECT delta_sha256 FROM versions WHERE collected = 0"),
            ("snapshot", "SELECT snapshot_sha256 FROM versions WHERE collected = 0"),
        ):
            of.update({row[0]: kind for row in db.execute(query) if row[0]})
    shutil.rmtree(scratch)
    for path in sorted(store.rglob("*")):
        relative = path.relative_to(store)
        if not path.is_file() or path.stat().st_size == 0 or relative.parts[0] in ("lock", "staging"):
            continue
        kind = of.get(path.name, "") if relative.parts[0] == "blobs" else _NAMES.get(path.name, path.name)
        if kind:
            kinds[kind].append(str(relative))
    return dict(kinds)


def flip(lab: Lab, victim: Victim, draw: random.Random, mutant: Mutant | None = None) -> Flip:
    """Flip one bit of one file and open the store."""
    store = victim.plan.store
    lab.put_back(Start(victim.name, victim.folder, Promised()))
    kind = draw.choice(sorted(victim.kinds)) if mutant is None else mutant.near
    path = store / draw.choice(victim.kinds[kind])
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    error, text, content = _open(lab, victim.plan, mutant)
    where = f"byte {bit // 8} of {len(data)} in {path.relative_to(store)} of the {victim.name} store"
    if error == _OPENED and content == victim.content:
        return Flip(kind, True, [])
    if error == _OPENED:
        return Flip(kind, False, [Finding("silent", f"{where} was flipped and the store opened with other content")])
    if error not in _REFUSALS:
        return Flip(kind, False, [Finding("unclear", f"{where} was flipped: {error}: {text}")])
    return Flip(kind, False, [])


def _open(lab: Lab, plan: Plan, mutant: Mutant | None = None) -> tuple[str, str, str]:
    """Open a store twice in a child; return (name of the error or "", its text, digest of the content)."""

    def main() -> tuple[str, str, str]:
        if mutant is not None:
            mutant.plant(lambda _: None)
        try:
            first = asyncio.run(_content(plan))
            second = asyncio.run(_content(plan))
        except Exception as error:
            return type(error).__name__, str(error), ""
        return _OPENED, "", first if first == second else f"{first}, then {second}"

    answer, ending = ask(main, lab.log)
    return ("nothing", f"the hub ended with {ending}", "") if answer is None else tuple(answer)


async def _content(plan: Plan) -> str:
    """Return the digest of every row and payload of a store, and of its newest version."""
    engine = await Engine.open(plan.store, plan.spec, plan.config, plan.signing_key)
    try:
        found = hashlib.sha256(digest_of(engine.feed.state.space).encode())
        for text in await engine.store.do(_rows):
            found.update(text.encode())
        for path in sorted((plan.store / "blobs").glob("*/*")):
            found.update(path.read_bytes())
    finally:
        await engine.close()
    return found.hexdigest()


def _rows(journal: Journal) -> list[str]:
    """Return every row of every table as text, in a fixed order."""
    tables = [row[0] for row in journal.rows("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
    return [text for table in tables for text in sorted(repr(tuple(r)) for r in journal.rows(f"SELECT * FROM {table}"))]


def hunt(lab: Lab, mutant: Mutant, victims: list[Victim], seed: int) -> Caught:
    """Flip bits under a hub with a planted bug until one of them goes unnoticed."""
    draw = random.Random(seed)
    with Meter(f"planted bug {mutant.name}", _MUTANT_FLIPS) as meter:
        for tried in range(1, _MUTANT_FLIPS + 1):
            done = flip(lab, draw.choice([victim for victim in victims if mutant.near in victim.kinds]), draw, mutant)
            meter.step()
            if done.findings:
                return Caught(mutant.name, mutant.what, tried, done.findings[0].text)
    return Caught(mutant.name, mutant.what, 0, "")
