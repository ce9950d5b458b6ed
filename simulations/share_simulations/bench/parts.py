"""What a long run has finished, kept in files, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from share_core.durable import PUBLIC, write_atomic
from share_core.errors import ConfigError


class Parts:
    """JSON values by name in ``out/parts``, all of one run with the same options."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        """Claim ``out`` for a run with these options.

        Raises:
            ConfigError: ``out`` holds a run with other options.
        """
        self._folder = out / "parts"
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "options.json"
        described = json.loads(json.dumps(options, default=str))
        if path.is_file() and json.loads(path.read_text()) != described:
            raise ConfigError(f"{out}: holds a run with other options ({path}); name another --out or remove it")
        _write(path, described)

    def has(self, name: str) -> bool:
        """Return whether this part is finished."""
        return self._path(name).is_file()

    def load(self, name: str) -> Any:
        """Return a finished part."""
        return json.loads(self._path(name).read_text())

    def save(self, name: str, value: object) -> None:
        """Keep a part; a kill in between leaves none."""
        _write(self._path(name), value)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def _write(path: Path, value: object) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode(), PUBLIC)
