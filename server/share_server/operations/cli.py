"""The commands ``verify``, ``audit``, ``rebuild``, ``forget``, ``backup`` and ``restore`` of share-server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from share_core.command_line import plain_errors
from share_core.errors import FedshareError
from share_server.layout import Layout

if TYPE_CHECKING:
    from rich.table import Table

    from share_server.operations.forget import Forgotten
    from share_server.operations.reading import Told
    from share_server.operations.rebuild import Rebuilt
    from share_server.operations.report import Report

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of a table.")]


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a stopped server, or a backup.")],
    replay: Annotated[
        bool, typer.Option("--replay", help="Also make every kept version anew from its updates and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check everything in a store and change nothing: exit code 0 if all of it holds, else 1 and every problem."""
    from share_server.operations.verify import verify as check

    with plain_errors("share-server"), _progress() as told:
        report = check(Layout(directory.resolve()), replay, told)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        _show(_verify_table(report))
        for note in report.notes:
            typer.echo(f"note: {note}")
        for problem in report.problems:
            typer.echo(f"problem: {problem}")
        typer.echo("everything holds" if not report.problems else "restore the store from a backup")
    raise typer.Exit(1 if report.problems else 0)


def audit(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The server directory; its hub may run.")],
    version: Annotated[int, typer.Option(help="Only what this version took; 0: everything.", min=0)] = 0,
    member: Annotated[str, typer.Option(help="Only of this member (organisation/name) or organisation.")] = "",
    task: Annotated[str, typer.Option(help="Only of this task (organisation/name).")] = "",
    as_json: Json = False,
) -> None:
    """Show who contributed what to which version, each signature checked: exit code 1 if one of them is not valid."""
    from share_server.operations.audit import Filter
    from share_server.operations.audit import audit as look
    from share_server.operations.signatures import INVALID, UNSIGNED, VALID
    from share_server.tables import audit_table, contributors_table

    with plain_errors("share-server"):
        found = look(Layout(directory.resolve()), Filter(version, member, task))
    if as_json:
        counts = {"valid": found.count(VALID), "invalid": found.count(INVALID), "unsigned": found.count(UNSIGNED)}
        typer.echo(json.dumps({**dataclasses.asdict(found), "signatures": counts}))
    else:
        _show(audit_table(found))
        _show(contributors_table(found))
        for line in found.updates:
            if line.problem or line.reason:
                typer.echo(f"{line.update_id}: {line.problem or line.reason}")
    raise typer.Exit(1 if found.count(INVALID) else 0)


def rebuild(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a stopped server.")],
    k_max: Annotated[int, typer.Option(help="Most basis vectors per site and side from now on.", min=1, max=4096)],
    tau: Annotated[
        float | None, typer.Option(help="Share of a task's norm that a merge may leave out, at least 0 and below 1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the space anew at another size, from what was submitted, as its next version."""
    from share_server.operations.rebuild import rebuild as make

    with plain_errors("share-server"), _progress() as told:
        made = make(Layout(directory.resolve()), k_max, tau, told)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(made)))
        return
    _show(_rebuild_table(made))
    typer.echo(f"version {made.version} with k_max {made.k_max} and tau {made.tau:g}; members fetch it whole")


def forget(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a stopped server.")],
    name: Annotated[
        str, typer.Argument(metavar="ORGANISATION[/NAME]", help="A member, or an organisation for all of its members.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go and what it would cost the others; change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the space anew without a contributor, as its next version, and remove what it has sent. Not to be undone."""
    from share_server.operations.forget import forget as take_out

    with plain_errors("share-server"), _progress() as told:
        done = take_out(Layout(directory.resolve()), name, dry_run=dry_run, told=told)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
        return
    _tell_forgotten(done)


def backup(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The server directory; its hub may run.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Directory to make. Must not exist.")],
    as_json: Json = False,
) -> None:
    """Copy a whole server directory, keys included, while its hub serves. Keep the copy as safe as the original."""
    from share_server.operations.backup import backup_stopped
    from share_server.operations.reading import is_running

    layout, place = Layout(directory.resolve()), target.absolute()
    with plain_errors("share-server"), _progress() as told:
        version = _ask_hub(layout, place, told) if is_running(layout) else backup_stopped(layout, place, told)
    if as_json:
        typer.echo(json.dumps({"directory": str(place), "version": version}))
        return
    typer.echo(f"backup of version {version} in {place}")
    typer.echo("on the same disk its payloads are hard links: copy it to another disk to survive the loss of this one")


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="A directory made by 'backup'.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Server directory to make. Must not exist.")],
    as_json: Json = False,
) -> None:
    """Prove a backup and make a server directory from it."""
    from share_server.operations.restore import WARNING
    from share_server.operations.restore import restore as bring_back

    place = directory.absolute()
    with plain_errors("share-server"), _progress() as told:
        version = bring_back(source.resolve(), place, told)
    warning = WARNING.format(version=version)
    if as_json:
        typer.echo(json.dumps({"directory": str(place), "version": version, "warning": warning}))
        return
    typer.echo(f"server directory {place} at version {version}")
    typer.echo(f"note: {warning}")
    typer.echo(f"next: share-server run {directory}")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of share-server."""
    for command in (verify, audit, rebuild, forget, backup, restore):
        app.command()(command)


def _ask_hub(layout: Layout, target: Path, told: Told) -> int:
    """Let the running hub make the backup; return the version it holds."""
    import grpc

    from share_proto.v1 import hub_pb2
    from share_server.config import read_config
    from share_server.operator import named_error, operator_stub

    config = read_config(layout.config)
    with operator_stub(layout, config) as hub:
        try:
            for one in hub.Backup(hub_pb2.BackupRequest(directory=str(target))):
                told("files", one.done, one.total)
                if one.finished:
                    return int(one.version)
        except grpc.RpcError as error:
            raise named_error(error, config.local_hub_address) from error
    raise FedshareError("the hub ended the backup without saying that it is complete: look at its log")


@contextmanager
def _progress() -> Iterator[Told]:
    """Show a progress bar on standard error, where somebody sees it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        rows: dict[str, Any] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in rows:
                rows[what] = bar.add_task(what, total=total)
            bar.update(rows[what], completed=done, total=total)

        yield told


def _show(table: Table) -> None:
    from share_server.tables import show

    show(table)


def _verify_table(report: Report) -> Table:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("versions", str(report.versions))
    table.add_row("updates", str(report.updates))
    table.add_row("entries", str(report.entries))
    table.add_row("signatures", str(report.signatures))
    table.add_row("payloads", f"{report.payloads} ({decimal(report.bytes)})")
    table.add_row("orphans", f"{len(report.orphans)}" + "".join(f"\n{digest}" for digest in report.orphans))
    if report.replayed:
        table.add_row("replayed", f"{report.replayed}, {report.bit_equal} of them equal to the bit")
        table.add_row("largest distance", f"{report.largest_distance:.2e}")
    table.add_row("ledger violations", str(report.ledger_violations))
    table.add_row("problems", str(len(report.problems)))
    return table


def _tell_forgotten(done: Forgotten) -> None:
    from rich.filesize import decimal

    if not done.updates:
        typer.echo(f"{done.name} is forgotten already: the newest version is {done.version}")
        return
    table = _task_table("error before", "after", "change")
    for task in done.tasks:
        table.add_row(task.task_id, f"{task.before:.4f}", f"{task.after:.4f}", f"{task.change:.4f}")
    _show(table)
    for task_id in done.vanished:
        typer.echo(f"task {task_id} {'would go' if done.dry_run else 'is gone'}: nobody else has contributed to it")
    what = f"{done.updates} updates of {done.name} and {decimal(done.payload_bytes)} of payloads"
    if done.dry_run:
        typer.echo(f"{what} would go; version {done.version} would be the newest; nothing was changed")
    else:
        typer.echo(f"{what} are gone; version {done.version} is the newest; members fetch it whole")
    for note in done.notes:
        typer.echo(f"note: {note}")


def _task_table(*numbers: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("task", overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _rebuild_table(made: Rebuilt) -> Table:
    table = _task_table("error before", "after")
    for task in made.tasks:
        table.add_row(task.task_id, f"{task.before:.4f}", f"{task.after:.4f}")
    return table
