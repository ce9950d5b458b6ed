"""The thin ServerApp between a Grid and a hub that may both fail."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from share_core.errors import UnavailableError
from share_core.lease import LEASE_RECORD, MESSAGE_TYPE, REPORT_RECORD, LeaseReport, lease_from_record
from share_proto.v1 import fleet_pb2


@pytest.fixture(scope="module")
def server_app() -> Any:
    """The module, without its tie to a parent: it would tie the test run itself."""
    from share_core import lifeline

    honest, lifeline.arm = lifeline.arm, lambda parent=None: None
    try:
        from share_server.fleet import server_app
    finally:
        lifeline.arm = honest
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # Flower's worker sets them
    return server_app


class Grid:
    """Takes messages and gives the replies that a test put in."""

    def __init__(self) -> None:
        self.pushed: list[Message] = []
        self.replies: list[Any] = []
        self.refuse = False

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=2**64 - 1)]

    def push_messages(self, messages: list[Message]) -> list[str | None]:
        if self.refuse:
            return [None]
        self.pushed += messages
        return [f"m{len(self.pushed)}"]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        found, self.replies = self.replies, []
        return [reply for reply in found if reply.metadata.reply_to_message_id in ids]


class Hub:
    """Hands out one lease and remembers what it was told."""

    def __init__(self, minutes: float = 1.0) -> None:
        deadline = int((time.time() + 60 * minutes) * 1000)
        self.leases = [fleet_pb2.Lease(lease_id="a" * 32, node_id=2**64 - 1, deadline_unix_ms=deadline, max_updates=2)]
        self.told: list[tuple[str, int]] = []
        self.online: list[int] = []
        self.down = False

    def dispatch(self, request: fleet_pb2.DispatchRequest) -> fleet_pb2.DispatchResponse:
        if self.down:
            raise UnavailableError("down")
        self.told += [(outcome.lease_id, outcome.error_code) for outcome in request.outcomes]
        self.online = list(request.online_node_ids)
        leases, self.leases = self.leases, []
        return fleet_pb2.DispatchResponse(leases=leases)


def reply(content: RecordDict | None = None, error: Error | None = None) -> Any:
    return SimpleNamespace(
        metadata=SimpleNamespace(reply_to_message_id="m1"),
        has_error=lambda: error is not None,
        error=error,
        content=content,
    )


REPORT = RecordDict({REPORT_RECORD: ConfigRecord({**LeaseReport("a" * 32, 1, True).to_record()})})


def test_a_lease_goes_out_as_scalars_with_a_life_beyond_its_deadline(server_app: Any) -> None:
    grid, hub = Grid(), Hub()
    server_app.Dispatcher(grid, hub).round()
    (message,) = grid.pushed
    assert hub.online == [2**64 - 1]
    assert message.metadata.message_type == MESSAGE_TYPE
    assert 120 < message.metadata.ttl <= 60 + server_app.REPLY_GRACE_SECONDS
    assert list(message.content.keys()) == [LEASE_RECORD]
    assert lease_from_record(dict(message.content.config_records[LEASE_RECORD])).node_id == 2**64 - 1


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (reply(REPORT), 0),
        (reply(error=Error(5, "node gone")), 5),
        (reply(error=Error(8, "crashed")), 8),
        (reply(RecordDict({})), 6),
        (reply(RecordDict({REPORT_RECORD: ConfigRecord({"lease_id": 3})})), 6),
    ],
    ids=["report", "unavailable", "crashed", "empty", "nonsense"],
)
def test_every_reply_reaches_the_hub_once_even_when_it_was_down(server_app: Any, answer: Any, code: int) -> None:
    grid, hub = Grid(), Hub()
    dispatcher = server_app.Dispatcher(grid, hub)
    dispatcher.round()
    hub.down = True
    grid.replies = [answer]
    with pytest.raises(UnavailableError):
        dispatcher.round()
    hub.down = False
    dispatcher.round()
    dispatcher.round()
    assert hub.told == [("a" * 32, code)]


def test_a_message_that_flower_does_not_take_is_told(server_app: Any) -> None:
    grid, hub = Grid(), Hub()
    grid.refuse = True
    dispatcher = server_app.Dispatcher(grid, hub)
    dispatcher.round()
    dispatcher.round()
    assert hub.told == [("a" * 32, 5)]


def test_a_reply_that_never_comes_is_given_up(server_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "SHORTEST_TTL_SECONDS", 0.01)
    grid, hub = Grid(), Hub(minutes=-10)
    dispatcher = server_app.Dispatcher(grid, hub)
    dispatcher.round()
    time.sleep(0.02)
    dispatcher.round()
    assert hub.told == [("a" * 32, 4)]


def test_importing_the_app_ties_it_to_its_parent() -> None:
    code = (
        "import ctypes, share_server.fleet.server_app; n = ctypes.c_int(); "
        "ctypes.CDLL(None).prctl(2, ctypes.byref(n)); print(n.value)"  # PR_GET_PDEATHSIG
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "9"
