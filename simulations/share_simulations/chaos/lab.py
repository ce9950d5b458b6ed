"""The bench that every crash experiment is made on: one store directory, put back to a known start each time."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from share_core.errors import ConfigError
from share_core.identity import Identity, make_authority, make_signer
from share_core.types import Space
from share_core.wire import decode_snapshot, encode_snapshot
from share_server.hub.engine import Engine
from share_simulations.chaos.checks import Finding, ask, recovery
from share_simulations.chaos.mutants import Mutant
from share_simulations.chaos.ptrace import GO, KILL, Call, Ending, Handler, Verdict, require_tracer, trace
from share_simulations.chaos.scenario import Letter, Plan, Promised, live, say_to, toy_config, toy_spec, write_letters

_FILLED = 7
_LETTERS = 5


class Witness(Handler):
    """Remembers what the outside was told."""

    def __init__(self, promised: Promised) -> None:
        self.promised = promised

    def marked(self, text: bytes) -> None:
        """Take a promise."""
        self.promised.take(text)


class KillAt(Witness):
    """Kills the process before its n-th file-changing call, never if n is 0; remembers the calls."""

    def __init__(self, promised: Promised, number: int) -> None:
        super().__init__(promised)
        self._number = number
        self.calls: list[Call] = []

    def entered(self, call: Call) -> Verdict:
        """Count, and kill at the chosen one."""
        self.calls.append(call)
        return KILL if len(self.calls) == self._number else GO


@dataclass(frozen=True)
class Start:
    """A store to begin an experiment with."""

    name: str
    """empty, filled or killed."""
    folder: Path | None
    """Copied into place; None: no store."""
    promised: Promised
    """What was promised while it was made."""
    letters: tuple[Letter, ...] = ()
    """What was sent while it was made."""
    space: Space | None = None
    """A version that new updates may be relative to."""


@dataclass
class Lab:
    """One experiment at a time. Make it with :func:`open_lab`."""

    folder: Path
    """Everything lies below; removed at the end."""
    signing_key: bytes
    """Ed25519 private key, PEM."""
    log: Path
    """What the children wrote to stderr."""
    starts: list[Start] = field(default_factory=list)
    """Every kind of store an experiment may begin with."""

    def __post_init__(self) -> None:
        self.spec = toy_spec()
        self.config = toy_config()
        self.work = self.folder / "work"

    def plan(self, start: Start, seed: int, *, count: int = _LETTERS, orderly: bool = False) -> Plan:
        """Return a fresh workload for this start."""
        letters = write_letters(self.spec, seed, count, start.space)
        return Plan(self.work / "store", self.spec, self.config, self.signing_key, letters, orderly)

    def put_back(self, start: Start) -> None:
        """Make the store what it is at ``start``."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if start.folder is not None:
            copy_store(start.folder, self.work / "store")

    def run(self, plan: Plan, handler: Handler, mutant: Mutant | None = None) -> Ending:
        """Let one hub live under the tracer."""
        marker = os.open(os.devnull, os.O_WRONLY)
        try:
            say = say_to(marker)

            def main() -> int:
                if mutant is not None:
                    mutant.plant(say)
                return live(plan, say)

            return trace(main, self.work, handler, marker=marker, log=self.log)
        finally:
            os.close(marker)

    def recover(self, plan: Plan, promised: Promised, mutant: Mutant | None = None) -> list[Finding]:
        """Open what is left and return the broken promises. Recovery is honest unless a mutant is about it."""
        if mutant is not None and mutant.recovery:
            return recovery(plan, promised, self.log, lambda: mutant.plant(lambda _: None))
        return recovery(plan, promised, self.log)

    def _build(self) -> None:
        self.starts = [Start("empty", None, Promised())]
        self.starts.append(self._filled(seed=11))
        self.starts.append(self._killed(self.starts[1], seed=12))

    def _filled(self, seed: int) -> Start:
        """A store with several versions, closed in good order."""
        start = self.starts[0]
        self.put_back(start)
        plan = self.plan(start, seed, count=_FILLED)
        witness = Witness(Promised())
        ending = self.run(plan, witness)
        if ending.code != 0:
            raise ConfigError(f"the hub does not even live without a fault ({ending}): {self.last_words()}")
        folder = self.folder / "filled"
        copy_store(plan.store, folder)
        return Start("filled", folder, _carried(witness.promised), plan.letters, self._newest(plan))

    def _killed(self, before: Start, seed: int) -> Start:
        """A store left by a kill: a write-ahead log, updates that wait, rests in staging."""
        plan = self.plan(before, seed, count=_LETTERS)
        self.put_back(before)
        counter = KillAt(before.promised.copy(), 0)
        self.run(plan, counter)
        self.put_back(before)
        witness = KillAt(before.promised.copy(), len(counter.calls) * 2 // 3)
        self.run(plan, witness)
        folder = self.folder / "killed"
        copy_store(plan.store, folder)
        return Start("killed", folder, _carried(witness.promised), (*before.letters, *plan.letters), before.space)

    def _newest(self, plan: Plan) -> Space:
        """Return the newest version of a closed store; a child reads it, so that no thread is left here."""
        path = self.folder / "newest.safetensors"

        async def read() -> None:
            engine = await Engine.open(plan.store, plan.spec, plan.config, plan.signing_key)
            path.write_bytes(encode_snapshot(engine.feed.state.space))
            await engine.close()

        ask(lambda: asyncio.run(read()), self.log)
        return decode_snapshot(path.read_bytes(), self.spec)

    def last_words(self) -> str:
        """Return the end of what the children said."""
        return self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""


def _carried(promised: Promised) -> Promised:
    return Promised(dict(promised.acks), promised.version, promised.digest)


@contextmanager
def open_lab(folder: Path | None = None) -> Iterator[Lab]:
    """Build a lab in a fresh folder below ``folder`` and remove it at the end.

    Args:
        folder: where; default: memory, if the machine has a file system there, because a killed process loses nothing
            that the kernel has, so the disk behind it does not matter.

    Raises:
        ConfigError: this machine cannot trace.
    """
    require_tracer()
    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    base = folder or (memory if os.access(memory, os.W_OK) else None)
    made = Path(tempfile.mkdtemp(prefix="share-chaos-", dir=base)).resolve()
    try:
        now = datetime.now(UTC)
        certificate, key = make_authority("crash lab", now)
        _, signing_key = make_signer(certificate, key, Identity("signer", "hub", "signer"), now, 30.0)
        lab = Lab(made, signing_key, made / "log")
        # What others left behind, such as gRPC channels, must not be collected in a forked child: its threads are gone.
        _freeze()
        lab._build()
        _freeze()
        yield lab
    finally:
        gc.unfreeze()
        shutil.rmtree(made, ignore_errors=True)


def _freeze() -> None:
    """Collect what is garbage, and keep the rest from the collector: forked children share what it never touches."""
    gc.collect()
    gc.freeze()


def copy_store(source: Path, target: Path) -> None:
    """Copy a directory tree of small files."""
    target.mkdir()
    for entry in os.scandir(source):
        if entry.is_dir():
            copy_store(Path(entry.path), target / entry.name)
        else:
            (target / entry.name).write_bytes(Path(entry.path).read_bytes())


def seeds(seed: int) -> Iterator[int]:
    """Yield seeds of workloads for ever."""
    draw = random.Random(seed)
    while True:
        yield draw.randrange(2**31)
