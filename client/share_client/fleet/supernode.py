"""Keeping one Flower SuperNode alive.

It runs in a session of its own, so that everything it started can be ended with it, and dies with us if we are killed.
When it ends by itself, the gateway and the hub tell why:

* our key is not accepted any more: stop, nothing here can change that;
* it was killed or crashed: Flower still believes the node to be online and would refuse it for a minute, so it is
  deactivated in its place, then started again;
* anything else: start it again, waiting longer each time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from share_client.backoff import Backoff
from share_client.durable import make_private_directory
from share_client.fleet.deactivate import deactivate
from share_client.fleet.environment import node_environment
from share_client.fleet.forwarder import Forwarder
from share_client.link import HubLink
from share_client.member import ClientLayout, Member, save_member
from share_core.errors import AccessError, FedshareError, IdentityError, UnavailableError
from share_core.lifeline import tied

_ENDS_IN_S = 6.0
"""Flower forces its own exit after 5 s."""

_HEALTHY_S = 30.0
"""A SuperNode that lived this long was up: waiting times begin anew."""

_UNKNOWN_S = 90.0
"""How long our key may be refused before we believe it: the gateway learns of new nodes with a delay."""


class SuperNode:
    """One supervised SuperNode. :meth:`run` blocks; it must be called from the main thread."""

    def __init__(
        self,
        layout: ClientLayout,
        member: Member,
        tasks_path: Path,
        link: HubLink,
        stop: threading.Event,
        tell: Callable[[str], None],
    ) -> None:
        self._layout = ClientLayout(layout.root.resolve())  # Flower runs in another working directory
        self._member = member
        self._tasks_path = tasks_path
        self._link = link
        self._stop = stop
        self._tell = tell
        self._forwarder = Forwarder(self._layout, member.gateway_address, datetime.now(UTC))
        self._refused_since: float | None = None

    def run(self) -> None:
        """Keep the SuperNode running until ``stop`` is set.

        Raises:
            AccessError: the federation does not accept this node any more.
        """
        self._forwarder.start()
        backoff = Backoff(first=1.0, longest=10.0)
        try:
            self._deactivate()  # after a crash of this machine Flower may still believe the node to be online
            while not self._stop.is_set():
                started = time.monotonic()
                child = self._start()
                try:
                    self._watch(child)
                finally:
                    self._end(child)
                if self._stop.is_set():
                    break
                if time.monotonic() - started >= _HEALTHY_S:
                    backoff.reset()
                self._tell(f"SuperNode ended with code {child.returncode}: starting it again")
                self._after_end()
                backoff.wait(self._stop)
        finally:
            self._forwarder.stop()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{self._forwarder.port}"),
            *("--root-certificates", str(self._forwarder.authority)),
            *("--auth-supernode-private-key", str(self._layout.node_key)),
            *("--host", "127.0.0.1", "--port", str(_free_port())),
        ]
        log = make_private_directory(self._layout.logs) / "supernode.log"
        with log.open("ab") as output:
            return subprocess.Popen(
                tied(command),
                env=node_environment(self._layout, self._tasks_path, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self._layout.root,
            )

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        """Return when the child has ended or ``stop`` is set; tell when the gateway goes and comes."""
        trouble = ""
        while child.poll() is None and not self._stop.wait(0.2):
            if self._forwarder.trouble != trouble:
                trouble = self._forwarder.trouble
                self._tell(trouble or "the gateway can be reached")

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """Stop the child in order, then everything it started, then reap it."""
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_ENDS_IN_S)
            except subprocess.TimeoutExpired:
                self._tell("SuperNode does not end: killing it")
        with contextlib.suppress(ProcessLookupError):  # it may have taken all of its group along
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def _after_end(self) -> None:
        """Find out whether we are still wanted, and make room for the next start.

        Raises:
            AccessError: we are not.
        """
        status = self._deactivate()
        if status != 401:
            self._refused_since = None
            return
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        try:
            node = self._link.get_node()
        except (AccessError, IdentityError) as error:
            raise AccessError(f"this node is not enrolled or was revoked: {error}") from error
        except FedshareError as error:
            self._tell(f"cannot ask the hub about our node: {error}")
            return
        if node.revoked:
            raise AccessError(f"node {self._member.member} was revoked: ask the operator")
        if node.node_id not in (0, self._member.node_id):
            self._member = replace(self._member, node_id=node.node_id)
            save_member(self._layout, self._member)
        elif now - self._refused_since >= _UNKNOWN_S:
            raise AccessError(
                f"the gateway has refused node {self._member.member} for {_UNKNOWN_S:g} s: not enrolled or revoked"
            )

    def _deactivate(self) -> int:
        if not self._member.node_id:
            return 0
        return deactivate(self._layout, self._forwarder.port, self._forwarder.authority, self._member.node_id)


def wait_for_node(layout: ClientLayout, link: HubLink, stop: threading.Event, tell: Callable[[str], None]) -> int:
    """Return Flower's id of our node, once the server has registered it; 0 if ``stop`` was set before.

    Raises:
        AccessError, IdentityError: the hub does not let us in.
    """
    told = ""
    while not stop.is_set():
        try:
            node = link.get_node()
        except UnavailableError as error:
            reason = f"waiting for the hub: {error}"
        else:
            if node.revoked:
                raise AccessError(f"node {node.member} was revoked: ask the operator")
            if node.node_id:
                return int(node.node_id)
            reason = "waiting for the server to register our node"
        if reason != told:
            tell(reason)
            told = reason
        stop.wait(1.0)
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
