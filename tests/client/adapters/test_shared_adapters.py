"""Adapters that exist already, contributed by several organisations to one task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import share_client.contribute
from share_client.cli import app
from share_client.contribute import contribute, read_contributions
from share_client.egress import read_egress
from share_client.link import HubLink
from share_client.member import ClientLayout
from share_client.pull import pull
from share_client.sharing import OWN, read_terms, schema_digest
from share_core.errors import AccessError, ConfigError, UnknownTaskError
from share_proto.v1 import hub_pb2

RUNNER = CliRunner()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LABELS = ["--kind", "text-classification", "--labels", "no,yes,perhaps"]
SCHEMA = schema_digest("text-classification", ("no", "yes", "perhaps"))


@pytest.fixture
def other(bert_hub: Any, member: Any, connect: Any, tmp_path: Path) -> Callable[[str], tuple[ClientLayout, str]]:
    """Return a function that enrols a client of another organisation, whose name begins as given."""

    def enrol(name: str) -> tuple[ClientLayout, str]:
        organisation = f"{name}-{member[2][:20].strip('-')}"
        return bert_hub.client(tmp_path / name, f"{organisation}/main"), organisation

    return enrol


@pytest.fixture
def run(bert_directory: Path) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Return a function that contributes by command: (exit code, the only adapter's outcome, what is told)."""

    def command(layout: ClientLayout, adapter: Path, *options: str) -> tuple[int, dict[str, Any], str]:
        always = ["--dir", str(layout.root), "--backbone", str(bert_directory), "--wait", "--json"]
        answer = RUNNER.invoke(app, ["contribute", str(adapter), "--task", "films", *always, *options])
        outcome = json.loads(answer.stdout)["adapters"][0] if answer.stdout.startswith("{") else {}
        return answer.exit_code, outcome, answer.output

    return command


def submitted(layout: ClientLayout) -> int:
    """Return how many updates were announced to the hub."""
    return sum(b"Hub/Submit" in line for line in read_egress(layout.egress))


def test_two_organisations_contribute_to_one_task_and_a_third_may_not(
    member: tuple[ClientLayout, HubLink, str], other: Any, run: Any, save_adapter: Any, connect: Any, tmp_path: Path
) -> None:
    layout, link, ours = member
    (second, lab), (third, _) = other("lab"), other("zoo")
    first, theirs = save_adapter("one", 1, head=True), save_adapter("two", 2, head=True)
    code, _, told = run(second, theirs, "--owner", ours, *LABELS)
    assert (code, submitted(second)) == (1, 0)
    assert f"there is no task {ours}/films yet, and only {ours} can make it" in told
    assert run(layout, first, "--share-with", lab, *LABELS)[1]["state"] == "merged"
    assert run(second, theirs, "--owner", ours, *LABELS)[1]["task_id"] == f"{ours}/films"
    assert submitted(second) == 1
    code, _, told = run(third, theirs, "--owner", ours, *LABELS)
    assert (code, submitted(third)) == (1, 0)
    assert f"task {ours}/films is not shared with zoo" in told
    (task,) = [one for one in link.list_tasks().tasks if one.task_id == f"{ours}/films"]
    assert (task.updates, task.owner) == (2, f"{ours}/main")
    # What stayed with a contributor comes back to it, also of the task of another owner.
    made = pull(second, connect(second), f"{ours}/films", tmp_path / "out")
    assert made.head == "own"


def test_everybody_may_and_other_labels_are_refused(
    member: tuple[ClientLayout, HubLink, str], other: Any, run: Any, save_adapter: Any
) -> None:
    layout, link, ours = member
    second, _ = other("lab")
    adapter = save_adapter("one")
    assert run(layout, adapter, "--share-with", "everybody", *LABELS)[0] == 0
    code, outcome, _ = run(second, adapter, "--owner", ours, *LABELS[:3], "yes,no,perhaps")
    assert (code, outcome["state"]) == (1, "refused")
    assert f"has label schema {SCHEMA}" in outcome["reason"]
    assert run(second, adapter, "--owner", ours, *LABELS)[1]["state"] == "merged"
    found = link.hub.ListUpdates(hub_pb2.ListUpdatesRequest()).updates
    assert {one.schema_sha256 for one in found if one.task_id == f"{ours}/films"} == {SCHEMA}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("lab", "acme", "causal-lm", "a"), "either --owner or --share-with, got both"),
        (("lab", None, None, None), "add --kind and --labels"),
        ((None, "acme", None, None), "add --kind and --labels"),
        (("lab", None, "causal-lm", None), "belong together"),
        (("lab,", None, "causal-lm", "a"), "--share-with: expected a non-empty string"),
        (("lab,everybody", None, "causal-lm", "a"), "--share-with: expected"),
        ((None, "Acme", "causal-lm", "a"), "--owner: organisation 'Acme' is not allowed"),
        (("lab", None, "text", "a"), "--kind: expected one of"),
        (("lab", None, "causal-lm", "a,,b"), "--labels: expected labels with commas"),
    ],
)
def test_options_that_cannot_be_are_told(options: tuple[str | None, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_terms(*options)


def test_without_options_a_task_is_private() -> None:
    assert read_terms(None, None, None, None) == OWN


def test_planted_bug_a_client_that_does_not_ask_is_caught(
    member: tuple[ClientLayout, HubLink, str],
    other: Any,
    connect: Any,
    save_adapter: Any,
    bert_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = member[2]
    outsider, _ = other("zoo")
    link = connect(outsider)
    terms = read_terms(None, ours, "text-classification", "no,yes,perhaps")
    wanted = read_contributions([save_adapter("films")], terms=terms)

    def sent() -> int:
        before = submitted(outsider)
        with pytest.raises((UnknownTaskError, AccessError)):
            contribute(outsider, link, wanted, backbone=str(bert_directory), wait=True)
        return submitted(outsider) - before

    assert sent() == 0
    monkeypatch.setattr(share_client.contribute, "require_open", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        sent()
    assert submitted(outsider) == 1, "it is the hub that refused it"
