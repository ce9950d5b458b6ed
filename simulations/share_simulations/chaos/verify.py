"""What ``share-server verify`` says of a directory whose hub has ended."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from share_core.lifeline import arm

_MOST_S = 3600.0
_NO_SUCH_COMMAND = 2

# The server that LocalHub forks hubs from: it has imported what the command needs, which takes longer than the rest.
_WARM = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Verified:
    """One answer of the command."""

    sound: bool | None
    """Whether everything is as it should be; None if this release has no such command."""
    text: str
    """The last thing it said."""


def verify_directory(root: Path, replay: bool) -> Verified:
    """Verify the server directory ``root``; ``replay`` also makes every version again, in one thread.

    Raises:
        TimeoutError: it takes longer than an hour.
    """
    words = ["share-server", "verify", str(root), *(["--replay"] if replay else [])]
    with tempfile.TemporaryDirectory(prefix="fedshare-verify-") as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = _WARM.Process(target=_be_command, args=(words, output, errors), daemon=True)
        process.start()
        try:
            process.join(_MOST_S)
        finally:
            code = process.exitcode
            process.kill()
            process.join()
        if code is None:
            raise TimeoutError(f"{' '.join(words)} still runs after {_MOST_S:g} s")
        text = errors.read_text(errors="replace").strip() or output.read_text(errors="replace").strip()
    lines = [line.strip(" │") for line in text.splitlines()]
    said = next((line for line in reversed(lines) if any(map(str.isalnum, line))), "nothing")
    return Verified(None if code == _NO_SUCH_COMMAND else code == 0, said)


def _be_command(words: Sequence[str], output: Path, errors: Path) -> None:
    """Be the command; what it says goes to two files."""
    arm()
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.argv = list(words)
    from share_server.cli import main

    main()
