"""A client session killed at chosen and at random moments, in small, and planted bugs that one kill must show."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from share_client.outbox import Outbox
from share_core.errors import ConfigError
from share_simulations.chaos import client
from share_simulations.chaos.client import ClientOptions, Site, Tally, open_site, play, run_client_kills
from share_simulations.chaos.client_bugs import BUGS, replace_step
from share_simulations.chaos.client_life import Kill

BEFORE_THE_MERGE_IS_RECORDED = Kill(place="records", call=1)
"""The hub has the update and has merged it; the client is about to write that down."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("clients")) as made:
        yield made


def test_a_killed_client_loses_nothing_and_sends_nothing_twice(site: Site) -> None:
    tally = Tally()
    moments = (
        Kill(place="outbox", call=6),
        BEFORE_THE_MERGE_IS_RECORDED,
    )
    assert play(site, iter(moments), len(moments), tally) == []
    assert tally.kills == 2, "a life ended before its moment: the test proves less than it says"
    assert tally.lives == 3
    assert tally.updates >= 2


@pytest.mark.parametrize("bug", ["removed_before_acknowledgement", "recorded_after_removal", "new_id_at_each_start"])
def test_a_planted_bug_is_caught(site: Site, bug: str) -> None:
    findings = play(site, itertools.repeat(BEFORE_THE_MERGE_IS_RECORDED), 1, Tally(), bug)
    assert "double" in [finding.kind for finding in findings], findings


def test_a_bug_that_no_longer_fits_the_client_is_told() -> None:
    with pytest.raises(AttributeError, match="does not fit"):
        replace_step(Outbox, "no_such_step", None)
    assert set(BUGS) >= {"removed_before_acknowledgement", "new_id_at_each_start"}


def test_moments_are_of_every_kind(site: Site) -> None:
    measured = Site(site.folder, site.spec, site.bench, calls={"any": 9, "outbox": 5, "records": 3}, span_s=1.0)
    drawn = list(itertools.islice(client._moments(measured, random.Random(1)), 200))
    assert {kill.place for kill in drawn} == {"any", "outbox", "records"}
    assert all((kill.call > 0) != (kill.after_s > 0) for kill in drawn)
    assert all(kill.call <= measured.calls[kill.place] and kill.after_s <= 1.0 for kill in drawn)


def test_a_campaign_without_kills_is_none() -> None:
    with pytest.raises(ConfigError, match="at least one kill"):
        run_client_kills(ClientOptions(kills=0))
