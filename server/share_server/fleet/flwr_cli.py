"""Flower's command line: its stable seam, asked for JSON and believed only in its ``success`` field.

The exit code says nothing: a refused registration, for one, ends with 0.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from share_core.errors import RequestError, UnavailableError
from share_core.lifeline import tied
from share_server.fleet.files import FleetFiles, write_text
from share_server.fleet.node_table import canonical_key
from share_server.fleet.superlink import CONNECTION, environment

_TIMEOUT_SECONDS = 40.0
_FINISHED = "finished"


class FlowerCommands:
    """``flwr`` against our own SuperLink. Call it from the main thread: the commands die with the thread."""

    def __init__(self, files: FleetFiles, cancelled: Callable[[], bool]) -> None:
        self._files = files
        self._cancelled = cancelled
        self.running: int | None = None
        """Process id of the command that runs now, for whoever clears up strangers."""

    def configure(self, port: int) -> None:
        """Write Flower's settings for the SuperLink on ``port``."""
        address, authority = json.dumps(f"127.0.0.1:{port}"), json.dumps(str(self._files.authority))
        text = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f"[superlink.{CONNECTION}]\naddress = {address}\nroot-certificates = {authority}\n"
        )
        write_text(self._files.home / "config.toml", text)

    def submit(self) -> str:
        """Submit the shim; return the id of the run."""
        return str(self._call("run", str(self._files.shim), CONNECTION)["run-id"])

    def unfinished_runs(self) -> list[str]:
        """Return the ids of all runs that are not over."""
        runs = self._call("ls", CONNECTION)["runs"]
        return [str(run["run-id"]) for run in runs if not str(run["status"]).startswith(_FINISHED)]

    def stop(self, run_id: str) -> None:
        """Stop a run; one that is over already counts as stopped."""
        try:
            self._call("stop", run_id, CONNECTION)
        except UnavailableError:
            if run_id in self.unfinished_runs():
                raise

    def register(self, member: str, public_key: bytes) -> int:
        """Register a node's key under its member's name; return Flower's id of the node.

        Raises:
            RequestError: it is no elliptic-curve key in PEM form.
        """
        path = self._files.node_keys / f"{member.replace('/', '+')}.pub"
        write_text(path, openssh_key(public_key, member))
        answer = self._call("supernode", "register", str(path), CONNECTION, "--name", member)
        return int(answer["node-id"])

    def registered(self) -> dict[bytes, int]:
        """Return Flower's node ids by key, PEM, from the SuperLink's database.

        No command tells which id belongs to which key, and a key that is in use cannot be registered again. So
        after a crash between registering and binding the database is the only one who knows.
        """
        if not self._files.database.exists():
            return {}
        try:
            with closing(
                sqlite3.connect(f"{self._files.database.as_uri()}?mode=ro", uri=True, timeout=5.0)
            ) as database:
                rows = database.execute("SELECT public_key, node_id FROM node WHERE unregistered_at IS NULL").fetchall()
        except sqlite3.OperationalError as error:
            raise UnavailableError(f"{self._files.database} cannot be read: {error}") from error
        # Flower keeps its unsigned ids in SQLite's signed integers.
        return {bytes(key): int(node_id) % 2**64 for key, node_id in rows if key is not None}

    def _call(self, *arguments: str) -> dict[str, Any]:
        """Run one command and return its answer.

        Raises:
            UnavailableError: it failed, took too long or was cancelled.
        """
        line = [str(Path(sys.executable).parent / "flwr"), *arguments, "--format", "json"]
        with subprocess.Popen(
            tied(line),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(self._files),
            start_new_session=True,
        ) as process:
            self.running = process.pid
            try:
                output = self._wait(process)
            finally:
                process.kill()
                self.running = None
        answer = _last_object(output)
        if answer.get("success") is not True:
            said = answer.get("error-message") or output.strip()[-500:]
            raise UnavailableError(f"flwr {' '.join(arguments[:2])} failed: {said}")
        return answer

    def _wait(self, process: subprocess.Popen[str]) -> str:
        end = time.monotonic() + _TIMEOUT_SECONDS
        while not self._cancelled() and time.monotonic() < end:
            try:
                return process.communicate(timeout=0.1)[0]
            except subprocess.TimeoutExpired:
                continue
        raise UnavailableError("flwr was cancelled" if self._cancelled() else "flwr took too long")


def openssh_key(public_key: bytes, member: str) -> str:
    """Return a PEM public key in the form that ``flwr supernode register`` reads.

    Raises:
        RequestError: it is no public key.
    """
    canonical = canonical_key(public_key)
    if not canonical:
        raise RequestError(f"node key of {member} is no PEM public key: have it join again")
    key = serialization.load_pem_public_key(canonical)
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")


def _last_object(output: str) -> dict[str, Any]:
    """Return the JSON object in a command's output, which may have other lines around it."""
    start, end = output.find("{"), output.rfind("}")
    try:
        found = json.loads(output[start : end + 1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
