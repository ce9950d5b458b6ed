"""Results, the stored file, the table and the pictures, from a run whose figures are known."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from share_core.errors import ConfigError
from share_simulations.metrics import AccuracyMatrix
from share_simulations.plots import write_plots
from share_simulations.report import percent, points, print_report, size
from share_simulations.results import FILE, Results, as_json, read_results, summarise, write_results
from share_simulations.scenario import Scenario
from share_simulations.watch import Observation

PROMISED = {
    "scenario",
    "average_accuracy",
    "lora_average_accuracy",
    "forgetting",
    "bwt",
    "bytes_up",
    "bytes_up_lora",
    "bytes_heads",
    "bytes_down",
    "bytes_envelope",
    "bytes_total",
    "versions",
    "staleness_max",
    "staleness_mean",
    "clients",
    "tasks",
    "seconds",
    "run_dir",
    "dtype",
    "per_task",
}


def printed(results: Results) -> str:
    stream = StringIO()
    print_report(results, Console(file=stream, width=120))
    return stream.getvalue()


def test_the_figures_are_those_worked_out_by_hand(results: Results) -> None:
    assert results.average_accuracy == pytest.approx((0.78 + 0.62 + 0.90) / 3)
    assert results.lora_average_accuracy == pytest.approx(0.8)
    assert results.forgetting == pytest.approx((0.02 - 0.02 + 0.0) / 3, abs=1e-12)
    assert results.bwt == pytest.approx(0.0, abs=1e-12)
    assert results.bytes_up == 1100
    assert results.bytes_up_lora == 3 * (32 + 48) * 8 * 4
    assert (results.bytes_heads, results.bytes_envelope, results.bytes_down) == (40, 30, 5000)
    assert results.bytes_total == 1100 + 40 + 30 + 5000
    assert results.staleness_max == 1
    assert results.staleness_mean == pytest.approx(2 / 3)
    assert results.staleness == {"0": 1, "1": 2}
    assert [t.task for t in results.per_task] == ["north/a", "east/c", "north/b"]
    assert [t.forgetting for t in results.per_task] == [pytest.approx(0.02), pytest.approx(-0.02), 0.0]
    assert results.task_matrix.values == ((0.80, None, None), (0.78, 0.60, None), (0.78, 0.62, 0.90))


def test_the_json_holds_everything_promised(results: Results) -> None:
    plain = json.loads(json.dumps(as_json(results)))
    assert set(plain) >= PROMISED
    assert plain["per_task"][0]["owner"] == "north/trainer"


def test_what_is_stored_is_read_back(results: Results, tmp_path: Path) -> None:
    path = write_results(results, tmp_path)
    assert path == tmp_path / FILE
    assert read_results(tmp_path) == results


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"per_task": 3}'])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=FILE):
        read_results(tmp_path)


def test_no_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the results of a finished run"):
        read_results(tmp_path)


def test_the_report_says_what_the_results_say(results: Results) -> None:
    text = printed(results)
    assert "76.7" in text, "average accuracy"
    assert "separate LoRA 80.0" in text
    assert "+2.00" in text
    assert "-2.00" in text
    assert "1100 B" in text
    assert "= 14 % of" in text
    assert "1 x 0, 2 x 1" in text
    assert "?" not in text


def test_what_was_not_measured_is_shown_as_such(scenario: Scenario, seen: Observation, tmp_path: Path) -> None:
    kept = tuple(m for m in seen.measured if (m.task, m.version) != ("east/c", 3))
    partial = summarise(scenario, dataclasses.replace(seen, measured=kept), {}, 1.0, 0.0, tmp_path)
    assert partial.average_accuracy is None
    assert partial.forgetting is None
    assert partial.lora_average_accuracy is None
    text = printed(partial)
    row = next(line for line in text.splitlines() if "3 b" in line)
    assert "?" in row, "c was there and not evaluated"
    first = next(line for line in text.splitlines() if "1 a" in line)
    assert first.count(" . ") == 2, "c and b did not exist yet"
    assert "?" not in first


def test_a_run_without_any_merge_can_be_reported(scenario: Scenario, tmp_path: Path) -> None:
    empty = summarise(scenario, Observation(), {}, 1.0, 0.0, tmp_path)
    assert empty.matrix == AccuracyMatrix(scenario.task_ids, (), ())
    assert "average accuracy" in printed(empty)
    write_plots(empty, tmp_path)


def test_pictures_are_written_and_differ_with_the_results(results: Results, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = write_plots(results, tmp_path)
    cell = dataclasses.replace(results.matrix, values=((0.1, None, None), *results.matrix.values[1:]))
    others = write_plots(dataclasses.replace(results, matrix=cell), tmp_path / "other")
    for path, other in zip(paths, others, strict=True):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.read_bytes() != other.read_bytes()


def test_figures_for_people() -> None:
    assert (percent(0.12345), percent(None)) == ("12.3", "?")
    assert (points(-0.0), points(0.0012), points(None)) == ("+0.00", "+0.12", "?")
    assert (size(9999), size(12_345), size(12_345_678)) == ("9999 B", "12.3 kB", "12.3 MB")
