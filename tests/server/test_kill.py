"""SIGKILL while a client submits: nothing acknowledged is lost, nothing is merged twice.

The campaign is shown to catch two planted bugs: an acknowledgement sent before its row is committed, and a row
committed before its payload is durable.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from share_core.errors import UnavailableError
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.local import Holder, LocalHub, submit_header, submit_messages

KILLS = 12

ACK_BEFORE_ROW = """
import asyncio, dataclasses, sys
from share_server.hub import __main__, intake
from share_server.hub.clock import now_ms
from share_server.store.records import UpdateRow, UpdateState

honest = intake.Intake._make_durable
tasks = set()

async def hasty(self, staged, new):
    async def later():
        await asyncio.sleep(1.0)
        await honest(self, staged, new)
    staged.discard_now, staged.discard = staged.discard, lambda: None
    tasks.add(asyncio.create_task(later()))
    return UpdateRow(new, 1, "", UpdateState.ACCEPTED, "", 0, now_ms(), 0.0), False

intake.Intake._make_durable = hasty
sys.exit(__main__.main(sys.argv[1:]))
"""

ROW_BEFORE_PAYLOAD = """
import asyncio, sys
from share_server.hub import __main__, intake
from share_server.hub.clock import now_ms
from share_server.hub.merging import MergeLoop
from share_server.store.updates import accept_update

tasks = set()

async def hasty(self, staged, new):
    row = await self._store.do(lambda journal: accept_update(journal, new, now_ms()))
    staged.commit_now, staged.discard = staged.commit, lambda: None
    async def later():
        await asyncio.sleep(1.0)
        await self._store.io(staged.commit)
    tasks.add(asyncio.create_task(later()))
    return row

intake.Intake._make_durable = hasty
MergeLoop.wake = lambda self: None
sys.exit(__main__.main(sys.argv[1:]))
"""


class _Client(threading.Thread):
    """Submits one update after the other with an outbox's manners: the same id again until it is acknowledged."""

    def __init__(self, server: LocalHub, holder: Holder, spec: SpaceSpec, payloads: list[bytes]) -> None:
        super().__init__(daemon=True)
        self.acknowledged: dict[str, str] = {}
        self.over = threading.Event()
        self._server = server
        self._holder = holder
        self._spec = spec
        self._payloads = payloads

    def run(self) -> None:
        while not self.over.is_set():
            number = len(self.acknowledged)
            payload = self._payloads[number % len(self._payloads)]
            task = f"acme/t{number % 4}"
            header = submit_header(self._spec, task, payload, update_id=secrets.token_hex(16))
            while not self.over.is_set():
                try:
                    with self._server.hub(self._holder) as hub:
                        hub.Submit(submit_messages(header, payload), timeout=20)
                except grpc.RpcError as error:
                    assert isinstance(error, grpc.Call)
                    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), error
                    time.sleep(0.05)
                    continue
                self.acknowledged[header.update_id] = header.payload_sha256
                break


def _campaign(server: LocalHub, spec: SpaceSpec, payloads: list[bytes], kills: int) -> list[str]:
    """Run it and return every broken promise in words."""
    draw = random.Random(5)
    server.start()
    client = _Client(server, server.enrol("acme/alice"), spec, payloads)
    client.start()
    try:
        for _ in range(kills):
            goal = len(client.acknowledged) + draw.randint(1, 6)
            while len(client.acknowledged) < goal:
                assert client.is_alive()
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            server.kill()
            try:
                server.start()
            except UnavailableError as error:
                return [f"the hub does not start again: {error}"]
    finally:
        client.over.set()
        client.join(60)
    with server.hub(server.own("operator")) as hub:
        return _broken_promises(hub, client.acknowledged)


def _broken_promises(hub: hub_pb2_grpc.HubStub, acknowledged: dict[str, str]) -> list[str]:
    end = time.monotonic() + 60
    while (status := hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)).accepted and time.monotonic() < end:
        time.sleep(0.05)
    rows: list[hub_pb2.UpdateRecord] = []
    while page := hub.ListUpdates(
        hub_pb2.ListUpdatesRequest(after_seq=rows[-1].ingest_seq if rows else 0), timeout=30
    ).updates:
        rows.extend(page)
    known = {row.update_id: row for row in rows}
    problems = [f"{name} was acknowledged and is lost" for name in acknowledged if name not in known]
    problems += [
        f"{name} has other bytes"
        for name, digest in acknowledged.items()
        if name in known and known[name].payload_sha256 != digest
    ]
    problems += [f"{row.update_id} is not merged: {row.reason}" for row in rows if row.version == 0]
    if len(known) != len(rows):
        problems.append("an update stands twice in the journal")
    if {row.version for row in rows} - {0} != set(range(1, status.version + 1)):
        problems.append(f"{len(rows)} updates made {status.version} versions: a version is lost or holds nothing")
    merged = sum(task.updates for task in hub.ListTasks(hub_pb2.ListTasksRequest(), timeout=30).tasks)
    if merged != len(rows):
        problems.append(f"{len(rows)} updates were merged {merged} times")
    if [row.ingest_seq for row in rows] != list(range(1, len(rows) + 1)):
        problems.append("the ingest order has gaps")
    return problems


def test_nothing_acknowledged_is_lost_and_nothing_merged_twice(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    server = new_hub()
    assert _campaign(server, toy_spec, [make_payload(n) for n in range(5)], KILLS) == []
    assert server.stop() == 0


@pytest.mark.parametrize(("bug", "sign"), [(ACK_BEFORE_ROW, "is lost"), (ROW_BEFORE_PAYLOAD, "does not start again")])
def test_the_campaign_catches_a_planted_bug(
    new_hub: Callable[..., LocalHub],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
    tmp_path: Path,
    bug: str,
    sign: str,
) -> None:
    script = tmp_path / "hasty_hub.py"
    script.write_text(bug)
    server = new_hub(script=script)
    problems = _campaign(server, toy_spec, [make_payload(n) for n in range(5)], kills=1)
    assert any(sign in problem for problem in problems), problems


def test_a_second_hub_on_the_same_directory_is_refused(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    server = new_hub()
    server.start()
    second = server.launch()
    second.join(60)
    assert second.exitcode == 1
    assert "already runs" in server.log_file.read_text()
    payload = make_payload(1)
    with server.hub(server.enrol("acme/alice")) as hub:
        header = submit_header(toy_spec, "acme/task", payload)
        assert hub.Submit(submit_messages(header, payload), timeout=30).ingest_seq == 1
    assert server.stop() == 0


def test_a_hub_whose_disk_fails_stops_acknowledging_and_exits(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes], tmp_path: Path
) -> None:
    script = tmp_path / "failing_disk.py"
    script.write_text(
        "import os, sys\n"
        "from share_server.hub import __main__\n"
        "from share_server.store import blobs\n"
        "calls = []\n"
        "def failing(file):\n"
        "    calls.append(file)\n"
        "    if len(calls) == 3:\n"
        "        raise OSError(5, 'Input/output error')\n"
        "    os.fsync(file)\n"
        "blobs.sync_file = failing\n"
        "code = __main__.main(sys.argv[1:])\n"
        "print('fsync calls:', len(calls), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    server = new_hub(script=script)
    server.start()
    acknowledged = []
    with server.hub(server.enrol("acme/alice")) as hub:
        names: list[grpc.StatusCode] = []
        for number in range(3):
            payload = make_payload(number)
            header = submit_header(toy_spec, "acme/task", payload)
            try:
                hub.Submit(submit_messages(header, payload), timeout=30)
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                names.append(error.code())
            else:
                acknowledged.append(header.update_id)
    assert set(names) == {grpc.StatusCode.UNAVAILABLE}
    assert server.wait() == 1
    assert "fsync calls: 3" in server.log_file.read_text(), "a failed fsync was tried again"
    server.script = None
    server.start()
    with server.hub(server.own("operator")) as hub:
        rows = hub.ListUpdates(hub_pb2.ListUpdatesRequest(), timeout=30).updates
        assert [row.update_id for row in rows][: len(acknowledged)] == acknowledged
    assert server.stop() == 0
