"""A contribution that is killed anywhere is merged by the same command given again, and is at the hub once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = 6


@pytest.fixture
def killed(
    bert_hub: Any, save_adapter: Any, bert_directory: Path, tmp_path: Path, run_script: Callable[..., dict[str, Any]]
) -> Callable[[str], dict[str, Any]]:
    """Return a function (bug) -> step -> what is known afterwards."""

    def run(bug: str) -> dict[str, Any]:
        name = bug.replace(" ", "-") or "sound"
        layouts = [bert_hub.client(tmp_path / f"c{step}", f"kills-{name}-{step}/main") for step in range(STEPS)]
        adapter = save_adapter("films", head=True)
        roots = [str(layout.root) for layout in layouts]
        return run_script("adapters/contribute_kills.py", bug, str(bert_directory), str(adapter), *roots)

    return run


def sound(found: dict[str, Any]) -> bool:
    """Whether exactly one update is at the hub, known here as merged, with its head, and nothing is left."""
    return (
        len(found["at_hub"]) == 1 and found["merged"] == found["at_hub"] and not found["left"] and bool(found["head"])
    )


def test_killed_anywhere_and_given_again(killed: Any) -> None:
    found = killed("")
    assert len(found) == STEPS
    assert all(sound(one) for one in found.values()), found


def test_the_check_catches_an_adapter_that_is_sent_again(killed: Any) -> None:
    found = killed("what waits is not looked at")
    assert not sound(found["put done"])
    assert not sound(found["write receipt"])
    assert sound(found["rename entry"]), "nothing was in the outbox yet"
