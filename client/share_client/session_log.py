"""What a session tells while it works: JSON lines in ``logs/session.jsonl``, and one sentence for people of each.

Every line has ``time`` (UTC, ISO 8601) and ``event``; the other keys depend on the event. The file is for watching,
not for deciding: nothing is read back from it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from share_client.durable import make_private_directory
from share_core.durable import PRIVATE

_SENTENCES: Mapping[str, str] = {
    "started": "session for {member} in {space} at version {version}",
    "waiting": "waiting for the hub: {reason}",
    "contributing": "{task}: {sites} sites of rank up to {rank}, {payload_bytes} bytes to send",
    "training": "{task}: training on {rows} rows in version {version}",
    "progress": "{task}: epoch {epoch}, step {step} of {steps}, loss {loss:.4f}",
    "plan": "{task}: {sites}",
    "trained": "{task}: trained {steps} steps in {seconds:.1f} s, loss {loss:.4f}, {payload_bytes} bytes to send",
    "spent": "{task}: epsilon {epsilon:.3f} at delta {delta:.1e} spent by all its trainings so far",
    "refit": "{task}: coefficients learned again in version {version}: {reason}",
    "acknowledged": "{task}: the hub has the update as number {ingest_seq}",
    "merged": "{task}: merged in version {version}, staleness {staleness}",
    "refused": "{task}: refused: {reason}",
    "retrain": "{task}: will be trained again: {reason}",
    "rebased": "{task}: expressed in version {version} and sent again, without training: {reason}",
    "signed_again": "{task}: signed anew, under another number: {reason}",
    "set_aside": "{task}: the hub has set the update aside until the operator decides: {reason}",
    "source": "{reason}",
    "version": "version {version} received",
    "skipped": "versions {first} to {last} were jumped over: the hub sent the one after them whole",
    "evaluation": "{task}: {metric} {value:.4f} at version {version} on {rows} rows",
    "unmeasured": "{task}: not evaluated from version {version} on: {reason}",
    "broken_off": "{task}: training broken off, tried again in {again_in_s:.0f} s: {reason}",
    "lost": "{task}: the hub no longer holds what it merged in version {version}: it is trained again",
    "ended": "session ended at version {version}: {submitted} submitted, {merged} merged, {evaluated} evaluations",
    "failed": "session failed: {reason}",
    "certificate": "{reason}",
    "tasks": "tasks: {reason}",
    "closed": "{task}: not trained, looks again later: {reason}",
    "head": "{task}: head: {reason}",
    "node": "{reason}",
}

WAITING_EVERY_S = 5.0
"""A hub that is away is mentioned this often, not at every attempt."""


class SessionLog:
    """Appends events to one file, and tells them to who wants to know."""

    def __init__(self, path: Path, tell: Callable[[str], None] | None = None) -> None:
        """Append to ``path``; ``tell`` is called with one sentence for people of each event."""
        self._tell = tell
        make_private_directory(path.parent)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, PRIVATE)
        self._file = os.fdopen(handle, "a", encoding="utf-8")
        self._waited = -WAITING_EVERY_S

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Of a series of ``waiting`` only one in :data:`WAITING_EVERY_S` is written."""
        if event == "waiting":
            if time.monotonic() - self._waited < WAITING_EVERY_S:
                return
            self._waited = time.monotonic()
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tell is not None:
            self._tell(sentence(line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def sentence(line: Mapping[str, Any]) -> str:
    """Return an event as one sentence for people."""
    pattern = _SENTENCES.get(str(line.get("event")))
    try:
        return pattern.format(**line) if pattern else json.dumps(line)
    except (KeyError, ValueError, TypeError):
        return json.dumps(line)
