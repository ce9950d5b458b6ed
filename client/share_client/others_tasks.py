"""Tasks of other organisations: whether there is one of that name, and whether this organisation may contribute."""

from __future__ import annotations

import time

from share_client.chain import ManifestChain
from share_client.heads import fetch_head
from share_client.link import HubLink
from share_client.session_log import SessionLog
from share_client.trainer import LocalTask
from share_core.errors import AccessError, FedshareError, ManifestError, UnknownTaskError
from share_core.names import split_task_id

AGAIN_S = 30.0
"""Seconds between two questions after the same task, while no new version arrives."""


def require_open(link: HubLink, chain: ManifestChain, task_id: str, version: int, organisation: str) -> None:
    """Refuse a task that is not there, or that is not shared with ``organisation``.

    The hub gives the head of a task to exactly those who may contribute to it, so that is what is asked for.

    Args:
        link: to the hub.
        chain: checks what the hub signs.
        task_id: ``organisation/name``.
        version: a published version; 0: there is none yet, and so no task.
        organisation: who wants to contribute.

    Raises:
        UnknownTaskError: that version holds no such task; says who makes it, and how.
        AccessError: its owner has not named ``organisation``; says what the owner can do.
        FedshareError: what the call raises.
    """
    owner, name = split_task_id(task_id)
    try:
        if version:
            fetch_head(link, chain, task_id, version)
            return
    except AccessError as error:
        raise AccessError(
            f"task {task_id} is not shared with {organisation}. Who may contribute is what {owner} said with the first "
            f"update of the task, and stays so: ask {owner} to make another task whose share_with names "
            f"{organisation}, and name that one"
        ) from error
    except UnknownTaskError:
        pass
    raise UnknownTaskError(
        f"there is no task {task_id} yet, and only {owner} can make it: ask {owner} to send the first update of its "
        f"own task {name!r} with share_with naming {organisation}, or correct the name ('share-client tasks' lists "
        "what there is)"
    )


class OthersTasks:
    """Keeps a session from training what it could not hand in: asks before, and again now and then."""

    def __init__(self, link: HubLink, chain: ManifestChain, organisation: str, log: SessionLog) -> None:
        self._link = link
        self._chain = chain
        self._organisation = organisation
        self._log = log
        # By task id: the version and time of the last question, and what was the matter.
        self._closed: dict[str, tuple[int, float, str]] = {}

    def is_closed(self, task: LocalTask, version: int) -> bool:
        """Whether a task belongs to others who do not let this organisation contribute to it in ``version``.

        Why is written into the log, once.

        Raises:
            ManifestError: the hub's answer is not what it has signed.
        """
        if not task.owner:
            return False
        task_id = f"{task.owner}/{task.name}"
        asked_in, asked, told = self._closed.get(task_id, (-1, 0.0, ""))
        if asked_in == version and time.monotonic() < asked + AGAIN_S:
            return True
        try:
            require_open(self._link, self._chain, task_id, version, self._organisation)
        except ManifestError:
            raise
        except FedshareError as error:
            if str(error) != told:
                self._log.write("closed", task=task.name, reason=str(error))
            self._closed[task_id] = (version, time.monotonic(), str(error))
            return True
        self._closed.pop(task_id, None)
        return False
