"""Telling of exceptions that nobody foresaw: where, and never in their own words, which may quote rows."""

from __future__ import annotations

import traceback
from pathlib import Path

from share_core.errors import FedshareError


def in_words(error: BaseException) -> str:
    """Return class and place of an exception; of ours its text, of the operating system's what it says of the cause."""
    if isinstance(error, FedshareError):
        return str(error)
    what = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        what = f"{what} ({error.strerror})"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return what
    return f"{what} at {Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name}"
