"""What goes wrong is one clear sentence, code 1 (2 for wrong usage), and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from share_core.peft.reader import read_adapter
from share_core.space_tool.spacefile import read_space

Refused = Callable[..., str]


def contents(root: Path) -> Mapping[str, bytes]:
    """Return every file below a directory."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["merge"],
        ["merge", "a"],
        ["merge", "a", "-o", "m", "--cap", "0"],
        ["merge", "a", "-o", "m", "--cap", "-1"],
        ["merge", "a", "-o", "m", "--cap", "many"],
        ["merge", "a", "-o", "m", "--cap", str(1 << 70)],
        ["merge", "a", "-o", "m", "--rank", "0"],
        ["merge", "a", "-o", "m", "--budget", "1"],
        ["merge", "a", "-o", "m", "--budget", "-0.1"],
        ["merge", "a", "-o", "m", "--budget", "nan"],
        ["merge", "a", "-o", "m", "--cap", "4", "--budget", "0.1"],
        ["merge", "a", "-o", "m", "--site-cap", "x"],
        ["merge", "a", "-o", "m", "--site-cap", "=4"],
        ["merge", "a", "-o", "m", "--site-cap", "x=0"],
        ["merge", "a", "-o", "m", "--site-cap", "x=²"],
        ["merge", "a", "-o", "m", "--site-cap", "x=" + "9" * 5000],
        ["export", "m", "-o", "x"],
        ["verify"],
        ["diff", "m"],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_wrong_usage_is_code_2(words: list[str], run: Any) -> None:
    answer = run(*words)
    assert (answer.code, answer.out) == (2, "")
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("nothing", "No such file or directory"),
        ("directory", "is no file"),
        ("pipe", "is no file"),
        ("empty", "at least 8 bytes"),
        ("text", "allowed"),
        ("huge header", "at most 1048576 are allowed"),
        ("adapter", "share-space merge"),
        ("cut", "by its header"),
    ],
)
@pytest.mark.parametrize("command", ["add", "remove", "rebuild", "inspect", "export", "verify", "diff"])
def test_what_is_no_space_file_is_refused(
    command: str, what: str, expected: str, refused: Refused, space: Path, three: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "given"
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "adapter":
        shutil.copy(three[0] / "adapter_model.safetensors", path)
    elif what != "nothing":
        whole = space.read_bytes()
        lies = {"empty": b"", "text": b"# hello, I am a text\n", "huge header": b"\xff" * 8 + whole, "cut": whole[:-9]}
        path.write_bytes(lies[what])
    before = contents(tmp_path) if what != "pipe" else {}
    extra: dict[str, list[Any]] = {
        "add": [three[0]],
        "remove": ["one"],
        "export": ["one", "-o", tmp_path / "out"],
        "diff": [space],
    }
    said = refused(command, path, *extra.get(command, []))
    assert expected in said
    assert str(path) in said
    if what != "pipe":
        assert contents(tmp_path) == before


def test_places_that_cannot_be_written_are_refused_before_the_work(
    refused: Refused, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("an adapter was read")

    monkeypatch.setattr("share_core.space_tool.build.read_adapter", never)
    (tmp_path / "thesis.txt").write_text("all my work")
    before = contents(tmp_path)
    for place, expected in (
        (tmp_path / "missing" / "m.space", "there is no directory"),
        (tmp_path, "is a directory"),
        (tmp_path / "thesis.txt", "is no space file"),
        (three[0], "is a directory"),
        (three[0] / "adapter_model.safetensors", "is no space file"),
        (Path("/dev/null"), "is no space file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert expected in refused("merge", *three, "-o", place), place
    assert contents(tmp_path) == before


def test_a_backbone_is_not_overwritten(refused: Refused, three: list[Path], backbone: Any, tmp_path: Path) -> None:
    model = backbone(tmp_path / "model") / "model.safetensors"
    assert "nothing was overwritten" in refused("merge", *three, "--backbone", model, "-o", model)


def test_a_place_that_may_not_be_written_is_refused(
    refused: Refused, three: list[Path], space: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write everywhere
    before = contents(tmp_path)
    assert "may not be written" in refused("merge", *three, "-o", tmp_path / "new.space")
    assert "may not be written" in refused("add", space, three[0])
    assert contents(tmp_path) == before


def test_a_place_that_refuses_only_at_the_end_is_named(refused: Refused, three: list[Path]) -> None:
    said = refused("merge", *three, "-o", "/proc/m.space")
    assert "cannot write /proc/m.space" in said
    assert "choose another place with -o" in said


def test_a_link_is_followed_and_stays(run: Any, three: list[Path], space: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.space"
    link.symlink_to(space)
    assert run("remove", link, "one").code == 0
    assert link.is_symlink()
    assert list(read_space(space).space.cores) == ["two", "three"]


def test_an_empty_file_may_be_filled(run: Any, three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "made-by-mktemp").touch()
    assert run("merge", *three, "-o", tmp_path / "made-by-mktemp").code == 0


def test_a_change_by_another_command_is_not_undone(
    refused: Refused,
    run: Any,
    space: Path,
    three: list[Path],
    adapter: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, others = read_adapter, [adapter(tmp_path / "other", 8)]

    def slow(directory: Path) -> Any:
        if others:
            assert run("add", space, others.pop()).code == 0
        return original(directory)

    monkeypatch.setattr("share_core.space_tool.build.read_adapter", slow)
    assert "changed by another command" in refused("add", space, f"mine={three[0]}")
    assert list(read_space(space).space.cores) == ["one", "two", "three", "other"]


def test_adapters_that_cannot_be_used_are_named(
    refused: Refused, adapter: Any, three: list[Path], tmp_path: Path
) -> None:
    def broken(name: str, change: Callable[[Path], object]) -> Path:
        path: Path = adapter(tmp_path / "bad" / name, 5)
        change(path)
        return path

    def config(**values: Any) -> Callable[[Path], object]:
        def change(path: Path) -> None:
            file = path / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

        return change

    def in_place_of_tensors(path: Path) -> None:
        (path / "adapter_model.safetensors").unlink()
        (path / "adapter_model.safetensors").mkdir()

    def tensors(content: bytes) -> Callable[[Path], object]:
        return lambda path: (path / "adapter_model.safetensors").write_bytes(content)

    for path in (
        tmp_path / "nowhere",
        three[0] / "adapter_config.json",
        broken("no-config", lambda path: (path / "adapter_config.json").unlink()),
        broken("no-tensors", lambda path: (path / "adapter_model.safetensors").unlink()),
        broken("empty", tensors(b"")),
        broken("cut", lambda path: os.truncate(path / "adapter_model.safetensors", 1000)),
        broken("huge", tensors(b"\xff" * 8 + b"{}")),
        broken("text", lambda path: (path / "adapter_config.json").write_text("{")),
        broken("dora", config(use_dora=True)),
        broken("ranks", config(r=64)),
        broken("control", config(base_model_name_or_path="bert-tiny\x1b[2J/../bert-tiny")),
        broken("directory", in_place_of_tensors),
    ):
        said = refused("merge", *three, path, "-o", tmp_path / "m")
        assert str(path) in said
        assert not (tmp_path / "m").exists()


def test_absurdly_large_adapters_do_not_make_unreadable_files(refused: Refused, tmp_path: Path) -> None:
    tensors = {f"base_model.model.x.lora_{part}.weight": torch.full((4, 4), 1e30) for part in "AB"}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    assert "absurdly large" in refused("merge", tmp_path / "a", "-o", tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["line\nbreak", "bell\x07"])
def test_paths_that_no_terminal_should_show(name: str, refused: Refused, adapter: Any, tmp_path: Path) -> None:
    said = refused("merge", adapter(tmp_path / name), "-o", tmp_path / "m")
    assert "printable characters" in said
    assert "rename it" in said


def test_two_adapters_of_one_name_are_refused(refused: Refused, three: list[Path], tmp_path: Path) -> None:
    other = shutil.copytree(three[0], tmp_path / "other" / "One")
    for second in (three[0], other, f"one={three[1]}"):
        said = refused("merge", three[0], second, "-o", tmp_path / "m")
        assert "would both be task 'one'" in said
        assert "NAME=" in said


@pytest.mark.parametrize("name", ["Größe", "a b", "", "../x", "a/b/c", "x" * 65, "[red]", "."])
def test_illegal_names_are_refused(name: str, refused: Refused, three: list[Path], tmp_path: Path) -> None:
    assert "is not allowed" in refused("merge", f"{name}={three[0]}", "-o", tmp_path / "m")


def test_tasks_that_are_not_there(refused: Refused, space: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    assert "it has: one, three, two" in refused("export", space, "four", "-o", tmp_path / "out")
    assert "it has: one, three, two" in refused("remove", space, "one", "four")
    assert "name the tasks to remove" in refused("remove", space)
    assert "has some" in refused("remove", space, "--contributor", "nobody")
    assert contents(tmp_path) == before


def test_export_does_not_overwrite(refused: Refused, run: Any, space: Path, three: list[Path], tmp_path: Path) -> None:
    before = contents(tmp_path)
    for place in (three[0], space, tmp_path):
        assert "nothing was overwritten" in refused("export", space, "one", "-o", place)
    assert "cannot write /proc/x" in refused("export", space, "one", "-o", "/proc/x")
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert run("export", space, "one", "-o", tmp_path / "empty").code == 0


def test_a_space_without_tasks_cannot_be_rebuilt(refused: Refused, run: Any, space: Path) -> None:
    assert run("remove", space, "one", "two", "three", "--anew").code == 0
    assert "has no task" in refused("rebuild", space)
    assert "it has: none" in refused("export", space, "one", "-o", space.parent / "out")


def test_plots_that_cannot_be_drawn(
    refused: Refused, space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cannot write" in refused("inspect", space, "--plot", tmp_path / "missing" / "p.png")
    assert ".png, .svg or .pdf" in refused("inspect", space, "--plot", tmp_path / "p.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert "pip install" in refused("inspect", space, "--plot", tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_a_picture_of_thousands_of_tasks(tmp_path: Path) -> None:
    from share_core.space_tool.plot import write_plot

    tasks = [{"task": f"org/t{i}", "error": 0.1, "measured": i % 2 == 0} for i in range(2500)]
    write_plot({"sites": [], "tasks": tasks}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 0


def test_names_with_brackets_are_shown_as_they_are(run: Any, adapter: Any, tmp_path: Path) -> None:
    path, odd = tmp_path / "[bold]m[" / "x]", {"layer[/0].w": (5, 6)}
    path.parent.mkdir()
    source = adapter(tmp_path / "in[/red]", 0, odd, base="[/bold]tiny[red]")
    assert run("merge", source, "-o", path).code == 0
    shown = run("inspect", path)
    assert shown.code == 0
    assert "[/bold]tiny[red]" in shown.out
    assert "layer[/0].w" in shown.out
    assert "layer[/0].w" in run("diff", path, path).out
    shutil.rmtree(source)
    assert run("verify", path).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(refused: Refused, space: Path, three: list[Path], tmp_path: Path) -> None:
    (three[0] / "adapter_model.safetensors").chmod(0)
    assert "Permission denied" in refused("merge", *three, "-o", tmp_path / "m")
    space.chmod(0)
    assert "Permission denied" in refused("verify", space)
