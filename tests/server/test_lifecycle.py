"""The life of a hub process: one per directory and port, an end in order, health that tells the truth."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.config import LimitConfig, config_to_toml
from share_server.local import Holder, LocalHub, submit_header, submit_messages

TRIES = 20

SHARED_PORT = """
import sys
from share_server.hub import options
for one in (options.HUB_OPTIONS, options.ENROLMENT_OPTIONS):
    one[:] = [(name, 1 if name == "grpc.so_reuseport" else value) for name, value in one]
from share_server.hub import __main__
sys.exit(__main__.main(sys.argv[1:]))
"""

NO_DRAIN = """
import sys
from grpc import aio
from share_server.hub import __main__
honest = aio.server

def server(*arguments, **named):
    made = honest(*arguments, **named)
    stop = made.stop
    made.stop = lambda grace: stop(0)
    return made

aio.server = server
sys.exit(__main__.main(sys.argv[1:]))
"""

FAILING_DISK = """
import errno, os, sys
from pathlib import Path
from share_server.hub import __main__
real = os.fsync

def failing(handle):
    if Path(sys.argv[1], "fail").exists():
        raise OSError(errno.EIO, "Input/output error")
    real(handle)

os.fsync = failing
os.fdatasync = failing
"""

HONEST = "sys.exit(__main__.main(sys.argv[1:]))\n"

SILENT_HEALTH = """
from share_server.hub import process
async def nothing(self): pass
process.HealthServicer.enter_graceful_shutdown = nothing
"""


def _ended(hub: LocalHub) -> tuple[int | None, str]:
    """Start a further process on this directory; return its exit code (None: it lives) and what it wrote."""
    before = hub.log_file.stat().st_size if hub.log_file.exists() else 0
    process = hub.launch()
    end = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < end and '"serving"' not in _since(hub, before):
        time.sleep(0.02)
    if process.is_alive():
        process.join(0.5)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, _since(hub, before)


def _since(hub: LocalHub, offset: int) -> str:
    return hub.log_file.read_bytes()[offset:].decode() if hub.log_file.exists() else ""


def test_a_second_hub_on_one_directory_is_refused_every_time(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub()
    hub.start()
    for _ in range(TRIES):
        code, said = _ended(hub)
        assert code == 1
        assert "another hub (process" in said
        assert "stop it first" in said
    with hub.hub(hub.own("operator")) as stub:
        stub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
    assert hub.stop() == 0


@pytest.mark.parametrize("port", ["hub_port", "enrol_port"])
def test_a_second_hub_on_one_port_is_refused_every_time(new_hub: Callable[..., LocalHub], port: str) -> None:
    first, second = new_hub(), new_hub()
    first.start()
    _same_port(first, second, port)
    for _ in range(TRIES // 2):
        code, said = _ended(second)
        assert code == 1
        assert "is another server using the port? Stop it, or choose another port" in said
    assert first.stop() == 0


def test_hubs_that_share_a_port_would_be_noticed(new_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    script = tmp_path / "shared.py"
    script.write_text(SHARED_PORT)
    first, second = new_hub(script=script), new_hub(script=script)
    first.start()
    _same_port(first, second, "hub_port")
    code, said = _ended(second)
    assert code is None
    assert '"serving"' in said


def _same_port(first: LocalHub, second: LocalHub, name: str) -> None:
    changed = replace(second.config, **{name: getattr(first.config, name)})
    second.layout.config.write_text(config_to_toml(changed))


class _Halves:
    """An upload whose second half is sent when told to.

    The first half is sent in four chunks: so many the hub writes at once, and the file shows that they have come.
    """

    def __init__(self, hub: LocalHub, holder: Holder, spec: SpaceSpec, payload: bytes) -> None:
        self.go_on = threading.Event()
        self.header = submit_header(spec, "acme/halves", payload)
        self.receipt: hub_pb2.SubmitResponse | None = None
        self.error: grpc.RpcError | None = None
        self._hub, self._holder, self._payload = hub, holder, payload
        self._half = len(payload) // 2
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for_half(self) -> None:
        """Wait until the hub has the first half."""
        end = time.monotonic() + 30
        while sum(path.stat().st_size for path in (self._hub.layout.store / "staging").iterdir()) < self._half:
            assert time.monotonic() < end, self.error
            time.sleep(0.01)

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _messages(self) -> Iterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=self.header)
        size = self._half // 4 + 1
        for start in range(0, self._half, size):
            yield hub_pb2.SubmitRequest(chunk=self._payload[start : min(start + size, self._half)])
        self.go_on.wait(60)
        yield hub_pb2.SubmitRequest(chunk=self._payload[self._half :])

    def _run(self) -> None:
        with self._hub.hub(self._holder) as stub:
            try:
                self.receipt = stub.Submit(self._messages(), timeout=60)
            except grpc.RpcError as error:
                self.error = error


def _watch(hub: LocalHub) -> tuple[threading.Thread, list[int], threading.Event]:
    """Collect what Watch says until the stream ends; the event is set at the first NOT_SERVING."""
    states: list[int] = []
    down, began = threading.Event(), threading.Event()

    def run() -> None:
        with hub.channel(hub.own("operator")) as channel:
            try:
                for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120):
                    states.append(answer.status)
                    began.set()
                    if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                        down.set()
            except grpc.RpcError:
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert began.wait(30)
    return thread, states, down


@pytest.mark.parametrize("planted", [False, True], ids=["real", "planted"])
def test_an_upload_in_progress_is_finished_after_sigterm_and_health_is_down_before(
    new_hub: Callable[..., LocalHub],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
    tmp_path: Path,
    planted: bool,
) -> None:
    """The planted bug is a hub that stops without waiting: the upload breaks."""
    script = tmp_path / "hasty.py"
    script.write_text(NO_DRAIN)
    hub = new_hub(script=script if planted else None)
    hub.start()
    upload = _Halves(hub, hub.enrol("acme/alice"), toy_spec, make_payload(1))
    upload.wait_for_half()
    watching, states, down = _watch(hub)
    os.kill(hub.pid, signal.SIGTERM)
    if planted:
        assert hub.wait() == 0  # it ends while the other half is still to come
        upload.go_on.set()
        upload.join()
        assert upload.receipt is None
        assert upload.error is not None
        watching.join(30)
        return
    assert down.wait(30)
    assert upload.receipt is None
    upload.go_on.set()
    upload.join()
    begun = time.monotonic()
    assert hub.wait() == 0
    assert time.monotonic() - begun < LimitConfig().drain_s / 2  # nobody waits for those who only watch
    watching.join(30)
    assert upload.receipt is not None
    serving = health_pb2.HealthCheckResponse
    assert states == [serving.SERVING, serving.NOT_SERVING]
    hub.start()
    with hub.hub(hub.own("operator")) as stub:
        found = stub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=upload.header.update_id), timeout=30).update
    assert found.payload_sha256 == upload.header.payload_sha256


class _Submitter(threading.Thread):
    """Submits without pause and keeps every receipt."""

    def __init__(self, hub: LocalHub, holder: Holder, payload: bytes, task: str) -> None:
        super().__init__(daemon=True)
        self.acknowledged: dict[str, str] = {}
        self.codes: set[grpc.StatusCode] = set()
        self.over = threading.Event()
        self._hub, self._holder, self._payload, self._task = hub, holder, payload, task

    def run(self) -> None:
        with self._hub.hub(self._holder) as stub:
            while not self.over.is_set():
                header = submit_header(self._hub.spec, self._task, self._payload)
                try:
                    stub.Submit(submit_messages(header, self._payload, 512), timeout=30)
                except grpc.RpcError as error:
                    assert isinstance(error, grpc.Call)
                    self.codes.add(error.code())
                    self.over.wait(0.01)  # a hub that is away answers at once: asking without a pause takes its time
                    continue
                self.acknowledged[header.update_id] = header.payload_sha256


def test_drains_under_load_lose_nothing_and_end_in_time(
    new_hub: Callable[..., LocalHub], make_payload: Callable[..., bytes]
) -> None:
    hub = new_hub(limits=LimitConfig(drain_s=10.0))
    hub.start()
    holders = [hub.enrol(f"org{number}/a") for number in range(4)]
    submitters: list[_Submitter] = []
    for _ in range(5):
        now = [_Submitter(hub, holder, make_payload(n), f"org{n}/t") for n, holder in enumerate(holders)]
        submitters += now
        for one in now:
            one.start()
        while any(len(one.acknowledged) < 3 for one in now):
            time.sleep(0.01)
        begun = time.monotonic()
        assert hub.stop() == 0
        assert time.monotonic() - begun < 10.0 + 5.0
        for one in now:
            one.over.set()
        for one in now:
            one.join(60)
            assert not one.is_alive()
        hub.start()
    assert set().union(*(one.codes for one in submitters)) <= {grpc.StatusCode.UNAVAILABLE}
    expected = {key: value for one in submitters for key, value in one.acknowledged.items()}
    with hub.hub(hub.own("operator")) as stub:
        updates = stub.ListUpdates(hub_pb2.ListUpdatesRequest(), timeout=30).updates
    found = {update.update_id: update.payload_sha256 for update in updates}
    assert len(found) == len(updates) >= len(expected) >= 60
    assert {key: found.get(key) for key in expected} == expected
    assert [update.ingest_seq for update in updates] == list(range(1, len(updates) + 1))


@pytest.mark.parametrize("silent", [False, True], ids=["real", "planted"])
def test_when_the_storage_fails_health_says_so_and_the_hub_ends(
    new_hub: Callable[..., LocalHub],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
    tmp_path: Path,
    silent: bool,
) -> None:
    """The planted bug is a hub that ends without a word to those who watch it."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING_DISK + (SILENT_HEALTH if silent else "") + HONEST)
    hub = new_hub(script=script)
    hub.start()
    alice = hub.enrol("acme/alice")
    watching, states, _ = _watch(hub)
    (hub.layout.root / "fail").touch()
    payload = make_payload(1)
    with hub.hub(alice) as stub, pytest.raises(grpc.RpcError):
        stub.Submit(submit_messages(submit_header(toy_spec, "acme/t", payload), payload), timeout=30)
    assert hub.wait() == 1
    watching.join(30)
    assert (states[-1] == health_pb2.HealthCheckResponse.NOT_SERVING) is not silent


FORGETS = """
import asyncio, sys
from share_server.hub import __main__, interceptor

async def write(self, context, message):
    await asyncio.wait_for(context.write(message), self._write_timeout_s)

interceptor.Door._write = write
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("planted", [False, True], ids=["real", "planted"])
def test_streams_cancelled_at_any_moment_leave_nothing_behind(
    new_hub: Callable[..., LocalHub], make_payload: Callable[..., bytes], tmp_path: Path, planted: bool
) -> None:
    """The planted bug: a cancellation that comes with the end of a write is forgotten, and the stream waits on."""
    script = tmp_path / "forgets.py"
    script.write_text(FORGETS)
    hub = new_hub(script=script if planted else None)
    hub.start()
    alice = hub.enrol("acme/alice")
    payload = make_payload(1)
    with hub.hub(alice) as stub, hub.hub(hub.own("operator")) as operator:
        stub.Submit(submit_messages(submit_header(hub.spec, "acme/t", payload), payload), timeout=30)
        while operator.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).merged == 0:
            time.sleep(0.02)
        for _ in range(400):
            stream = stub.FollowVersions(hub_pb2.FollowVersionsRequest(space_id=hub.spec.space_id), timeout=120)
            try:
                next(stream)
            except grpc.RpcError:
                assert planted, "only forgotten streams can fill the connection"
                break
            stream.cancel()
        end = time.monotonic() + (3 if planted else 60)
        while (left := operator.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).subscribers) and (
            time.monotonic() < end
        ):
            time.sleep(0.05)
    assert (left > 0) is planted
