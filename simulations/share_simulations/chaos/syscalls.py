"""SIGKILL before every file-changing system call of a hub's life, one call after the other."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError
from share_simulations.chaos.checks import Finding
from share_simulations.chaos.lab import KillAt, Lab, Start, open_lab, seeds
from share_simulations.chaos.mutants import Mutant, mutants_of
from share_simulations.chaos.ptrace import Call
from share_simulations.chaos.report import Caught, Tally, assemble
from share_simulations.chaos.scenario import Plan
from share_simulations.chaos.show import Meter
from share_simulations.interrupts import reporting

_MUTANT_POINTS = 300
_RANDOM_PART = re.compile(r"-[0-9a-f]{8}$")


@dataclass(frozen=True)
class SyscallOptions:
    """One campaign."""

    points: int = 10_000
    """Kills in all."""
    seed: int = 0
    """Of the workloads."""
    mutants: bool = False
    """Also show that the planted bugs are caught."""
    folder: Path | None = None
    """Where the stores lie; default: memory."""


@dataclass(frozen=True)
class Shot:
    """One kill and what came of it."""

    killed: bool
    """False: the hub's life was over before the chosen call."""
    acks: int
    """Updates acknowledged in this life."""
    where: str
    """The call it died before."""
    findings: list[Finding]
    """Broken promises."""


def run_syscalls(options: SyscallOptions) -> dict[str, Any]:
    """Run the campaign and return its report.

    Raises:
        ConfigError: this machine cannot trace, or the hub does not even work without a fault.
        Interrupted: with the report of what was reached.
    """
    began = time.monotonic()
    tally, places, caught = Tally(), Counter[str](), list[Caught]()
    acks = lives = 0

    def report() -> dict[str, Any]:
        kills = places.total()
        figures = {"points": kills, "kills": kills, "acks": acks, "lives": lives, "places": dict(places.most_common())}
        return assemble("syscalls", options.seed, figures, tally, caught, began)

    with reporting(report), open_lab(options.folder) as lab:
        with Meter("kills", options.points) as meter:
            for start, plan, numbers in enumerations(
                lab, options.seed, options.points, lambda: options.points - places.total()
            ):
                lives += 1
                for number in numbers:
                    shot = shoot(lab, start, plan, number)
                    tally.add(shot.findings, f"start {start.name}, call {number}, before {shot.where}")
                    if shot.killed:
                        acks += shot.acks
                        places[shot.where] += 1
                        meter.step(f"{acks} acknowledged, {tally.broken} broken")
        for mutant in mutants_of("syscalls") if options.mutants else ():
            caught.append(hunt(lab, mutant, options.seed))
    return report()


def enumerations(
    lab: Lab, seed: int, points: int, left: Callable[[], int]
) -> Iterator[tuple[Start, Plan, Sequence[int]]]:
    """Yield (start, plan, call numbers) until no points are left: every start in turn, each time another workload.

    A whole life is enumerated where there are points enough, otherwise a random part of it.
    """
    share = max(1, -(-points // len(lab.starts)))
    for workload in seeds(seed):
        for start in lab.starts:
            if left() <= 0:
                return
            plan = lab.plan(start, workload)
            numbers = range(1, len(trial(lab, start, plan)) + 1)
            most = min(share, left())
            yield start, plan, numbers if most >= len(numbers) else random.Random(workload).sample(numbers, most)


def trial(lab: Lab, start: Start, plan: Plan) -> list[Call]:
    """Let one hub live unharmed, check it, and return the file-changing calls it made.

    Raises:
        ConfigError: it breaks a promise without any fault.
    """
    lab.put_back(start)
    handler = KillAt(start.promised.copy(), 0)
    ending = lab.run(plan, handler)
    findings = lab.recover(plan, handler.promised)
    if ending.code != 0 or findings:
        raise ConfigError(f"the hub does not even work without a fault ({ending}, {findings[:1]}): {lab.last_words()}")
    return handler.calls


def shoot(lab: Lab, start: Start, plan: Plan, number: int, mutant: Mutant | None = None) -> Shot:
    """Kill one hub before its ``number``-th call and check what is left."""
    lab.put_back(start)
    handler = KillAt(start.promised.copy(), number)
    ending = lab.run(plan, handler, mutant)
    findings = lab.recover(plan, handler.promised, mutant)
    killed = len(handler.calls) >= number
    if not killed and ending.code != 0 and mutant is None:
        findings.append(Finding("hung", f"the hub was not killed and ended with {ending}: {lab.last_words()[-300:]}"))
    acks = len(handler.promised.acks) - len(start.promised.acks)
    return Shot(killed, acks, place(handler.calls[-1]) if handler.calls else "", findings)


def place(call: Call) -> str:
    """Return what a call does in words that are the same in every life: its name and the kind of file."""
    parts = Path(call.path).parts
    after = parts[parts.index("work") + 1 :] if "work" in parts else parts
    kind = "/".join(after[:2]) if len(after) < 3 else f"{after[0]}/{after[1]}/*"
    return f"{call.name} {_RANDOM_PART.sub('', kind) or '.'}"


def hunt(lab: Lab, mutant: Mutant, seed: int) -> Caught:
    """Shoot at a hub with a planted bug, first where it should show, until a promise is broken."""
    tried = 0
    draw = random.Random(seed)
    with Meter(f"planted bug {mutant.name}", _MUTANT_POINTS) as meter:
        for start, workload in zip(itertools.cycle(reversed(lab.starts)), seeds(seed), strict=False):
            plan = lab.plan(start, workload)
            unharmed = KillAt(start.promised.copy(), 0)
            lab.put_back(start)
            lab.run(plan, unharmed, mutant)
            calls = unharmed.calls
            numbers = list(range(1, len(calls) + 1))
            draw.shuffle(numbers)
            numbers.sort(key=lambda number: not place(calls[number - 1]).startswith(mutant.near))
            for number in numbers[: _MUTANT_POINTS // 6]:
                tried += 1
                shot = shoot(lab, start, plan, number, mutant)
                meter.step()
                if shot.findings:
                    return Caught(mutant.name, mutant.what, tried, shot.findings[0].text)
            if tried >= _MUTANT_POINTS:
                break
    return Caught(mutant.name, mutant.what, 0, "")
