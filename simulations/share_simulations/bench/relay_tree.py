"""Relays between a hub and its readers: some levels, each relay following one of the level above."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import grpc

from share_core.identity import Identity
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.local import Holder, LocalHub
from share_server.operator import CHANNEL_OPTIONS
from share_server.provision import free_ports, invite_member
from share_simulations.processes import Child, Processes

ROSTER_S = 2.0
"""How often a relay asks whom it may serve; readers that enrol later are let in after one period per level."""
_READY_S = 90.0
_CUT = b"nothing was read"


class RelayTree:
    """``relays`` relays on each of ``levels`` levels; number i of a level follows number i of the level above."""

    def __init__(self, hub: LocalHub, folder: Path, relays: int, levels: int, processes: Processes) -> None:
        self._hub = hub
        self._folder = folder
        self._relays = relays
        self._levels = levels
        self._processes = processes
        self._leaves: list[tuple[str, Child]] = []

    @property
    def addresses(self) -> list[str]:
        """``host:port`` of the lowest level."""
        return [address for address, _ in self._leaves]

    @property
    def leaf_pids(self) -> list[int]:
        """Process ids of the lowest level."""
        return [child.pid for _, child in self._leaves]

    def start(self, member: Holder, version: int) -> None:
        """Start level after level; each holds ``version`` before the next one starts. ``member`` asks them."""
        for level in range(self._levels):
            above = self.addresses or [""] * self._relays
            started = [self._start(level, number, above[number]) for number in range(self._relays)]
            for address, child in started:
                self._wait(address, child, member, version)
            self._leaves = started

    def wait_for_roster(self) -> None:
        """Return when everybody who is enrolled by now is known to all levels."""
        time.sleep(ROSTER_S * (self._levels + 1))

    def cut(self) -> int:
        """Return how many readers the lowest level has cut because they took nothing."""
        return sum(child.log.read_bytes().count(_CUT) for _, child in self._leaves)

    def _start(self, level: int, number: int, above: str) -> tuple[str, Child]:
        name = f"relay-{level + 1}-{number}"
        identity = Identity("relay", "relays", name)
        hosts = ("127.0.0.1",)
        token = invite_member(self._hub.layout, self._hub.config, identity, 1.0, datetime.now(UTC), hosts)
        address = f"127.0.0.1:{free_ports(1)[0]}"
        command = ["share-server", "relay", token, "--dir", str(self._folder / name), "--listen", address, "--json"]
        command += ["--roster-seconds", str(ROSTER_S), *(["--follow", above] if above else [])]
        return address, self._processes.start(name, command)

    def _wait(self, address: str, child: Child, member: Holder, version: int) -> None:
        authority = self._hub.layout.ca_cert.read_bytes()
        credentials = grpc.ssl_channel_credentials(authority, member.key, member.certificate)
        end = time.monotonic() + _READY_S
        with grpc.secure_channel(address, credentials, CHANNEL_OPTIONS) as channel:
            stub = hub_pb2_grpc.HubStub(channel)
            while time.monotonic() < end:
                child.check()
                try:
                    if stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=2.0).version >= version:
                        return
                except grpc.RpcError:
                    pass  # not listening yet, or it does not know the member yet
                time.sleep(0.1)
        raise child.failure(f"does not serve version {version} within {_READY_S:g} s")
