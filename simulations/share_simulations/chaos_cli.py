"""The commands ``share-sim chaos ...``: break a hub on purpose and count the promises it broke."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

chaos_app = typer.Typer(
    no_args_is_help=True,
    help="Break a hub on purpose and count what it promised and did not keep; exit code 1 if that is anything.",
)
Seed = Annotated[int, typer.Option(help="Seed of the workloads and of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Progress to standard error; the last line is one JSON object.")]
Mutants = Annotated[
    bool, typer.Option("--mutants", help="Also plant bugs, one by one, and fail if one of them goes unnoticed.")
]
Folder = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder for the stores under test. Default: memory, if this machine offers it."),
]


@chaos_app.command()
def syscalls(
    points: Annotated[int, typer.Option(min=1, help="Kills in all.")] = 10_000,
    mutants: Mutants = False,
    seed: Seed = 0,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Kill a hub before each system call that changes a file, and look at what is left.

    The hub opens a store (empty, filled, or left by a kill), takes updates of several members at once, merges,
    publishes, collects and closes. It is killed before its first such call, then before its second, and so on; then
    with another workload. After each kill a second process opens the store and everything is counted: acknowledged
    updates, merges, versions, payloads. About 0.15 s per point. Quick look: --points 300 --mutants.
    """
    from share_simulations.chaos.syscalls import SyscallOptions, run_syscalls

    _finish(run_syscalls(SyscallOptions(points, seed, mutants, folder)), as_json)


@chaos_app.command()
def disk(
    points: Annotated[int, typer.Option(min=1, help="Failures in all.")] = 3_000,
    mutants: Mutants = False,
    seed: Seed = 0,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Let each system call that changes a file fail once: EIO, ENOSPC, EDQUOT and short writes.

    After the failure nothing may be acknowledged whose row was not durable before, the hub must end with exit code 1,
    and the next start on a healthy disk must keep every promise. About 0.2 s per point. Quick look: --points 200.
    """
    from share_simulations.chaos.disk import DiskOptions, run_disk

    _finish(run_disk(DiskOptions(points, seed, mutants, folder)), as_json)


@chaos_app.command()
def power(
    cuts: Annotated[int, typer.Option(min=1, help="Power cuts in all.")] = 1_000,
    mutants: Mutants = False,
    seed: Seed = 0,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Cut the power of a hub at random moments, on a modelled disk that keeps only what was flushed.

    One life of a hub is traced with the bytes of all its writes. For each cut a disk is built from it: flushed data and
    names are there; of the rest nothing, everything, or a random part survives, torn at 512-byte sectors and out of
    order. The hub must come back on it with everything it had acknowledged. About 0.1 s per cut.
    """
    from share_simulations.chaos.power import PowerOptions, run_power

    _finish(run_power(PowerOptions(cuts, seed, mutants, folder)), as_json)


def _finish(report: dict[str, Any], as_json: bool) -> None:
    """Print the report; exit code 1 if a promise was broken or a planted bug survived."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(report))
    else:
        table = Table("figure", "value", title=f"chaos {report['campaign']}", title_justify="left")
        for key, value in report.items():
            if isinstance(value, dict):
                for name, detail in value.items():
                    table.add_row(f"{key}: {name}", str(detail))
            else:
                table.add_row(key, "\n".join(map(str, value)) if isinstance(value, list) else str(value))
        Console().print(table)
    if not report["ok"]:
        raise typer.Exit(1)
