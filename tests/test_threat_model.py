"""The threat model names a test for every control; each is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "docs" / "THREAT_MODEL.md"
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_ROW = re.compile(r"^\| (?!threat|asset|---)(.+) \| (.+) \| (.+) \|$", re.MULTILINE)


def missing(text: str) -> set[str]:
    """Return the rows of controls without a test, and the named tests that are not there."""
    found = {f"{path}::{name}" for path, name in _NAMED.findall(text) if name not in _tests_of(ROOT / path)}
    return found | {threat for threat, _, shown in _ROW.findall(text) if not _NAMED.search(shown)}


def _tests_of(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_control_has_its_test() -> None:
    text = MODEL.read_text("utf-8")
    assert missing(text) == set()
    assert len(_NAMED.findall(text)) >= 40


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            "| theft | a lock | `tests/test_threat_model.py::test_of_the_lock` |",
            "tests/test_threat_model.py::test_of_the_lock",
        ),
        (
            "| theft | a lock | `tests/test_locks.py::test_every_control_has_its_test` |",
            "tests/test_locks.py::test_every_control_has_its_test",
        ),
        ("| theft | a lock | experience |", "theft"),
    ],
)
def test_a_control_that_nothing_shows_is_noticed(row: str, said: str) -> None:
    assert missing(row) == {said}
