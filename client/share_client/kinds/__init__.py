"""Task kinds: how files become batches, and the head, loss and metric of each kind."""

from __future__ import annotations

from share_client.imports import import_object
from share_client.kind_names import KINDS
from share_client.kinds.kind import Kind, PreparedTask, Rows
from share_core.errors import ConfigError

__all__ = ["Kind", "PreparedTask", "Rows", "find_kind"]


def find_kind(name: str) -> Kind:
    """Return the kind of that name; its file is imported when it is first asked for.

    Raises:
        ConfigError: there is none.
    """
    if name not in KINDS:
        raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {name!r}")
    kind: Kind = import_object(KINDS[name], f"kind {name!r}")()
    return kind
