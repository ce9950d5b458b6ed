"""The lock that keeps a second session out of a client directory."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator

from share_client.member import ClientLayout
from share_core.errors import UnavailableError


@contextlib.contextmanager
def only_session(layout: ClientLayout, seconds: float) -> Iterator[None]:
    """Hold the session lock: two sessions on one directory would train and send everything twice.

    Raises:
        UnavailableError: another one holds it for longer than ``seconds``.
    """
    end = time.monotonic() + seconds
    with (layout.root / "session.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise UnavailableError(
                        f"another session works in {layout.root}: wait for it to end, or stop it"
                    ) from error
                time.sleep(0.2)
        yield
