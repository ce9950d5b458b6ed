"""Logs: one JSON object per line on stderr. No keys, tokens or payloads are ever logged."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_LOGGER = logging.getLogger("share_server.hub")


class JsonLines(logging.Formatter):
    """One JSON object per record, with the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging() -> None:
    """Send everything to stderr as JSON lines. Called once by the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def info(event: str, **fields: Any) -> None:
    """Log something that went as it should."""
    _LOGGER.info(event, extra={"fields": fields})


def warning(event: str, **fields: Any) -> None:
    """Log something that was refused."""
    _LOGGER.warning(event, extra={"fields": fields})


def failure(event: str, error: BaseException, **fields: Any) -> None:
    """Log a fault with its traceback."""
    _LOGGER.error(event, exc_info=error, extra={"fields": {**fields, "error": type(error).__name__}})
