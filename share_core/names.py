"""Names of members, tasks and updates: one alphabet, checked in one place."""

from __future__ import annotations

import re

from share_core.errors import TaskNameError, UpdateIdError

_PART = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_HEX_128 = re.compile(r"[0-9a-f]{32}")


def check_name(name: str, what: str = "name") -> str:
    """Return ``name`` if it is 1 to 64 of ``a-z 0-9 . _ -`` and begins and ends with a letter or digit.

    Raises:
        TaskNameError: otherwise.
    """
    if not _PART.fullmatch(name):
        raise TaskNameError(
            f"{what} {name[:80]!r} is not allowed: use 1 to 64 of a-z 0-9 . _ - "
            "beginning and ending with a letter or digit"
        )
    return name


def split_task_id(task_id: str) -> tuple[str, str]:
    """Split ``organisation/name``, the form of task ids and member ids.

    Raises:
        TaskNameError: if it is not two allowed names joined by one slash.
    """
    organisation, slash, name = task_id.partition("/")
    if not slash:
        raise TaskNameError(f"task id {task_id[:160]!r} is not of the form organisation/name")
    return check_name(organisation, "organisation"), check_name(name, "task name")


def check_update_id(update_id: str) -> str:
    """Return ``update_id`` if it is 32 lower-case hexadecimal digits.

    Raises:
        UpdateIdError: otherwise.
    """
    if not _HEX_128.fullmatch(update_id):
        raise UpdateIdError(f"update id {update_id[:80]!r} is not 32 lower-case hexadecimal digits")
    return update_id
