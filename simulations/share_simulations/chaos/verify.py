"""What ``share-server verify`` says of a directory whose hub has ended."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_MOST_S = 3600.0
_NO_SUCH_COMMAND = 2


@dataclass(frozen=True)
class Verified:
    """One answer of the command."""

    sound: bool | None
    """Whether everything is as it should be; None if this release has no such command."""
    text: str
    """The last thing it said."""


def verify_directory(root: Path, replay: bool) -> Verified:
    """Verify the server directory ``root``; ``replay`` also makes every version again, in one thread."""
    command = [sys.executable, "-m", "share_server.cli", "verify", str(root), *(["--replay"] if replay else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_S, check=False)
    lines = [line.strip(" │") for line in (done.stderr.strip() or done.stdout.strip()).splitlines()]
    said = next((line for line in reversed(lines) if any(map(str.isalnum, line))), "nothing")
    return Verified(None if done.returncode == _NO_SUCH_COMMAND else done.returncode == 0, said)
