"""The body of ``share-server run DIR``: hub, SuperLink, gateway and the Flower run, kept alive by one process.

The main thread forks, waits and reaps; nothing else does. Children are tied to it by the kernel, and it adopts what
its children leave behind, so neither its own sudden death nor theirs leaves a process over. A hub that ends by itself
has refused to go on (storage, configuration): then everything stops, for a restart could only hide it.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import logging
import logging.handlers
import os
import signal
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console

from share_core import lifeline
from share_core.errors import ConfigError
from share_server.config import ServerConfig
from share_server.fleet import shim, superlink
from share_server.fleet.files import FleetFiles, write_superlink_address, write_text
from share_server.fleet.flower_run import FlowerRun
from share_server.fleet.flwr_cli import FlowerCommands
from share_server.fleet.hub_link import HubLink
from share_server.fleet.registrar import Registrar
from share_server.fleet.service import Service
from share_server.hub import log
from share_server.layout import Layout
from share_server.provision import free_ports

EXIT_STOPPED = 0
"""Asked to stop, and everything has ended."""

EXIT_FAILED = 1
"""Something cannot run; the reason was printed."""

_HUB_REFUSED = 1
"""The hub's exit code when its storage or its merging failed, or its configuration cannot be used."""

_HUB_SAYS = "share-server hub: "
"""How the sentence begins with which a hub says why it cannot run."""

_TICK = 0.15
_REAP_EVERY = 1.0
_DEATHS_AT_START = 3
"""A process that dies so often before it was ever healthy will not get better by itself."""

_FLOWER_PATIENCE = 5.0
_FOREVER = 10**9


def supervise(layout: Layout, config: ServerConfig, fleet: bool) -> int:
    """Run everything until SIGTERM, SIGINT or SIGHUP; return the exit code.

    Raises:
        ConfigError: another supervisor runs on this directory, or its files cannot be used.
    """
    layout = Layout(layout.root.resolve())
    layout.logs.mkdir(parents=True, exist_ok=True)
    with _only_one(layout), _logging(layout.logs / "supervisor.log"):
        lifeline.become_subreaper()
        return _Supervisor(layout, config, fleet).run()


class _Supervisor:
    """One life of the server."""

    def __init__(self, layout: Layout, config: ServerConfig, fleet: bool) -> None:
        self._layout = layout
        self._config = config
        self._stopping = False
        self._announced: tuple[object, ...] | None = None
        self._before = frozenset(lifeline.children())
        self._next_reap = 0.0
        self._link = HubLink(layout, config)
        self._files = FleetFiles(layout.fleet)
        self._port = 0
        self._hub = Service("hub", layout.logs / "hub.log", self._launch_hub, self._link.serving, _FOREVER)
        self._superlink = Service(
            "superlink", layout.logs / "superlink.log", self._launch_superlink, self._probe_superlink, 40.0
        )
        self._gateway = Service("gateway", layout.logs / "gateway.log", self._launch_gateway, self._probe_gateway, 30.0)
        self._commands = FlowerCommands(self._files, lambda: self._stopping)
        self._services = [self._hub]
        self._run: FlowerRun | None = None
        self._registrar = Registrar(self._link, self._commands)
        if fleet:
            self._prepare_fleet()
            self._services += [self._superlink, self._gateway]
            self._run = FlowerRun(self._files, self._commands)

    def run(self) -> int:
        """Supervise until asked to stop or until something cannot run."""
        failure: str | None = None
        with self._signals():
            try:
                while not self._stopping and failure is None:
                    failure = self._step()
                    time.sleep(_TICK)
            finally:
                self._stop()
        if failure is not None:
            log.warning("giving up", reason=failure)
            Console(stderr=True).print(failure, markup=False, highlight=False, soft_wrap=True)
            return EXIT_FAILED
        return EXIT_STOPPED

    def _step(self) -> str | None:
        """Look after everything once; return why it cannot go on, or None."""
        for service in self._services:
            if service.step():
                if service is self._superlink:
                    self._superlink_died()
                reason = self._hopeless(service)
                if reason is not None:
                    return reason
        self._reap()
        # Before the run, which takes seconds to submit: members can join from here on.
        if all(service.healthy for service in self._services):
            self._announce()
        if self._run is not None and self._superlink.healthy:
            if self._hub.healthy:
                self._registrar.step()
            self._run.step()
        return None

    def _hopeless(self, service: Service) -> str | None:
        refused = service is self._hub and service.exit_code == _HUB_REFUSED
        last = service.tail().rpartition("\n")[2]
        if refused and last.startswith(_HUB_SAYS):
            return f"share-server: the hub cannot run: {last.removeprefix(_HUB_SAYS)}"
        if refused or (not service.was_healthy and service.deaths >= _DEATHS_AT_START):
            return (
                f"share-server: the {service.name} cannot run (exit code {service.exit_code}). Everything was "
                f"stopped; put right what its log says and start again. The end of its log:\n{service.tail()}"
            )
        return None

    def _superlink_died(self) -> None:
        """End what it left behind: workers in sessions of their own, which would otherwise go on for long."""
        ended = lifeline.kill_adopted(self._owned())
        log.info("ended what the SuperLink left behind", processes=len(ended))
        self._registrar.superlink_restarted()
        if self._run is not None:
            self._run.lost()

    def _owned(self) -> frozenset[int]:
        pids = {service.pid for service in self._services} | {self._commands.running}
        return self._before | {pid for pid in pids if pid is not None}

    def _reap(self) -> None:
        """Take adopted processes that have ended off the table; Flower takes a zombie for a living process."""
        if time.monotonic() < self._next_reap:
            return
        self._next_reap = time.monotonic() + _REAP_EVERY
        owned = self._owned()
        for pid in lifeline.children():
            if pid not in owned:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def _stop(self) -> None:
        """Stop everything in order; nothing of ours is left when this returns."""
        log.info("stopping")
        self._layout.run_file.unlink(missing_ok=True)
        for service in reversed(self._services):
            service.ask_to_stop()
        end = time.monotonic() + _FLOWER_PATIENCE
        for service in reversed(self._services):
            if service is self._hub:
                end = time.monotonic() + self._config.limits.drain_s + _FLOWER_PATIENCE
            service.stop(end - time.monotonic())
        lifeline.kill_adopted(self._before)
        self._link.close()
        log.info("stopped")

    def _announce(self) -> None:
        """Write ``run.json`` whenever a process id or the run has changed; tell the person once."""
        run_id = self._run.run_id if self._run is not None and self._run.dispatching else None
        state = (*(service.pid for service in self._services), run_id)
        if state == self._announced:
            return
        first, self._announced = self._announced is None, state
        content = {
            "pid": os.getpid(),
            "processes": {service.name: service.pid for service in self._services},
            "addresses": self._addresses(),
            "run_id": run_id,
        }
        write_text(self._layout.run_file, json.dumps(content, indent=2) + "\n")
        log.info("up", run_id=run_id)
        if first:
            self._greet()

    def _addresses(self) -> dict[str, str]:
        addresses = {"hub": self._config.hub_address, "enrolment": self._config.enrol_address}
        return addresses | ({"gateway": self._config.gateway_address} if self._run is not None else {})

    def _greet(self) -> None:
        console = Console()
        if not self._config.listen.startswith("127."):
            console.print(f"listening on {self._config.listen}", highlight=False)
        for name, address in self._addresses().items():
            console.print(f"[green]up[/green]  {name:<10} {address}", highlight=False)
        console.print(f"logs in {self._layout.logs}; stop with Ctrl-C", highlight=False, soft_wrap=True)
        console.print("invite a member with:", highlight=False)
        console.print(f"  share-server invite {self._layout.root} ORGANISATION/NAME", highlight=False, soft_wrap=True)

    def _prepare_fleet(self) -> None:
        self._files.home.mkdir(parents=True, exist_ok=True)
        self._files.server_app.unlink(missing_ok=True)
        superlink.prepare(self._files)
        shim.write_shim(self._files.shim)
        self._choose_port()

    def _choose_port(self) -> None:
        (self._port,) = free_ports(1)
        write_superlink_address(self._files, f"127.0.0.1:{self._port}")
        self._commands.configure(self._port)

    def _launch_hub(self) -> tuple[list[str], None]:
        return [sys.executable, "-m", "share_server.hub", str(self._layout.root)], None

    def _launch_superlink(self) -> tuple[list[str], dict[str, str]]:
        if self._superlink.deaths:
            self._choose_port()  # the old one may be what it died of
        return superlink.command(self._files, self._port), superlink.environment(self._files)

    def _launch_gateway(self) -> tuple[list[str], None]:
        return [sys.executable, "-m", "share_server.fleet.gateway", str(self._layout.root)], None

    def _probe_superlink(self) -> bool:
        return superlink.healthy(self._files, self._port)

    def _probe_gateway(self) -> bool:
        """Return whether the gateway serves: an unpublished path is 404 then, and 503 before."""
        context = ssl.create_default_context(cafile=str(self._layout.ca_cert))
        context.check_hostname = False  # the local address need not be among the names for clients
        context.load_cert_chain(self._layout.certificate("fleet"), self._layout.key("fleet"))
        host = self._config.local_hub_address.rpartition(":")[0].strip("[]")
        connection = http.client.HTTPSConnection(host, self._config.gateway_port, timeout=2.0, context=context)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == http.HTTPStatus.NOT_FOUND
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _only_one(layout: Layout) -> Iterator[None]:
    """Hold the directory's lock; the kernel lets go of it when this process ends, however it ends."""
    path = layout.root / "run.lock"
    try:
        file = path.open("a+b")
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened: {error}: run 'share-server init {layout.root}' first") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another 'share-server run' works on {layout.root}: stop it first, or choose another directory"
            ) from error
        yield


@contextlib.contextmanager
def _logging(path: Path) -> Iterator[None]:
    """Write the supervisor's own log as JSON lines to ``path`` and nowhere else."""
    handler = logging.handlers.RotatingFileHandler(
        path, maxBytes=log.FILE_BYTES, backupCount=log.KEPT_FILES, encoding="utf-8"
    )
    handler.setFormatter(log.JsonLines())
    logger = logging.getLogger("share_server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
        handler.close()
