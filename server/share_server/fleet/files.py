"""Where the working files of the Flower side lie. All of them are made anew at every start, except the database."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core.durable import PUBLIC, write_atomic
from share_core.errors import ConfigError


@dataclass(frozen=True)
class FleetFiles:
    """The paths below ``DIR/fleet``."""

    root: Path
    """``DIR/fleet``."""

    @property
    def home(self) -> Path:
        """Flower's home: connection settings, unpacked apps."""
        return self.root / "home"

    @property
    def shim(self) -> Path:
        """The one-file Flower app that names the installed package."""
        return self.root / "shim"

    @property
    def authority(self) -> Path:
        """Certificate of the authority that only this machine's Flower processes trust."""
        return self.root / "tls" / "ca.pem"

    @property
    def certificate(self) -> Path:
        """The SuperLink's certificate."""
        return self.root / "tls" / "superlink.pem"

    @property
    def key(self) -> Path:
        """The SuperLink's private key."""
        return self.root / "tls" / "superlink.key"

    @property
    def database(self) -> Path:
        """The SuperLink's SQLite file: nodes, runs, messages."""
        return self.root / "flower.db"

    @property
    def superlink(self) -> Path:
        """``{"address": "127.0.0.1:port"}`` of the running SuperLink, for the gateway."""
        return self.root / "superlink.json"

    @property
    def server_app(self) -> Path:
        """Held locked by the ServerApp while it runs; holds its run id and process id."""
        return self.root / "serverapp.lock"

    @property
    def node_keys(self) -> Path:
        """Public keys of nodes on their way into the SuperLink."""
        return self.root / "keys"


def write_text(path: Path, text: str, mode: int = PUBLIC) -> None:
    """Replace ``path`` by ``text`` in one step, making its directory if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode(), mode)


def write_superlink_address(files: FleetFiles, address: str) -> None:
    """Tell the gateway where the SuperLink listens."""
    write_text(files.superlink, json.dumps({"address": address}) + "\n")


def read_superlink_address(files: FleetFiles) -> str:
    """Return ``127.0.0.1:port`` of the SuperLink.

    Raises:
        ConfigError: nothing usable is written there.
    """
    try:
        content: Any = json.loads(files.superlink.read_text("utf-8"))
        return str(content["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{files.superlink} does not tell where the SuperLink listens ({error}): start 'share-server run'"
        ) from error
