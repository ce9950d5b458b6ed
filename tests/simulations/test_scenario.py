"""Scenarios: what is refused, when tasks arrive, and that the client reads what the simulation writes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from share_client.tasks_file import read_tasks
from share_core.errors import ConfigError, TaskNameError
from share_simulations.scenario import (
    Arrival,
    ClientPlan,
    Scenario,
    TaskPlan,
    tasks_toml,
    toml_value,
    write_tasks_file,
)


def task(name: str, merged: int = 0) -> TaskPlan:
    return TaskPlan(name, "image-classification", f"{name}/train.npz", f"{name}/test.npz", Arrival(merged))


def scenario(*clients: ClientPlan) -> Scenario:
    return Scenario("trial", "digits-vit", clients)


def test_ids_and_owners_follow_the_organisation() -> None:
    made = scenario(ClientPlan("north", (task("a"), task("b"))), ClientPlan("east", (task("a"),), name="gpu"))
    assert made.task_ids == ("north/a", "north/b", "east/a")
    assert made.owners["east/a"].member == "east/gpu"


def test_two_clients_of_one_organisation_are_refused() -> None:
    with pytest.raises(ConfigError, match="two clients of one organisation"):
        scenario(ClientPlan("north", (task("a"),)), ClientPlan("north", (task("b"),)))


def test_a_task_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="listed twice"):
        scenario(ClientPlan("north", (task("a"), task("a"))))


def test_a_name_outside_the_alphabet_is_refused() -> None:
    with pytest.raises(TaskNameError, match="task name 'A b'"):
        scenario(ClientPlan("north", (task("A b"),)))


def test_a_task_that_could_never_arrive_is_refused() -> None:
    scenario(ClientPlan("north", (task("a"), task("b", merged=1))))
    with pytest.raises(ConfigError, match="north/b waits for 2 merged tasks, but only 1"):
        scenario(ClientPlan("north", (task("a"), task("b", merged=2))))


def test_arrival_needs_both_conditions() -> None:
    arrival = Arrival(merged=2, seconds=5.0)
    assert arrival.due(2, 5.0)
    assert not arrival.due(1, 9.0)
    assert not arrival.due(9, 4.9)


def test_the_client_reads_what_is_written(tmp_path: Path) -> None:
    plan = ClientPlan("north", (task("a"), task("b")), defaults={"epochs": 4, "pace": 0.25})
    for name in ("a", "b"):
        folder = tmp_path / "north" / name
        folder.mkdir(parents=True)
        for part in ("train", "test"):
            (folder / f"{part}.npz").touch()
    path = write_tasks_file(tmp_path, scenario(plan), plan, plan.tasks[:1])
    assert [t.name for t in read_tasks(path).tasks] == ["a"]
    assert write_tasks_file(tmp_path, scenario(plan), plan, plan.tasks) == path
    found = read_tasks(path)
    assert (found.backbone.model, found.device) == ("digits-vit", "cpu")
    assert [(t.name, t.epochs, t.pace) for t in found.tasks] == [("a", 4, 0.25), ("b", 4, 0.25)]
    assert found.tasks[0].train == (tmp_path / "north" / "a" / "train.npz").resolve()
    assert sorted(p.name for p in path.parent.iterdir()) == ["a", "b", "tasks.toml"], "no draft is left behind"


def test_options_of_one_task_stand_in_its_table() -> None:
    special = TaskPlan("a", "text-classification", "t", "t", options={"share_head": True})
    plan = ClientPlan("north", (special,))
    assert tomllib.loads(tasks_toml(scenario(plan), plan, plan.tasks))["task"][0]["share_head"] is True


@pytest.mark.parametrize("value", [True, False, 3, -1, 0.5, 2e-3, 1e-12, "plain", 'quo"te', "back\\slash", "Umlaut ü"])
def test_scalars_survive_toml(value: str | bool | int | float) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


def test_control_characters_are_refused() -> None:
    with pytest.raises(ConfigError, match="control character"):
        toml_value("a\nb")
