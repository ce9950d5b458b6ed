"""Making a server directory, its certificates, and join tokens.

``server.toml`` is written last: a directory that has it is complete.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from datetime import datetime, timedelta
from pathlib import Path

from share_core.durable import PUBLIC, write_atomic
from share_core.errors import ConfigError
from share_core.identity import (
    Identity,
    certificate_fingerprint,
    make_authority,
    make_csr,
    make_signer,
    new_private_key_pem,
    not_after,
    sign_csr,
    token_encode,
)
from share_core.spec_file import spec_to_toml
from share_core.types import SpaceSpec
from share_server.config import ServerConfig, check_hosts, config_to_toml, is_loopback
from share_server.layout import Layout

OWN_ORGANISATION = "server"
"""Organisation in the certificates of the server's own tools. Nobody can be invited into it."""

OWN_CERTIFICATES = {
    "server": Identity("hub", OWN_ORGANISATION, "hub"),
    "operator": Identity("operator", OWN_ORGANISATION, "operator"),
    "fleet": Identity("fleet", OWN_ORGANISATION, "fleet"),
}
"""Certificates that the server makes for itself: file name and identity."""

SIGNER = Identity("signer", OWN_ORGANISATION, "hub")
"""Name in the certificate of the key that signs manifests."""

SIGNER_DAYS = 3650
"""Life of that certificate in days."""

OWN_DAYS = 365
"""Life of those certificates in days."""

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Where Linux says which ports it gives to outgoing connections."""

_USUAL_FIRST_EPHEMERAL = 32768
"""The first of them where the system does not say."""

_FIRST_PORT, _ENOUGH_PORTS, _BIND_TRIES = 10_000, 1_000, 100

INVITED_ROLES = ("trainer", "contributor", "reader", "relay")
"""Roles that a join token can give."""


def create_server(layout: Layout, config: ServerConfig, spec: SpaceSpec, now: datetime) -> None:
    """Fill a fresh server directory: authority, enrolment key, certificates, space and configuration.

    Raises:
        ConfigError: it is a server directory already, holds something else, or cannot be written.
    """
    if layout.config.exists():
        raise ConfigError(f"{layout.root} is a server directory already: choose another one")
    try:
        if layout.root.is_dir() and any(layout.root.iterdir()):
            raise ConfigError(f"{layout.root} is not empty: choose a new directory, or empty this one")
        for folder in (layout.ca_cert.parent, layout.certificate("server").parent, layout.fleet, layout.logs):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        authority, key = make_authority("fedshare authority", now)
        write_atomic(layout.ca_key, key)
        write_atomic(layout.ca_cert, authority, PUBLIC)
        write_atomic(layout.enrol_key, secrets.token_bytes(32))
        write_atomic(layout.space, spec_to_toml(spec).encode(), PUBLIC)
        renew_certificates(layout, config, now)
        write_atomic(layout.config, config_to_toml(config).encode(), PUBLIC)
    except OSError as error:
        raise ConfigError(f"{layout.root} cannot be written: {error.strerror}") from error


def renew_certificates(layout: Layout, config: ServerConfig, now: datetime) -> list[str]:
    """Make those of the server's own certificates anew that are missing or past two thirds of their life.

    Returns the names of the files that were made. Keys stay.
    """
    made = []
    for name, identity in OWN_CERTIFICATES.items():
        path = layout.certificate(name)
        if path.exists() and not_after(path.read_bytes()) - now > timedelta(days=OWN_DAYS / 3):
            continue
        if not layout.key(name).exists():
            write_atomic(layout.key(name), new_private_key_pem())
        certificate = sign_csr(
            layout.ca_cert.read_bytes(),
            layout.ca_key.read_bytes(),
            make_csr(layout.key(name).read_bytes()),
            identity,
            now,
            OWN_DAYS,
            server_names=listener_names(config) if name == "server" else (),
        )
        write_atomic(path, certificate, PUBLIC)
        made.append(name)
    if not (layout.signing_key.exists() and layout.signing_certificate.exists()):
        # Made once: followers keep the certificate they have seen, so a new key is a decision, not a renewal.
        certificate, key = make_signer(
            layout.ca_cert.read_bytes(), layout.ca_key.read_bytes(), SIGNER, now, SIGNER_DAYS
        )
        write_atomic(layout.signing_key, key)
        write_atomic(layout.signing_certificate, certificate, PUBLIC)
        made.append("signing")
    return made


def listener_names(config: ServerConfig) -> tuple[str, ...]:
    """Return every name and address the listeners' certificate must carry."""
    names = [host.strip("[]") for host in config.hosts] + ["localhost", "127.0.0.1"]
    try:
        address = ipaddress.ip_address(config.listen.strip("[]"))
    except ValueError:
        names.append(config.listen)
    else:
        names += [] if address.is_unspecified else [str(address)]
    return tuple(dict.fromkeys(names))


def invite_member(
    layout: Layout,
    config: ServerConfig,
    identity: Identity,
    hours: float,
    now: datetime,
    hosts: tuple[str, ...] = (),
) -> str:
    """Return a join token for ``identity``. It works once; neither the hub nor its store is needed.

    ``hosts`` are the names and addresses under which a relay may serve: needed for that role, and only for it.

    Raises:
        ConfigError: this identity cannot be invited, or the directory is incomplete.
    """
    if identity.role not in INVITED_ROLES:
        raise ConfigError(f"role {identity.role!r} cannot be invited: choose one of {', '.join(INVITED_ROLES)}")
    if identity.organisation == OWN_ORGANISATION:
        raise ConfigError(f"organisation {OWN_ORGANISATION!r} is the server's own: choose another name")
    _check_relay_hosts(config, identity.role, hosts)
    if not 0 < hours <= 24 * 365:
        raise ConfigError(f"hours must be positive and at most a year, got {hours:g}")
    try:
        key, authority = layout.enrol_key.read_bytes(), layout.ca_cert.read_bytes()
    except OSError as error:
        raise ConfigError(f"{layout.root} is no complete server directory: {error.strerror}") from error
    return token_encode(
        key,
        config.enrol_address,
        certificate_fingerprint(authority),
        identity,
        now + timedelta(hours=hours),
        secrets.token_hex(16),
        hosts,
    )


def _check_relay_hosts(config: ServerConfig, role: str, hosts: tuple[str, ...]) -> None:
    """Refuse names for somebody who serves nobody, and the hub's own: a relay must never be taken for the hub."""
    if hosts and role != "relay":
        raise ConfigError(f"--host is for relays: a {role} serves nobody")
    if hosts:
        check_hosts(hosts, "--host")
    own = {host.strip("[]").lower() for host in config.hosts if not is_loopback(host)}
    if taken := sorted(own & {host.strip("[]").lower() for host in hosts}):
        raise ConfigError(f"{', '.join(taken)} is the hub's own name: give the relay another one")


def free_ports(count: int) -> list[int]:
    """Return ``count`` TCP ports that nobody uses on loopback right now.

    They lie below those that the system gives to outgoing connections: while a server restarts, the attempts of its own
    clients could be given its port, and it could not have it back.
    """
    ports, sockets = _lasting_ports(), [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            _bind(one, ports)
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _lasting_ports() -> range:
    """Return the ports to choose from; port 0, the system's own choice, where there are too few."""
    try:
        first = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = _USUAL_FIRST_EPHEMERAL
    return range(_FIRST_PORT, first) if first - _FIRST_PORT >= _ENOUGH_PORTS else range(1)


def _bind(one: socket.socket, ports: range) -> None:
    for _ in range(_BIND_TRIES):
        with contextlib.suppress(OSError):
            one.bind(("127.0.0.1", secrets.choice(ports)))
            return
    one.bind(("127.0.0.1", 0))
