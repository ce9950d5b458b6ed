"""Task kinds: how files become batches, and the head, loss and metric of each kind."""

from __future__ import annotations

from share_client.backbones import Backbone
from share_client.imports import import_object
from share_client.kind_names import KINDS, is_import_path
from share_client.kinds.kind import Kind, PreparedTask, Rows
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError

__all__ = ["Kind", "PreparedTask", "Rows", "find_kind", "prepare_task"]


def prepare_task(task: TaskConfig, backbone: Backbone) -> PreparedTask:
    """Read a task's files, check them, and tokenise texts for the backbone.

    Raises:
        ConfigError: the files cannot be used, or the backbone takes no such data; names file and row.
    """
    if not is_import_path(task.kind):
        return find_kind(task.kind).prepare(task, backbone)
    from share_client.kinds.custom import load_custom, prepare_custom

    return prepare_custom(load_custom(task.kind), task, backbone)


def find_kind(name: str) -> Kind:
    """Return the kind of that name; its file is imported when it is first asked for.

    Raises:
        ConfigError: there is none.
    """
    if name not in KINDS:
        raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {name!r}")
    kind: Kind = import_object(KINDS[name], f"kind {name!r}")()
    return kind
