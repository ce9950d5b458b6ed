"""The commands of ``share-space`` from adapter directories to adapter directories."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from share_core.fingerprint import describe_space
from share_core.ledger import measure
from share_core.merge import MergePolicy, empty_state, merge
from share_core.peft.reader import read_adapter
from share_core.space_tool.spacefile import read_space
from share_core.spec_file import spec_to_toml
from share_core.types import Factors
from share_core.wire import encode_snapshot

KEYS = {
    "adapters",
    "sites",
    "cap",
    "budget",
    "mean_error",
    "max_error",
    "per_task",
    "measured",
    "bytes_space",
    "bytes_adapters",
    "seconds",
    "peak_mib",
}


def test_merge_says_in_json_what_it_made(run: Any, three: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "m.space"
    answer = run("merge", *three, "-o", path, "--cap", 5, "--json")
    assert (answer.code, answer.err.strip()) == (0, "")
    found = answer.result
    assert set(found) == KEYS
    assert (found["adapters"], found["sites"], found["cap"], found["budget"]) == (3, 3, 5, 0.0)
    assert list(found["per_task"]) == ["one", "two", "three"]
    assert found["measured"] is True
    assert found["max_error"] == max(found["per_task"].values()) > found["mean_error"] > 0
    assert found["bytes_space"] == path.stat().st_size
    assert found["bytes_adapters"] == 3 * 4 * 3 * (22 + 22 + 22)
    assert all(max(b.k_out, b.k_in) <= 5 for b in read_space(path).space.bases.values())


@pytest.mark.parametrize("options", [("--cap", 5), ("--cap", 2), ("--cap", 5, "--rank", 1), ("--budget", 0.3)])
def test_per_task_errors_are_those_of_the_exported_adapters(
    options: tuple[object, ...], run: Any, three: list[Path], tmp_path: Path, relative_error: Any
) -> None:
    path = tmp_path / "m.space"
    found = run("merge", *three, "-o", path, "--json", *options).result
    for source in three:
        out = tmp_path / "out" / source.name
        assert run("export", path, source.name, "-o", out).code == 0
        assert found["per_task"][source.name] == pytest.approx(relative_error(source, out), abs=2e-6)


def test_a_budget_is_kept(run: Any, three: list[Path], tmp_path: Path) -> None:
    found = run("merge", *three, "-o", tmp_path / "m", "--budget", 0.2, "--json").result
    assert (found["cap"], found["budget"]) == (None, 0.2)
    assert 0 < found["max_error"] <= 0.2


@pytest.mark.parametrize("options", [("--budget", 0), ("--cap", 64), ("--cap", 1 << 20)])
def test_nothing_is_lost_where_there_is_room(
    options: tuple[object, ...], run: Any, three: list[Path], tmp_path: Path
) -> None:
    assert run("merge", *three, "-o", tmp_path / "m", *options, "--json").result["max_error"] < 1e-6


def test_rank_and_site_caps(run: Any, three: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "m.space"
    assert run("merge", *three, "-o", path, "--rank", 2, "--site-cap", "*.out=3", "--site-cap", "*=4").code == 0
    file = read_space(path)
    assert {name: b.k_out for name, b in file.space.bases.items()} == {
        "layer.0.query": 4,
        "layer.0.value": 4,
        "layer.1.out": 3,
    }
    assert all(core.rank <= 2 for cores in file.space.cores.values() for core in cores.values())
    assert list(file.policy.site_caps) == ["*.out", "*"], "the first that matches counts, also after reading"


def test_a_site_cap_that_matches_nothing_is_said(run: Any, three: list[Path], tmp_path: Path) -> None:
    answer = run("merge", *three, "-o", tmp_path / "m.space", "--site-cap", "layr*=4")
    assert answer.code == 0
    assert "no site matches the cap for 'layr*'" in answer.err


def test_cap_one(run: Any, three: list[Path], tmp_path: Path) -> None:
    assert 0 < run("merge", *three, "-o", tmp_path / "m", "--cap", 1, "--json").result["max_error"] <= 1


def test_one_adapter_of_more_ranks_than_the_cap_is_cut_to_its_best(run: Any, adapter: Any, tmp_path: Path) -> None:
    source = adapter(tmp_path / "wide", rank=8)
    found = run("merge", source, "-o", tmp_path / "m", "--cap", 3, "--json").result
    values = [torch.linalg.svdvals(f.out.double() @ f.in_.double().T) for f in read_adapter(source).factors.values()]
    best = (sum(float(s[3:].square().sum()) for s in values) / sum(float(s.square().sum()) for s in values)) ** 0.5
    assert found["max_error"] == pytest.approx(best, rel=1e-5)


def test_the_same_adapter_twice_costs_no_more_than_once(run: Any, three: list[Path], tmp_path: Path) -> None:
    once = run("merge", three[0], "-o", tmp_path / "a", "--cap", 2, "--json").result
    twice = run("merge", three[0], f"again={three[0]}", "-o", tmp_path / "b", "--cap", 2, "--json").result
    assert list(twice["per_task"]) == ["one", "again"]
    assert twice["max_error"] == pytest.approx(once["max_error"], abs=1e-5)


def test_names(run: Any, adapter: Any, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "Größe 1", 1), adapter(tmp_path / "lr=0.1" / "x", 2)
    found = run("merge", first, second, f"org/given={first}", "-o", tmp_path / "größe.space", "--json").result
    assert list(found["per_task"]) == ["gr-e-1", "x", "org/given"]
    assert read_space(tmp_path / "größe.space").sources["gr-e-1"].path == str(first)


def test_the_order_of_arguments_is_the_order_of_arrival(run: Any, three: list[Path], tmp_path: Path) -> None:
    forwards = run("merge", *three, "-o", tmp_path / "a", "--cap", 8, "--json").result["per_task"]
    backwards = run("merge", *reversed(three), "-o", tmp_path / "b", "--cap", 8, "--json").result["per_task"]
    assert list(forwards) == list(reversed(backwards))
    assert all(abs(forwards[task] - backwards[task]) < 0.1 for task in forwards)


def test_equal_adapters_make_equal_files(run: Any, three: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("merge", *three, "-o", tmp_path / name, "--cap", 5).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_sites_may_differ_and_adapters_may_change_nothing(
    run: Any, adapter: Any, tmp_path: Path, relative_error: Any
) -> None:
    sites = {"a": (6, 7), "b": (7, 6), "c": (6, 7)}
    sources = [
        adapter(tmp_path / "in" / name, seed, {n: sites[n] for n in own}, scale=scale)
        for seed, (name, own, scale) in enumerate(
            [("ab", "ab", 1.0), ("bc", "bc", 100.0), ("none", "c", 0.0), ("c", "c", 0.01)]
        )
    ]
    path = tmp_path / "m.space"
    found = run("merge", *sources, "-o", path, "--cap", 4, "--json").result
    assert (found["sites"], found["per_task"]["none"]) == (3, 0.0)
    for source in (sources[0], sources[1], sources[3]):
        run("export", path, source.name, "-o", tmp_path / source.name)
        assert relative_error(source, tmp_path / source.name) == pytest.approx(found["per_task"][source.name], abs=2e-6)
        assert set(read_adapter(tmp_path / source.name).sites) <= set(read_adapter(source).sites)
    assert run("verify", path).code == 0
    assert run("export", path, "none", "-o", tmp_path / "none").code == 0
    assert all(not f.out.any() for f in read_adapter(tmp_path / "none").factors.values())


def test_only_adapters_that_change_nothing(run: Any, adapter: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.space"
    found = run("merge", adapter(tmp_path / "zero", scale=0.0), "-o", path, "--json").result
    assert (found["max_error"], found["measured"]) == (0.0, True)
    assert run("verify", path).code == run("inspect", path, "--plot", tmp_path / "p.png").code == 0


def test_add_gives_what_one_merge_gives(run: Any, three: list[Path], tmp_path: Path) -> None:
    one, two = tmp_path / "a", tmp_path / "b"
    whole = run("merge", *three, "-o", one, "--json").result
    run("merge", *three[:2], "-o", two)
    first = two.read_bytes()
    added = run("add", two, three[2], "-o", tmp_path / "c", "--json").result
    assert two.read_bytes() == first
    assert added["per_task"].keys() == whole["per_task"].keys()
    assert added["max_error"] < 1e-6
    assert run("add", two, three[2]).code == 0
    assert two.read_bytes() == (tmp_path / "c").read_bytes()


def test_a_task_of_the_same_name_is_replaced(
    run: Any, space: Path, adapter: Any, tmp_path: Path, relative_error: Any
) -> None:
    other = adapter(tmp_path / "other", 9)
    found = run("add", space, f"one={other}", "--json").result
    assert list(found["per_task"]) == ["two", "three", "one"]
    run("export", space, "one", "-o", tmp_path / "out")
    assert relative_error(other, tmp_path / "out") == pytest.approx(found["per_task"]["one"], abs=2e-6)


def test_remove(run: Any, space: Path) -> None:
    before = read_space(space)
    found = run("remove", space, "two", "--json").result
    after = read_space(space)
    assert list(found["per_task"]) == ["one", "three"]
    for task, ledger in after.ledger.items():
        assert ledger.bound <= before.ledger[task].bound + 1e-6, "the others do not move"
    assert run("verify", space).code == 0


def test_directions_that_nobody_uses_go_with_their_task(run: Any, three: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "m.space"
    run("merge", *three, "-o", path)
    sizes = {name: b.k_out for name, b in read_space(path).space.bases.items()}
    found = run("remove", path, "two", "one", "--json").result
    assert found["max_error"] < 1e-6
    assert all(b.k_out == 3 < sizes[name] for name, b in read_space(path).space.bases.items())
    run("remove", path, "three")
    assert all(b.k_out == b.k_in == 0 for b in read_space(path).space.bases.values())
    assert run("verify", path).code == run("inspect", path).code == run("inspect", path, "--json").code == 0
    assert run("add", path, three[0], "--json").result["max_error"] < 1e-6


def test_remove_a_contributor(run: Any, three: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "m.space"
    run("merge", f"anna/x={three[0]}", f"anna/y={three[1]}", f"bert/x={three[2]}", "-o", path)
    assert list(run("remove", path, "--contributor", "anna", "--json").result["per_task"]) == ["bert/x"]
    answer = run("remove", path, "--contributor", "anna")
    assert (answer.code, "a contributor that has some" in answer.err) == (1, True)


@pytest.mark.parametrize("with_backbone", [True, False])
def test_removed_anew_is_as_if_it_had_never_been_there(
    with_backbone: bool, run: Any, three: list[Path], backbone: Any, tmp_path: Path
) -> None:
    options = ["--cap", 5, *(["--backbone", backbone(tmp_path / "model")] if with_backbone else [])]
    run("merge", *three, "-o", tmp_path / "a", *options)
    run("merge", three[0], three[2], "-o", tmp_path / "b", *options)
    assert run("remove", tmp_path / "a", "two", "--anew").code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rebuild_is_a_merge_at_another_size(run: Any, space: Path, three: list[Path], tmp_path: Path) -> None:
    assert run("rebuild", space, "--cap", 3, "-o", tmp_path / "a").code == 0
    run("merge", *three, "-o", tmp_path / "b", "--cap", 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_inspect(run: Any, space: Path, tmp_path: Path) -> None:
    found = run("inspect", space, "--json").result
    assert [task["task"] for task in found["tasks"]] == ["one", "two", "three"]
    assert [site["site"] for site in found["sites"]] == ["layer.0.query", "layer.0.value", "layer.1.out"]
    assert all(sum(site["spectrum"]) == pytest.approx(1) and len(site["spectrum"]) == 5 for site in found["sites"])
    text = run("inspect", space, "--plot", tmp_path / "p.png")
    assert text.code == 0
    assert "bert-tiny version 3: 3 tasks" in text.out
    assert "layer.1.out" in text.out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_a_snapshot(run: Any, tmp_path: Path) -> None:
    spec = describe_space("tiny", {"q": torch.ones(12, 10)})
    merged = merge(
        empty_state(spec), "org/t", {"q": Factors(torch.randn(12, 2), torch.randn(10, 2))}, MergePolicy(8, 0.0)
    )
    path, toml = tmp_path / "snapshot", tmp_path / "space.toml"
    path.write_bytes(encode_snapshot(merged.state.space))
    toml.write_text(spec_to_toml(spec))
    found = run("inspect", path, "--space", toml, "--json").result
    assert [(site["k_out"], site["k_in"]) for site in found["sites"]] == [(2, 2)]
    assert "org/t" in run("inspect", path, "--space", toml).out
    answer = run("inspect", path)
    assert (answer.code, "inspect it with --space" in answer.err) == (1, True)
    answer = run("inspect", path, "--space", toml, "--plot", tmp_path / "p.png")
    assert (answer.code, "carries no errors to draw" in answer.err) == (1, True)


@pytest.mark.parametrize("own", [True, False])
def test_export_is_the_task(own: bool, run: Any, space: Path, tmp_path: Path) -> None:
    assert run("export", space, "two", "-o", tmp_path / "out", *(["--own-ranks"] if own else [])).code == 0
    file, again = read_space(space), read_adapter(tmp_path / "out")
    stored = {
        site: Factors(file.space.bases[site].left @ c.out, file.space.bases[site].right @ c.in_)
        for site, c in file.space.cores["two"].items()
    }
    assert measure(stored, again.factors).bound < 1e-6
    assert again.config.base_model == "bert-tiny"
    assert {s.module for s in again.sites.values()} == {f"bert.{name}" for name in file.sites}


def test_export_with_heads(run: Any, adapter: Any, tmp_path: Path) -> None:
    key = "base_model.model.bert.layer.0.query.bias"
    source = adapter(tmp_path / "in", extra={key: torch.ones(12)})
    run("merge", source, "-o", tmp_path / "m")
    assert "with heads" in run("export", tmp_path / "m", "in", "-o", tmp_path / "a", "--heads").out
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")[key].sum() == 12
    run("export", tmp_path / "m", "in", "-o", tmp_path / "b")
    assert key not in load_file(tmp_path / "b" / "adapter_model.safetensors")
    adapter(tmp_path / "in", 7, extra={key: torch.zeros(12)})
    answer = run("export", tmp_path / "m", "in", "-o", tmp_path / "c", "--heads")
    assert (answer.code, "export without --heads" in answer.err) == (1, True)
    assert not (tmp_path / "c").exists()


def test_export_for_vllm_says_the_rank_it_needs_or_leaves_nothing(run: Any, adapter: Any, tmp_path: Path) -> None:
    source = adapter(tmp_path / "in", extra={"base_model.model.bert.layer.0.query.bias": torch.ones(12)})
    run("merge", source, "-o", tmp_path / "m")
    answer = run("export", tmp_path / "m", "in", "-o", tmp_path / "a", "--for", "vllm")
    assert (answer.code, "start vLLM with --max-lora-rank 8 or more" in answer.out) == (0, True)
    answer = run("export", tmp_path / "m", "in", "-o", tmp_path / "b", "--for", "vllm", "--heads")
    assert (answer.code, "layer.0.query.bias' has another name" in answer.err) == (1, True)
    assert not (tmp_path / "b").exists()
    assert run("export", tmp_path / "m", "in", "-o", tmp_path / "c", "--for", "tgi").code == 2


def test_diff(run: Any, space: Path, three: list[Path], adapter: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.space"
    run("merge", three[0], three[1], adapter(tmp_path / "four", 4), "-o", other, "--cap", 5)
    same = run("diff", space, space, "--json").result
    assert all(site["left_distance"] < 1e-6 for site in same["sites"])
    assert all(task["apart"] < 1e-6 for task in same["tasks"])
    found = run("diff", space, other, "--json").result
    assert (found["added"], found["removed"]) == (["four"], ["three"])
    assert [task["task"] for task in found["tasks"]] == ["one", "two"]
    assert all(0 < task["apart"] < 2 and 0 < task["error_second"] < 1 for task in found["tasks"])
    assert "only in the second: four" in run("diff", space, other).out
    strange = adapter(tmp_path / "strange", sites={"x": (3, 4)})
    run("merge", strange, "-o", tmp_path / "s")
    assert "no site in common" in run("diff", space, tmp_path / "s").err


def test_verify_passes_and_names_what_was_not_measured_again(
    run: Any, space: Path, three: list[Path], adapter: Any
) -> None:
    assert run("verify", space, "--json").result["ok"] is True
    assert "ok" in run("verify", space).out
    shutil.rmtree(three[0])
    adapter(three[1], 77)
    (three[2] / "adapter_model.safetensors").write_bytes(b"damaged")
    found = run("verify", space, "--json").result
    assert found["ok"] is True
    details = {row["checked"]: row["detail"] for row in found["findings"]}
    assert all("not measured again" in details[task] for task in ("one", "two", "three"))


@pytest.mark.parametrize("tensor", ["L/layer.0.query", "R/layer.1.out", "E_o/layer.0.value", "norms", "bounds"])
def test_verify_finds_what_was_altered(tensor: str, run: Any, space: Path) -> None:
    with safe_open(space, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(space)
    tensors[tensor].view(-1)[0] += 0.01 * tensors[tensor].abs().max()
    save_file(tensors, space, metadata)
    answer = run("verify", space)
    assert answer.code == 1
    assert "WRONG" in answer.out
    assert "does not hold what it says" in answer.err
    assert run("verify", space, "--json").result["ok"] is False


def test_sources_that_are_gone_keep_a_bound(run: Any, space: Path, three: list[Path], adapter: Any) -> None:
    before = read_space(space)
    shutil.rmtree(three[0])
    (three[1] / "adapter_model.safetensors").write_bytes(b"damaged")
    found = run("add", space, adapter(three[0].parent / "four", 4), "--json").result
    after = read_space(space)
    assert found["measured"] is False
    assert {t: after.ledger[t].measured for t in after.ledger} == {
        "one": False,
        "two": False,
        "three": True,
        "four": True,
    }
    assert after.ledger["one"].bound >= before.ledger["one"].bound - 1e-6
    assert run("verify", space).code == 0
    whole = space.read_bytes()
    answer = run("rebuild", space)
    assert (answer.code, "task 'one' cannot be rebuilt" in answer.err) == (1, True)
    assert run("remove", space, "three", "--anew").code == 1
    assert space.read_bytes() == whole


def test_a_kept_bound_holds(run: Any, three: list[Path], adapter: Any, tmp_path: Path, relative_error: Any) -> None:
    path, aside = tmp_path / "m.space", tmp_path / "aside"
    run("merge", *three, "-o", path, "--cap", 4)
    shutil.copytree(three[0], aside)
    shutil.rmtree(three[0])
    for seed in range(4):
        found = run("add", path, adapter(tmp_path / f"more{seed}", 50 + seed), "--json").result
    run("export", path, "one", "-o", tmp_path / "out")
    assert relative_error(aside, tmp_path / "out") <= found["per_task"]["one"] + 1e-6
