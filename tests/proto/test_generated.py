"""The committed stubs are what the committed .proto files give, and every field and method is explained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[2] / "proto"
FILES = sorted((PROTO / "share_proto" / "v1").glob("*.proto"))


def test_committed_stubs_are_fresh(tmp_path: Path) -> None:
    subprocess.run(
        [str(PROTO / "generate.sh"), str(tmp_path)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(made) == 4 * len(FILES)
    for name in made:
        fresh, committed = (tmp_path / name).read_text(), (PROTO / name).read_text()
        assert fresh == committed, f"{name} is stale: run 'make proto' and commit"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_field_method_and_message_is_commented(path: Path) -> None:
    lines = path.read_text().splitlines()
    bare = [
        f"{path.name}:{number + 1}: {line.strip()}"
        for number, line in enumerate(lines)
        if re.match(r"\s*(message|service|rpc|enum)\s|\s*(repeated\s+)?\w+ \w+ = \d+;|\s*[A-Z_]+ = \d+;", line)
        and not lines[number - 1].strip().startswith("//")
    ]
    assert not bare, f"explain what each of these means and what zero says: {bare}"


def test_the_comment_rule_catches_a_bare_field(tmp_path: Path) -> None:
    planted = tmp_path / "bare.proto"
    planted.write_text("// M\nmessage M {\n  int32 naked = 1;\n}\n")
    with pytest.raises(AssertionError, match="naked"):
        test_every_field_method_and_message_is_commented(planted)
