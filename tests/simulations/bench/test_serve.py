"""The serving benchmark at a toy size: every promised key, equal outputs, and a refusal where they are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from share_client.serving.stacks import RowCores
from share_core.errors import ConfigError
from share_simulations.bench import serve
from share_simulations.bench.serve import ServeOptions, run_serve
from share_simulations.cli import app

pytest.importorskip("peft", reason="compares with PEFT")
TOY = ServeOptions(
    ("decoder",), tasks=(1, 3), rows=4, tokens=3, directions=6, rank=2, repetitions=2, width=64, layers=1, device="cpu"
)


def test_every_key_is_there_and_bytes_are_counted_whole() -> None:
    notes: list[str] = []
    report = run_serve(TOY, notes.append)
    for key in (
        "throughput_ratio_vs_backbone",
        "throughput_ratio_vs_peft_mixed",
        "throughput_ratio_vs_peft_switching",
        "bytes_per_task",
    ):
        assert report[key] > 0, key
    assert report["largest_difference"] < 1e-5
    rows = report["models"]["decoder"]["by_tasks"]
    assert set(rows) == {"1", "3"}
    assert rows["3"]["tasks_in_batch"] == 3
    added = 4 * 2 * 2 * (6 + 6)  # two sites, float32; two factors of rank 2 are fewer numbers than a core of 6 x 6
    bases = 4 * 2 * 6 * (64 + 64)
    assert report["bytes_added_per_task"] == added
    assert report["bytes_per_task"] == pytest.approx((bases + 4 * added) / 3)
    assert report["peft_bytes_per_task"] == 4 * 2 * 2 * (64 + 64)
    mixed = rows["3"]["ways"]["PEFT mixed"]
    assert report["throughput_ratio_vs_peft_mixed"] == mixed["ours_to_this"]
    assert mixed["ours_to_this_from"] <= mixed["ours_to_this"] <= mixed["ours_to_this_to"]
    assert len([note for note in notes if "throughput" in note]) == 2
    json.dumps(report)


def test_ways_that_do_not_do_the_same_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = RowCores.apply
    with monkeypatch.context() as planted:
        planted.setattr(RowCores, "apply", lambda self, z: apply(self, z) * 1.01)
        with pytest.raises(ConfigError, match="do not do the same"):
            run_serve(TOY)
    with monkeypatch.context() as planted:  # tasks that change nothing would agree whatever is served
        planted.setattr(serve, "_STRENGTH", 1e-9)
        with pytest.raises(ConfigError, match="do not do the same"):
            run_serve(TOY)


def test_turns_begin_with_another_way_each_time() -> None:
    order: list[str] = []
    ways: Any = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds, processor = serve._time_in_turns(ways, 3, torch.device("cpu"))
    assert order == list("abcbcacab")
    assert {len(times) for times in (*seconds.values(), *processor.values())} == {3}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"models": ("gpt",)}, "expected minilm or decoder, got gpt"),
        ({"dtype": "int8"}, "expected float32 or bfloat16"),
        ({"rank": 7}, "at most --directions, 6"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run_serve(replace(TOY, **changes))


def test_the_command_writes_json_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_serve(replace(TOY, repetitions=1))
    monkeypatch.setattr(serve, "run_serve", lambda options, note: report)
    words = ["bench", "serve", "--models", "decoder", "--tasks", "1,3", "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, [*words, "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout.splitlines()[-1])["bytes_per_task"] == report["bytes_per_task"]
    assert json.loads((tmp_path / "out" / "serve.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "out" / "serve.png").read_bytes().startswith(b"\x89PNG")
    table = CliRunner().invoke(app, words)
    assert "PEFT switching" in table.stdout.replace("\n", " ") or "switching" in table.stdout
