"""Shared heads: what the contributors to a task share of its head, as the hub publishes and signs it."""

from __future__ import annotations

from share_client.chain import ManifestChain
from share_client.link import HubLink
from share_client.session_log import SessionLog
from share_core.errors import FedshareError, ManifestError
from share_core.types import SharedHead, Space
from share_core.wire import MAX_HEAD_PAYLOAD_BYTES, decode_head


def first_head(link: HubLink, chain: ManifestChain, space: Space, task_id: str, log: SessionLog) -> SharedHead | None:
    """Return the head to start from for a task that others have trained and this client has not; None if there is none.

    It is a better start than chance and nothing depends on it: where the hub gives none, the head starts fresh.

    Raises:
        ManifestError: it is not what the hub has signed.
    """
    if task_id not in space.cores:
        return None
    try:
        shared = fetch_head(link, chain, task_id, space.version)
    except ManifestError:
        raise
    except FedshareError as error:
        log.write("head", task=task_id, reason=f"starts fresh: {error}")
        return None
    if shared is not None:
        whose = ", ".join(shared.organisations)
        log.write("head", task=task_id, reason=f"the one that {whose} shared in version {shared.version}")
    return shared


def fetch_head(link: HubLink, chain: ManifestChain, task_id: str, version: int) -> SharedHead | None:
    """Return the shared head that goes with the core of a task in a version; None where there is none.

    Args:
        link: to the hub: relays hold no heads.
        chain: checks what the hub signs.
        task_id: ``organisation/name``.
        version: the version, at least 1.

    Raises:
        AccessError: it is shared, if at all, with others.
        ManifestError: it is not what the hub has signed for this task and version.
        FedshareError: what the call or the payload raises.
    """
    payload = link.fetch_head(chain.space_id, task_id, version, MAX_HEAD_PAYLOAD_BYTES, chain.check_head)
    if payload is None:
        return None
    head = decode_head(payload)
    if (head.task_id, head.version) != (task_id, version):
        raise ManifestError(
            f"asked for the head of {task_id} in version {version}, got that of {head.task_id} in version "
            f"{head.version}: do not use it, and ask the operator"
        )
    return head if head.tensors else None
