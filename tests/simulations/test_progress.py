"""What the progress says of each client."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from share_simulations.metrics import Measured, Submission
from share_simulations.progress import LineProgress, LiveProgress, last_said, view_of
from share_simulations.scenario import Scenario
from share_simulations.watch import Observation

SUBMITTED = Submission("north/a", "north/trainer", 0, 0, 1, 1)
MERGED = Submission("north/a", "north/trainer", 0, 1, 1, 1)


def states(scenario: Scenario, arrived: list[str], seen: Observation, said: dict[str, str]) -> list[str]:
    return [f"{c.state} {c.task}".strip() for c in view_of(scenario, arrived, seen, said).clients]


def test_a_client_goes_from_joining_to_idle(scenario: Scenario) -> None:
    here = ["north/a"]
    assert states(scenario, [], Observation(), {}) == ["not started", "not started"]
    assert states(scenario, here, Observation(), {}) == ["joining a", "not started"]
    assert states(scenario, here, Observation(), {"north": "x"})[0] == "training a"
    assert states(scenario, here, Observation(submissions=(SUBMITTED,)), {"north": "x"})[0] == "submitted a"
    merged = Observation(version=1, submissions=(MERGED,))
    assert states(scenario, here, merged, {"north": "x"})[0] == "evaluating a"
    done = Observation(version=1, submissions=(MERGED,), measured=(Measured("north/a", 1, 0.5),))
    assert states(scenario, here, done, {"north": "x"})[0] == "idle"
    assert states(scenario, [*here, "north/b"], done, {"north": "x"})[0] == "training b"


def test_lines_are_printed_for_changes_only(scenario: Scenario) -> None:
    stream = StringIO()
    progress = LineProgress(Console(file=stream, width=200))
    for said in ("step 1", "step 2"):
        progress.show(view_of(scenario, ["north/a"], Observation(), {"north": said}))
    progress.note("stage")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "v0 north/trainer: training a; 0/2 merged, nothing evaluated",
        "v0 east/trainer: not started; 0/1 merged, nothing evaluated",
        "stage",
    ]


def test_the_live_table_shows_what_clients_said(scenario: Scenario) -> None:
    stream = StringIO()
    with LiveProgress(Console(file=stream, width=200, force_terminal=True)) as progress:
        progress.show(view_of(scenario, ["north/a"], Observation(), {"north": "a: epoch 2"}))
    assert "a: epoch 2" in stream.getvalue()


def test_the_last_whole_event_is_told(tmp_path: Path) -> None:
    log = tmp_path / "session.jsonl"
    assert last_said(log) == ""
    log.touch()
    assert last_said(log) == ""
    events = [{"event": "version", "version": v} for v in range(200)]
    log.write_text("".join(json.dumps(e) + "\n" for e in events) + '{"event": "vers', encoding="utf-8")
    assert last_said(log) == "version 199 received"


def test_complete_means_merged_and_evaluated_at_the_newest_version(seen: Observation, scenario: Scenario) -> None:
    assert seen.complete(scenario.task_ids)
    assert not seen.complete([*scenario.task_ids, "east/d"]), "not merged"
    for version, extra in ((4, ()), (3, (SUBMITTED,))):
        other = Observation(version, (*seen.submissions, *extra), measured=seen.measured)
        assert not other.complete(scenario.task_ids)
