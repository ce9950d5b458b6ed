"""The whole thing: a real server and real clients, from an empty folder to results."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]


def command(out: Path) -> list[str]:
    scenario = ["run", "quickstart", "--clients", "2", "--tasks", "3", "--epochs", "1"]
    return [sys.executable, "-m", "share_simulations.cli", *scenario, "--json", "--keep", "--out", str(out)]


def left_behind(folder: Path) -> list[str]:
    """Return command lines of live processes that belong to a run folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:  # it has ended, or is not ours to look at
            continue
        if str(folder).encode() in words:
            found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def test_a_federation_runs_from_an_empty_folder_to_results(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    assert left_behind(out) == []
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert line == json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert len(done.stdout.splitlines()) == 1, "with --json everything else goes to standard error"

    tasks = {t["task"]: t for t in line["per_task"]}
    assert set(tasks) == {"north/rot90", "north/low", "east/inverted"}
    assert {t["owner"] for t in tasks.values()} == {"north/trainer", "east/trainer"}
    assert line["versions"] == line["updates"] == 3
    for name, task in tasks.items():
        # One epoch is little; a guess among ten classes would be right in a tenth of the rows.
        assert task["accuracy_final"] > 0.2, name
        assert task["accuracy_lora"] > 0.2, name
    assert abs(line["forgetting"]) <= 0.002, "nothing was compacted, so nothing may move"

    versions, names = line["matrix"]["versions"], line["matrix"]["tasks"]
    assert versions == [1, 2, 3]
    for version, row in zip(versions, line["matrix"]["values"], strict=True):
        there = [value is not None for value in row]
        assert there == [tasks[name]["first_version"] <= version for name in names], "evaluated at every version"

    # Three LoRA adapters of rank 8 over the space's sites; what left the clients is less, but not nothing.
    space = (out / "server" / "space.toml").read_text(encoding="utf-8")
    assert line["bytes_up_lora"] == 3 * lora_bytes(space)
    assert 0 < line["bytes_up"] < line["bytes_up_lora"]
    assert line["bytes_up"] == sum(t["bytes_up"] for t in tasks.values())
    assert line["bytes_heads"] == 0, "heads are private"
    assert line["bytes_down"] > 0
    assert line["bytes_total"] == line["bytes_up"] + line["bytes_envelope"] + line["bytes_down"]
    assert sum(line["staleness"].values()) == 3
    for picture in ("matrix.png", "curves.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_federation_leaves_no_process_behind(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(command(out), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        said = ""
        while "joining" not in said:
            line = process.stderr.readline()
            assert line, f"ended before a client was there: {said}"
            said += line
        assert left_behind(out), "the search finds processes while they run"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "share-sim: interrupted; every process of the federation was stopped"
    assert left_behind(out) == []
    assert (out / "logs" / "server.log").exists(), "logs of a failed run stay"


def lora_bytes(space_toml: str) -> int:
    """Return the float32 bytes of one rank-8 LoRA over the sites of a space.toml."""
    return sum(sum(site["shape"]) for site in tomllib.loads(space_toml)["sites"].values()) * 8 * 4
