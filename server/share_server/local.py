"""A real hub as a child process on loopback, for tests and experiments: start, enrol members, kill, start again."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import runpy
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from share_core.errors import UnavailableError
from share_core.identity import (
    Identity,
    identity_of,
    make_authority,
    make_csr,
    new_private_key_pem,
    sign_csr,
    sign_update,
    statement_of,
)
from share_core.identity.statement import MOST_SEQUENCE
from share_core.lifeline import arm
from share_core.types import SpaceSpec
from share_core.wire import payload_bytes
from share_proto.v1 import enrolment_pb2, enrolment_pb2_grpc, hub_pb2, hub_pb2_grpc
from share_server.config import LeaseConfig, LimitConfig, ServerConfig
from share_server.hub.access import Caller
from share_server.layout import Layout
from share_server.operator import CHANNEL_OPTIONS, named_error
from share_server.provision import create_server, free_ports, invite_member
from share_server.store.records import PRIVATE, NewUpdate, Sharing

_START_S = 60.0

# Hubs are forked from a server that has imported everything and opened nothing: importing takes longer than a restart.
_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(["share_server.hub.__main__"])


def new_update(
    payload: bytes,
    member: str,
    task_id: str,
    *,
    base_version: int = 0,
    update_id: str = "",
    sharing: Sharing = PRIVATE,
    schema_sha256: str = "",
) -> NewUpdate:
    """Return what intake makes of a member's payload, for an engine fed without a network."""
    # Without an id one is drawn.
    split = payload_bytes(payload)
    return NewUpdate(
        update_id=update_id or secrets.token_hex(16),
        member=member,
        task_id=task_id,
        create=True,
        base_version=base_version,
        sha256=hashlib.sha256(payload).hexdigest(),
        size=len(payload),
        coefficients=split.coefficients,
        directions=split.directions,
        heads=split.heads,
        envelope=split.envelope,
        lease_id="",
        rows=0,
        sharing=sharing,
        schema_sha256=schema_sha256,
    )


@dataclass(frozen=True)
class Holder:
    """Somebody with a key and a certificate, both PEM."""

    key: bytes
    """Private key."""
    certificate: bytes
    """Certificate."""

    @property
    def caller(self) -> Caller:
        """Who calls with this certificate, as the interceptor makes it: for an engine without listeners."""
        return Caller(_identity_of(self.certificate), self.certificate)


class LocalHub:
    """One server directory and, between :meth:`start` and :meth:`stop` or :meth:`kill`, its hub process."""

    def __init__(
        self,
        root: Path,
        spec: SpaceSpec,
        limits: LimitConfig | None = None,
        lease: LeaseConfig | None = None,
        script: Path | None = None,
    ) -> None:
        """Make the directory. ``script`` runs instead of ``share_server.hub``, with the directory as argument."""
        ports = free_ports(3)
        self.config = ServerConfig(
            hub_port=ports[0],
            enrol_port=ports[1],
            gateway_port=ports[2],
            limits=limits or LimitConfig(),
            lease=lease or LeaseConfig(),
        )
        self.spec = spec
        self.layout = Layout(root)
        self.script = script
        create_server(self.layout, self.config, spec, datetime.now(UTC))
        self._process: BaseProcess | None = None

    @property
    def log_file(self) -> Path:
        """What the hub wrote to stderr, over all its lives."""
        return self.layout.logs / "hub.log"

    def launch(self) -> BaseProcess:
        """Start a hub process without waiting for it; the caller owns it."""
        process = _WARM.Process(target=_run_hub, args=(self.script, self.layout.root, self.log_file), daemon=True)
        process.start()
        return process

    def start(self, patience_s: float = _START_S) -> None:
        """Start the hub and return when it serves, which is after it has verified its store.

        Raises:
            UnavailableError: it ended, or did not serve within ``patience_s``; the end of its log is in the message.
        """
        self._process = self.launch()
        end = time.monotonic() + patience_s
        with self.channel(self.own("operator")) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < end and self._process.is_alive():
                try:
                    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
                except grpc.RpcError:
                    time.sleep(0.05)
                    continue
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        tail = self.log_file.read_text(errors="replace")[-2000:]
        raise UnavailableError(f"the hub of {self.layout.root} does not serve: {tail}")

    def kill(self) -> None:
        """End the hub with SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ask the hub to stop and return its exit code."""
        return self._end(signal.SIGTERM)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait until the hub has ended by itself and return its exit code.

        Raises:
            UnavailableError: it is not running, or still runs after ``timeout_s``.
        """
        if self._process is None:
            raise UnavailableError("the hub is not running")
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise UnavailableError(f"the hub still runs after {timeout_s:g} s")
        code, self._process = self._process.exitcode, None
        return code

    def _end(self, number: signal.Signals) -> int:
        if self._process is not None and self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)
        return self.wait()

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.is_alive()

    def own(self, name: str) -> Holder:
        """Return the server's own ``operator`` or ``fleet`` certificate."""
        return Holder(self.layout.key(name).read_bytes(), self.layout.certificate(name).read_bytes())

    @property
    def pid(self) -> int:
        """Process id of the running hub.

        Raises:
            UnavailableError: it is not running.
        """
        if self._process is None or self._process.pid is None:
            raise UnavailableError("the hub is not running")
        return self._process.pid

    def invite(self, member: str, role: str = "trainer", hours: float = 1.0) -> str:
        """Return a join token for ``organisation/name``."""
        organisation, _, name = member.partition("/")
        identity = Identity(role, organisation, name)
        return invite_member(self.layout, self.config, identity, hours, datetime.now(UTC))

    def enrol(self, member: str, role: str = "trainer", node_key: bytes = b"") -> Holder:
        """Enrol a fresh key with a fresh token over the real enrolment listener."""
        return self.enrol_with(self.invite(member, role), new_private_key_pem(), node_key)

    def enrol_with(self, token: str, key: bytes, node_key: bytes = b"") -> Holder:
        """Enrol ``key`` with a given token.

        Raises:
            FedshareError: what the hub refused.
        """
        roots = grpc.ssl_channel_credentials(self.layout.ca_cert.read_bytes())
        request = enrolment_pb2.EnrolRequest(token=token, csr_pem=make_csr(key), node_public_key_pem=node_key)
        with grpc.secure_channel(self.config.enrol_address, roots, CHANNEL_OPTIONS) as channel:
            try:
                answer = enrolment_pb2_grpc.EnrolmentStub(channel).Enrol(request, timeout=20.0)
            except grpc.RpcError as error:
                raise named_error(error, self.config.enrol_address) from error
        return Holder(key, answer.certificate_pem)

    @contextmanager
    def channel(self, holder: Holder) -> Iterator[grpc.Channel]:
        """Open a channel to the hub as ``holder``."""
        credentials = grpc.ssl_channel_credentials(self.layout.ca_cert.read_bytes(), holder.key, holder.certificate)
        with grpc.secure_channel(self.config.local_hub_address, credentials, CHANNEL_OPTIONS) as channel:
            yield channel

    @contextmanager
    def hub(self, holder: Holder) -> Iterator[hub_pb2_grpc.HubStub]:
        """Open the Hub service as ``holder``; a header that it submits unsigned is signed with its key on the way."""
        with self.channel(holder) as channel:
            yield hub_pb2_grpc.HubStub(grpc.intercept_channel(channel, _SignSubmit(holder)))


class _SignSubmit(grpc.StreamUnaryClientInterceptor):
    """Signs the headers of Submit calls as a client does, unless they are signed."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder

    def intercept_stream_unary(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[Any],
    ) -> Any:
        """Pass the messages on, the first one signed."""
        return continuation(client_call_details, self._signed(request_iterator))

    def _signed(self, messages: Iterator[Any]) -> Iterator[Any]:
        for message in messages:
            if isinstance(message, hub_pb2.SubmitRequest) and message.WhichOneof("part") == "header":
                copy = hub_pb2.SubmitRequest()
                copy.CopyFrom(message)
                yield (
                    copy
                    if copy.header.signature
                    else hub_pb2.SubmitRequest(header=sign_header(copy.header, self._holder))
                )
            else:
                yield message


@lru_cache(maxsize=4096)
def _identity_of(certificate: bytes) -> Identity:
    return identity_of(certificate)


@lru_cache(maxsize=1)
def _no_hub() -> tuple[bytes, bytes]:
    return make_authority("no hub", datetime.now(UTC))


@lru_cache(maxsize=4096)
def member_of_no_hub(member: str, role: str = "trainer") -> Holder:
    """Return somebody who can sign and call an engine without listeners: always the same for the same name.

    Its certificate is one of an authority of this process, so no hub lets it in and ``verify`` does not know it.
    """
    organisation, _, name = member.partition("/")
    now, key = datetime.now(UTC), new_private_key_pem()
    return Holder(key, sign_csr(*_no_hub(), make_csr(key), Identity(role, organisation, name), now, 30))


def _run_hub(script: Path | None, root: Path, log_file: Path) -> None:
    """Be the hub process: it ends with whoever started it, also by SIGKILL; stderr goes to the log file."""
    arm()
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    os.close(log)
    if script is None:
        from share_server.hub.__main__ import main

        sys.exit(main([str(root)]))
    sys.argv = [str(script), str(root)]
    runpy.run_path(str(script), run_name="__main__")


def submit_header(
    spec: SpaceSpec, task_id: str, payload: bytes, *, create: bool = True, update_id: str = ""
) -> hub_pb2.SubmitHeader:
    """Return an honest header for ``payload``; a fresh update id unless one is given."""
    return hub_pb2.SubmitHeader(
        update_id=update_id or secrets.token_hex(16),
        space_id=spec.space_id,
        task_id=task_id,
        create=create,
        payload_size=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
    )


def sign_header(header: hub_pb2.SubmitHeader, holder: Holder, sequence: int = 0) -> hub_pb2.SubmitHeader:
    """Sign a header, in place, with the key of who will send it; return it.

    Args:
        header: complete but for ``sequence`` and ``signature``.
        holder: who sends it.
        sequence: a number under which this key has signed nothing; 0 draws one. A client counts instead, which takes
            a place on the disk.
    """
    header.sequence = sequence or secrets.randbelow(MOST_SEQUENCE) + 1
    header.signature = sign_update(holder.key, statement_of(header, holder.caller.member))
    return header


def submit_messages(
    header: hub_pb2.SubmitHeader, payload: bytes, chunk_bytes: int = 2**20
) -> Iterator[hub_pb2.SubmitRequest]:
    """Return the messages of one Submit call."""
    yield hub_pb2.SubmitRequest(header=header)
    for start in range(0, len(payload), chunk_bytes):
        yield hub_pb2.SubmitRequest(chunk=payload[start : start + chunk_bytes])


def read_deltas(stream: Iterable[hub_pb2.FollowVersionsResponse]) -> Iterator[tuple[int, bytes]]:
    """Return (version, payload) of every delta in a FollowVersions stream, until it ends or asks for a snapshot."""
    header, payload = None, bytearray()
    for message in stream:
        part = message.WhichOneof("part")
        if part == "snapshot_required":
            return
        if part == "heartbeat":
            continue
        if part == "delta":
            header, payload = message.delta, bytearray(message.delta.data)
        else:
            payload += message.chunk
        if header is not None and len(payload) == header.payload_size:
            yield header.version, bytes(payload)
            header = None
