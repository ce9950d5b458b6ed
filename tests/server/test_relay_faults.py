"""What a relay does when things happen at the same time, when its files are gone, and when upstream is slow to fail."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from share_core.errors import ConfigError, DigestError, RebaseError, StorageError, UnavailableError, VersionError
from share_proto.v1 import hub_pb2
from share_server.hub.access import Roster
from share_server.relay import replica as replica_module
from share_server.relay import upstream as upstream_module
from share_server.relay.home import RelayHome, RelayState, load_state
from share_server.relay.replica import Replica
from share_server.relay.upstream import Pace, Upstream

STATE = RelayState("acme/r", "sha256:s", "hub.example:7443", "hub.example:7443", "127.0.0.1:1")


def _step(version: int, size: int = 10) -> hub_pb2.DeltaHeader:
    return hub_pb2.DeltaHeader(from_version=version - 1, version=version, payload_size=size)


async def _fill(replica: Replica, upto: int) -> None:
    for version in range(replica.head + 1, upto + 1):
        await replica.append(_step(version), bytes([version]) * 10, f"link {version}")


def _forget(replica: Replica) -> None:
    """Make it read from its files, as after many other steps."""
    replica._memory.clear()
    replica._memory_bytes = 0
    replica._whole_memory = None


def test_a_whole_version_that_comes_during_a_step_is_not_undone_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, go_on = replica_module._write, threading.Event()

    def slow(path: Path, payload: bytes, header: bytes) -> None:
        if path.suffix == ".step":
            go_on.wait(30)
        write(path, payload, header)

    async def run() -> None:
        replica = Replica(tmp_path)
        await _fill(replica, 2)
        monkeypatch.setattr(replica_module, "_write", slow)
        step = asyncio.create_task(replica.append(_step(3), b"3" * 10, "link 3"))
        await asyncio.sleep(0.05)
        whole = asyncio.create_task(replica.put_whole(hub_pb2.SnapshotHeader(version=5, payload_size=5), b"whole", "5"))
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.gather(step, whole)
        assert (replica.head, replica.base, replica.link) == (5, 5, "5")
        with pytest.raises(VersionError, match="does not follow"):
            await replica.append(_step(4), b"4" * 10, "link 4")
        await replica.append(_step(6), b"6" * 10, "link 6")
        assert (replica.head, replica.base) == (6, 5)
        assert [path.name for path in tmp_path.glob("*.step")] == ["6.step"]

    asyncio.run(run())


def test_a_step_that_is_dropped_while_it_is_read_is_no_fault(tmp_path: Path) -> None:
    async def run() -> None:
        replica = Replica(tmp_path)
        await _fill(replica, 3)
        _forget(replica)
        (tmp_path / "2.step").unlink()  # as the removal does on its thread
        reading = asyncio.create_task(replica.step(2))
        await asyncio.sleep(0)
        del replica._steps[1], replica._steps[2]
        with pytest.raises(RebaseError, match="no longer held"):
            await reading

    asyncio.run(run())


def test_files_that_somebody_has_removed_are_named_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    async def run() -> None:
        replica = Replica(tmp_path)
        await _fill(replica, 3)
        await replica.put_whole(hub_pb2.SnapshotHeader(version=2, payload_size=5), b"whole", "")
        _forget(replica)
        (tmp_path / "3.step").unlink()
        (tmp_path / "2.whole").unlink()
        async with asyncio.timeout(10):
            with pytest.raises(StorageError, match=r"3\.step is gone"):
                await replica.step(3)
            with pytest.raises(StorageError, match=r"2\.whole is gone"):
                await replica.whole_payload()

    asyncio.run(run())


def test_many_who_ask_for_the_same_file_share_its_bytes(tmp_path: Path) -> None:
    async def run() -> None:
        replica = Replica(tmp_path)
        await _fill(replica, 3)
        await replica.put_whole(hub_pb2.SnapshotHeader(version=2, payload_size=5), b"whole", "")
        _forget(replica)
        steps = await asyncio.gather(*(replica.step(3) for _ in range(20)))
        wholes = await asyncio.gather(*(replica.whole_payload() for _ in range(20)))
        assert len({id(payload) for _, payload in steps}) == len({id(payload) for _, payload in wholes}) == 1
        assert (steps[0][1], wholes[0][1]) == (bytes([3]) * 10, b"whole")

    asyncio.run(run())


def test_what_is_counted_is_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "_MEMORY_BYTES", 35)

    async def run() -> None:
        replica = Replica(tmp_path, kept_bytes=55)
        for version in range(1, 30):
            await _fill(replica, version)
            if version % 4 == 0:
                await replica.put_whole(hub_pb2.SnapshotHeader(version=version, payload_size=5), b"whole", "")
            if version % 9 == 0:
                ahead = hub_pb2.SnapshotHeader(version=version + 1, payload_size=5)
                await replica.put_whole(ahead, b"whole", f"link {version + 1}")
            if replica.base < replica.head:
                await replica.step(replica.base + 1)
            assert replica._step_bytes == replica.chain_bytes(replica.base)
            assert replica._memory_bytes == sum(map(len, replica._memory.values())) <= 35
            assert set(replica._memory) <= set(replica._steps)

    asyncio.run(run())


def test_an_upstream_that_is_slow_to_fail_is_asked_once_for_all_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    async def fail_late(self: Upstream, after: int) -> None:
        asked.append(after)
        await asyncio.sleep(0.1)
        raise UnavailableError("nobody answers")

    monkeypatch.setattr(upstream_module, "_FETCH_EVERY_S", 0.05)
    monkeypatch.setattr(Upstream, "_fetch_whole", fail_late)

    async def run() -> None:
        upstream = Upstream(RelayHome(tmp_path), STATE, Replica(tmp_path), Roster([]), Pace())
        told = await asyncio.gather(*(upstream.ensure_whole() for _ in range(4)), return_exceptions=True)
        assert [type(one) for one in told] == [UnavailableError] * 4
        assert asked == [0]

    asyncio.run(run())


class _Upstream:
    """An upstream that always demands a whole version, and has one that is no newer."""

    def __init__(self) -> None:
        self.followed = 0

    def FollowVersions(self, request: hub_pb2.FollowVersionsRequest) -> Any:
        self.followed += 1
        return _Stream([hub_pb2.FollowVersionsResponse(snapshot_required=hub_pb2.SnapshotRequired())])

    def FetchSnapshot(self, request: hub_pb2.FetchSnapshotRequest, timeout: float) -> Any:
        return _Stream([])


class _Stream:
    def __init__(self, messages: list[Any]) -> None:
        self._messages = iter(messages)

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        for message in self._messages:
            return message
        raise StopAsyncIteration

    def cancel(self) -> None:
        return


def test_an_upstream_that_demands_version_0_whole_is_not_asked_again_and_again(tmp_path: Path) -> None:
    async def run() -> None:
        upstream = Upstream(RelayHome(tmp_path), STATE, Replica(tmp_path), Roster([]), Pace())
        stub = upstream._stub = _Upstream()
        with pytest.raises(DigestError, match="without its header"):
            async with asyncio.timeout(1):
                await upstream._follow()
        assert stub.followed == 1

    asyncio.run(run())


@pytest.mark.parametrize("content", [b"{", b"{}", b"[1]", b'{"member": 1, "space_id": 1}', b"\xff"])
def test_a_damaged_state_says_the_way_out(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "relay.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"relay\.json.*remove it and enrol anew"):
        load_state(RelayHome(tmp_path))


def test_a_description_that_the_disk_refuses_does_not_end_the_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*rest: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upstream_module, "write_atomic", refuse)
    monkeypatch.setattr(upstream_module, "Checker", lambda *rest: None)
    (tmp_path / "ca.pem").write_bytes(b"")

    async def load(self: Replica, checker: object) -> None:
        return

    monkeypatch.setattr(Replica, "load", load)

    async def run() -> None:
        upstream = Upstream(RelayHome(tmp_path), STATE, Replica(tmp_path / "versions"), Roster([]), Pace())
        with pytest.raises(StorageError, match="No space left"):
            await upstream._take_description(hub_pb2.DescribeSpaceResponse(space_id="sha256:s"))

    asyncio.run(run())
