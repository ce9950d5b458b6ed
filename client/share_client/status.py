"""What ``share-client status``, ``watch`` and ``tasks`` show, as plain values first and as tables second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from share_client.chain import open_chain
from share_client.feed import VersionFeed
from share_client.link import HubLink
from share_client.member import ClientLayout, Credentials, load_member
from share_client.outbox import list_outbox
from share_client.records import Records
from share_client.sources import Sources
from share_client.spending import Spending
from share_core.space import empty_space
from share_core.types import Delta, Space
from share_core.wire import encode_snapshot
from share_proto.v1 import hub_pb2


def client_status(layout: ClientLayout) -> dict[str, Any]:
    """Return member, outbox, tasks and their newest evaluations of a client directory; nothing is changed."""
    member = load_member(layout)
    waiting, refused = list_outbox(layout.outbox)
    records, spending = Records(layout.tasks), Spending(layout.tasks)
    return {
        "member": asdict(member),
        "outbox": [
            {"task": entry.training.task, "acknowledged": entry.acknowledged, **asdict(entry.submission)}
            for entry in waiting
        ],
        "refused": [
            {"task": entry.training.task, "update_id": entry.update_id, "reason": reason} for entry, reason in refused
        ],
        "tasks": [
            {
                "task": record.task,
                "merged_version": record.heads[-1].version if record.heads else 0,
                "refused_reason": record.refused_reason,
                "broken_off": asdict(record.broken_off) if record.broken_off.times else None,
                "spent": spending.total(record.task),
                "history": records.history(record.task),
            }
            for record in records.all()
        ],
    }


def print_status(found: dict[str, Any]) -> None:
    """Print what :func:`client_status` returned, for people."""
    console = Console()
    member = found["member"]
    console.print(
        f"{member['member']} in {member['space_id']}, hub {member['hub_address']}"
        + (f", versions from {member['follow_address']}" if member["follow_address"] else ""),
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", overflow="fold")
    for heading in ("merged in", "last evaluation", "remark"):
        table.add_column(heading)
    for task in found["tasks"]:
        seen = [line for line in task["history"] if line["event"] == "evaluation"]
        last = f"{seen[-1]['metric']} {seen[-1]['value']:.4f} at version {seen[-1]['version']}" if seen else "-"
        spent = task["spent"]
        remarks = [f"epsilon {spent['epsilon']:.3f} at delta {spent['delta']:.1e} spent"] if spent else []
        remarks += [task["refused_reason"]] if task["refused_reason"] else []
        if broken := task["broken_off"]:
            again = datetime.fromtimestamp(broken["not_before"], UTC).strftime("%H:%M")
            remarks.append(f"training broke off, {broken['times']} in a row, again at {again} UTC: {broken['reason']}")
        table.add_row(task["task"], str(task["merged_version"] or "-"), last, "; ".join(remarks))
    console.print(table)
    for entry in found["outbox"]:
        state = "at the hub, waiting for its merge" if entry["acknowledged"] else "not yet sent"
        console.print(f"outbox: {entry['update_id']} of {entry['task']}, {state}", markup=False, soft_wrap=True)
    for entry in found["refused"]:
        text = f"refused: {entry['update_id']} of {entry['task']}: {entry['reason']}"
        console.print(text, markup=False, soft_wrap=True)


def watch_versions(sources: Sources, credentials: Credentials) -> Iterator[dict[str, Any]]:
    """Yield the newest version, then every later one as it is published; what the hub signs is verified."""
    description = sources.hub.describe()
    version = description.version
    chain = open_chain(description, credentials, None, datetime.now(UTC))
    yield {
        "event": "version",
        "version": version,
        "space_id": description.spec.space_id,
        "text": f"version {version} of {description.spec.backbone}",
    }
    for event in VersionFeed(sources, description.spec, version, chain=chain).events():
        chain.before_cached(event.version)  # nothing is cached: what led here is of no use any more
        yield _line(event)


def fetch_snapshot(link: HubLink, credentials: Credentials, version: int) -> tuple[int, bytes]:
    """Return (version, payload) of one whole version, 0 for the newest; what the hub signs is verified.

    Raises:
        FedshareError: the hub refuses, or the payload is not what it has signed.
    """
    description = link.describe()
    chain = open_chain(description, credentials, None, datetime.now(UTC))
    if version == 0 and description.version == 0:
        return 0, encode_snapshot(empty_space(description.spec))  # nothing has been published, so nothing is signed
    return link.fetch_snapshot(description.spec.space_id, version, chain.check_snapshot)


def _line(event: Delta | Space) -> dict[str, Any]:
    if isinstance(event, Space):
        text = f"version {event.version} (whole)"
        return {"event": "snapshot", "version": event.version, "tasks": sorted(event.cores), "text": text}
    grown = sum(int(step.append_left.shape[1]) for step in event.transition.values())
    text = f"version {event.version}: {', '.join(sorted(event.cores))}, {grown} new left directions"
    return {
        "event": "version",
        "version": event.version,
        "tasks": sorted(event.cores),
        "new_left_directions": grown,
        "compacts": event.compacts,
        "text": text + (", compacted" if event.compacts else ""),
    }


def task_list(link: HubLink) -> dict[str, Any]:
    """Return every task of the space."""
    answer = link.list_tasks()
    names = [field.name for field in hub_pb2.TaskRecord.DESCRIPTOR.fields]
    return {
        "version": answer.version,
        "tasks": [
            # What was not said is null, not zero: no epsilon and an epsilon of 0 are opposites.
            {n: getattr(task, n) if n not in ("epsilon", "delta") or task.HasField(n) else None for n in names}
            for task in answer.tasks
        ],
    }


def print_tasks(found: dict[str, Any]) -> None:
    """Print what :func:`task_list` returned, for people."""
    table = Table(box=box.SIMPLE_HEAD, caption="last: version; coeff.: numbers; error: relative bound, ! over budget")
    for heading in ("task", "owner"):
        table.add_column(heading, overflow="fold")  # a name goes on in the next line, it is never cut
    for heading in ("last", "updates", "coeff.", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task in found["tasks"]:
        bound = f"{task['error_bound']:.4f}" + ("!" if task["over_budget"] else "")
        cells = (task["updated_version"], task["updates"], task["coefficients"], bound)
        table.add_row(task["task_id"], task["owner"], *(str(cell) for cell in cells))
    Console().print(table)
