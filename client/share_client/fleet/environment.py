"""What ClientApp learns from its environment, and the environment itself.

SuperNode starts a worker that starts the ClientApp; all three get the environment made here, from scratch: nothing of
the user's shell may change what Flower does, and Flower writes only into the client's directory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from share_client.durable import make_private_directory
from share_client.member import ClientLayout
from share_core.errors import ConfigError

DIRECTORY = "FEDSHARE_CLIENT_DIR"
"""The client directory."""

TASKS = "FEDSHARE_TASKS"
"""The tasks file."""

LINGER = "FEDSHARE_LINGER_S"
"""Seconds an idle session stays; empty for the default."""

_KEPT = (
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    LINGER,
)
"""What the ClientApp may need of the caller's environment: data, libraries, devices, threads."""


def node_environment(layout: ClientLayout, tasks_path: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the SuperNode and everything it starts."""
    environment = {name: inherited[name] for name in _KEPT if name in inherited}
    programs = [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]
    environment |= {
        "PATH": os.pathsep.join(programs),
        "PYTHONUNBUFFERED": "1",
        "FLWR_HOME": str(make_private_directory(layout.fleet / "flwr")),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        DIRECTORY: str(layout.root.resolve()),
        TASKS: str(tasks_path.resolve()),
    }
    return environment


def read_paths(environment: Mapping[str, str]) -> tuple[Path, Path]:
    """Return (client directory, tasks file) from the environment of a ClientApp.

    Raises:
        ConfigError: it was not started by share-client.
    """
    try:
        return Path(environment[DIRECTORY]), Path(environment[TASKS])
    except KeyError as error:
        raise ConfigError(f"{error.args[0]} is not set: this app is started by share-client join") from error


def read_linger(environment: Mapping[str, str], default: float) -> float:
    """Return how long an idle session stays, in seconds."""
    text = environment.get(LINGER, "")
    try:
        return float(text) if text else default
    except ValueError as error:
        raise ConfigError(f"{LINGER}: expected seconds, got {text!r}") from error
