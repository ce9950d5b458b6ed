"""The written directory: whole or not there, and only what can be loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from share_core.errors import AdapterError, NonFiniteError
from share_core.linalg import difference_norm, product_norm
from share_core.peft.export import PeftExport, PeftSite
from share_core.peft.reader import read_adapter
from share_core.peft.writer import write_adapter
from share_core.types import Adapter, Factors

SITES = {
    "a.linear": PeftSite("bert.a.linear", "linear", (6, 4)),
    "a.conv": PeftSite("bert.a.conv", "conv", (5, 2, 3, 1)),
    "a.line": PeftSite("bert.a.line", "conv", (5, 2, 3)),
    "table": PeftSite("bert.table", "embedding", (7, 3)),
}
EXPORT = PeftExport("some/backbone", "CAUSAL_LM", False, ("score",), SITES, "all")


def drawn(ranks: dict[str, int], seed: int = 0, scale: float = 1.0) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, rank in ranks.items():
        d_out, d_in = SITES[name].matrix_shape
        out, in_ = (torch.randn(d, rank, generator=generator) for d in (d_out, d_in))
        found[name] = Factors(scale * out, in_)
    return found


def assert_same(got: Adapter, expected: Adapter) -> None:
    assert set(got) == set(expected)
    for name, f in expected.items():
        apart = difference_norm(f.out, f.in_, got[name].out, got[name].in_)
        assert apart <= 1e-6 * product_norm(f.out, f.in_), name


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(SITES)), st.integers(0, 9), min_size=1),
    st.integers(0, 1 << 20),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.booleans(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, ranks: dict[str, int], seed: int, scale: float, uniform: bool
) -> None:
    factors = drawn(ranks, seed, scale)
    directory = tmp_path_factory.mktemp("x") / "task"
    write_adapter(directory, factors, EXPORT, uniform_rank=uniform)
    adapter = read_adapter(directory)
    assert_same(adapter.factors, factors)
    assert {name: adapter.sites[name] for name in factors} == {name: SITES[name] for name in factors}
    assert adapter.config.rank_pattern == {} or not uniform
    needed = {name: max(1, min(rank, *SITES[name].matrix_shape)) for name, rank in ranks.items()}
    found = {name: f.rank for name, f in adapter.factors.items()}
    assert found == ({name: max(needed.values()) for name in needed} if uniform else needed)


def test_a_task_that_changes_nothing(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {}, EXPORT)
    adapter = read_adapter(tmp_path / "a")
    assert set(adapter.factors) == set(SITES)
    assert adapter.notes[0].startswith("all B are zero")


def test_zeros_stay_zeros_at_the_same_sites(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {"a.linear": Factors(torch.zeros(6, 3), torch.ones(4, 3))}, EXPORT)
    assert {name: f.rank for name, f in read_adapter(tmp_path / "a").factors.items()} == {"a.linear": 1}


def test_the_config_says_no_more_than_the_file_holds(tmp_path: Path) -> None:
    def written(name: str, extra: dict[str, torch.Tensor] | None, task_type: str | None = "SEQ_CLS") -> dict[str, Any]:
        like = PeftExport("b", task_type, False, ("score", "classifier"), SITES, "all")
        write_adapter(tmp_path / name, drawn({"a.linear": 2}), like, extra=extra)
        config: dict[str, Any] = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert set(load_file(tmp_path / name / "adapter_model.safetensors")) >= set(extra or {})
        return config

    def read(config: dict[str, Any]) -> tuple[Any, Any, Any]:
        return config["task_type"], config["modules_to_save"], config["bias"]

    head = {"base_model.model.score.weight": torch.ones(2), "base_model.model.score.bias": torch.ones(2)}
    bias = {"base_model.model.bert.a.linear.base_layer.bias": torch.ones(6)}
    assert read(written("none", None)) == (None, None, "none")
    assert read(written("head", head)) == ("SEQ_CLS", ["score"], "none")
    assert read(written("bias", bias)) == (None, None, "all")
    assert read(written("both", {**head, **bias})) == ("SEQ_CLS", ["score"], "all")
    assert read(written("causal", None, "CAUSAL_LM")) == ("CAUSAL_LM", None, "none")


@pytest.mark.parametrize("what", ["file in it", "file"])
def test_nothing_is_overwritten(what: str, tmp_path: Path) -> None:
    target = tmp_path / "a"
    file = target / "precious" if what == "file in it" else target
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(AdapterError, match="is not an empty directory: choose another, nothing was overwritten"):
        write_adapter(target, drawn({"a.linear": 2}), EXPORT)
    assert file.read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == (2 if what == "file in it" else 1)


def test_an_empty_directory_and_missing_parents_are_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "some" / "where"):
        write_adapter(target, drawn({"a.linear": 2}), EXPORT)
        assert sorted(p.name for p in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("step", ["write_flushed", "flush_directory"])
def test_a_failure_leaves_nothing(step: str, tmp_path: Path) -> None:
    with (
        mock.patch(f"share_core.peft.writer.{step}", side_effect=OSError(28, os.strerror(28))),
        pytest.raises(OSError, match="No space"),
    ):
        write_adapter(tmp_path / "a", drawn({"a.linear": 2}), EXPORT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("factors", "options", "error", "says"),
    [
        ({"b": Factors(torch.ones(6, 1), torch.ones(4, 1))}, {}, AdapterError, "site 'b' is not one"),
        ({"a.linear": Factors(torch.ones(4, 1), torch.ones(6, 1))}, {}, AdapterError, "expected 6 x 4, got 4 x 6"),
        ({"table": Factors(torch.ones(7, 1), torch.ones(3, 1))}, {}, AdapterError, "expected 3 x 7, got 7 x 3"),
        ({"a.linear": Factors(torch.full((6, 1), torch.nan), torch.ones(4, 1))}, {}, NonFiniteError, "site 'a.linear'"),
        ({"a.linear": Factors(torch.ones(6, 1), torch.full((4, 1), torch.inf))}, {}, NonFiniteError, "site 'a.linear'"),
        (
            {"a.linear": Factors(torch.full((6, 1), 1e7), torch.full((4, 1), 1e7))},
            {"dtype": torch.float16},
            AdapterError,
            "too large for torch.float16",
        ),
    ],
)
def test_factors_that_are_refused(
    factors: Adapter, options: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as refused:
        write_adapter(tmp_path / "a", factors, EXPORT, **options)
    assert says in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no site at all"):
        write_adapter(tmp_path / "a", {}, PeftExport(None, None, False, (), {}))


def test_what_is_kept_is_json() -> None:
    assert PeftExport.from_json(json.loads(json.dumps(EXPORT.to_json()))) == EXPORT


def _change(**changes: Any) -> Callable[[], Any]:
    return lambda: {**EXPORT.to_json(), **changes}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: None, "it is no object"),
        (list, "it is no object"),
        (dict, "sites is no object"),
        (_change(sites=[]), "sites is no object"),
        (_change(modules_to_save="score"), "modules_to_save is no list"),
        (_change(modules_to_save=[1]), "modules_to_save is no list"),
        (_change(fan_in_fan_out="no"), "fan_in_fan_out or bias"),
        (_change(bias="few"), "fan_in_fan_out or bias"),
        (_change(base_model=1), "base_model is neither"),
        (_change(task_type=[]), "task_type is neither"),
        (_change(sites={"a": None}), "site 'a' is not"),
        (_change(sites={"a": ["m", "linear"]}), "site 'a' is not"),
        (_change(sites={"a": ["", "linear", [1, 1]]}), "has module ''"),
        (_change(sites={"a": ["m", "linea", [1, 1]]}), "kind 'linea'"),
        (_change(sites={"a": ["m", [], [1, 1]]}), "has module 'm'"),
        (_change(sites={"a": ["m", "linear", [1]]}), "has shape"),
        (_change(sites={"a": ["m", "conv", [1, 1]]}), "has shape"),
        (_change(sites={"a": ["m", "linear", [1, 0]]}), "has shape"),
        (_change(sites={"a": ["m", "linear", [1, True]]}), "has shape"),
    ],
)
def test_damaged_export_information(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(AdapterError, match="the export information is damaged") as refused:
        PeftExport.from_json(make())
    assert says in str(refused.value)
