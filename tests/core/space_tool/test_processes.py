"""Real processes: a full disk, a kill in the middle of writing, Ctrl-C, a closed pipe, and memory.

Planted bugs: a file that is written in place, a target that is emptied before the work, and adapters that are kept.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def process(run_program: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., Any]:
    """Return a function (lines of Python, arguments) that runs ``share-space`` after those lines."""

    def run(before: str, *words: object) -> subprocess.CompletedProcess[str]:
        return run_program(f"import signal\n{before}\nfrom share_core.space_tool.cli import main\nmain()\n", *words)

    return run


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))"


def test_a_full_disk(process: Callable[..., Any], space: Path, three: list[Path], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words in (
        ["merge", *three, "-o", tmp_path / "new.space"],
        ["add", space, f"more={three[0]}"],
        ["export", space, "one", "-o", tmp_path / "out"],
    ):
        done = process(FULL, *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("share-space: cannot write ")
        assert "File too large" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


IN_PLACE = """
import share_core.space_tool.spacefile as planted
def write(path, data, mode):
    with open(path, "wb") as file:
        for start in range(0, len(data), 256):
            file.write(data[start : start + 256])
            file.flush()
            os.fsync(file.fileno())
planted.write_atomic = write
"""


def test_a_full_disk_would_show_a_file_written_in_place(
    process: Callable[..., Any], space: Path, three: list[Path]
) -> None:
    before = space.read_bytes()
    assert process(f"{IN_PLACE}{FULL}", "add", space, f"more={three[0]}").returncode == 1
    assert space.read_bytes() != before


KILLED = "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)"


def test_killed_while_writing(
    process: Callable[..., Any], run: Any, space: Path, three: list[Path], tmp_path: Path
) -> None:
    before = space.read_bytes()
    for words in (["add", space, f"more={three[0]}"], ["export", space, "one", "-o", tmp_path / "out"]):
        assert process(KILLED, *words).returncode == -signal.SIGKILL
    assert space.read_bytes() == before
    assert not (tmp_path / "out").exists()
    assert run("verify", space).code == 0
    assert run("add", space, f"more={three[0]}").code == 0
    assert run("export", space, "more", "-o", tmp_path / "out").code == 0


def test_a_kill_would_show_a_file_written_in_place(process: Callable[..., Any], space: Path, three: list[Path]) -> None:
    before = space.read_bytes()
    assert process(f"{IN_PLACE}{KILLED}", "add", space, f"more={three[0]}").returncode == -signal.SIGKILL
    assert space.read_bytes() != before


INTERRUPTED = """
from share_core.space_tool import build
original, seen = build.read_adapter, []
def read(path):
    seen.append(path)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return original(path)
build.read_adapter = read
"""


def test_interrupted(process: Callable[..., Any], space: Path, three: list[Path]) -> None:
    before = {path: path.read_bytes() for path in space.parent.rglob("*") if path.is_file()}
    for words in (["merge", *three, "-o", space], ["add", space, f"x={three[0]}"]):
        done = process(INTERRUPTED, *words)
        assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")
    assert {path: path.read_bytes() for path in space.parent.rglob("*") if path.is_file()} == before


EMPTIED = """
from share_core.space_tool import cli as planted
def target(out, found=planted._target):
    place = found(out)
    open(place, "wb").close()
    return place
planted._target = target
"""


def test_an_interruption_would_show_a_target_emptied_before_the_work(
    process: Callable[..., Any], space: Path, three: list[Path]
) -> None:
    before = space.read_bytes()
    assert process(f"{EMPTIED}{INTERRUPTED}", "merge", *three, "-o", space).returncode == 130
    assert space.read_bytes() != before


GONE = """
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
"""


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_reader_that_goes_away(process: Callable[..., Any], command: str, space: Path) -> None:
    done = process(GONE, command, space)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_would_show_an_error_nobody_handles(process: Callable[..., Any], space: Path) -> None:
    planted = "import rich.console as planted; planted.Console.on_broken_pipe = lambda console: 1 / 0"
    assert "Traceback" in process(f"{GONE}{planted}", "verify", space).stderr


def test_help_does_not_wait_for_torch() -> None:
    heavy = "'torch', 'safetensors', 'matplotlib'"
    code = f"import sys, share_core.space_tool.cli; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


GENERATED = """
import json, resource
from pathlib import Path
from safetensors.torch import save_file
from share_core.space_tool.build import Source, merge_sources
from share_core.space_tool.spacefile import FilePolicy

root = Path(sys.argv[1])
(root / "a").mkdir(exist_ok=True)
config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
(root / "a" / "adapter_config.json").write_text(json.dumps(config))


wide, tall = torch.randn(8, 16384), torch.randn(16384, 8)


def make(seed):
    tensors = {f"base_model.model.s{i}.lora_A.weight": wide.roll(99 * seed + i, 1) for i in range(4)}
    tensors |= {f"base_model.model.s{i}.lora_B.weight": tall.roll(77 * seed + i, 0) for i in range(4)}
    save_file(tensors, root / "a" / "adapter_model.safetensors")


def progress(what, task):
    make(int(task))


peaks = []
for count in (10, int(sys.argv[2])):
    merge_sources([Source(str(i), root / "a") for i in range(count)], FilePolicy(16, 0.0), None, progress)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


KEEPING = """
from share_core.space_tool import build as planted
kept, original = [], planted.read_adapter
def read(path):
    kept.append(original(path))
    return kept[-1]
planted.read_adapter = read
"""


@pytest.fixture
def growth(run_program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> Callable[..., Any]:
    """Return a function (planted bug, count) -> rise of the peak from 10 adapters to so many, size of one: bytes."""

    def measure(planted: str, count: int) -> tuple[int, int]:
        done = run_program(f"{planted}{GENERATED}", tmp_path, count)
        assert done.returncode == 0, done.stderr
        ten, last = json.loads(done.stdout)
        return last - ten, (tmp_path / "a" / "adapter_model.safetensors").stat().st_size

    return measure


def test_memory_does_not_grow_with_the_number_of_adapters(growth: Callable[..., tuple[int, int]]) -> None:
    grown, adapter = growth("", 60)
    assert adapter > 4e6
    assert grown < 50 * adapter / 5


def test_memory_would_show_adapters_that_are_kept(growth: Callable[..., tuple[int, int]]) -> None:
    """Ten more are enough to pass the bound for fifty."""
    grown, adapter = growth(KEEPING, 20)
    assert grown > 50 * adapter / 5
