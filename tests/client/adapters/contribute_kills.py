"""Kill contributions at chosen steps of the outbox, and give the same command again.

Run as a script: ``contribute_kills.py BUG BACKBONE ADAPTER DIRECTORY...``: one enrolled client directory for each step
in :data:`STEPS`. Each contribution runs in a forked process. The last line printed is a JSON object: for each step what
the client's files tell, and which updates the hub has of the member, afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import share_client.contribute
from share_client.link import HubLink
from share_client.member import ClientLayout, load_credentials, load_member
from share_client.records import Records

STEPS = ("write header.json", "rename entry", "put done", "write receipt", "acknowledge done", "remove entry")
"""Before the update is durable, after it, before and after its receipt is, and once it is recorded as merged."""


def plant(bug: str) -> None:
    if bug == "what waits is not looked at":
        module = cast(Any, share_client.contribute)
        real = module._Contributor._on_its_way
        asked: set[str] = set()

        def forget_once(self: Any, one: Any) -> bool:
            known = one.task in asked
            asked.add(one.task)
            return known and bool(real(self, one))

        module._Contributor._on_its_way = forget_once


def open_link(layout: ClientLayout) -> HubLink:
    return HubLink(load_member(layout).hub_address, load_credentials(layout, datetime.now(UTC)))


def forked(layout: ClientLayout, backbone: str, adapter: Path, kill_at: str, bug: str) -> int:
    """Contribute once; return how the process ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:

        def step(name: str) -> None:
            if name == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        plant(bug)
        wanted = share_client.contribute.read_contributions([adapter])
        with open_link(layout) as link:
            share_client.contribute.contribute(layout, link, wanted, backbone=backbone, wait=True, step=step)
        os._exit(0)
    finally:
        os._exit(1)


def looked_at(layout: ClientLayout) -> dict[str, Any]:
    records = Records(layout.tasks)
    history = [line for record in records.all() for line in records.history(record.task)]
    with open_link(layout) as link:
        at_hub = [update.update_id for update in link.list_updates(0, 100).updates]
    heads = [records.read_head(record.task, head) for record in records.all() for head in record.heads]
    return {
        "merged": [line["update_id"] for line in history if line["event"] == "merged"],
        "at_hub": at_hub,
        "left": [path.name for path in layout.outbox.iterdir() if path.name != "refused"],
        "head": sorted(heads[-1]) if heads else [],
    }


def main(bug: str, backbone: str, adapter: Path, roots: list[Path]) -> dict[str, Any]:
    ended: dict[Path, int] = {}
    for step, root in zip(STEPS, roots, strict=True):
        killed = forked(ClientLayout(root), backbone, adapter, step, "")
        assert os.WIFSIGNALED(killed), f"the contribution did not reach {step!r}: {killed}"
        ended[root] = forked(ClientLayout(root), backbone, adapter, "", bug)
    # No channel is open before the last fork.
    answer = {}
    for step, root in zip(STEPS, roots, strict=True):
        assert ended[root] == 0, f"the contribution after {step!r} failed: {ended[root]}"
        answer[step] = looked_at(ClientLayout(root))
    return answer


if __name__ == "__main__":
    bug, backbone, adapter, *roots = sys.argv[1:]
    print(json.dumps(main(bug, backbone, Path(adapter), [Path(root) for root in roots])))
