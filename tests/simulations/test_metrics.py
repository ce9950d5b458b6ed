"""Metrics against matrices worked out by hand, and properties on drawn ones."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from share_simulations import metrics
from share_simulations.metrics import Measured, Site, Submission


def submission(task: str, base: int, version: int, coefficients: int = 100, directions: int = 50) -> Submission:
    return Submission(task, "org/a", base, version, coefficients, directions, heads=7, envelope=3)


# Three tasks. Version 1 brings a, 2 brings b, 3 brings c, 4 brings a again.
JOURNAL = (submission("a", 0, 1), submission("b", 0, 2), submission("c", 1, 3), submission("a", 3, 4))
MEASURED = (
    Measured("a", 1, 0.80),
    Measured("a", 2, 0.80),
    Measured("b", 2, 0.60),
    Measured("a", 3, 0.70),
    Measured("b", 3, 0.55),
    Measured("c", 3, 0.90),
    Measured("a", 4, 0.85),
    Measured("b", 4, 0.50),
    Measured("c", 4, 0.93),
)


def test_the_whole_matrix_has_a_row_for_every_version() -> None:
    matrix = metrics.accuracy_matrix(MEASURED, ("a", "b", "c"), newest=4)
    assert matrix.versions == (1, 2, 3, 4)
    assert matrix.values == ((0.80, None, None), (0.80, 0.60, None), (0.70, 0.55, 0.90), (0.85, 0.50, 0.93))


def test_the_task_matrix_has_the_state_after_each_last_merge() -> None:
    last = metrics.last_merges(JOURNAL)
    assert list(last.items()) == [("b", 2), ("c", 3), ("a", 4)]
    matrix = metrics.task_matrix(metrics.accuracy_matrix(MEASURED, ("a", "b", "c"), 4), last)
    assert matrix.tasks == ("b", "c", "a")
    assert matrix.versions == (2, 3, 4)
    assert matrix.values == ((0.60, None, 0.80), (0.55, 0.90, 0.70), (0.50, 0.93, 0.85))


def test_forgetting_counts_from_the_last_merge_over_all_tasks() -> None:
    last = metrics.last_merges(JOURNAL)
    matrix = metrics.accuracy_matrix(MEASURED, ("a", "b", "c"), 4)
    own, final = metrics.own_accuracy(matrix, last), metrics.final_accuracy(matrix)
    assert own == {"a": 0.85, "b": 0.60, "c": 0.90}
    assert final == {"a": 0.85, "b": 0.50, "c": 0.93}
    forgetting = metrics.forgetting_per_task(own, final)
    assert forgetting == {"a": 0.0, "b": pytest.approx(0.10), "c": pytest.approx(-0.03)}
    assert metrics.mean(forgetting.values()) == pytest.approx(0.07 / 3)
    # Nothing was merged after a; b fell by 10 points and c rose by 3.
    assert metrics.backward_transfer(own, final, last, newest=4) == pytest.approx(-0.035)


def test_backward_transfer_of_a_single_task_does_not_exist() -> None:
    assert metrics.backward_transfer({"a": 0.5}, {"a": 0.5}, {"a": 1}, newest=1) is None


def test_a_missing_cell_stays_missing() -> None:
    without = tuple(m for m in MEASURED if (m.task, m.version) != ("b", 4))
    last = metrics.last_merges(JOURNAL)
    matrix = metrics.accuracy_matrix(without, ("a", "b", "c"), 4)
    own, final = metrics.own_accuracy(matrix, last), metrics.final_accuracy(matrix)
    assert final["b"] is None
    assert metrics.forgetting_per_task(own, final)["b"] is None
    assert metrics.mean(final.values()) is None
    assert metrics.backward_transfer(own, final, last, 4) is None


def test_a_task_that_was_never_merged_has_no_own_accuracy() -> None:
    matrix = metrics.accuracy_matrix(MEASURED, ("a", "d"), 4)
    assert metrics.own_accuracy(matrix, metrics.last_merges(JOURNAL))["d"] is None


def test_the_mean_of_nothing_is_missing() -> None:
    assert metrics.mean([]) is None


def test_bytes_count_every_submission_and_one_lora_for_each() -> None:
    sites = (Site(64, 64), Site(64, 256))
    assert metrics.lora_bytes(sites, 8, "float32") == (128 + 320) * 8 * 4
    assert metrics.lora_bytes(sites, 8, "bfloat16") == (128 + 320) * 8 * 2
    counted = metrics.traffic(JOURNAL, down=1000, sites=sites, lora_rank=8, dtype="float32")
    assert counted.up == 4 * 150
    assert counted.up_lora == 4 * (128 + 320) * 8 * 4
    assert (counted.heads, counted.envelope, counted.down) == (28, 12, 1000)
    assert counted.total == 600 + 28 + 12 + 1000
    pulled = metrics.traffic(JOURNAL, 1000, sites, 8, "float32", down_heads=5)
    assert (pulled.heads, pulled.down, pulled.total - counted.total) == (33, 1000, 5)


def test_an_unmerged_update_left_the_client_but_has_no_staleness() -> None:
    waiting = submission("d", 4, 0)
    assert waiting.staleness is None
    assert metrics.traffic((waiting,), 0, (Site(2, 2),), 8, "float32").up == 150
    assert metrics.last_merges((waiting,)) == {}
    assert metrics.staleness_histogram((*JOURNAL, waiting)) == {0: 2, 1: 2}


@given(tasks=st.integers(1, 6), versions=st.integers(1, 12), gaps=st.floats(0, 0.4), seed=st.integers(0, 2**32 - 1))
def test_forgetting_is_the_own_row_minus_the_last_row(tasks: int, versions: int, gaps: float, seed: int) -> None:
    draw = random.Random(seed)
    names = [f"t{i}" for i in range(tasks)]
    journal = [submission(n, 0, draw.randint(1, versions)) for n in names for _ in range(draw.randint(1, 3))]
    measured = [
        Measured(n, v, draw.random())
        for n in names
        for v in range(min(s.version for s in journal if s.task == n), versions + 1)
        if draw.random() >= gaps
    ]
    last = metrics.last_merges(journal)
    matrix = metrics.accuracy_matrix(measured, names, versions)
    known = {(m.task, m.version): m.value for m in measured}
    forgetting = metrics.forgetting_per_task(metrics.own_accuracy(matrix, last), metrics.final_accuracy(matrix))
    for name in names:
        before, after = known.get((name, last[name])), known.get((name, versions))
        value = forgetting[name]
        assert (value is None) == (before is None or after is None)
        if before is not None and after is not None and value is not None:
            assert math.isclose(value, before - after)
    square = metrics.task_matrix(matrix, last)
    assert len(square.values) == tasks
    assert all(square.values[i][i] == known.get((n, last[n])) for i, n in enumerate(square.tasks))
    assert list(square.versions) == sorted(square.versions)
    assert sum(metrics.staleness_histogram(journal).values()) == len(journal)
