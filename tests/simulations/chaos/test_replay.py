"""A small campaign of captured submissions, and each planted bug noticed by it."""

from __future__ import annotations

import pytest

from share_simulations.chaos.replay import ReplayOptions, hunt, run_replay
from share_simulations.chaos.thefts import MUTANTS, THEFTS, Mutant


def test_nothing_comes_of_what_was_captured() -> None:
    report = run_replay(ReplayOptions(replays=200, seed=1, stride=9))
    assert report["ok"], report["problems"]
    known, unseen, again = (report["answers"][name] for name in sorted(report["answers"]))
    assert known["first receipt"] > 50, "the payload of a known submission is not even asked for"
    assert "first receipt" not in unseen and unseen["DigestError"] > 50
    assert again["SignatureError"] > again["first receipt"] > 0
    assert report["changed_bytes"] > 800 and report["replays"] == 200


def test_every_theft_has_a_name_of_its_own() -> None:
    assert len({theft.name for theft in THEFTS}) == len(THEFTS) == 16


QUICK = ("blind", "numbers-again", "taken-again", "id-unsigned")


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in QUICK], ids=lambda mutant: mutant.name)
def test_planted_bug_is_caught(mutant: Mutant) -> None:
    """The others take a change of one certain byte: ``share-sim chaos replay --mutants`` hunts them all."""
    caught = hunt(mutant, ReplayOptions(seed=1))
    assert caught.after, f"{mutant.name} survived: {mutant.what}"
