"""The supervisor without Flower: what dies comes back, what refuses ends everything, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from share_core.types import SpaceSpec
from share_server.config import ServerConfig, read_config
from share_server.layout import Layout
from share_server.provision import create_server, free_ports

RUN = [sys.executable, "-c", "from share_server.cli import main; main()", "run"]

UNTIED = """
import sys
from pathlib import Path
from share_server.config import read_config
from share_server.fleet import service, supervisor
from share_server.layout import Layout
if sys.argv[2] == "planted":
    service.tied = list
layout = Layout(Path(sys.argv[1]))
sys.exit(supervisor.supervise(layout, read_config(layout.config), fleet=False))
"""


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def layout(tmp_path: Path, toy_spec: SpaceSpec) -> Layout:
    hub, enrol, gateway = free_ports(3)
    made = Layout(tmp_path / "server")
    config = ServerConfig(hub_port=hub, enrol_port=enrol, gateway_port=gateway)
    create_server(made, config, toy_spec, datetime.now(UTC))
    return made


@pytest.fixture
def running(layout: Layout) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([*RUN, str(layout.root), "--no-fleet"], stdout=subprocess.PIPE, text=True) as process:
        assert wait_for(layout.run_file.exists)
        yield process
        process.terminate()


def processes(layout: Layout) -> dict[str, int]:
    return dict(json.loads(layout.run_file.read_text())["processes"])


def test_hub_alone_comes_back_after_a_kill_and_everything_stops_on_request(
    layout: Layout, running: subprocess.Popen[str]
) -> None:
    hub = processes(layout)["hub"]
    second = subprocess.run([*RUN, str(layout.root), "--no-fleet"], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "another 'share-server run'" in second.stderr
    os.kill(hub, signal.SIGKILL)
    assert wait_for(lambda: processes(layout)["hub"] != hub)
    again = processes(layout)["hub"]
    running.send_signal(signal.SIGTERM)
    output = running.communicate(timeout=60)[0]
    assert running.returncode == 0
    assert "share-server invite" in output
    assert not alive(again)
    assert not layout.run_file.exists()


def test_a_hub_that_refuses_ends_everything_with_its_reason(layout: Layout) -> None:
    layout.space.write_text("this is no space")
    done = subprocess.run([*RUN, str(layout.root), "--no-fleet"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the hub cannot run" in done.stderr
    assert "space.toml" in done.stderr
    assert not layout.run_file.exists()


@pytest.mark.parametrize("planted", [False, True], ids=["tied", "planted-bug"])
def test_sigkill_of_the_supervisor_takes_the_hub_along(layout: Layout, planted: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", UNTIED, str(layout.root), "planted" if planted else "honest"],
        stdout=subprocess.DEVNULL,
    ) as process:
        assert wait_for(layout.run_file.exists)
        hub = processes(layout)["hub"]
        process.kill()
    gone = wait_for(lambda: not alive(hub), 2.0 if planted else 20.0)
    if alive(hub):
        os.kill(hub, signal.SIGKILL)
    assert bool(gone) is not planted


def test_a_port_in_use_is_one_sentence(layout: Layout) -> None:
    port = read_config(layout.config).hub_port
    with socket.create_server(("127.0.0.1", port)):
        done = subprocess.run([*RUN, str(layout.root), "--no-fleet"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"share-server: the hub cannot run: cannot listen on 127.0.0.1:{port}" in done.stderr
