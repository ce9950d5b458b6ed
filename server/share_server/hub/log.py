"""Logs: one JSON object per line on stderr. No keys, tokens or payloads are ever logged.

When stderr is a file, this process is its only writer and keeps it small: a full file is renamed to ``.1`` and so on,
and a new one takes its place.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

_LOGGER = logging.getLogger("share_server.hub")

FILE_BYTES = 16 * 2**20
"""A log file of this size is put aside."""

KEPT_FILES = 4
"""So many full files are kept beside the one being written."""

_LONGEST_TEXT = 2000
"""Longest text of one field: what a caller sends must not fill the disk through the log."""


class JsonLines(logging.Formatter):
    """One JSON object per record, with the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, Any] = getattr(record, "fields", {})
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{name: _short(value) for name, value in fields.items()},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class RotatingStderr(logging.StreamHandler[Any]):
    """Writes to stderr; when that is a regular file that has grown full, puts it aside and begins a new one.

    The file descriptor is replaced, not the stream, so that what other code writes to stderr follows.
    """

    def __init__(self, most_bytes: int = FILE_BYTES, kept: int = KEPT_FILES) -> None:
        super().__init__(sys.stderr)
        self._most_bytes = most_bytes
        self._kept = kept
        self._path: Path | None = None
        with contextlib.suppress(OSError, ValueError):
            handle = self.stream.fileno()
            if stat.S_ISREG(os.fstat(handle).st_mode):
                self._path = Path(f"/proc/self/fd/{handle}").readlink()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, then look at the size of the file. Runs under the handler's lock."""
        super().emit(record)
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError):  # logging must never end what it tells about
                handle = self.stream.fileno()
                entry = os.fstat(handle)
                if entry.st_size >= self._most_bytes:
                    self._rotate(handle, entry, self._path)

    def _rotate(self, handle: int, entry: os.stat_result, path: Path) -> None:
        if path.exists() and os.path.samestat(path.stat(), entry):  # else somebody has moved it: the name is free
            for number in range(self._kept, 1, -1):
                with contextlib.suppress(FileNotFoundError):
                    _aside(path, number - 1).rename(_aside(path, number))
            path.rename(_aside(path, 1))
        fresh = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, stat.S_IMODE(entry.st_mode))
        try:
            for one in {handle, 1, 2}:  # stdout often is the same file
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(one), entry):
                        os.dup2(fresh, one)
        finally:
            os.close(fresh)


def start_logging(most_bytes: int = FILE_BYTES) -> None:
    """Send everything to stderr as JSON lines. Called once by the process."""
    handler = RotatingStderr(most_bytes)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


def info(event: str, **fields: Any) -> None:
    """Log something that went as it should."""
    _LOGGER.info(event, extra={"fields": fields})


def warning(event: str, **fields: Any) -> None:
    """Log something that was refused."""
    _LOGGER.warning(event, extra={"fields": fields})


def failure(event: str, error: BaseException, **fields: Any) -> None:
    """Log a fault with its traceback."""
    _LOGGER.error(event, exc_info=error, extra={"fields": {**fields, "error": type(error).__name__}})


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _short(value: Any) -> Any:
    """Return ``value``, a long text cut."""
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return value[:_LONGEST_TEXT] + "..."
    return value
