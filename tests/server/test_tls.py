"""The listeners' certificate changes while the hub serves; a broken one changes nothing and is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from share_core import identity as ids
from share_core.durable import write_atomic
from share_core.errors import CertificateError, ConfigError
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.config import config_to_toml
from share_server.fleet.hub_link import HubLink
from share_server.fleet.tls_listener import tls_context
from share_server.hub.tls import PairFile
from share_server.local import Holder, LocalHub
from share_server.provision import OWN_CERTIFICATES, free_ports, listener_names

NOW = datetime.now(UTC)

NEVER_LOOKS = """
import sys
from share_server.hub import __main__, tls
tls.PairFile.current = lambda self: self._pair
sys.exit(__main__.main(sys.argv[1:]))
"""


def _leaf(address: str) -> bytes:
    """Return the certificate (PEM) that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as raw, context.wrap_socket(raw) as tls:
        der = tls.getpeercert(True)
    assert der is not None
    return ids.certificate_to_pem(der)


def _issue(hub: LocalHub, begun: datetime = NOW) -> bytes:
    """Return a fresh certificate for the listener's key."""
    layout = hub.layout
    return ids.sign_csr(
        layout.ca_cert.read_bytes(),
        layout.ca_key.read_bytes(),
        ids.make_csr(layout.key("server").read_bytes()),
        OWN_CERTIFICATES["server"],
        begun,
        365,
        server_names=listener_names(hub.config),
    )


def _wait_in_log(hub: LocalHub, text: str, count: int = 1) -> None:
    end = time.monotonic() + 60
    while hub.log_file.read_text().count(text) < count:
        assert time.monotonic() < end, f"{text!r} is not in {hub.log_file.read_text()[-2000:]}"
        time.sleep(0.05)


@contextlib.contextmanager
def _calling(callers: Sequence[_Caller], over: threading.Event) -> Iterator[None]:
    """Let them call while the block runs."""
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        over.set()
        for caller in callers:
            caller.join(30)


class _Caller(threading.Thread):
    """Calls without pause, over one connection or over a new one each time."""

    def __init__(self, hub: LocalHub, holder: Holder, over: threading.Event, anew: bool) -> None:
        super().__init__(daemon=True)
        self.calls = 0
        self.failures: list[str] = []
        self._hub, self._holder, self._over, self._anew = hub, holder, over, anew

    def run(self) -> None:
        while not self._over.is_set():
            with self._hub.hub(self._holder) as stub:
                while not self._over.is_set():
                    try:
                        stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=20)
                        self.calls += 1
                    except grpc.RpcError as error:
                        self.failures.append(str(error))
                    if self._anew:
                        break


def test_rotation_under_load_fails_no_call_and_new_connections_see_the_new_certificate(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec
) -> None:
    hub = new_hub()
    hub.start()
    alice = hub.enrol("acme/alice")
    over = threading.Event()
    callers = [_Caller(hub, alice, over, anew) for anew in (True, True, False, False)]
    with hub.hub(alice) as stub:
        stream = stub.FollowVersions(hub_pb2.FollowVersionsRequest(space_id=toy_spec.space_id), timeout=120)
        shown = [_leaf(hub.config.hub_address)]
        with _calling(callers, over):
            for _ in range(10):
                fresh = _issue(hub)
                write_atomic(hub.layout.certificate("server"), fresh)
                for address in (hub.config.hub_address, hub.config.enrol_address):
                    shown.append(_leaf(address))
                    assert shown[-1] == fresh
                before = [caller.calls for caller in callers]
                while any(caller.calls <= count + 2 for caller, count in zip(callers, before, strict=True)):
                    time.sleep(0.01)
        assert not any(caller.is_alive() for caller in callers)
        assert [caller.failures for caller in callers] == [[], [], [], []]
        assert len(set(shown)) == 11
        assert stream.is_active()
        stream.cancel()
    assert hub.stop() == 0


def test_a_hub_that_never_looks_is_noticed(new_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    script = tmp_path / "never.py"
    script.write_text(NEVER_LOOKS)
    hub = new_hub(script=script)
    hub.start()
    fresh = _issue(hub)
    write_atomic(hub.layout.certificate("server"), fresh)
    assert _leaf(hub.config.hub_address) != fresh


def test_a_broken_file_leaves_the_old_certificate_in_force_and_raises_the_alarm(
    new_hub: Callable[..., LocalHub],
) -> None:
    hub = new_hub()
    (port,) = free_ports(1)
    hub.layout.config.write_text(config_to_toml(replace(hub.config, metrics_port=port)))
    hub.start()
    path = hub.layout.certificate("server")
    good = path.read_bytes()
    alice = hub.enrol("acme/alice")

    def alarm() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines: list[str] = answer.read().decode().splitlines()
        return next(line for line in lines if line.startswith("fedshare_certificate_reload_failed "))

    assert alarm().endswith(" 0.0")
    for number, broken in enumerate(_broken(hub, good), start=1):
        if broken is None:
            path.unlink()
        else:
            write_atomic(path, broken)
        assert _leaf(hub.config.hub_address) == good
        _wait_in_log(hub, '"certificate not taken over"', number)
        assert alarm().endswith(" 1.0")
        with hub.hub(alice) as stub:
            stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=20)
    assert hub.log_file.read_text().count('"certificate not taken over"') == number  # once each, not per handshake
    fresh = _issue(hub)
    write_atomic(path, fresh)
    assert _leaf(hub.config.hub_address) == fresh
    assert alarm().endswith(" 0.0")


def _broken(hub: LocalHub, good: bytes) -> Iterator[bytes | None]:
    authority, authority_key = ids.make_authority("another", NOW)
    csr = ids.make_csr(hub.layout.key("server").read_bytes())
    name = OWN_CERTIFICATES["server"]
    yield good[: len(good) // 2]
    yield b""
    yield ids.sign_csr(authority, authority_key, csr, name, NOW, 365, ("127.0.0.1",))
    yield _issue(hub, NOW - timedelta(days=400))
    other = ids.make_csr(ids.new_private_key_pem())
    own = (hub.layout.ca_cert.read_bytes(), hub.layout.ca_key.read_bytes())
    yield ids.sign_csr(*own, other, name, NOW, 365, ("127.0.0.1",))
    yield None


def test_the_running_hub_renews_what_is_due(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub()
    hub.start()
    _wait_in_log(hub, '"serving"')
    ageing = _issue(hub, NOW - timedelta(days=300))
    write_atomic(hub.layout.certificate("server"), ageing)
    assert _leaf(hub.config.hub_address) == ageing  # it is valid still
    os.kill(hub.pid, signal.SIGHUP)
    _wait_in_log(hub, '"certificates renewed"')
    renewed = hub.layout.certificate("server").read_bytes()
    assert ids.not_after(renewed) > NOW + timedelta(days=300)
    assert _leaf(hub.config.hub_address) == renewed
    assert hub.stop() == 0


def test_a_start_with_a_pair_that_cannot_serve_is_refused(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub()
    layout = hub.layout
    authority = layout.ca_cert.read_bytes()
    key, certificate = layout.key("server"), layout.certificate("server")
    assert PairFile(key, certificate, authority).current().certificate == certificate.read_bytes()
    write_atomic(key, ids.new_private_key_pem())
    with pytest.raises(CertificateError, match="another key"):
        PairFile(key, certificate, authority)
    key.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        PairFile(key, certificate, authority)


def test_the_gateways_listener_follows_the_files_and_stays_strict(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub()
    layout = hub.layout
    authority = layout.ca_cert

    async def serve(stop: asyncio.Event, ports: list[int], ready: threading.Event) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"served")
            await writer.drain()
            writer.close()

        context = tls_context(layout.certificate("server"), layout.key("server"), authority)
        async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
            ports.append(server.sockets[0].getsockname()[1])
            ready.set()
            await stop.wait()

    def ask(own: bool, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> tuple[bytes, bytes]:
        """Return (what was served, the leaf that was shown); nothing was served if the connection was refused."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(authority)
        context.maximum_version = highest
        if own:
            context.load_cert_chain(layout.certificate("fleet"), layout.key("fleet"))
        try:
            with (
                socket.create_connection(("127.0.0.1", ports[0]), 10) as raw,
                context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
            ):
                leaf = ids.certificate_to_pem(tls.getpeercert(True) or b"")
                return tls.recv(100), leaf
        except OSError:
            return b"", b""

    loop, ports, ready, stop = asyncio.new_event_loop(), list[int](), threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(stop, ports, ready),), daemon=True)
    thread.start()
    try:
        assert ready.wait(10)
        path = layout.certificate("server")
        expected = path.read_bytes()
        for fresh in (None, _issue(hub), b"broken", _issue(hub)):
            if fresh is not None:
                write_atomic(path, fresh)
                expected = expected if fresh == b"broken" else fresh
            assert ask(own=True) == (b"served", expected)
            assert ask(own=False)[0] == b""
            assert ask(own=True, highest=ssl.TLSVersion.TLSv1_2) == (b"", b"")
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def test_the_fleets_connection_takes_up_a_renewed_certificate(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub()
    layout = hub.layout

    def issue(seconds: float) -> None:
        own = (layout.ca_cert.read_bytes(), layout.ca_key.read_bytes())
        csr = ids.make_csr(layout.key("fleet").read_bytes())
        fresh = ids.sign_csr(*own, csr, OWN_CERTIFICATES["fleet"], datetime.now(UTC), seconds / 86400)
        write_atomic(layout.certificate("fleet"), fresh)

    hub.start()
    issue(3)
    with contextlib.closing(HubLink(layout, hub.config)) as link:
        assert link.list_nodes() == []
        while True:  # until it has expired on the open connection
            try:
                link.list_nodes()
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                break
            time.sleep(0.1)
        issue(3600)
        assert link.list_nodes() == []
