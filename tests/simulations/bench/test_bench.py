"""The benchmarks at toy sizes: every promised key, figures that mean what they say, faults that would show."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from share_core.errors import ConfigError
from share_simulations.bench.compress import CompressOptions, read_pool, run_compress
from share_simulations.bench.endurance import EnduranceOptions, run_endurance
from share_simulations.bench.flops import flop_counter
from share_simulations.bench.generated import Generator, Shape
from share_simulations.bench.machine import pick_device
from share_simulations.bench.merge import MergeOptions, run_merge
from share_simulations.cli import app

TOY = Shape(sites=2, d_out=48, d_in=40, rank=3, cap=12)


def test_merge_reports_every_key_and_the_peers() -> None:
    report = run_merge(MergeOptions(TOY, tasks=(4, 8), device="cpu", peer_sites=1, error_sites=1))
    for key in (
        "seconds_per_update",
        "speedup_vs_restack",
        "speedup_vs_best_peer",
        "error_ratio_to_oracle",
        "error_ratio_paper_to_oracle",
        "roofline_fraction",
        "peak_mib",
        "growth",
    ):
        assert report[key] > 0, key
    assert 0.99 < report["error_ratio_to_oracle"] < 1.2
    assert report["error_ratio_paper_to_oracle"] > report["error_ratio_to_oracle"]
    assert set(report["by_tasks"]) == {"4", "8"}
    assert set(report["peers"]) == {
        "restack",
        "vlora-dev absorb_incremental",
        "vlora-dev absorb",
        "lorashare",
        "HOOI anew",
    }
    for name, peer in report["peers"].items():
        assert peer["speedup"] == pytest.approx(peer["seconds_per_update"] / report["seconds_per_update"]), name
        assert 0 < peer["error"] < 1, name
    assert report["peers"]["HOOI anew"]["error"] <= report["peers"]["restack"]["error"]
    same = {name: peer["speedup"] for name, peer in report["peers"].items() if peer["same_job"]}
    assert report["speedup_vs_best_peer"] == min(same.values())
    json.dumps(report)


def test_a_missing_package_is_said_before_the_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str, package: str) -> None:
        raise ConfigError(f"install {package}")

    notes: list[str] = []
    monkeypatch.setattr("share_simulations.bench.peers.optional_package", absent)
    with pytest.raises(ConfigError, match="install vlora-dev"):
        run_merge(MergeOptions(TOY, tasks=(4,), device="cpu"), notes.append)
    assert notes == []


def test_compress_reports_every_method_and_the_worst_order() -> None:
    report = run_compress(CompressOptions(caps=(6, 48), orders=2))
    rows = report["pools"]["generated"]["caps"]
    methods = rows["6"]["methods"]
    assert {"ours", "oracle", "paper once", "vlora-dev", "lorashare", "FlexLoRA (one adapter for all)"} <= set(methods)
    assert methods["oracle"]["mean"] <= methods["ours"]["mean"] * 1.001
    assert methods["ours"]["mean"] < methods["paper once"]["mean"]
    assert 1.0 <= report["error_ratio_to_oracle"] < 1.05
    assert rows["48"]["oracle_error"] < 1e-5
    assert report["lossless_error"] < 1e-5
    assert report["error_ratio_to_paper"] < 1.0


def test_compress_of_a_folder_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no PEFT adapter"):
        read_pool(tmp_path)


def test_ten_thousand_merges_keep_the_bases_the_ledger_and_the_memory() -> None:
    options = EnduranceOptions(merges=10_000, shape=Shape(1, 14, 12, 1, 3), tasks=6, window=2, checks=10)
    report = run_endurance(options)
    assert report["orthonormal_departure"] < 1e-5
    assert report["ledger_gap"] < 1e-6
    assert report["bound_violations"] == 0
    assert report["tensor_bytes_growth"] < 0.2 * report["tensor_bytes"]


def test_endurance_catches_bases_that_are_never_polished_and_bounds_that_are_too_low() -> None:
    options = EnduranceOptions(merges=300, shape=Shape(1, 14, 12, 2, 5), tasks=9, window=2, checks=5)
    assert run_endurance(options)["bound_violations"] == 0
    drifting = mock.patch("share_core.streaming.compact.reflect_basis", _sloppy)
    with drifting, mock.patch("share_core.streaming.fold.polish", lambda stack, step, tolerance: (stack, step)):
        assert run_endurance(options)["orthonormal_departure"] > 1e-5
    with mock.patch("share_core.streaming.compact._product2", lambda out, in_: torch.zeros(out.shape[:2]).double()):
        assert run_endurance(options)["bound_violations"] > 0


def _sloppy(base: torch.Tensor, extra: torch.Tensor, by: object) -> torch.Tensor:
    from share_core.streaming.reflect import reflect_basis

    return reflect_basis(base, extra, by) * (1 + 1e-6)  # type: ignore[arg-type]


def test_flops_of_in_place_products_and_factorisations_are_counted() -> None:
    a, b = torch.randn(8, 5), torch.randn(5, 6)
    with flop_counter() as counter:
        torch.zeros(8, 6).addmm_(a, b)
    assert counter.get_total_flops() == 2 * 8 * 5 * 6
    with flop_counter() as counter:
        torch.linalg.cholesky_ex(torch.eye(6))
    assert counter.get_total_flops() == 6**3 // 3


def test_generated_adapters_are_the_same_each_time_and_differ_by_number() -> None:
    one, again = Generator(TOY, torch.device("cpu")).adapter(3), Generator(TOY, torch.device("cpu")).adapter(3)
    other = Generator(TOY, torch.device("cpu")).adapter(4)
    assert all(torch.equal(one[s].out, again[s].out) for s in one)
    assert not torch.equal(one["site.000"].out, other["site.000"].out)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no device"):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA"):
            pick_device("cuda")


def test_commands_end_with_one_json_object() -> None:
    arguments = "--sites 1 --dim 40 --rank 2 --cap 8 --tasks 3,6 --no-peers --error-sites 1 --json --device cpu"
    result = CliRunner().invoke(app, ["bench", "merge", *arguments.split()])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["shape"]["rank"] == 2
    result = CliRunner().invoke(app, ["bench", "compress", "--caps", "4", "--orders", "1", "--no-peers"])
    assert result.exit_code == 0, result.output
    assert "oracle" in result.stdout
    result = CliRunner().invoke(app, ["bench", "merge", "--tasks", "many"])
    assert isinstance(result.exception, ConfigError)
