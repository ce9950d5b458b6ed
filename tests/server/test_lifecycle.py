"""The life of a hub process: one per directory and port, an end in order, health that tells the truth, clean logs."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from share_core.errors import FedshareError
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

TALKATIVE = """
import sys
from share_server.hub import __main__, enrolment_service, log
honest = enrolment_service.EnrolmentService.Enrol

async def talkative(self, request, context):
    log.info("enrolling", token=request.token)
    return await honest(self, request, context)

enrolment_service.EnrolmentService.Enrol = talkative
sys.exit(__main__.main(sys.argv[1:]))
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
    """An upload whose second half is sent when told to."""

    def __init__(self, hub: LocalHub, holder: Holder, spec: SpaceSpec, payload: bytes) -> None:
        self.go_on = threading.Event()
        self.half_sent = threading.Event()
        self.header = submit_header(spec, "acme/halves", payload)
        self.receipt: hub_pb2.SubmitResponse | None = None
        self.error: grpc.RpcError | None = None
        self._hub, self._holder, self._payload = hub, holder, payload
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(60)

    def _messages(self) -> Iterator[hub_pb2.SubmitRequest]:
        half = len(self._payload) // 2
        yield hub_pb2.SubmitRequest(header=self.header)
        yield hub_pb2.SubmitRequest(chunk=self._payload[:half])
        self.half_sent.set()
        self.go_on.wait(60)
        yield hub_pb2.SubmitRequest(chunk=self._payload[half:])

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
    assert upload.half_sent.wait(30)
    time.sleep(0.3)  # the half is on its way
    watching, states, down = _watch(hub)
    os.kill(hub.pid, signal.SIGTERM)
    if planted:
        assert hub.wait() == 0  # it ends while the other half is still to come
        upload.go_on.set()
        upload.join()
        assert upload.receipt is None
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


def _secrets_in_log(hub: LocalHub, make_payload: Callable[..., bytes]) -> list[str]:
    """Use the hub in good and bad ways and return which secrets its log holds; every line must be a JSON object."""
    hub.start()
    token = hub.invite("acme/alice")
    canary = secrets.token_hex(16)
    alice = hub.enrol_with(token, _key())
    for bad in ("fs1." + canary, canary, token[:-4] + "AAAA", token):
        with pytest.raises(FedshareError):
            hub.enrol_with(bad, _key())
    payload = make_payload(1)
    damaged = payload[: -len(canary)] + canary.encode()
    with hub.hub(alice) as stub:
        stub.Submit(submit_messages(submit_header(hub.spec, "acme/t", payload), payload), timeout=30)
        for wrong in (damaged, canary.encode() * 20):
            header = submit_header(hub.spec, "acme/t", wrong)
            try:
                stub.Submit(submit_messages(header, wrong), timeout=30)
            except grpc.RpcError:
                continue
    for port in (hub.config.hub_port, hub.config.enrol_port):
        with socket.create_connection(("127.0.0.1", port), 10) as raw:
            raw.sendall(canary.encode() + b"\r\n\r\n")
            raw.settimeout(10)
            try:
                while raw.recv(1024):
                    pass
            except OSError:
                pass
    assert hub.stop() == 0
    text = hub.log_file.read_text()
    for line in text.splitlines():
        assert isinstance(json.loads(line), dict), line
    assert '"enrolled"' in text
    assert '"refused"' in text
    key = alice.key.decode().splitlines()
    body = token.removeprefix("fs1.")
    found = {"token": body[-40:], "canary": canary, "key": key[1], "pem": "PRIVATE KEY", "enrolment": ""}
    found["enrolment"] = hub.layout.enrol_key.read_bytes().hex()
    return [name for name, secret in found.items() if secret in text]


def _key() -> bytes:
    from share_core.identity import new_private_key_pem

    return new_private_key_pem()


def test_the_log_is_json_and_holds_no_secret(
    new_hub: Callable[..., LocalHub], make_payload: Callable[..., bytes]
) -> None:
    assert _secrets_in_log(new_hub(), make_payload) == []


def test_a_hub_that_writes_tokens_down_is_noticed(
    new_hub: Callable[..., LocalHub], make_payload: Callable[..., bytes], tmp_path: Path
) -> None:
    script = tmp_path / "talkative.py"
    script.write_text(TALKATIVE)
    assert "token" in _secrets_in_log(new_hub(script=script), make_payload)


WRITES_LOG = """
import os
from share_server.hub import log
log.start_logging(4000)
for number in range(500):
    log.info("line", number=number)
    if number % 50 == 0:
        os.write(2, b'{"native": true}\\n')
"""


def test_a_full_log_is_put_aside_and_no_line_is_lost_at_the_seam(tmp_path: Path) -> None:
    path = tmp_path / "hub.log"
    with path.open("ab") as file:
        subprocess.run([sys.executable, "-c", WRITES_LOG], stderr=file, stdout=file, check=True)
    files = [path.with_name(f"hub.log.{number}") for number in range(4, 0, -1)] + [path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    lines = [json.loads(line) for one in files for line in one.read_text().splitlines()]
    numbers = [line["number"] for line in lines if "number" in line]
    assert numbers == list(range(numbers[0], 500))
    assert numbers[0] > 0  # the oldest are gone
    assert any("native" in line for line in lines)
    assert all(3900 < one.stat().st_size < 4200 for one in files[:-1])
    assert path.stat().st_size < 4200


def test_a_log_that_somebody_else_moved_begins_anew_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "hub.log"
    program = WRITES_LOG.replace("for number", f"os.rename({str(path)!r}, {str(path) + '-moved'!r})\nfor number")
    with path.open("ab") as file:
        subprocess.run([sys.executable, "-c", program], stderr=file, check=True)
    assert {one.name for one in tmp_path.iterdir()} == {
        "hub.log",
        "hub.log-moved",
        *(f"hub.log.{n}" for n in range(1, 5)),
    }
    assert (tmp_path / "hub.log-moved").stat().st_size >= 4000
