"""The Flower app that ``flwr run`` submits: one file that names what is installed already, on both sides."""

from __future__ import annotations

from pathlib import Path

from share_server.fleet.files import write_text

SERVER_APP = "share_server.fleet.server_app:app"
"""The thin ServerApp."""

CLIENT_APP = "share_client.fleet.client_app:app"
"""Named by text: the server side never imports the client side."""

_PYPROJECT = """\
[project]
name = "fedshare-fleet"
version = "1.0.0"
description = "Carries leases. The code is the installed fedshare package."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedshare"

[tool.flwr.app.components]
serverapp = "{server_app}"
clientapp = "{client_app}"

[tool.flwr.app.config]
"""


def write_shim(folder: Path, server_app: str = SERVER_APP, client_app: str = CLIENT_APP) -> None:
    """Write the app into ``folder``."""
    write_text(folder / "pyproject.toml", _PYPROJECT.format(server_app=server_app, client_app=client_app))
