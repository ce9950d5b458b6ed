"""What is noted during the scaled day, and the figures made of it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from share_simulations.chaos.day_crew import Crew
from share_simulations.chaos.endcheck import Book, Verdict
from share_simulations.chaos.verify import Verified


@dataclass(frozen=True)
class Sample:
    """The federation at one moment."""

    at_s: float
    """Seconds since the day began."""
    version: int | None
    """Newest version; None while the hub did not answer."""
    waiting: int | None
    """Durable updates that wait for their merge."""
    clients: int
    """Client processes that run."""


@dataclass
class Diary:
    """What happened when."""

    seconds: float
    """Length of the day."""
    samples: list[Sample] = field(default_factory=list)
    """How it was, in order."""
    marks: list[tuple[float, str]] = field(default_factory=list)
    """What was done, in order."""
    faults: Counter[str] = field(default_factory=Counter)
    """Faults of the network by kind."""
    hub_exit: int | None = None
    """Exit code of the hub after the evening."""
    over: bool = False
    """Whether the day has come to its end; one that was interrupted is not judged."""
    failure: str = ""
    """Why the hub could not be asked in the evening."""
    _began: float = 0.0

    def begin(self) -> None:
        """The day begins now."""
        self._began = time.monotonic()

    def now(self) -> float:
        """Return the seconds since the day began."""
        return time.monotonic() - self._began

    def mark(self, what: str) -> None:
        """Note what is being done."""
        self.marks.append((self.now(), what))

    def count(self, what: str) -> int:
        """Return how often it was done."""
        return sum(text == what for _, text in self.marks)


def day_report(crew: Crew, book: Book, diary: Diary, verdict: Verdict | None, replay: Verified) -> dict[str, Any]:
    """Return the figures of a day; ``ok`` says whether every promise was kept. What nobody could count is None."""
    waiting, problems = crew.outboxes()
    if diary.over:
        problems += verdict.problems if verdict is not None else (*book.broken, diary.failure)
        if diary.hub_exit != 0:
            problems.append(f"the hub ended with exit code {diary.hub_exit} when it was asked to stop")
        if replay.sound is False:
            problems.append(f"the replay of the journal: {replay.text}")
    else:  # outboxes are not empty in the middle of a day; what clients saw broken is broken
        problems = list(book.broken)
    kept: dict[str, Any] = {} if verdict is None else vars(verdict)
    down = [sample for sample in diary.samples if sample.version is None]
    return {
        "campaign": "day",
        "clients": crew.joined,
        "joined": diary.count("client joins"),
        "left_early": diary.count("client leaves"),
        "killed_clients": crew.killed,
        "hub_kills": diary.count("hub killed"),
        "updates": kept.get("updates"),
        "acknowledged": len(book.receipts),
        "merged": kept.get("merged"),
        "refused_rebase": _too_old(crew),
        "refused_after_receipt": kept.get("refused"),
        "reuploads": crew.sends() - len(book.sent),
        "answered_duplicates": book.duplicates,
        "lost": kept.get("lost"),
        "double": kept.get("double"),
        "outboxes_empty": waiting == 0 and not problems,
        "replay_equal": replay.sound,
        "replay": replay.text,
        "versions": kept.get("versions"),
        "versions_followed": len(book.versions),
        "evaluations": len(crew.logged("evaluation")),
        "hub_down_share": round(len(down) / max(1, len(diary.samples)), 4),
        "faults": dict(sorted(diary.faults.items())),
        "problems": problems[:20],
        "complete": True,
        "ok": not problems,
    }


def _too_old(crew: Crew) -> int:
    """Return how often a client was told that its version is no longer kept."""
    again = [line for line in crew.logged("retrain") if line["reason"].startswith("RebaseError")]
    return len(crew.logged("rebased")) + len(again)
