"""Gives every enrolled node an id in Flower and tells the hub."""

from __future__ import annotations

import time

from share_core.errors import RequestError, UnavailableError
from share_server.fleet.flwr_cli import FlowerCommands
from share_server.fleet.hub_link import EnrolledNode, HubLink
from share_server.fleet.node_table import canonical_key
from share_server.hub import log

PERIOD = 1.0
"""Seconds between two looks at the hub's table."""

_RETRY = 5.0
"""Seconds until a node whose registration failed is tried again."""


class Registrar:
    """Step it while hub and SuperLink are healthy. Cheap as long as every node is bound."""

    def __init__(self, link: HubLink, commands: FlowerCommands) -> None:
        self._link = link
        self._commands = commands
        self._next_look = 0.0
        self._waiting: dict[str, float] = {}
        self._compared = False

    def superlink_restarted(self) -> None:
        """Compare all nodes with Flower's database at the next look: it may have been lost or restored."""
        self._compared = False

    def step(self) -> None:
        """Register and bind what is enrolled and has no id yet; at most one registration per call."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + PERIOD
        try:
            nodes = [node for node in self._link.list_nodes() if not node.revoked and node.public_key]
            due = [node for node in nodes if node.node_id == 0 or not self._compared]
            due = [node for node in due if self._waiting.get(node.member, 0.0) <= now]
            if not due:
                return
            known = self._commands.registered()
        except UnavailableError as error:
            log.warning("nodes not compared", reason=str(error))
            return
        wrong = [node for node in due if known.get(canonical_key(node.public_key)) != node.node_id]
        self._compared = self._compared or len(wrong) <= 1
        if wrong:
            self._bind(wrong[0], known)
            self._next_look = time.monotonic() + (PERIOD if len(wrong) == 1 else 0.0)

    def _bind(self, node: EnrolledNode, known: dict[bytes, int]) -> None:
        try:
            # A key that Flower has already was registered in an earlier life that ended before it was bound.
            node_id = known.get(canonical_key(node.public_key))
            if node_id is None:
                node_id = self._commands.register(node.member, node.public_key)
            self._link.bind_node(node.member, node_id)
        except (UnavailableError, RequestError) as error:
            self._waiting[node.member] = time.monotonic() + _RETRY
            log.warning("node not registered", member=node.member, reason=str(error))
            return
        self._waiting.pop(node.member, None)
        log.info("node registered", member=node.member, node_id=str(node_id))
