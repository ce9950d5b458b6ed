"""Runs a scenario as a real federation on loopback: a real server, real clients, real TLS, real processes.

Nothing here stands in for the product: the commands are the ones a person types, started from the same
environment. The driver does what people do around them: it puts tasks into a client's tasks.toml when they
arrive and reads the hub's records until every task is merged and evaluated at the newest version.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from share_core.errors import UnavailableError
from share_simulations.processes import Child, Processes, ProcessFailedError
from share_simulations.progress import FederationView, Progress, last_said, view_of
from share_simulations.scenario import ClientPlan, Scenario, client_folder, write_tasks_file
from share_simulations.watch import HubWatch, Observation

READY_TIMEOUT_S = 120.0
"""Longest wait for the server to be up."""
POLL_S = 0.5
STATE_FOLDER = "state"
"""Folder of a client's identity and outbox, inside the client's folder."""

SESSION_LOG = Path("logs", "session.jsonl")
"""Where a client says what it does, inside its state folder."""
SETTLE_S = 2.5
"""The hub writes its byte counters about once a second."""


@dataclass(frozen=True)
class RunFolders:
    """Where things lie in a run folder."""

    root: Path

    @property
    def server(self) -> Path:
        """Directory of share-server."""
        return self.root / "server"

    @property
    def clients(self) -> Path:
        """One folder per client with its private data."""
        return self.root / "clients"

    @property
    def logs(self) -> Path:
        """One log per process."""
        return self.root / "logs"


@dataclass(frozen=True)
class FederationRecord:
    """What a finished federation leaves to measure."""

    seen: Observation
    """The hub's records at the end."""
    seconds: float
    """From the start of the server to the end of the last evaluation."""


def run_federation(scenario: Scenario, folders: RunFolders, progress: Progress) -> FederationRecord:
    """Run ``scenario`` to its end and stop every process again, also on errors and Ctrl-C.

    Raises:
        ProcessFailedError: a process ended, refused or stalled; shows the end of its log.
        FedshareError: the hub refused the operator.
    """
    started = time.monotonic()
    with Processes(folders.logs, _environment(scenario)) as processes:
        server, address = _start_server(scenario, folders, processes, progress)
        watch = HubWatch.of_server(folders.server, address)
        try:
            seen = _drive(_Driver(scenario, folders, processes, server, progress), watch)
        finally:
            watch.close()
        seconds = time.monotonic() - started
        progress.note("stopping the federation")
    return FederationRecord(seen, seconds)


def _start_server(
    scenario: Scenario, folders: RunFolders, processes: Processes, progress: Progress
) -> tuple[Child, str]:
    """Initialise and start the server; return it and the hub's address once it is up."""
    folder = str(folders.server)
    progress.note("starting the server")
    init = ["share-server", "init", folder, "--space", scenario.backbone, "--host", "127.0.0.1", "--port", "0"]
    processes.call("init", init)
    server = processes.start("server", ["share-server", "run", folder])
    ready = folders.server / "run.json"
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not ready.is_file():
        server.check()
        if time.monotonic() > deadline:
            raise server.failure(f"not ready after {READY_TIMEOUT_S:g} s")
        time.sleep(0.1)
    return server, hub_address(ready)


def hub_address(run_file: Path) -> str:
    """Return the hub's ``host:port`` from a server's run.json."""
    return str(json.loads(run_file.read_text(encoding="utf-8"))["addresses"]["hub"])


class _Driver:
    """Starts clients and hands out tasks as they arrive."""

    def __init__(
        self, scenario: Scenario, folders: RunFolders, processes: Processes, server: Child, progress: Progress
    ) -> None:
        self.scenario = scenario
        self.processes = processes
        self.server = server
        self._folders = folders
        self._progress = progress
        self._arrived: list[str] = []
        self._clients: dict[str, Child] = {}
        self._started = time.monotonic()

    def deliver(self, seen: Observation) -> None:
        """Put every task that is due into its client's tasks.toml; start clients whose first task this is."""
        merged, elapsed = len(seen.merged_tasks), time.monotonic() - self._started
        for client in self.scenario.clients:
            due = [t for t in client.tasks if t.arrival.due(merged, elapsed)]
            new = [client.task_id(t) for t in due if client.task_id(t) not in self._arrived]
            if not new:
                continue
            tasks_file = write_tasks_file(self._folders.clients, self.scenario, client, due)
            self._arrived.extend(new)
            if client.member not in self._clients:
                self._clients[client.member] = self._join(client, tasks_file)

    def view(self, seen: Observation) -> FederationView:
        """Return what there is to show."""
        said = {c.organisation: last_said(self._state(c) / SESSION_LOG) for c in self.scenario.clients}
        return view_of(self.scenario, self._arrived, seen, said)

    def show(self, seen: Observation) -> None:
        """Show the newest state."""
        self._progress.show(self.view(seen))

    def stalled(self, seen: Observation) -> ProcessFailedError:
        """Return the error for a federation in which nothing happens any more."""
        lines = self.view(seen).clients
        stuck = next((line for line in lines if line.state != "idle"), lines[0])
        child = self._clients.get(stuck.member, self.server)
        what = f"{stuck.state} {stuck.task}".strip()
        return child.failure(
            f"nothing new at the hub for {self.scenario.stall_s:g} s (version {seen.version}, {stuck.member} {what})"
        )

    def _state(self, client: ClientPlan) -> Path:
        return client_folder(self._folders.clients, client) / STATE_FOLDER

    def _join(self, client: ClientPlan, tasks_file: Path) -> Child:
        self._progress.note(f"{client.member} joins")
        invite = ["share-server", "invite", str(self._folders.server), client.member]
        token = self.processes.call(f"invite-{client.organisation}", invite).strip()
        state = self._state(client)
        join = ["share-client", "join", "-", "--tasks", str(tasks_file), "--dir", str(state)]
        return self.processes.start(client.organisation, join, stdin=token)


def _drive(driver: _Driver, watch: HubWatch) -> Observation:
    """Hand out tasks until all are merged and evaluated at the newest version; return what was seen last."""
    scenario = driver.scenario
    seen = Observation()
    last_change = time.monotonic()
    while True:
        driver.processes.check()
        newest = _observe(watch, seen)
        if newest != seen:
            last_change = time.monotonic()
        seen = newest
        if seen.refused:
            task, reason = next(iter(seen.refused.items()))
            raise driver.server.failure(f"the hub refused an update of {task}: {reason}")
        driver.deliver(seen)
        driver.show(seen)
        if seen.complete(scenario.task_ids):
            time.sleep(SETTLE_S)
            return _observe(watch, seen)
        if time.monotonic() - last_change > scenario.stall_s:
            raise driver.stalled(seen)
        time.sleep(POLL_S)


def _observe(watch: HubWatch, seen: Observation) -> Observation:
    """Return a new observation, or the old one while the hub does not answer."""
    try:
        return watch.observe()
    except UnavailableError:
        return seen


def _environment(scenario: Scenario) -> dict[str, str]:
    """Return variables for the children: threads shared out between them, output unbuffered."""
    threads = max(1, (os.cpu_count() or 1) // max(1, len(scenario.clients)))
    return {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
