"""Keeping the member's certificate valid: it lives days, and is renewed over the same key when half of that is over.

Several processes may work on one directory. Each looks at the certificate file; whoever finds it due first asks the
hub, which gives the same new certificate to all who ask, and writes it in one step. The others find it there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from share_client.link import HubLink
from share_client.member import ClientLayout, check_credentials, load_credentials
from share_core.durable import PUBLIC, write_atomic
from share_core.errors import CertificateError, FedshareError
from share_core.identity import identity_of, not_after, renewal_moment

LOOK_S = 60.0
"""Seconds between two looks at the certificate."""


def renew_if_due(layout: ClientLayout, link: HubLink, now: datetime) -> bool:
    """Ask the hub for a new certificate if half of the life of the present one is over, and keep it.

    Returns whether there is a new one.

    Raises:
        FedshareError: the hub does not answer or refuses, or what it gave is not a certificate of ours. The present one
            stays.
    """
    present = load_credentials(layout, now)
    if now < renewal_moment(present.certificate):
        return False
    fresh = link.renew()
    try:
        if identity_of(fresh) != identity_of(present.certificate):
            raise CertificateError(f"it names {identity_of(fresh).uri}")
        check_credentials(layout, replace(present, certificate=fresh), now)
    except CertificateError as error:
        raise CertificateError(f"what the hub gave is no certificate of ours: {error}; nothing was kept") from error
    if not_after(fresh) <= not_after(present.certificate):  # our clock is ahead of the hub's: later
        return False
    write_atomic(layout.certificate, fresh, PUBLIC)
    return True


@contextlib.contextmanager
def kept_renewed(
    layout: ClientLayout,
    links: Sequence[HubLink | None],
    tell: Callable[[str], None],
    expired: Callable[[FedshareError], None] = lambda error: None,
) -> Iterator[None]:
    """Renew the certificate in time while the block runs, and have ``links`` use each new one, whoever renewed it.

    Args:
        layout: the client directory.
        links: connections to keep, the hub's first; None stands for a relay that is not used.
        tell: told what happened, in one sentence, on a thread.
        expired: told, on the thread, when the certificate has ended without being renewed; nothing more is done then.
    """
    keeper = _Keeper(layout, [link for link in links if link is not None], tell, expired)
    keeper.thread.start()
    try:
        yield
    finally:
        keeper.stop.set()
        keeper.thread.join()


class _Keeper:
    """The thread behind :func:`kept_renewed`."""

    def __init__(
        self,
        layout: ClientLayout,
        links: list[HubLink],
        tell: Callable[[str], None],
        expired: Callable[[FedshareError], None],
    ) -> None:
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="certificate", daemon=True)
        self._layout = layout
        self._links = links
        self._tell = tell
        self._expired = expired
        self._in_use = layout.certificate.read_bytes()
        self._trouble = ""

    def _run(self) -> None:
        while True:
            if not self._look(datetime.now(UTC)) or self.stop.wait(LOOK_S):
                return

    def _look(self, now: datetime) -> bool:
        """Renew if due and use what is in the file; return whether to look again."""
        if now >= not_after(self._in_use) and not self._take(now):
            end = not_after(self._in_use)
            error = CertificateError(
                f"{self._layout.certificate} expired at {end:%Y-%m-%d %H:%M} UTC before it could be renewed: ask the "
                "operator for a new join token"
            )
            self._tell(str(error))
            self._expired(error)
            return False
        try:
            if renew_if_due(self._layout, self._links[0], now):
                end = not_after(self._layout.certificate.read_bytes())
                self._tell(f"certificate renewed until {end:%Y-%m-%d %H:%M} UTC")
            self._trouble = ""
        except FedshareError as error:
            self._complain(error)
        self._take(now)
        return True

    def _take(self, now: datetime) -> bool:
        """Have the links use what is in the file if it is new; return whether it was."""
        try:
            found = load_credentials(self._layout, now)
        except FedshareError:
            return False
        if found.certificate == self._in_use:
            return False
        for link in self._links:
            link.use(found)
        self._in_use = found.certificate
        return True

    def _complain(self, error: FedshareError) -> None:
        """Tell why there is no new certificate, once in a row."""
        if (text := str(error)) != self._trouble:
            self._tell(f"the certificate could not be renewed yet: {text}")
        self._trouble = text
