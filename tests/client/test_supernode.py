"""When a SuperNode is started again, when not, and what it gets to see of this machine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from share_client.fleet import supernode
from share_client.fleet.environment import LINGER, node_environment, read_linger, read_paths
from share_client.fleet.supernode import SuperNode, wait_for_node
from share_client.link import HubLink
from share_client.member import ClientLayout, Member, load_member, save_member
from share_core.errors import AccessError, CertificateError, ConfigError, FedshareError, UnavailableError

MEMBER = Member("org/one", "127.0.0.1:1", "127.0.0.1:2", "sha256:aa", node_id=5)


class Link:
    """Answers GetNode as a test says, one answer after the other; the last one stays."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def get_node(self) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, FedshareError):
            raise answer
        return answer


def node(node_id: int, revoked: bool = False) -> Any:
    return SimpleNamespace(member="org/one", node_id=node_id, revoked=revoked)


@pytest.fixture
def layout(offline: tuple[ClientLayout, bytes, bytes]) -> ClientLayout:
    save_member(offline[0], MEMBER)
    return offline[0]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The gateway answers 401, or what a test puts into the list."""
    statuses = [401]
    monkeypatch.setattr(supernode, "deactivate", lambda *arguments: statuses[-1])
    yield statuses


def made(layout: ClientLayout, link: Link, told: list[str]) -> SuperNode:
    return SuperNode(layout, MEMBER, layout.root / "t.toml", cast(HubLink, link), threading.Event(), told.append)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (CertificateError("org/one has enrolled again"), "not enrolled or was revoked: org/one has enrolled again"),
        (AccessError("org/one is shut out"), "not enrolled or was revoked"),
        (node(5, revoked=True), "org/one was revoked"),
    ],
)
def test_a_node_that_is_not_wanted_stops(answer: Any, sentence: str, layout: ClientLayout, refused: list[int]) -> None:
    with pytest.raises(AccessError, match=sentence):
        made(layout, Link(answer), [])._after_end()


def test_a_node_registered_anew_takes_its_new_id(layout: ClientLayout, refused: list[int]) -> None:
    made(layout, Link(node(9)), [])._after_end()
    assert load_member(layout).node_id == 9


def test_a_refusal_is_believed_only_after_a_while(
    layout: ClientLayout, refused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(supernode, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    tried = made(layout, Link(node(5)), [])
    tried._after_end()
    clock[0] += 80
    tried._after_end()
    refused.append(200)  # accepted in between: the count begins anew
    tried._after_end()
    refused.append(401)
    clock[0] += 80
    tried._after_end()
    clock[0] += 91
    with pytest.raises(AccessError, match="for 90 s: not enrolled or revoked"):
        tried._after_end()


def test_a_hub_that_is_away_stops_nobody(layout: ClientLayout, refused: list[int]) -> None:
    told: list[str] = []
    made(layout, Link(UnavailableError("away")), told)._after_end()
    assert told == ["cannot ask the hub about our node: away"]


def test_join_waits_until_the_server_has_registered_the_node(layout: ClientLayout) -> None:
    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return False

    told: list[str] = []
    link = Link(UnavailableError("away"), node(0), node(0), node(7))
    assert wait_for_node(layout, cast(HubLink, link), Stop(), told.append) == 7
    assert told == ["waiting for the hub: away", "waiting for the server to register our node"]
    with pytest.raises(AccessError):
        wait_for_node(layout, cast(HubLink, Link(node(7, revoked=True))), Stop(), told.append)


def test_the_environment_is_made_from_scratch(layout: ClientLayout, tmp_path: Path) -> None:
    shell = {"HOME": "/h", "HTTPS_PROXY": "http://proxy", "FLWR_HOME": "/elsewhere", "SECRET": "x", LINGER: "7"}
    tasks = tmp_path / "tasks.toml"
    found = node_environment(layout, tasks, shell)
    assert not {"HTTPS_PROXY", "SECRET"} & set(found)
    assert found["HOME"] == "/h"
    assert Path(found["FLWR_HOME"]).is_relative_to(layout.root)
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert read_paths(found) == (layout.root, tasks)
    assert read_linger(found, 20.0) == 7.0
    assert read_linger({}, 20.0) == 20.0
    with pytest.raises(ConfigError, match="share-client join"):
        read_paths({})
    with pytest.raises(ConfigError, match="soon"):
        read_linger({LINGER: "soon"}, 20.0)


def test_a_supernode_and_what_it_started_end_together(layout: ClientLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that ignores SIGTERM and has a child of its own: both are gone afterwards."""
    script = "trap '' TERM; sleep 300 & echo $! > child; wait; sleep 300"
    monkeypatch.setattr(supernode, "tied", lambda command: ["/bin/sh", "-c", script])
    monkeypatch.setattr(supernode, "_ENDS_IN_S", 0.2)
    told: list[str] = []
    tried = made(layout, Link(node(5)), told)
    child = tried._start()
    written = layout.root / "child"
    while not (written.exists() and written.read_text().strip()):
        assert child.poll() is None
    grandchild = int(written.read_text())
    tried._end(child)
    assert child.returncode == -9
    assert told == ["SuperNode does not end: killing it"]
    state = Path(f"/proc/{grandchild}/stat")
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # killed, but the kernel has not finished with it; if it lives on, the test's limit ends this
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_new_member_keeps_what_it_was_told(layout: ClientLayout) -> None:
    changed = replace(MEMBER, node_id=2**64 - 1)
    save_member(layout, changed)
    assert load_member(layout) == changed
    layout.member.write_text('{"member": 5}')
    with pytest.raises(ConfigError, match="expected str"):
        load_member(layout)
