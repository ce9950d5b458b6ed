"""The command line: help, refusals, exit codes, and the data it writes."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from share_client.tasks_file import read_tasks
from share_core.errors import ConfigError
from share_simulations.cli import app
from share_simulations.results import Results, write_results
from share_simulations.run import new_run_folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "share_simulations.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--help"], ["run", "data", "show"]),
        (["run", "--help"], ["quickstart", "text"]),
        (["run", "quickstart", "--help"], ["--clients", "--epochs", "--seed", "--json", "--out", "--keep"]),
        (["run", "text", "--help"], ["--data", "--tasks", "--rows", "--clients", "--epochs", "--json"]),
        (["data", "quickstart", "--help"], ["--out"]),
    ],
)
def test_help_names_what_there_is(command: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(app, command, env={"COLUMNS": "150"})
    assert result.exit_code == 0
    assert all(word in result.stdout for word in words)


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom share_simulations.cli import app\n"
        "try:\n    app(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'flwr', 'sklearn', 'matplotlib', 'grpc'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_refusal_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    done = run("run", "quickstart", "--clients", "9", "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "share-sim: quickstart: expected 1 to 3 clients, got 9"
    assert "Traceback" not in done.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("run", "text").returncode == 2


def test_data_for_the_tour_is_what_the_client_reads(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "quickstart", "--out", str(tmp_path)])
    assert result.exit_code == 0
    names = {c: [t.name for t in read_tasks(tmp_path / c / "tasks.toml").tasks] for c in ("north", "east", "south")}
    assert names["north"] == ["rot90", "low", "noisy"]
    assert sum(map(len, names.values())) == 8
    assert str(tmp_path / "south" / "tasks.toml") in result.stdout.replace("\n", "")


def test_show_prints_a_stored_run(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path)
    result = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert result.exit_code == 0
    assert "average accuracy" in result.stdout


def test_a_run_folder_is_new_or_replaces_an_earlier_run_but_never_anything_else(tmp_path: Path) -> None:
    now = datetime(2030, 1, 2, 3, 4, 5)
    folder = tmp_path / "run"
    assert new_run_folder("trial", folder, now).root == folder
    (folder / "logs").mkdir()
    (folder / "logs" / "server.log").touch()
    (folder / "results.json").touch()
    assert list(new_run_folder("trial", folder, now).root.iterdir()) == []
    (folder / "letter.txt").touch()
    with pytest.raises(ConfigError, match=r"it holds letter.txt"):
        new_run_folder("trial", folder, now)
    assert (folder / "letter.txt").exists()


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "run.json").touch()
    with pytest.raises(ConfigError, match="a federation still runs here"):
        new_run_folder("trial", tmp_path, datetime(2030, 1, 1))


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        new_run_folder("trial", tmp_path / "results.json", datetime(2030, 1, 1))


def test_the_default_run_folder_names_scenario_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = new_run_folder("trial", None, datetime(2030, 1, 2, 3, 4, 5))
    assert folders.root == (tmp_path / "runs" / "trial-20300102-030405").resolve()
