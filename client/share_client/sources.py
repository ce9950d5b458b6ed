"""Where versions are followed from: a relay while it works, else the hub.

A relay serves the hub's signed versions and nothing else. It may be slow, behind or gone without harm: after some
failures the hub is followed, and the relay is tried again later.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from share_client.link import HubLink
from share_client.member import Credentials
from share_core.errors import DigestError, FedshareError, UnavailableError

PATIENCE = 3
"""Failures of the relay in a row, without one version in between, after which the hub is followed."""

AGAIN_S = 60.0
"""Seconds after which the relay is tried again."""


class Sources:
    """The hub and perhaps a relay. Used by one thread at a time."""

    def __init__(
        self,
        hub: HubLink,
        relay: HubLink | None = None,
        tell: Callable[[str], None] = lambda text: None,
        again_s: float = AGAIN_S,
    ) -> None:
        self.hub = hub
        self._relay = relay
        self._tell = tell
        self._again_s = again_s
        self._failures = 0
        self._left = False
        self._again_at = 0.0

    def current(self) -> HubLink:
        """Return the link to follow now."""
        if self._relay is None or (self._left and not self.relay_is_due):
            return self.hub
        return self._relay

    def is_relay(self, link: HubLink) -> bool:
        """Whether ``link`` is the relay."""
        return link is self._relay

    @property
    def relay_is_due(self) -> bool:
        """Whether the hub is followed because the relay failed, and it is time to try the relay again."""
        return self._left and time.monotonic() >= self._again_at

    def worked(self, link: HubLink) -> None:
        """Say that a version came over ``link``."""
        if not self.is_relay(link):
            return
        if self._left:
            self._tell(f"the relay {link.address} works again: versions come from there")
        self._failures, self._left = 0, False

    def failed(self, link: HubLink, error: FedshareError, at_once: bool = False) -> None:
        """Say that ``link`` failed. A relay is left after :data:`PATIENCE` failures, or at once if more are vain."""
        if not self.is_relay(link):
            return
        self._failures += 1
        vain = at_once or not isinstance(error, UnavailableError | DigestError)
        if not (vain or self._left) and self._failures < PATIENCE:
            return
        if not self._left:
            self._tell(
                f"the relay {link.address} fails: {error}; versions come from the hub, and the relay is tried again "
                f"every {self._again_s:g} s"
            )
        self._left = True
        self._again_at = time.monotonic() + self._again_s


@contextlib.contextmanager
def open_relay(address: str, credentials: Credentials) -> Iterator[HubLink | None]:
    """Open the link to a relay for as long as the block runs; None without an address."""
    if not address:
        yield None
        return
    with HubLink(address, credentials) as link:
        yield link
