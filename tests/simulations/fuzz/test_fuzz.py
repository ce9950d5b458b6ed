"""A short look with changed files, no guidance needed; and readers without a guard, which it shows up."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from pathlib import Path

import pytest

from share_core.errors import ConfigError
from share_simulations.fuzz import target
from share_simulations.fuzz.campaign import FINDABLE, FuzzOptions, hunt, run_blindly, run_fuzz
from share_simulations.fuzz.mutator import blind, mutate, seeds
from share_simulations.fuzz.planted import GUARDS, without

RUNS = 3_000
needs_atheris = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")


def test_changed_files_break_no_rule() -> None:
    assert run_blindly(target.look, RUNS, seed=5) == ""


@pytest.mark.parametrize(
    "guard", ["minus zero", "nesting", "metadata ascii", "dtype a string", "contiguous", "to the end", "finite halves"]
)
def test_a_missing_guard_is_found(guard: str) -> None:
    with without(GUARDS[guard]) as modules:
        assert run_blindly(modules["share_simulations.fuzz.target"].look, RUNS, seed=5)
    assert guard in FINDABLE


def test_equal_draws_give_equal_files() -> None:
    def digest() -> str:
        draw = random.Random(7)
        raw = blind(draw)
        files = [mutate(draw.choice(seeds()), draw, raw) for _ in range(300)]
        return hashlib.sha256(b"|".join(files)).hexdigest()

    assert digest() == digest()


def test_the_first_files_are_acceptable_and_changed_ones_end_in_every_way() -> None:
    """Otherwise nothing behind the first refusal would be looked at."""
    assert {target.look(data) for data in seeds()[1:]} == {target.ACCEPTED}
    draw = random.Random(3)
    raw = blind(draw)
    ends = {target.look(mutate(draw.choice(seeds()), draw, raw)) for _ in range(600)}
    assert ends >= {target.ACCEPTED, "HeaderError", "TensorShapeError", "TensorNameError", "TensorTypeError"}


def test_what_safetensors_refuses_is_a_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: bytes) -> list[tuple[str, dict[str, object]]]:
        raise ValueError("planted")

    monkeypatch.setattr(target, "_deserialize", refuse)
    with pytest.raises(target.Divergence, match="safetensors refuses"):
        target.look(seeds()[1])


@needs_atheris
def test_a_guided_run_counts_goes_on_and_finds_a_missing_guard(tmp_path: Path) -> None:
    options = FuzzOptions(runs=400, folder=tmp_path, slice=400)
    first = run_fuzz(options)
    assert (first["executions"], first["ok"], first["broken_rules"]) == (400, True, 0)
    assert first["coverage_edges"] > 100
    again = run_fuzz(FuzzOptions(runs=400, folder=tmp_path))
    assert again["executions"] == 400, "nothing was left to do"
    assert "Divergence" in hunt("contiguous", options)


def test_without_atheris_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install fedshare\[fuzz\]"):
        run_fuzz(FuzzOptions(runs=1))
