"""The command ``share-client`` as people and scripts see it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from share_client.cli import app
from share_client.fleet import supernode
from share_client.join import join
from share_client.member import ClientLayout, load_member
from share_client.session import SessionOptions, run_session
from share_client.session_log import SessionLog
from share_core.errors import SpaceMismatchError
from share_core.spec_file import read_spec

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def worked(hub: Any, fake: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A client directory in which one task was trained, merged and evaluated."""
    layout = hub.client(tmp_path_factory.mktemp("cli") / "c", "cliorg/main")
    path = layout.root / "tasks.json"
    path.write_text(json.dumps({"first": "data"}))
    options = SessionOptions(linger_s=0.2, poll_s=0.02)
    run_session(layout.root, path, trainer=fake.FakeTrainer(path), options=options)
    return layout


def test_status_for_machines_and_people(worked: Any) -> None:
    answer = RUNNER.invoke(app, ["status", "--dir", str(worked.root), "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["member"]["member"] == "cliorg/main"
    assert (found["outbox"], found["refused"]) == ([], [])
    (task,) = found["tasks"]
    assert task["task"] == "first"
    assert [line["event"] for line in task["history"]][:2] == ["merged", "evaluation"]
    text = RUNNER.invoke(app, ["status", "--dir", str(worked.root)])
    assert text.exit_code == 0
    assert "first" in text.stdout


def test_tasks_come_from_the_hub(worked: Any) -> None:
    answer = RUNNER.invoke(app, ["tasks", "--dir", str(worked.root), "--json"])
    assert answer.exit_code == 0, answer.output
    owners = {task["task_id"]: task["owner"] for task in json.loads(answer.stdout)["tasks"]}
    assert owners["cliorg/first"] == "cliorg/main"
    assert RUNNER.invoke(app, ["tasks", "--dir", str(worked.root)]).exit_code == 0


def test_watch_prints_json_lines(worked: Any) -> None:
    command = [sys.executable, "-m", "share_client.cli", "watch", "--dir", str(worked.root), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        line = json.loads(watching.stdout.readline())
        watching.terminate()
    assert line["event"] == "version"
    assert line["version"] >= 1


@pytest.mark.parametrize("command", ["status", "tasks", "watch"])
def test_a_directory_that_is_not_enrolled_is_one_sentence_and_code_1(command: str, tmp_path: Path) -> None:
    answer = RUNNER.invoke(app, [command, "--dir", str(tmp_path)])
    assert answer.exit_code == 1
    assert "is not enrolled" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_code_2() -> None:
    assert RUNNER.invoke(app, ["status"]).exit_code == 2
    assert RUNNER.invoke(app, ["fly"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give a join token to enrol, or --dir CDIR to come back"),
        (["nonsense"], "neither a join token"),
        (["fs1.nonsense"], "join token is damaged"),
    ],
)
def test_join_says_what_is_wrong_with_its_token(arguments: list[str], sentence: str) -> None:
    answer = RUNNER.invoke(app, ["join", *arguments])
    assert answer.exit_code == 1
    assert sentence in answer.stderr


def test_a_mistake_in_the_tasks_file_costs_no_token(hub: Any, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(hub.token("cliorg/two") + "\n")
    tasks = tmp_path / "tasks.toml"
    tasks.write_text("backbone = 1\n")
    directory = tmp_path / "c"
    answer = RUNNER.invoke(app, ["join", str(token), "--tasks", str(tasks), "--dir", str(directory)])
    assert answer.exit_code == 1
    assert "tasks.toml" in answer.stderr
    assert not directory.exists()


def test_space_describes_a_backbone(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    answer = RUNNER.invoke(app, ["space", "--backbone", "digits-vit", "-o", str(path), "--k-max", "16", "--tau", "0.1"])
    assert answer.exit_code == 0, answer.output
    spec = read_spec(path)
    assert (spec.backbone, spec.k_max, spec.tau) == ("digits-vit", 16, 0.1)


def test_help_does_not_wait_for_torch() -> None:
    heavy = "'torch', 'flwr', 'grpc', 'transformers'"
    code = f"import sys, share_client.cli; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_token_file_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\x7f\xb8\x00\xff")
    answer = RUNNER.invoke(app, ["join", str(tmp_path / "token")])
    assert answer.exit_code == 1
    assert "share-client: this is no join token" in answer.stderr


def test_a_client_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    from share_client.durable import make_private_directory
    from share_core.command_line import plain_errors

    (tmp_path / "file").write_text("")
    with pytest.raises(typer.Exit) as refused, plain_errors("share-client"):
        make_private_directory(tmp_path / "file")
    assert refused.value.exit_code == 1


def test_join_ends_when_the_backbone_is_not_the_spaces(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = hub.client(tmp_path / "c", "cliorg/wrong")

    class Node:
        """Stands for Flower: a lease whose session finds the wrong backbone."""

        def __init__(self, layout: ClientLayout, *others: Any) -> None:
            self._log, self._stop = SessionLog(layout.session_log), others[3]

        def run(self) -> None:
            self._log.write("failed", error="UnavailableError", reason="goes away by itself")
            self._log.write("failed", error="SpaceMismatchError", reason="this backbone has no site 'x'")
            self._log.close()
            assert self._stop.wait(60)

    monkeypatch.setattr(supernode, "SuperNode", Node)
    monkeypatch.setattr(supernode, "wait_for_node", lambda *_: 7)
    with pytest.raises(SpaceMismatchError, match="no site 'x'"):
        join(layout, load_member(layout), tmp_path / "tasks.toml", lambda text: None)


def test_a_wrong_relay_address_does_not_cost_the_token(worked: Any) -> None:
    options = ["join", "--dir", str(worked.root), "--follow", "relay"]
    answer = RUNNER.invoke(app, options)
    assert answer.exit_code != 0
    assert "HOST:PORT" in answer.output
    assert load_member(worked).follow_address == ""
