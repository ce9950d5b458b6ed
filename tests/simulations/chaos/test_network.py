"""A bad network between real clients and a real hub, in small, and the planted bugs that it must show."""

from __future__ import annotations

from pathlib import Path

import pytest

from share_core.errors import ConfigError
from share_simulations.chaos.members import Diet
from share_simulations.chaos.network import (
    MIB,
    MOST_RESENT,
    PLANTED,
    NetworkOptions,
    Planted,
    campaign,
    catch,
    run_network,
)
from share_simulations.chaos.show import Meter


def planted(name: str) -> Planted:
    return next(one for one in PLANTED if one.name == name)


def test_everything_arrives_once_with_few_bytes_too_many(tmp_path: Path) -> None:
    options = NetworkOptions(4.0, clients=2, followers=1, scenes=False, seed=2, directory=tmp_path)
    with Meter("test") as meter:
        outcome = campaign(options, Planted(), meter)
    assert outcome.problems == ()
    assert outcome.delivered == outcome.updates > 0
    assert 1.0 < outcome.resend_ratio <= MOST_RESENT
    assert outcome.verdict is not None
    assert outcome.verdict.double == outcome.verdict.lost == 0


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("restarts_at_zero", "bytes were sent for each byte"),
        ("deaf_follower", "is at version 2, the newest is"),
        ("corrupting_network", "TLS refused"),
    ],
)
def test_a_planted_bug_is_caught(tmp_path: Path, name: str, sign: str) -> None:
    options = NetworkOptions(5.0, seed=1, directory=tmp_path)
    with Meter("test") as meter:
        signs = catch(options, planted(name), meter)
    assert any(sign in text for text in signs), signs


def test_a_hub_without_deduplication_is_caught(tmp_path: Path) -> None:
    options = NetworkOptions(2.0, diet=Diet(MIB, 2 * MIB, small=0.9), directory=tmp_path)
    with Meter("test") as meter:
        signs = catch(options, planted("no_dedupe"), meter)
    assert any("nobody sent it" in text for text in signs), signs


def test_numbers_that_make_no_campaign_are_refused() -> None:
    with pytest.raises(ConfigError, match="positive time"):
        run_network(NetworkOptions(seconds=0))
