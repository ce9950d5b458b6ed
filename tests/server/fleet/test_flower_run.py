"""Decisions around Flower's commands, with the commands replaced: what is submitted, stopped and believed."""

from __future__ import annotations

import fcntl
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from share_core.errors import RequestError, UnavailableError
from share_server.fleet import flower_run, flwr_cli, registrar, superlink
from share_server.fleet.files import FleetFiles
from share_server.fleet.hub_link import EnrolledNode

KEY = (
    ec.generate_private_key(ec.SECP384R1())
    .public_key()
    .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
)


class Commands:
    """Records what is asked of Flower."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.unfinished: list[str] = []
        self.known: dict[bytes, int] = {}
        self.down = False

    def submit(self) -> str:
        if self.down:
            raise UnavailableError("down")
        run_id = str(100 + self.asked.count("submit"))
        self.asked.append("submit")
        self.unfinished.append(run_id)
        return run_id

    def unfinished_runs(self) -> list[str]:
        return list(self.unfinished)

    def stop(self, run_id: str) -> None:
        self.asked.append(f"stop {run_id}")
        self.unfinished.remove(run_id)

    def registered(self) -> dict[bytes, int]:
        return self.known

    def register(self, member: str, public_key: bytes) -> int:
        self.asked.append(f"register {member}")
        self.known[public_key] = 2**63 + len(self.known)
        return self.known[public_key]


@pytest.fixture
def files(tmp_path: Path) -> FleetFiles:
    made = FleetFiles(tmp_path / "fleet")
    made.root.mkdir()
    return made


def test_runs_of_an_earlier_life_are_stopped_but_not_our_own(files: FleetFiles) -> None:
    files.database.touch()
    commands = Commands()
    commands.unfinished = ["7", "8"]
    run = flower_run.FlowerRun(files, commands)  # type: ignore[arg-type]
    for _ in range(5):
        run.step()
    assert commands.asked == ["submit", "stop 8", "stop 7"]
    assert run.run_id == "100"


def test_a_run_is_submitted_again_when_its_server_app_lets_go_of_the_lock(files: FleetFiles) -> None:
    commands = Commands()
    run = flower_run.FlowerRun(files, commands)  # type: ignore[arg-type]
    run.step()
    with files.server_app.open("w+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        holder.write("99 1\n")
        holder.flush()
        run.step()
        assert not run.dispatching, "an older ServerApp must not pass for ours"
        holder.seek(0)
        holder.write("100 1\n")
        holder.flush()
        run.step()
        assert run.dispatching
    run.step()
    assert run.run_id is None
    for _ in range(4):
        run.step()
    assert run.run_id == "101"
    assert commands.asked == ["submit", "submit", "stop 100"]


def test_a_failed_submission_is_tried_again(files: FleetFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_run, "_PAUSES", (0.0, 0.0))
    commands = Commands()
    commands.down = True
    run = flower_run.FlowerRun(files, commands)  # type: ignore[arg-type]
    run.step()
    assert run.run_id is None
    commands.down = False
    run.step()
    assert run.run_id == "100"


class Link:
    """A hub's table of nodes."""

    def __init__(self, *nodes: EnrolledNode) -> None:
        self.nodes = {node.member: node for node in nodes}
        self.bound: list[tuple[str, int]] = []

    def list_nodes(self) -> list[EnrolledNode]:
        return list(self.nodes.values())

    def bind_node(self, member: str, node_id: int) -> None:
        self.bound.append((member, node_id))
        self.nodes[member] = EnrolledNode(member, self.nodes[member].public_key, node_id, False, "")


def settle(link: Link, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> registrar.Registrar:
    monkeypatch.setattr(registrar, "PERIOD", 0.0)
    made = registrar.Registrar(link, commands)  # type: ignore[arg-type]
    for _ in range(4):
        made.step()
    return made


def test_an_enrolled_node_is_registered_once_and_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    link, commands = Link(EnrolledNode("acme/ann", KEY, 0, False, "")), Commands()
    settle(link, commands, monkeypatch)
    assert commands.asked == ["register acme/ann"]
    assert link.bound == [("acme/ann", 2**63)]


@pytest.mark.parametrize("bound", [0, 5], ids=["died-before-binding", "database-restored"])
def test_a_key_that_flower_has_already_is_bound_without_registering(
    monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    link, commands = Link(EnrolledNode("acme/ann", KEY, bound, False, "")), Commands()
    commands.known[KEY] = 2**63 + 9
    settle(link, commands, monkeypatch)
    assert commands.asked == []
    assert link.bound == [("acme/ann", 2**63 + 9)]


def test_a_lost_database_has_every_node_registered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    link, commands = Link(EnrolledNode("acme/ann", KEY, 5, False, "")), Commands()
    settle(link, commands, monkeypatch)
    assert link.bound == [("acme/ann", 2**63)]


def test_revoked_and_nodeless_members_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(EnrolledNode("acme/ann", KEY, 0, True, ""), EnrolledNode("acme/reader", b"", 0, False, ""))
    commands = Commands()
    settle(link, commands, monkeypatch)
    assert commands.asked == []
    assert link.bound == []


@pytest.fixture
def cli(files: FleetFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes ``flwr`` print something and end with a code."""
    monkeypatch.setattr(flwr_cli, "sys", SimpleNamespace(executable=str(tmp_path / "python")))

    def install(text: str, code: int = 0) -> flwr_cli.FlowerCommands:
        script = tmp_path / "flwr"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return flwr_cli.FlowerCommands(files, lambda: False)

    return install


def test_success_is_read_from_the_answer_and_not_from_the_exit_code(cli: Any) -> None:
    assert cli('note\n{"success": true, "node-id": 18446744073709551615}', 1).register("acme/ann", KEY) == 2**64 - 1
    refused = cli('{"success": false, "error-message": "[code: 23] Public key already in use."}', 0)
    with pytest.raises(UnavailableError, match="already in use"):
        refused.register("acme/ann", KEY)
    with pytest.raises(UnavailableError, match="no answer at all"):
        cli("no answer at all", 0).submit()


def test_a_key_that_is_none_is_refused_by_name(cli: Any) -> None:
    with pytest.raises(RequestError, match="acme/ann"):
        cli("{}").register("acme/ann", b"no key")


def test_ids_are_read_from_the_database_as_unsigned(cli: Any, files: FleetFiles) -> None:
    with closing(sqlite3.connect(files.database)) as database:
        database.execute("CREATE TABLE node (public_key BLOB, node_id INTEGER, unregistered_at TEXT)")
        database.executemany("INSERT INTO node VALUES (?, ?, ?)", [(KEY, -1, None), (b"old", 7, "yesterday")])
        database.commit()
    assert cli("{}").registered() == {KEY: 2**64 - 1}


def test_flower_gets_no_proxy_no_telemetry_and_nothing_else_of_ours(
    files: FleetFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "AWS_SECRET_ACCESS_KEY", "FLWR_HOME"):
        monkeypatch.setenv(name, "outside")
    made = superlink.environment(files)
    assert "outside" not in made.values()
    assert made["FLWR_HOME"] == str(files.home)
    assert made["FLWR_TELEMETRY_ENABLED"] == "0"
