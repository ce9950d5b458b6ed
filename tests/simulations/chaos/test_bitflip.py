"""Flipped bits: every kind of file is damaged, and every flip is refused before the hub serves."""

from __future__ import annotations

import random

import pytest

from share_simulations.chaos.bitflip import BitflipOptions, Victim, flip, hunt, make_victims, run_bitflip
from share_simulations.chaos.lab import Lab
from share_simulations.chaos.mutants import Mutant, mutants_of

KINDS = {"update", "original", "delta", "snapshot", "journal", "log", "page sums", "anchor"}


@pytest.fixture(scope="module")
def victims(lab: Lab) -> list[Victim]:
    return make_victims(lab, seed=0)


def test_every_kind_of_file_is_among_the_victims(victims: list[Victim]) -> None:
    assert {kind for victim in victims for kind in victim.kinds} == KINDS
    assert ["log" in victim.kinds for victim in victims] == [False, True, True]


def test_flips_of_every_kind_are_refused() -> None:
    report = run_bitflip(BitflipOptions(flips=48, seed=3))
    assert report["ok"], report["problems"]
    assert set(report["by_kind"]) == KINDS
    assert report["detected"] + report["unneeded"] == report["flips"] == 48
    assert all(counts["unneeded"] == 0 for kind, counts in report["by_kind"].items() if kind != "journal")


def test_a_lost_file_is_refused_too(lab: Lab, victims: list[Victim]) -> None:
    """An empty file is every bit wrong at once; the bit drawn is then flipped in a file of one byte."""
    victim = victims[0]
    path = victim.folder / "anchor"
    kept = path.read_bytes()
    try:
        path.write_bytes(b"\0")
        only = Victim(victim.name, victim.plan, victim.folder, {"anchor": ["anchor"]}, victim.content)
        done = flip(lab, only, random.Random(0))
    finally:
        path.write_bytes(kept)
    assert (done.findings, done.unneeded) == ([], False)


@pytest.mark.parametrize("mutant", mutants_of("bitflip"), ids=lambda mutant: mutant.name)
def test_planted_bug_is_caught(lab: Lab, victims: list[Victim], mutant: Mutant) -> None:
    caught = hunt(lab, mutant, victims, seed=1)
    assert caught.after, f"{mutant.name} survived: {mutant.what}"
