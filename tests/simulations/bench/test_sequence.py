"""What the chains of the sequence benchmark and the runs of the transfer benchmark add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from share_core.errors import ConfigError
from share_simulations.bench.sequence import SequenceOptions
from share_simulations.bench.sequence_plot import write_sequence_plot
from share_simulations.bench.sequence_report import difference, sequence_table, summary
from share_simulations.bench.texts import with_every_class
from share_simulations.bench.transfer import TransferOptions, report_of, transfer_table
from share_simulations.bench.transfer_plot import write_transfer_plot


def chain(finals: list[float], lost: float = 0.0, up: int = 100) -> dict[str, Any]:
    tasks = [
        {
            "task": f"t{i}",
            "own": value + lost,
            "final": value,
            "up": up,
            "heads": 7,
            "envelope": 3,
            "seconds": 1.0,
            "k": i,
        }
        for i, value in enumerate(finals)
    ]
    return {"down": 50, "tasks": tasks}


def test_the_summary_is_what_one_computes_by_hand(tmp_path: Path) -> None:
    found = {
        "auto": [chain([0.8, 0.6], 0.01, 20), chain([0.7, 0.5], 0.01, 20)],
        "lora": [chain([0.8, 0.7]), chain([0.8, 0.6])],
        "coefficients": [chain([0.5, 0.5], 0.0, 10)],
    }
    report = summary(found)
    assert report["average_final"] == pytest.approx(0.65)
    assert report["average_lora"] == pytest.approx(0.725)
    assert report["points_below_lora"] == pytest.approx(7.5)
    assert report["forgetting_points"] == pytest.approx(1.0)
    assert report["bytes_up_to_lora"] == pytest.approx(0.2)
    assert report["auto_against"]["coefficients"]["mean"] == pytest.approx((0.3 + 0.1) / 2), "the first seed of both"
    auto = report["ways"]["auto"]
    assert (auto["bytes_up"], auto["bytes_heads_kept"], auto["bytes_down"]) == (40, 14, 50)
    assert auto["bytes_total"] == 40 + 6 + 50
    assert sequence_table(report).row_count == 3
    write_sequence_plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_an_interval_holds_the_mean_and_grows_with_the_spread() -> None:
    theirs = {f"t{i}": [0.5] for i in range(8)}
    even, uneven = ({f"t{i}": [0.6 + spread * (-1) ** i] for i in range(8)} for spread in (0.0, 0.1))
    flat, wide = difference(even, theirs), difference(uneven, theirs)
    assert flat["low"] == pytest.approx(flat["mean"]) == pytest.approx(flat["high"])
    assert wide["low"] < wide["mean"] < wide["high"]
    assert 0.02 < wide["high"] - wide["low"] < 0.2


def test_every_class_is_there_if_there_is_room() -> None:
    lines = [f'{{"text": "{i}", "label": {0 if i < 97 else i}}}' for i in range(100)]
    for seed in map(str, range(20)):
        chosen = with_every_class(lines, 10, seed)
        assert len(set(chosen)) == 10
        assert {line.rpartition(" ")[2] for line in chosen} == {"0}", "97}", "98}", "99}"}
    assert len(with_every_class(lines, 2, "0")) == 2


def test_transfer_is_reported_by_passes_with_intervals(tmp_path: Path) -> None:
    def run(task: str, seed: int, learned: float) -> dict[str, Any]:
        return {"task": task, "seed": seed, "values": {"1": {"lora": 0.5, "learned": learned}}}

    report = report_of(
        [run("a", 0, 0.6), run("b", 0, 0.5), run("a", 1, 0.8), run("b", 1, 0.5)], [1], ("lora", "learned")
    )
    assert report["learned"] == pytest.approx(0.6)
    assert report["lora"] == pytest.approx(0.5)
    assert report["table"] == {"a": {"lora": 0.5, "learned": pytest.approx(0.7)}, "b": {"lora": 0.5, "learned": 0.5}}
    own = report["by_epochs"]["1"]
    assert own["learned_minus"]["lora"]["mean"] == pytest.approx(0.1)
    assert own["spread_over_seeds"]["learned"] == pytest.approx(0.0707, abs=1e-4)
    assert transfer_table(report).row_count == 2
    write_transfer_plot({**report, "rows": 100}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="modes: expected auto and others of"):
        SequenceOptions(tmp_path, tmp_path, modes=("free",))
    with pytest.raises(ConfigError, match="ways: expected learned and others of"):
        TransferOptions(tmp_path, tmp_path, ways=("lora", "learnt", "learned"))
