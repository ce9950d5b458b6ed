"""With whom a task is shared: what its owner writes, and what its labels are called so that others learn the same.

A task belongs to the organisation that made it. Its owner says with the first update who else may contribute
(``share_with``); the hub keeps that and ignores what later updates say. Everybody else names the ``owner`` and makes
nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from share_client import values
from share_client.kind_names import KINDS
from share_core.errors import ConfigError, TaskNameError
from share_core.names import check_name

EVERYBODY = "everybody"
"""In place of a list: every organisation of the federation."""
ONE_OWNER = "the owner alone says with whom a task is shared; take owner out if this organisation makes the task"


def read_organisation(value: object, where: str) -> str:
    """Read the name of an organisation."""
    try:
        return check_name(values.text(value, where), "organisation")
    except TaskNameError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_share_with(value: object, where: str) -> tuple[str, ...]:
    """Read ``"everybody"`` or a list of organisations: (:data:`EVERYBODY`,), or the names in order, each once."""
    if value == EVERYBODY:
        return (EVERYBODY,)
    if not isinstance(value, list) or not value or EVERYBODY in value:
        raise ConfigError(
            f'{where}: expected "{EVERYBODY}" or a list of organisations such as ["lab", "clinic"], got '
            f"{values.show(value)}; leave it out for a task of your own organisation alone"
        )
    return tuple(sorted({read_organisation(name, where) for name in value}))


def schema_digest(kind: str, labels: Sequence[object]) -> str:
    """Return the hexadecimal SHA-256 of a kind's name and the labels in the order of the outputs."""
    schema = [kind, *(str(label) for label in labels)]
    return hashlib.sha256(json.dumps(["fedshare labels 1", *schema]).encode()).hexdigest()


@dataclass(frozen=True)
class Terms:
    """Whose task something is contributed to, and on which terms."""

    owner: str = ""
    """The organisation whose task it is; empty: the contributing client's own, which may make it."""
    share_with: tuple[str, ...] = ()
    """Who else may contribute, from :func:`read_share_with`; counts when the task is made."""
    schema_sha256: str = ""
    """Digest of the kind and the labels (:func:`schema_digest`); empty: not told."""


OWN = Terms()
"""A private task of the own organisation."""


def read_terms(share_with: str | None, owner: str | None, kind: str | None, labels: str | None) -> Terms:
    """Read the options of a command: lists are comma-separated, None is an option that was not given.

    Raises:
        ConfigError: an option cannot be read, two exclude each other, or one that is needed is missing.
    """
    if owner is not None and share_with is not None:
        raise ConfigError(f"expected either --owner or --share-with, got both: {ONE_OWNER}")
    if (kind is None) != (labels is None):
        raise ConfigError("--kind and --labels belong together, got one of them: give both")
    if kind is None and (owner is not None or share_with is not None):
        raise ConfigError(
            "of a shared task all must learn the same labels, and an adapter does not tell its own: add --kind and "
            "--labels, such as --kind text-classification --labels negative,positive in the order of the outputs"
        )
    wanted = EVERYBODY if share_with == EVERYBODY else None if share_with is None else share_with.split(",")
    names = (labels or "").split(",")
    if labels is not None and not all(names):
        raise ConfigError(f"--labels: expected labels with commas between, got {labels!r}")
    return Terms(
        owner="" if owner is None else read_organisation(owner, "--owner"),
        share_with=() if wanted is None else read_share_with(wanted, "--share-with"),
        schema_sha256="" if kind is None else schema_digest(values.one_of(kind, tuple(KINDS), "--kind"), names),
    )
