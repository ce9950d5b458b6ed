"""The directory of a relay: its key and certificates, what it remembers, and the versions it keeps."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from share_core.durable import write_atomic
from share_core.errors import ConfigError


@dataclass(frozen=True)
class RelayState:
    """What a relay knows of itself."""

    member: str
    """``organisation/name`` it is enrolled as."""
    space_id: str
    """The space it serves."""
    hub_address: str
    """``host:port`` of the hub: where everything goes that a relay does not do."""
    upstream: str
    """``host:port`` it follows: the hub's, or that of another relay."""
    listen: str
    """``host:port`` it listens on."""


@dataclass(frozen=True)
class RelayHome:
    """The paths of one relay directory. Nothing is created here."""

    root: Path
    """The directory given with ``--dir``."""

    @property
    def key(self) -> Path:
        """Private key of both certificates."""
        return self.root / "relay.key"

    @property
    def caller(self) -> Path:
        """Certificate as a caller, role relay."""
        return self.root / "caller.pem"

    @property
    def serving(self) -> Path:
        """Certificate of the listener."""
        return self.root / "serving.pem"

    @property
    def authority(self) -> Path:
        """The federation's authority."""
        return self.root / "ca.pem"

    @property
    def cache(self) -> Path:
        """Versions: payloads and manifests. May be removed while the relay does not run."""
        return self.root / "versions"

    @property
    def description(self) -> Path:
        """The last DescribeSpaceResponse from upstream, as it travels."""
        return self.root / "space.pb"

    @property
    def state(self) -> Path:
        """``relay.json``, written last: a directory that has it is enrolled."""
        return self.root / "relay.json"


def save_state(home: RelayHome, state: RelayState) -> None:
    """Write ``relay.json``."""
    write_atomic(home.state, (json.dumps(asdict(state), indent=2) + "\n").encode())


def load_state(home: RelayHome) -> RelayState:
    """Read ``relay.json``.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    try:
        values: Any = json.loads(home.state.read_bytes())
        state = RelayState(**values)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{home.root} is not enrolled: run 'share-server relay TOKEN --dir {home.root} --listen HOST:PORT' with a "
            "token from 'share-server invite ... --role relay'"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{home.state} cannot be read: {error}: remove it and enrol anew with a fresh token"
        ) from error
    if not all(isinstance(value, str) for value in asdict(state).values()):
        raise ConfigError(f"{home.state} holds something else than text: remove it and enrol anew with a fresh token")
    return state


def split_address(address: str) -> tuple[str, int]:
    """Return (host, port) of ``host:port``; an IPv6 address stands in brackets.

    Raises:
        ConfigError: it is no such pair.
    """
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{address[:80]!r} is not HOST:PORT, such as relay.example:7443")
    return host, int(port)


@contextlib.contextmanager
def only_one(home: RelayHome) -> Iterator[None]:
    """Hold the directory for this process; the kernel lets go of it when the process ends, however it ends.

    Raises:
        ConfigError: another relay works on it.
    """
    home.root.mkdir(parents=True, exist_ok=True)
    home.root.chmod(0o700)
    with (home.root / "lock").open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another relay works on {home.root}: stop it first, or choose another directory"
            ) from error
        yield
