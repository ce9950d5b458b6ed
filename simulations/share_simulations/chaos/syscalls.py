"""SIGKILL before every file-changing system call of a hub's life, one call after the other."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError
from share_simulations.chaos.checks import Finding
from share_simulations.chaos.lab import KillAt, Lab, Start, open_lab, seeds
from share_simulations.chaos.mutants import Mutant, mutants_of
from share_simulations.chaos.ptrace import Call
from share_simulations.chaos.report import Caught, Meter, Tally, assemble
from share_simulations.chaos.scenario import Plan

_MUTANT_POINTS = 300


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
    """
    began = time.monotonic()
    tally, places = Tally(), Counter[str]()
    kills = acks = lives = 0
    with open_lab(options.folder) as lab:
        with Meter("kills", options.points) as meter:
            for start, plan, numbers in enumerations(lab, options.seed, options.points, lambda: options.points - kills):
                lives += 1
                for number in numbers:
                    shot = shoot(lab, start, plan, number)
                    tally.add(shot.findings, f"start {start.name}, call {number}, before {shot.where}")
                    if shot.killed:
                        kills += 1
                        acks += shot.acks
                        places[shot.where] += 1
                        meter.step(f"{acks} acknowledged, {tally.broken} broken")
        caught = [hunt(lab, mutant, options.seed) for mutant in mutants_of("syscalls")] if options.mutants else []
    figures = {"points": kills, "kills": kills, "acks": acks, "lives": lives, "places": dict(places.most_common())}
    return assemble("syscalls", options.seed, figures, tally, caught, began)


def enumerations(lab: Lab, seed: int, points: int, left: Any) -> Any:
    """Yield (start, plan, call numbers) until no points are left: every start in turn, each time another workload.

    A whole life is enumerated where there are points enough, otherwise a random part of it.
    """
    share = max(1, -(-points // len(lab.starts)))
    for workload in seeds(seed):
        for start in lab.starts:
            if left() <= 0:
                return
            plan = lab.plan(start, workload)
            total = count_calls(lab, start, plan)
            numbers = range(1, total + 1)
            most = min(share, left())
            yield start, plan, numbers if most >= total else random.Random(workload).sample(numbers, most)


def count_calls(lab: Lab, start: Start, plan: Plan) -> int:
    """Let one hub live unharmed, check it, and return how many file-changing calls it made."""
    lab.put_back(start)
    handler = KillAt(start.promised.copy(), 0)
    ending = lab.run(plan, handler)
    findings = lab.recover(plan, handler.promised)
    if ending.code != 0 or findings:
        raise ConfigError(
            f"the hub does not even work without a fault ({ending}, {findings[:1]}): {lab.last_words()}"
        )
    return handler.calls


def shoot(lab: Lab, start: Start, plan: Plan, number: int, mutant: Mutant | None = None) -> Shot:
    """Kill one hub before its ``number``-th call and check what is left."""
    lab.put_back(start)
    handler = KillAt(start.promised.copy(), number)
    ending = lab.run(plan, handler, mutant)
    findings = lab.recover(plan, handler.promised, mutant)
    killed = handler.calls >= number
    if not killed and ending.code != 0 and mutant is None:
        findings.append(Finding("hung", f"the hub was not killed and ended with {ending}"))
    acks = len(handler.promised.acks) - len(start.promised.acks)
    return Shot(killed, acks, "" if handler.last is None else place(handler.last), findings)


def place(call: Call) -> str:
    """Return what a call does in words that are the same in every life: its name and the kind of file."""
    parts = Path(call.path).parts
    after = parts[parts.index("work") + 1 :] if "work" in parts else parts
    kind = "/".join(after[:2]) if len(after) < 3 else f"{after[0]}/{after[1]}/*"
    return f"{call.name} {kind or '.'}"


def hunt(lab: Lab, mutant: Mutant, seed: int) -> Caught:
    """Shoot at random points of a hub with a planted bug until a promise is broken."""
    tried = 0
    draw = random.Random(seed)
    with Meter(f"planted bug {mutant.name}", _MUTANT_POINTS) as meter:
        for workload in seeds(seed):
            for start in lab.starts[:2]:
                plan = lab.plan(start, workload)
                numbers = list(range(1, count_calls(lab, start, plan) + 1))
                draw.shuffle(numbers)
                for number in numbers[: _MUTANT_POINTS // 6]:
                    tried += 1
                    shot = shoot(lab, start, plan, number, mutant)
                    meter.step()
                    if shot.findings:
                        return Caught(mutant.name, mutant.what, tried, shot.findings[0].text)
                    if tried >= _MUTANT_POINTS:
                        return Caught(mutant.name, mutant.what, 0, "")
    raise AssertionError("seeds never end")
