"""A very short day with everything in it, and a hub with a planted bug that does not get through it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from share_core.errors import ConfigError, UnavailableError
from share_simulations.chaos import day
from share_simulations.chaos.day import DayOptions, run_day
from share_simulations.chaos.endcheck import Verdict
from share_simulations.chaos.verify import verify_directory


def test_a_short_day_ends_with_empty_outboxes_and_every_promise_kept(tmp_path: Path) -> None:
    options = DayOptions(minutes=0.2, clients=4, pace_s=3.0, hub_kills=3, seed=1, directory=tmp_path)
    report = run_day(options, tmp_path / "out")
    assert report["problems"] == []
    assert report["ok"]
    assert report["outboxes_empty"]
    assert report["lost"] == report["double"] == 0
    assert report["hub_kills"] == 3
    assert report["killed_clients"] > 0
    assert report["reuploads"] > 0
    assert report["acknowledged"] == report["updates"] == report["merged"] + report["refused_after_receipt"] > 0
    assert report["replay_equal"] in (True, None)
    assert (tmp_path / "out" / "day.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "day.json").read_text()) == report


def test_a_hub_that_acknowledges_too_early_does_not_get_through_the_day(tmp_path: Path) -> None:
    options = DayOptions(0.15, clients=3, pace_s=1.0, hub_kills=4, directory=tmp_path, planted="ack_before_row")
    report = run_day(options)
    assert not report["ok"]
    assert any("was acknowledged" in problem for problem in report["problems"])


def test_a_hub_that_does_not_come_back_is_a_broken_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(*_: object) -> Verdict:
        raise UnavailableError("the hub does not start: damaged")

    monkeypatch.setattr(day, "_live", gone)
    report = run_day(DayOptions(0.1, clients=2, directory=tmp_path), tmp_path / "out")
    assert not report["ok"]
    assert "the hub does not start: damaged" in report["problems"]
    assert report["lost"] is None, "nobody could count"
    assert json.loads((tmp_path / "out" / "day.json").read_text()) == report


def test_a_directory_that_is_none_does_not_verify(tmp_path: Path) -> None:
    assert verify_directory(tmp_path / "nothing", replay=True).sound is not True


def test_numbers_that_make_no_day_are_refused() -> None:
    with pytest.raises(ConfigError, match="positive number of minutes"):
        run_day(DayOptions(minutes=0))
