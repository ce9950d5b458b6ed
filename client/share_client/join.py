"""``share-client join``: enrol if needed, then keep a SuperNode running and show what its sessions do."""

from __future__ import annotations

import contextlib
import fcntl
import json
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from share_client.durable import make_private_directory
from share_client.enrol import enrol
from share_client.link import HubLink
from share_client.member import ClientLayout, Member, check_node_key, load_credentials, load_member, save_member
from share_client.renewal import kept_renewed
from share_client.session_log import sentence
from share_core.errors import CertificateError, ConfigError, FedshareError, SpaceMismatchError
from share_core.identity import identity_of


def ensure_member(layout: ClientLayout, token: str | None, now: datetime, tell: Callable[[str], None]) -> Member:
    """Return who this directory is; enrol with ``token`` if it is nobody yet, or its identity has run out.

    Raises:
        ConfigError: not enrolled and no token.
        CertificateError: expired or damaged, and no token.
        FedshareError: what :func:`share_client.enrol.enrol` raises.
    """
    if not layout.member.exists():
        if token is None:
            raise ConfigError(f"{layout.root} is not enrolled: give a join token, share-client join TOKEN ...")
        member = enrol(token, layout, now)
        tell(f"enrolled as {member.member}")
        return member
    member = load_member(layout)
    try:
        load_credentials(layout, now)
        check_node_key(layout)
    except (CertificateError, ConfigError):
        if token is None:
            raise
        member = enrol(token, layout, now)
        tell(f"enrolled again as {member.member}")
        return member
    if token is not None:
        tell(f"{layout.root} is enrolled as {member.member} already: the token was not used")
    return member


def remember_follow(layout: ClientLayout, member: Member, follow: str | None) -> Member:
    """Return ``member`` with the relay of ``--follow``, and keep it; None changes nothing, ``hub`` forgets the relay.

    Raises:
        ConfigError: it is no HOST:PORT.
    """
    if follow is None:
        return member
    changed = replace(member, follow_address=follow_address(follow))
    if changed != member:
        save_member(layout, changed)
    return changed


def follow_address(follow: str) -> str:
    """Return the address of a relay as given on the command line; ``hub`` is none.

    Raises:
        ConfigError: it is no HOST:PORT.
    """
    if follow == "hub":
        return ""
    host, _, port = follow.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--follow {follow!r}: expected HOST:PORT of a relay, or hub to follow the hub itself")
    return follow


def join(layout: ClientLayout, member: Member, tasks_path: Path, tell: Callable[[str], None]) -> None:
    """Work leases until SIGTERM or SIGINT. Call it in the main thread.

    Raises:
        AccessError, IdentityError: the federation does not accept this member any more.
        CertificateError: the certificate expired before the hub could be asked for a new one.
        SpaceMismatchError: the backbone in the tasks file is not the one of the space.
    """
    from share_client.fleet.supernode import SuperNode, wait_for_node

    credentials = load_credentials(layout, datetime.now(UTC))
    role = identity_of(credentials.certificate).role
    if role != "trainer":
        tell(f"{member.member} is enrolled as {role}: only trainers work leases, nothing more to do")
        return
    stop = threading.Event()
    mismatches: list[str] = []
    expired: list[FedshareError] = []

    def look(line: dict[str, Any]) -> None:
        tell(sentence(line))
        if line.get("event") == "failed" and line.get("error") == SpaceMismatchError.__name__:
            mismatches.append(str(line.get("reason")))  # no later lease can end otherwise: trying on would hide it
            stop.set()

    def give_up(error: FedshareError) -> None:
        expired.append(error)
        stop.set()

    with (
        _stopping_on_signals(stop),
        HubLink(member.hub_address, credentials) as link,
        kept_renewed(layout, [link], tell, give_up),
        _following(layout, look),
    ):
        node_id = wait_for_node(layout, link, stop, tell)
        if stop.is_set():
            return
        if node_id != member.node_id:
            member = replace(member, node_id=node_id)
            save_member(layout, member)
        tell(f"node {node_id} of {member.member}: waiting for leases")
        SuperNode(layout, member, tasks_path, link, stop, tell).run()
        tell("stopped")
    if expired:
        raise expired[0]
    if mismatches:
        raise SpaceMismatchError(mismatches[0])


@contextlib.contextmanager
def only_join(layout: ClientLayout) -> Iterator[None]:
    """Hold the lock of the directory.

    Raises:
        ConfigError: another join runs on it.
    """
    make_private_directory(layout.root)
    with (layout.root / "join.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another share-client join runs on {layout.root}: stop it, or use another --dir"
            ) from error
        yield


@contextlib.contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on SIGTERM and SIGINT."""
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _following(layout: ClientLayout, look: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Pass on every new line of the session log while the block runs."""
    done = threading.Event()
    make_private_directory(layout.logs)
    layout.session_log.touch(mode=0o600)
    with layout.session_log.open(encoding="utf-8") as file:
        file.seek(0, 2)
        thread = threading.Thread(target=_tail, args=(file, done, look), name="follow-log", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _tail(file: TextIO, done: threading.Event, look: Callable[[dict[str, Any]], None]) -> None:
    partial = ""
    while True:
        last = done.is_set()
        partial += file.read()
        *lines, partial = partial.split("\n")
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                look(json.loads(line))
        if last:
            return
        done.wait(0.2)
