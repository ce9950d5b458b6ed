"""Flower's own path for the same payloads: updates per second, latency, and what is lost when its server is killed.

A real SuperLink with real SuperNodes on loopback, without TLS (which favours it), and an app that replies with a random
array at once. A reply counts as taken when its SuperNode has written "Sent successfully": the SuperLink has answered
all requests for it by then. Lost are taken replies that the ServerApp never gets, although the SuperLink is started
again at once and the ServerApp pulls as soon as it can. Dropped are replies that a SuperNode could not deliver
meanwhile: it does not try again.
"""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from share_server.fleet import shim, superlink
from share_server.fleet.files import FleetFiles, write_text
from share_server.provision import free_ports
from share_simulations.bench.flower_app import FOLDER
from share_simulations.bench.stats import percentile
from share_simulations.processes import Child, Processes, ProcessFailedError

Progress = Callable[[str], None]

_TAKEN = b"Sent successfully"
_DROPPED = b"Failed to send message"
_HEALTHY_S = 60.0
_FIRST_REPLY_S = 90.0
_MEASURE_S = 30.0
_HOLD_S = 45.0
"""Longest time in which replies gather at the SuperLink before it is killed."""
_HELD = 3
"""Replies per node that are enough."""
_SILENT_S = 8.0
"""A ServerApp that has made no round for so long is gone."""
_AFTER_S = 25.0
"""How long the ServerApp may still get replies after the restart; Flower ends it within about 10 s."""


def compare_with_flower(folder: Path, nodes: int, payload_bytes: int, progress: Progress) -> dict[str, Any]:
    """Measure Flower once with its state in memory, which is its default, and once with a database.

    Raises:
        ProcessFailedError: one of its processes cannot run; shows its log.
    """
    progress(f"Flower, state in memory: {nodes} SuperNodes")
    memory = _measure(folder / "flower-memory", nodes, payload_bytes, False, progress)
    progress("Flower, state in a database")
    database = _measure(folder / "flower-database", nodes, payload_bytes, True, progress)
    return {
        "flower_nodes": nodes,
        "flower_updates_per_s": memory["updates_per_s"],
        "flower_latency_p50_ms": memory["latency_p50_ms"],
        "flower_latency_p99_ms": memory["latency_p99_ms"],
        "flower_taken_before_kill": memory["taken"],
        "flower_lost_after_kill": memory["lost"],
        "flower_taken_before_kill_database": database["taken"],
        "flower_lost_after_kill_database": database["lost"],
        "flower_dropped_by_nodes": memory["dropped"],
        "flower_dropped_by_nodes_database": database["dropped"],
        "flower_run_survived_kill": memory["run_survived"],
        "flower_run_survived_kill_database": database["run_survived"],
        "flower_note": f"{nodes} SuperNodes, no TLS, ServerApp looks for replies every 50 ms (Flower's own loop: 3 s)",
    }


class FlowerStand:
    """One SuperLink with its SuperNodes and one run."""

    def __init__(self, folder: Path, nodes: int, payload_bytes: int, database: bool, processes: Processes) -> None:
        self._folder = folder
        self._files = FleetFiles(folder)
        self._nodes = nodes
        self._database = database
        self._processes = processes
        (self._port,) = free_ports(1)
        write_text(folder / "job.json", json.dumps({"nodes": nodes, "bytes": payload_bytes}))
        module = "share_simulations.bench.flower_app"
        shim.write_shim(self._files.shim, f"{module}:server", f"{module}:client")
        config = (
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )
        write_text(self._files.home / "config.toml", config)
        self._nodes_running: list[Child] = []

    def start(self) -> None:
        """Start everything and submit the run."""
        self.superlink = self._start_superlink()
        for number, port in enumerate(free_ports(self._nodes)):
            address = f"127.0.0.1:{self._port}"
            command = [
                "flower-supernode",
                "--insecure",
                "--superlink",
                address,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ]
            self._nodes_running.append(self._processes.start(f"supernode{number}", command))
        self._processes.call("flwr run", ["flwr", "run", str(self._files.shim), "own", "--format", "json"])

    def kill_superlink(self) -> None:
        """SIGKILL the SuperLink, reap it, and start it again with the same arguments."""
        self.superlink.signal(signal.SIGKILL)
        while self.superlink.exit_code() is None:
            time.sleep(0.01)
        self.superlink = self._start_superlink()

    def hold(self) -> None:
        """Let the ServerApp pull no replies for now."""
        (self._folder / "hold").touch()

    def release(self) -> None:
        """Let it pull again."""
        (self._folder / "hold").unlink()

    def taken(self) -> int:
        """Return how many replies the SuperNodes have delivered to the SuperLink."""
        return self._said(_TAKEN)

    def dropped(self) -> int:
        """Return how many replies the SuperNodes have thrown away because the SuperLink did not take them."""
        return self._said(_DROPPED)

    def pulled(self) -> list[dict[str, Any]]:
        """Return the replies that the ServerApp has got, in order."""
        path = self._folder / "replies.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if not line["error"]]

    def run_lives(self) -> bool:
        """Return whether the ServerApp still makes its rounds."""
        return time.time() - (self._folder / "alive").stat().st_mtime < _SILENT_S

    def wait(self, reached: Callable[[], bool], seconds: float) -> bool:
        """Return whether a condition came true in time; every process must live on."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if reached():
                return True
            self._processes_alive()
            time.sleep(0.1)
        return False

    def _said(self, words: bytes) -> int:
        return sum(child.log.read_bytes().count(words) for child in self._nodes_running)

    def _processes_alive(self) -> None:
        for child in (self.superlink, *self._nodes_running):
            child.check()

    def _start_superlink(self) -> Child:
        command = ["flower-superlink", "--insecure", "--host=127.0.0.1", f"--port={self._port}"]
        command += ["--disable-runtime-dependency-installation"]
        command += [f"--database={self._files.database}"] if self._database else []
        child = self._processes.start("superlink", command)
        end = time.monotonic() + _HEALTHY_S
        while not self._healthy():
            child.check()
            if time.monotonic() > end:
                raise child.failure(f"not healthy within {_HEALTHY_S:g} s")
            time.sleep(0.1)
        return child

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=2.0) as answer:
                return int(answer.status) == 200
        except (OSError, urllib.error.URLError):
            return False


def _measure(folder: Path, nodes: int, payload_bytes: int, database: bool, progress: Progress) -> dict[str, Any]:
    folder.mkdir(parents=True)
    environment = superlink.environment(FleetFiles(folder)) | {FOLDER: str(folder)}
    with Processes(folder / "logs", environment, patience_s=5.0) as processes:
        stand = FlowerStand(folder, nodes, payload_bytes, database, processes)
        stand.start()
        if not stand.wait(lambda: len(stand.pulled()) >= nodes, _FIRST_REPLY_S):
            raise ProcessFailedError(
                f"Flower gave no reply within {_FIRST_REPLY_S:g} s; its logs said: {_tails(folder)}"
            )
        begin = time.monotonic()
        if not database:  # measured once, in its default and faster form
            progress(f"  replies come; measuring for {_MEASURE_S:g} s")
            time.sleep(_MEASURE_S)
        counted = [line for line in stand.pulled() if begin <= line["at"] < begin + _MEASURE_S]
        progress("  letting replies gather, then killing the SuperLink")
        stand.hold()
        time.sleep(1.0)  # a round that had begun
        enough = len(stand.pulled()) + _HELD * nodes
        stand.wait(lambda: stand.taken() >= enough, _HOLD_S)
        taken = stand.taken()
        stand.kill_superlink()
        stand.release()
        time.sleep(_AFTER_S)
        seconds = [line["seconds"] for line in counted]
        return {
            "updates_per_s": round(len(counted) / _MEASURE_S, 3),
            "latency_p50_ms": round(1000 * percentile(seconds, 0.5), 1),
            "latency_p99_ms": round(1000 * percentile(seconds, 0.99), 1),
            "taken": taken,
            "lost": max(0, taken - len(stand.pulled())),
            "dropped": stand.dropped(),
            "run_survived": stand.run_lives(),
        }


def _tails(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-800:] for path in sorted((folder / "logs").glob("*.log")))
