"""Slow readers, many readers, and updates that cannot be merged: nobody holds up the others."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from share_core.errors import RebaseError
from share_core.merge import empty_state
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.config import LimitConfig
from share_server.hub.feed import Feed
from share_server.local import LocalHub, read_deltas, submit_header, submit_messages
from share_server.store.journal import Journal
from share_server.store.versions import chain_bytes


def _submit(hub: hub_pb2_grpc.HubStub, spec: SpaceSpec, task: str, payload: bytes) -> hub_pb2.UpdateRecord:
    header = submit_header(spec, task, payload)
    hub.Submit(submit_messages(header, payload), timeout=60)
    while True:
        record = hub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=header.update_id), timeout=30).update
        if record.state != hub_pb2.UPDATE_STATE_ACCEPTED:
            return record
        time.sleep(0.02)


def test_a_feed_wakes_everybody_and_remembers_nobody(toy_spec: SpaceSpec) -> None:
    async def run() -> None:
        feed = Feed(empty_state(toy_spec), toy_spec.space_id)
        woken: list[int] = []

        async def wait(number: int) -> None:
            await feed.wait_after(0, 30)
            woken.append(number)

        waiting = [asyncio.create_task(wait(number)) for number in range(200)]
        await asyncio.sleep(0)
        assert not woken
        feed.close()
        await asyncio.gather(*waiting)
        assert len(woken) == 200
        await feed.wait_after(0, 30)  # a closed feed keeps nobody waiting

    asyncio.run(run())


def test_a_chain_with_a_gap_needs_a_snapshot(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db", "sha256:1")
    assert chain_bytes(journal, 0, 0) == 0
    with pytest.raises(RebaseError):
        chain_bytes(journal, 0, 2)
    journal.close()


def test_slow_readers_are_cut_and_late_ones_take_a_snapshot(
    new_hub: Callable[..., LocalHub],
    wide_spec: SpaceSpec,
    wide_payload: Callable[[int], bytes],
    stall: Callable[..., None],
) -> None:
    server = new_hub(spec=wide_spec, limits=LimitConfig(write_timeout_s=1.0))
    server.start()
    holder = server.enrol("acme/alice")
    with server.hub(holder) as hub:
        for number in range(4):
            record = _submit(hub, wide_spec, "acme/wide", wide_payload(number))
            assert record.state == hub_pb2.UPDATE_STATE_MERGED, record.reason
        follow = hub_pb2.FollowVersionsRequest(space_id=wide_spec.space_id)
        answers = list(hub.FollowVersions(follow, timeout=60))
        assert [answer.WhichOneof("part") for answer in answers] == ["heartbeat", "snapshot_required"]
        assert answers[1].snapshot_required.newest_version == 4
    sleepy, authority = server.enrol("acme/sleepy"), server.layout.ca_cert.read_bytes()
    with server.hub(server.own("operator")) as operator:
        stall(
            server.config.local_hub_address,
            authority,
            sleepy,
            wide_spec.space_id,
            server.log_file.read_text,
            lambda: operator.GetStatus(hub_pb2.GetStatusRequest(), timeout=30),
        )
    with server.hub(holder) as hub:
        assert _submit(hub, wide_spec, "acme/wide", wide_payload(9)).version == 5
        assert hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).subscribers == 0
    assert server.stop() == 0


def test_fifty_readers_get_every_version(
    shared_hub: LocalHub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    holder = shared_hub.enrol("acme/alice")
    with shared_hub.hub(holder) as hub:
        start = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).version
        digests: list[list[str]] = [[] for _ in range(50)]
        request = hub_pb2.FollowVersionsRequest(space_id=toy_spec.space_id, since_version=start)
        streams = [hub.FollowVersions(request, timeout=120) for _ in digests]

        def read(number: int) -> None:
            for version, payload in read_deltas(streams[number]):
                digests[number].append(hashlib.sha256(payload).hexdigest())
                if version == start + 5:
                    streams[number].cancel()
                    return

        readers = [threading.Thread(target=read, args=(number,)) for number in range(50)]
        for reader in readers:
            reader.start()
        for number in range(5):
            _submit(hub, toy_spec, f"acme/t{number}", make_payload(number))
        for reader in readers:
            reader.join(60)
    assert len(set(map(tuple, digests))) == 1
    assert len(digests[0]) == 5


def test_an_update_that_cannot_be_merged_is_refused_with_its_reason_and_blocks_nobody(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes], tmp_path: Path
) -> None:
    script = tmp_path / "faulty_merge.py"
    script.write_text(
        "import sys\n"
        "from share_core.errors import TensorShapeError\n"
        "from share_server.hub import __main__, stepping\n"
        "honest = stepping.merge_all\n"
        "def faulty(state, adapters, *rest):\n"
        "    if 'acme/shape' in adapters:\n"
        "        raise TensorShapeError('site a: expected 3, got 4')\n"
        "    if 'acme/fault' in adapters:\n"
        "        raise ZeroDivisionError('a secret of the server')\n"
        "    return honest(state, adapters, *rest)\n"
        "stepping.merge_all = faulty\n"
        "sys.exit(__main__.main(sys.argv[1:]))\n"
    )
    server = new_hub(script=script)
    server.start()
    with server.hub(server.enrol("acme/alice")) as hub:
        named = _submit(hub, toy_spec, "acme/shape", make_payload(1))
        fault = _submit(hub, toy_spec, "acme/fault", make_payload(2))
        good = _submit(hub, toy_spec, "acme/good", make_payload(3))
        status = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
    assert (named.state, named.reason) == (
        hub_pb2.UPDATE_STATE_REFUSED,
        "TensorShapeError: site a: expected 3, got 4",
    )
    assert fault.state == hub_pb2.UPDATE_STATE_REFUSED
    assert "secret" not in fault.reason
    assert "ZeroDivisionError" in server.log_file.read_text()
    assert (good.state, good.version) == (hub_pb2.UPDATE_STATE_MERGED, 1)
    assert (status.refused, status.merged, status.tasks) == (2, 1, 1)
    assert server.stop() == 0
    server.start()
    with server.hub(server.own("operator")) as hub:
        assert hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).refused == 2


def test_one_organisation_cannot_take_every_call(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub(limits=LimitConfig(concurrent_calls=16))
    hub.start()
    request = hub_pb2.FollowVersionsRequest(space_id=hub.spec.space_id)
    with hub.hub(hub.enrol("greedy/one")) as greedy, hub.hub(hub.enrol("modest/one")) as modest:
        open_ones = [greedy.FollowVersions(request) for _ in range(2)]
        status = hub_pb2.GetStatusRequest()
        while modest.GetStatus(status, timeout=30).subscribers < 2:
            time.sleep(0.02)
        with pytest.raises(grpc.RpcError, match="greedy follows with 2 streams, which is the most"):
            next(greedy.FollowVersions(request))
        other = modest.FollowVersions(request)
        while modest.GetStatus(status, timeout=30).subscribers < 3:
            time.sleep(0.02)
        for stream in (*open_ones, other):
            stream.cancel()
