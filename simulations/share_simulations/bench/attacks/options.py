"""What an attack run is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from share_core.errors import ConfigError

OWNER = 0
"""Number of the client that created the shared tasks. It is honest."""

FRACTIONS = (0.1, 0.2, 0.3)
"""Shares of hostile organisations, beside none."""

TRIGGER = "cf"
"""The word that the backdoor reacts to."""


@dataclass(frozen=True)
class AttackOptions:
    """One run."""

    data: Path
    """Folder with ``<task>/{train,test}.jsonl.gz``."""
    adapters: Path
    """Folder with finished PEFT adapters and heads by task: the tasks that the space holds already."""
    shared: tuple[str, ...] = ("trec", "snips", "sst2")
    """Tasks that everybody contributes to."""
    stored: tuple[str, ...] = ("cr", "subj", "agnews", "clinc150")
    """Private tasks of another organisation that are stored before."""
    clients: int = 20
    """Contributors, one organisation each."""
    rows: int = 100
    """Training rows of each client and task; no two clients have the same."""
    test_rows: int = 250
    """Test rows of each task."""
    epochs: int = 3
    """Passes over the rows."""
    batch_size: int = 10
    """Rows in one step."""
    evaluators: int = 4
    """Honest clients whose own heads the merged adapter is measured with."""
    seed: int = 0
    """Of rows, training and attacks."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.clients < 10:
            raise ConfigError(
                f"attacks: expected at least 10 clients, so that 10 % are one of them, got {self.clients}"
            )
        if self.rows < 8 or self.test_rows < 8:
            raise ConfigError(f"attacks: expected at least 8 rows and test rows, got {self.rows} and {self.test_rows}")

    def hostile(self, fraction: float) -> range:
        """Return the numbers of the hostile clients: the last ones."""
        return range(self.clients - round(fraction * self.clients), self.clients)

    @property
    def most_hostile(self) -> range:
        """Return the clients that are hostile in at least one setting."""
        return self.hostile(max(FRACTIONS))


def organisation(client: int) -> str:
    """Return the organisation of a client."""
    return f"org{client:02d}"


def shared_id(task: str) -> str:
    """Return the id of a shared task."""
    return f"{organisation(OWNER)}/{task}"


def stored_id(task: str) -> str:
    """Return the id of a task that was stored before."""
    return f"archive/{task}"
