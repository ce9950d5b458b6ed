"""The history of a client's tasks as rows, table and picture."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from share_client.cli import app
from share_client.history import client_history, history_rows, plot_history
from share_client.member import Member, save_member
from share_client.records import Records
from share_core.errors import ConfigError

RUNNER = CliRunner()


def evaluation(version: int, value: float, metric: str = "accuracy") -> dict[str, Any]:
    return {"event": "evaluation", "version": version, "metric": metric, "value": value, "rows": 50}


LINES: list[dict[str, Any]] = [
    {"event": "merged", "version": 2, "why": "it was new", "refit": False},
    evaluation(2, 0.5),
    evaluation(3, 0.5),
    {"event": "refit", "version": 3, "sent": False, "reason": "0.5000 became 0.5100, noise 0.0200: kept"},
    {"event": "refit", "version": 6, "sent": True, "reason": "0.5000 became 0.6000, noise 0.0200: sent"},
    {"event": "merged", "version": 7, "why": "the subspace had grown", "refit": True},
    evaluation(7, 0.6),
]


@pytest.fixture
def layout(offline: Any) -> Any:
    made = offline[0]
    save_member(made, Member("org/one", "127.0.0.1:1", "127.0.0.1:2", "sha256:" + "0" * 64))
    records = Records(made.tasks)
    records.merged("first", "hash", 2, b"")
    for line in LINES:
        records.add_history("first", line)
    records.merged("second", "hash", 4, b"")
    records.add_history("second", evaluation(4, 0.9))
    return made


def test_rows_tell_the_change_and_why() -> None:
    rows = history_rows(LINES)
    assert [(row["version"], row["value"], row["why"]) for row in rows] == [
        (2, 0.5, "it was new"),
        (3, 0.5, ""),
        (3, None, "not trained anew: 0.5000 became 0.5100, noise 0.0200: kept"),
        (7, 0.6, "the subspace had grown"),
    ]
    assert [row["change"] for row in rows] == [None, 0.0, None, pytest.approx(0.1)]
    older = history_rows([{"event": "merged", "version": 1}, evaluation(1, 0.5)])
    assert "did not write it down" in older[0]["why"]
    two = history_rows(
        [evaluation(1, 0.5), evaluation(1, 9.0, "error"), evaluation(2, 0.4), evaluation(2, 8.0, "error")]
    )
    assert [row["change"] for row in two] == [None, None, pytest.approx(-0.1), pytest.approx(-1.0)]


def test_the_command_for_machines_people_and_one_task(layout: Any) -> None:
    answer = RUNNER.invoke(app, ["history", "--dir", str(layout.root), "--json"])
    assert answer.exit_code == 0, answer.output
    assert [task["task"] for task in json.loads(answer.output)["tasks"]] == ["first", "second"]
    answer = RUNNER.invoke(app, ["history", "second", "--dir", str(layout.root)])
    assert answer.exit_code == 0, answer.output
    assert "0.9000" in answer.output
    assert "first" not in answer.output
    answer = RUNNER.invoke(app, ["history", "secnod", "--dir", str(layout.root)])
    assert answer.exit_code != 0
    assert "did you mean 'second'" in answer.output


@pytest.mark.parametrize(("name", "begin"), [("h.png", b"\x89PNG"), ("h.svg", b"<?xml")])
def test_a_picture(layout: Any, tmp_path: Path, name: str, begin: bytes) -> None:
    answer = RUNNER.invoke(app, ["history", "--dir", str(layout.root), "--plot", str(tmp_path / name)])
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_pictures_that_cannot_be_drawn(layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = RUNNER.invoke(app, ["history", "--dir", str(layout.root), "--plot", "history.pdf"])
    assert answer.exit_code != 0
    assert ".png or .svg" in answer.output
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot_history({"member": "m", "tasks": []}, tmp_path / "h.png")
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install"):
        plot_history(client_history(layout), tmp_path / "h.png")
