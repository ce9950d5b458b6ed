"""Power cuts: the disks that a cut at any moment of one traced life may leave, and whether a hub lives on them."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError
from share_simulations.chaos.checks import Finding
from share_simulations.chaos.disk_model import MODES, Disk, Recorder, read_tree, write_tree
from share_simulations.chaos.lab import Lab, Start, open_lab, seeds
from share_simulations.chaos.mutants import Mutant, mutants_of
from share_simulations.chaos.report import Caught, Tally, assemble
from share_simulations.chaos.scenario import Plan
from share_simulations.chaos.show import Meter
from share_simulations.interrupts import reporting

_CUTS_PER_LIFE = 150
_MUTANT_CUTS = 600


@dataclass(frozen=True)
class PowerOptions:
    """One campaign."""

    cuts: int = 1_000
    """Power cuts in all."""
    seed: int = 0
    """Of the workloads and of what survives a cut."""
    mutants: bool = False
    """Also show that the planted bugs are caught."""
    folder: Path | None = None
    """Where the stores lie; default: memory."""


@dataclass(frozen=True)
class Cut:
    """One power cut and what came of it."""

    mode: str
    """One of :data:`share_simulations.chaos.disk_model.MODES`."""
    acks: int
    """Updates acknowledged in this life before the cut."""
    where: str
    """Start, moment and mode in words."""
    findings: list[Finding]
    """Broken promises."""


def run_power(options: PowerOptions) -> dict[str, Any]:
    """Run the campaign and return its report.

    Raises:
        ConfigError: this machine cannot trace, or the hub does not even work without a fault.
        Interrupted: with the report of what was reached.
    """
    began = time.monotonic()
    tally, modes, caught = Tally(), Counter[str](), list[Caught]()
    acks, slowest = 0, 0.0

    def report() -> dict[str, Any]:
        figures = {"cuts": modes.total(), "acks": acks, "modes": dict(modes), "slowest_s": round(slowest, 2)}
        return assemble("power", options.seed, figures, tally, caught, began)

    with reporting(report), open_lab(options.folder) as lab:
        with Meter("power cuts", options.cuts) as meter:
            for cut, seconds in timed(cuts(lab, options.seed, options.cuts)):
                tally.add(cut.findings, cut.where)
                modes[cut.mode] += 1
                acks += cut.acks
                slowest = max(slowest, seconds)
                meter.step(f"{acks} acknowledged, {tally.broken} broken")
        for mutant in mutants_of("power") if options.mutants else ():
            caught.append(hunt(lab, mutant, options.seed))
    return report()


def timed(source: Iterator[Cut]) -> Iterator[tuple[Cut, float]]:
    """Yield each cut with the seconds it took."""
    while True:
        began = time.monotonic()
        cut = next(source, None)
        if cut is None:
            return
        yield cut, time.monotonic() - began


def cuts(lab: Lab, seed: int, most: int, mutant: Mutant | None = None) -> Iterator[Cut]:
    """Yield ``most`` power cuts: every start in turn, moments spread over each life, every mode in turn."""
    left = most
    share = min(_CUTS_PER_LIFE, max(1, -(-most // len(lab.starts))))
    for workload in seeds(seed):
        for start in lab.starts:
            plan = lab.plan(start, workload)
            recorder = record(lab, start, plan, mutant)
            draw = random.Random(workload)
            for number in range(min(share, left)):
                moment = draw.randint(1, recorder.moment)
                yield cut_at(lab, start, plan, recorder, moment, MODES[number % len(MODES)], draw)
                left -= 1
            if not left:
                return


def record(lab: Lab, start: Start, plan: Plan, mutant: Mutant | None = None) -> Recorder:
    """Let one hub live unharmed and write everything down.

    Raises:
        ConfigError: it does not live.
    """
    lab.put_back(start)
    recorder = Recorder(start.promised.copy())
    ending = lab.run(plan, recorder, mutant)
    if ending.code != 0:
        raise ConfigError(f"the hub does not even work without a fault ({ending}): {lab.last_words()}")
    return recorder


def cut_at(lab: Lab, start: Start, plan: Plan, recorder: Recorder, moment: int, mode: str, draw: random.Random) -> Cut:
    """Cut the power at one moment and check what is left."""
    base = {} if start.folder is None else read_tree(start.folder, plan.store)
    left = Disk(lab.work, base, recorder, moment).after_cut(mode, draw)
    shutil.rmtree(lab.work, ignore_errors=True)
    lab.work.mkdir()
    write_tree(left)
    promised = recorder.promised_at(moment)
    findings = lab.recover(plan, promised)
    where = f"start {start.name}, moment {moment} of {recorder.moment}, {mode} survives"
    return Cut(mode, len(promised.acks) - len(start.promised.acks), where, findings)


def hunt(lab: Lab, mutant: Mutant, seed: int) -> Caught:
    """Cut the power of a hub with a planted bug until a promise is broken."""
    with Meter(f"planted bug {mutant.name}", _MUTANT_CUTS) as meter:
        for tried, cut in enumerate(cuts(lab, seed, _MUTANT_CUTS, mutant), 1):
            meter.step()
            if cut.findings:
                return Caught(mutant.name, mutant.what, tried, cut.findings[0].text)
    return Caught(mutant.name, mutant.what, 0, "")
