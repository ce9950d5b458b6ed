"""Power cuts on a modelled disk: the model itself, a sample of cuts, and the planted bugs."""

from __future__ import annotations

import gc
import os
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from share_core.errors import ConfigError
from share_simulations.chaos import lab as lab_module
from share_simulations.chaos.disk_model import MODES, Disk, Recorder, read_tree, write_tree
from share_simulations.chaos.lab import Lab, open_lab
from share_simulations.chaos.mutants import Mutant, mutants_of
from share_simulations.chaos.power import PowerOptions, hunt, run_power
from share_simulations.chaos.ptrace import trace
from share_simulations.chaos.scenario import Promised

Cut = Callable[[str, int], dict[str, bytes | None]]


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


@pytest.fixture
def cut(tmp_path: Path) -> Callable[[Callable[[Path], None]], Cut]:
    """Return a function that records what a function does to a directory, and gives back a cut at its end."""

    def record(change: Callable[[Path], None]) -> Cut:
        root = tmp_path / "disk"
        root.mkdir()
        (root / "old").write_bytes(b"o" * 1200)
        base = read_tree(root, root)
        del base[str(root)]
        recorder = Recorder(Promised())

        def main() -> int:
            change(root)
            return 0

        assert trace(main, root, recorder).code == 0

        def at_end(mode: str, seed: int) -> dict[str, bytes | None]:
            left = Disk(root, base, recorder, recorder.moment).after_cut(mode, random.Random(seed))
            return {str(Path(path).relative_to(root)): data for path, data in left.items()}

        return at_end

    return record


def test_what_was_not_flushed_is_lost(cut: Callable[[Callable[[Path], None]], Cut]) -> None:
    def change(root: Path) -> None:
        (root / "new").write_bytes(b"n")

    at_end = cut(change)
    assert at_end("nothing", 0) == {"old": b"o" * 1200}
    assert at_end("everything", 0) == {"old": b"o" * 1200, "new": b"n"}


def test_a_flushed_file_without_a_flushed_name_is_lost(cut: Callable[[Callable[[Path], None]], Cut]) -> None:
    def change(root: Path) -> None:
        (root / "new").write_bytes(b"n")
        _flush(root / "new")

    assert "new" not in cut(change)("nothing", 0)


def test_flushed_bytes_and_names_stay(cut: Callable[[Callable[[Path], None]], Cut]) -> None:
    def change(root: Path) -> None:
        (root / "ab").mkdir()
        _flush(root)
        (root / "tmp").write_bytes(b"n")
        _flush(root / "tmp")
        (root / "tmp").rename(root / "ab" / "new")
        _flush(root / "ab")

    at_end = cut(change)
    for mode in MODES:
        for seed in range(10):
            assert at_end(mode, seed)["ab/new"] == b"n"


def test_everything_in_a_directory_whose_name_was_lost_is_lost(cut: Callable[[Callable[[Path], None]], Cut]) -> None:
    def change(root: Path) -> None:
        (root / "ab").mkdir()
        (root / "ab" / "new").write_bytes(b"n")
        _flush(root / "ab" / "new")
        _flush(root / "ab")

    assert cut(change)("nothing", 0) == {"old": b"o" * 1200}


def test_an_unflushed_write_may_be_torn_at_sectors(cut: Callable[[Callable[[Path], None]], Cut]) -> None:
    def change(root: Path) -> None:
        file = os.open(root / "old", os.O_RDWR)
        os.pwrite(file, b"x" * 1200, 0)
        os.close(file)

    at_end = cut(change)
    found = {at_end("harsh", seed)["old"] for seed in range(200)}
    sectors = {(data[:512], data[512:1024], data[1024:]) for data in found if data}
    assert all(len(set(part)) == 1 for three in sectors for part in three)
    assert len(sectors) == 8


def test_unflushed_names_are_lost_in_their_order_or_each_on_its_own(
    cut: Callable[[Callable[[Path], None]], Cut],
) -> None:
    def change(root: Path) -> None:
        (root / "first").mkdir()
        (root / "second").mkdir()

    at_end = cut(change)
    journal = {tuple(sorted(at_end("journal", seed))) for seed in range(60)}
    harsh = {tuple(sorted(at_end("harsh", seed))) for seed in range(60)}
    assert journal == {("old",), ("first", "old"), ("first", "old", "second")}
    assert harsh == journal | {("old", "second")}


def test_a_call_that_the_model_does_not_know_is_refused(cut: Callable[[Callable[[Path], None]], Cut]) -> None:
    def change(root: Path) -> None:
        file = os.open(root / "old", os.O_RDWR)
        os.writev(file, [b"x"])
        os.close(file)

    with pytest.raises(ConfigError, match="calls writev, which the model"):
        cut(change)("nothing", 0)


def test_a_tree_is_written_as_it_was_read(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"1")
    tree = read_tree(tmp_path / "a", tmp_path / "z")
    write_tree(tree)
    assert read_tree(tmp_path / "z", tmp_path / "z") == tree


def check_garbage_is_out_of_reach() -> None:
    """When the first child is forked, what was garbage is gone and the rest is kept from the collector."""

    class Left:
        """Garbage in a cycle: only the collector finds it."""

        def __init__(self) -> None:
            self.self = self

    kept, gone = gc.get_freeze_count(), weakref.ref(Left())
    seen: list[tuple[bool, int]] = []
    with (
        mock.patch.object(Lab, "_build", lambda self: seen.append((gone() is None, gc.get_freeze_count()))),
        open_lab(),
    ):
        pass
    ((collected, frozen),) = seen
    assert collected
    assert frozen > kept


def test_no_child_is_forked_before_garbage_is_out_of_its_reach() -> None:
    check_garbage_is_out_of_reach()


def test_a_laboratory_that_forks_at_once_is_caught() -> None:
    with mock.patch.object(lab_module, "_freeze", lambda: None), pytest.raises(AssertionError):
        check_garbage_is_out_of_reach()


def test_nothing_is_lost_at_a_sample_of_cuts() -> None:
    report = run_power(PowerOptions(cuts=24, seed=4))
    assert report["ok"], report["problems"]
    assert report["cuts"] == 24
    assert set(report["modes"]) == set(MODES)
    assert report["acks"] > 0


@pytest.mark.parametrize("mutant", mutants_of("power"), ids=lambda mutant: mutant.name)
def test_planted_bug_is_caught(lab: Lab, mutant: Mutant) -> None:
    caught = hunt(lab, mutant, seed=1)
    assert caught.after, f"{mutant.name} survived: {mutant.what}"
