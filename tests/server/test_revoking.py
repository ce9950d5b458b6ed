"""Being shut out bites at once on everything that is open, on a running hub and on one that is started later."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from share_core.errors import AccessError, ConfigError, FedshareError, RequestError
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server import cli
from share_server.config import LimitConfig
from share_server.hub.interceptor import Door
from share_server.local import Holder, LocalHub, submit_header
from share_server.operations.revoke import revoke
from share_server.operator import named_error

NEVER_LOOKS = """
import sys
from share_server.hub import __main__, interceptor
interceptor.Door.look = lambda self: None
sys.exit(__main__.main(sys.argv[1:]))
"""

RARELY = LimitConfig(recheck_s=3600.0)
"""Nothing in these tests is left to the looks of an hour."""


class Upload:
    """One Submit call whose payload waits for the word of the test."""

    def __init__(self, stub: Any, spec: SpaceSpec, payload: bytes) -> None:
        self._payload = payload
        self._go: queue.Queue[None] = queue.Queue()
        header = submit_header(spec, "acme/task", payload)
        self._call = stub.Submit.future(self._messages(header), timeout=60)
        list(self._call.initial_metadata())  # the hub has let the payload come

    def _messages(self, header: hub_pb2.SubmitHeader) -> Iterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=header)
        self._go.get()
        yield hub_pb2.SubmitRequest(chunk=self._payload)

    def finish(self) -> FedshareError | None:
        """Send the payload; return the refusal, or None if the update was acknowledged."""
        self._go.put(None)
        return refusal(self._call.result)


def refusal(call: Callable[[], object]) -> FedshareError | None:
    try:
        call()
    except grpc.RpcError as error:
        return named_error(error, "hub")
    return None


def described(hub: LocalHub, holder: Holder) -> FedshareError | None:
    with hub.hub(holder) as stub:
        return refusal(lambda: stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=20))


def test_whoever_is_shut_out_is_cut_off_in_the_middle(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    hub = new_hub(limits=RARELY)
    with pytest.raises(ConfigError, match="no store yet"):
        revoke(hub.layout, "acme/alice")
    hub.start()
    alice, bob = hub.enrol("acme/alice"), hub.enrol("bolt/bob")
    follow = hub_pb2.FollowVersionsRequest(space_id=toy_spec.space_id)
    with hub.hub(alice) as stub, hub.hub(bob) as other:
        stream, others = stub.FollowVersions(follow, timeout=60), other.FollowVersions(follow, timeout=60)
        upload = Upload(stub, toy_spec, make_payload(1))
        assert CliRunner().invoke(cli.app, ["revoke", str(hub.layout.root), "acme/alice"]).exit_code == 0
        found = [refusal(lambda: list(stream)), upload.finish(), described(hub, alice)]
        assert [type(one) for one in found] == [AccessError] * 3, found
        assert all("acme/alice is shut out" in str(one) for one in found)
        assert described(hub, bob) is None
        assert others.is_active()
        with pytest.raises(AccessError, match="shut out"):
            hub.enrol("acme/alice")  # a token from before does not help
    hub.kill()
    revoke(hub.layout, "bolt/bob")  # of a stopped hub the journal is changed
    hub.start()
    assert [type(described(hub, one)) for one in (alice, bob)] == [AccessError, AccessError]
    revoke(hub.layout, "acme/alice", undo=True)
    assert described(hub, alice) is None
    with pytest.raises(RequestError, match="no member 'acme/nobody'"):
        revoke(hub.layout, "acme/nobody")
    assert hub.stop() == 0


def test_a_hub_that_does_not_look_at_open_calls_is_noticed(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes], tmp_path: Any
) -> None:
    script = tmp_path / "planted.py"
    script.write_text(NEVER_LOOKS)
    hub = new_hub(limits=RARELY, script=script)
    hub.start()
    alice = hub.enrol("acme/alice")
    with hub.hub(alice) as stub:
        upload = Upload(stub, toy_spec, make_payload(1))
        revoke(hub.layout, "acme/alice")
        assert upload.finish() is None, "the update of somebody who was shut out before is acknowledged"


@pytest.mark.parametrize("looks", [True, False], ids=["real", "planted"])
def test_calls_are_looked_at_without_being_asked(looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second case is a planted bug: whoever was let in once stays."""
    if not looks:
        monkeypatch.setattr(Door, "look", lambda self: None)

    async def shut_out_meanwhile() -> str:
        refused, asked = False, 0

        def recheck() -> None:
            nonlocal asked
            asked += 1
            if refused:
                raise AccessError("shut out")

        door = Door(lambda method, context: recheck, 1.0)
        looking = asyncio.create_task(door.keep_looking(0.0))
        try:
            async with door._watched(recheck):
                for _ in range(20):
                    await asyncio.sleep(0)
                refused = True
                for _ in range(1000):
                    await asyncio.sleep(0)
                return "let in"
        except AccessError as error:
            assert asked > 1
            return str(error)
        finally:
            looking.cancel()

    assert asyncio.run(shut_out_meanwhile()) == ("shut out" if looks else "let in")


def test_a_handler_that_runs_out_of_time_by_itself_is_not_taken_for_a_refusal() -> None:
    async def slow() -> None:
        door = Door(lambda method, context: None, 1.0)
        async with door._watched(lambda: None), asyncio.timeout(0.0):
            await asyncio.sleep(3600)

    with pytest.raises(TimeoutError):
        asyncio.run(slow())
