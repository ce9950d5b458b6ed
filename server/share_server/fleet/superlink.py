"""The SuperLink: Flower's server, on loopback, with TLS of its own that nobody outside this machine trusts."""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from datetime import UTC, datetime
from pathlib import Path

from share_core.durable import PRIVATE
from share_core.identity import Identity, make_authority, make_csr, new_private_key_pem, sign_csr
from share_server.fleet.files import FleetFiles, write_text

CONNECTION = "own"
"""Name of the connection in Flower's ``config.toml``."""

SERVER_DIRECTORY = "FEDSHARE_SERVER_DIR"
"""Environment variable by which the ServerApp learns the server directory."""

_CERTIFICATE_DAYS = 3000.0
_PROBE_SECONDS = 2.0


def prepare(files: FleetFiles) -> None:
    """Make the private authority and the SuperLink's certificate anew; the authority's key is thrown away."""
    now = datetime.now(UTC)
    authority, authority_key = make_authority("fedshare internal", now)
    key = new_private_key_pem()
    identity = Identity("hub", "internal", "superlink")
    certificate = sign_csr(
        authority, authority_key, make_csr(key), identity, now, _CERTIFICATE_DAYS, ("127.0.0.1", "localhost")
    )
    write_text(files.key, key.decode("ascii"), PRIVATE)
    write_text(files.certificate, certificate.decode("ascii"))
    write_text(files.authority, authority.decode("ascii"))


def environment(files: FleetFiles) -> dict[str, str]:
    """Return the whole environment of Flower's processes, built from nothing.

    Flower finds its workers by PATH, so our own installation comes first. It must not phone home, not ask for
    updates, not install anything, and not send loopback calls through a proxy.
    """
    kept = {name: os.environ[name] for name in ("TMPDIR", "LANG", "LC_ALL", "TZ") if name in os.environ}
    binaries = str(Path(sys.executable).parent)
    return {
        **kept,
        "PATH": os.pathsep.join([binaries, "/usr/local/bin", "/usr/bin", "/bin"]),
        "HOME": str(files.home),
        "FLWR_HOME": str(files.home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONUNBUFFERED": "1",
        SERVER_DIRECTORY: str(files.root.parent),
    }


def command(files: FleetFiles, port: int) -> list[str]:
    """Return the command line of the SuperLink."""
    return [
        str(Path(sys.executable).parent / "flower-superlink"),
        "--host=127.0.0.1",
        f"--port={port}",
        f"--ssl-certfile={files.certificate}",
        f"--ssl-keyfile={files.key}",
        f"--ssl-ca-certfile={files.authority}",
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        f"--database={files.database}",
    ]


def healthy(files: FleetFiles, port: int) -> bool:
    """Return whether the SuperLink answers on its port."""
    context = ssl.create_default_context(cafile=str(files.authority))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=_PROBE_SECONDS, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
