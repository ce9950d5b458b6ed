"""What people see of the hub, on a terminal of 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from share_proto.v1 import hub_pb2
from share_server.tables import status_table, task_table, traffic_table

MEMBER = "st-mary-university-hospital/radiology-workstation-2"
TASK = "st-mary-university-hospital/chest-xray-findings.2026"


def printed(table: Table) -> list[str]:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in capture.get()
    return lines


def column(lines: list[str], heading: str, following: str) -> str:
    """Return everything under a heading, folded lines joined."""
    head = next(line for line in lines if heading in line and following in line)
    start, end = head.index(heading), head.index(following)
    return "".join(line[start:end].strip() for line in lines[lines.index(head) + 2 :])


def test_tasks_show_whole_names_and_whole_numbers() -> None:
    task = hub_pb2.TaskRecord(
        task_id=TASK,
        owner=MEMBER,
        created_version=12,
        updated_version=12345,
        updates=678,
        coefficients=9_876_543,
        error_bound=0.0712,
        over_budget=True,
    )
    lines = printed(task_table(hub_pb2.ListTasksResponse(version=12345, tasks=[task])))
    words = " ".join(lines).split()
    assert {"12", "12345", "678", "9876543", "0.0712!"} <= set(words)
    assert column(lines[:-1], "task", "owner").startswith(TASK)
    assert column(lines[:-1], "owner", "first").startswith(MEMBER)


def test_traffic_adds_up_and_shows_whole_names() -> None:
    row = hub_pb2.MemberTraffic(
        member=MEMBER,
        up=hub_pb2.PayloadBytes(coefficients=1_000_000, directions=2_000_000, heads=30_000, envelope=4_000),
        down_deltas=500_000_000,
        down_snapshots=1_000_000,
        updates=7,
    )
    lines = printed(traffic_table(hub_pb2.GetStatusResponse(traffic=[row])))
    text = " ".join(lines)
    for size in ("3.0 MB", "30.0 kB", "4.0 kB", "501.0 MB", "504.0 MB"):
        assert size in text
    assert column(lines, "member", "updates") == MEMBER
    row.down_heads = 500_000
    text = " ".join(printed(traffic_table(hub_pb2.GetStatusResponse(traffic=[row]))))
    for size in ("530.0 kB", "501.0 MB", "504.5 MB"):  # heads both ways, apart from versions, and in the total
        assert size in text


def test_status_shows_the_whole_space_id() -> None:
    space_id = "sha256:" + "0123456789abcdef" * 4
    lines = printed(status_table(hub_pb2.GetStatusResponse(space_id=space_id, version=3)))
    assert space_id in "".join(line[13:].strip() for line in lines[:2])
