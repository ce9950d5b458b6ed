"""A finished run, made by hand, for everything that reads results."""

from __future__ import annotations

from pathlib import Path

import pytest

from share_simulations.baselines.separate_lora import Baseline
from share_simulations.metrics import Measured, Site, Submission
from share_simulations.results import Results, summarise
from share_simulations.scenario import ClientPlan, Scenario, TaskPlan
from share_simulations.watch import Observation


def _task(name: str) -> TaskPlan:
    return TaskPlan(name, "image-classification", f"{name}/train.npz", f"{name}/test.npz")


@pytest.fixture
def scenario() -> Scenario:
    clients = (ClientPlan("north", (_task("a"), _task("b"))), ClientPlan("east", (_task("c"),)))
    return Scenario("trial", "digits-vit", clients, seed=5)


@pytest.fixture
def seen() -> Observation:
    """Three versions; c was not evaluated at version 2, and b came last."""
    return Observation(
        version=3,
        submissions=(
            Submission("north/a", "north/trainer", 0, 1, 0, 400, envelope=10, relative_error=0.01),
            Submission("east/c", "east/trainer", 0, 2, 0, 400, envelope=10, relative_error=0.02),
            Submission("north/b", "north/trainer", 1, 3, 100, 200, heads=40, envelope=10, relative_error=0.03),
        ),
        measured=(
            Measured("north/a", 1, 0.80, 50),
            Measured("north/a", 2, 0.78, 50),
            Measured("north/a", 3, 0.78, 50),
            Measured("east/c", 2, 0.60, 50),
            Measured("east/c", 3, 0.62, 50),
            Measured("north/b", 3, 0.90, 50),
        ),
        down_bytes=5000,
        sites=(Site(16, 16), Site(16, 32)),
        k_left=6,
        k_right=5,
        subspace_bytes=1234,
        tau=0.05,
        k_max=64,
    )


@pytest.fixture
def results(scenario: Scenario, seen: Observation, tmp_path: Path) -> Results:
    alone = {t: Baseline(0.5, 0.8, rows=100, test_rows=50, classes=10) for t in scenario.task_ids}
    return summarise(scenario, seen, alone, 12.0, 3.0, tmp_path)
