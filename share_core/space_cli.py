"""``share-space``: look at shared subspaces as files, offline."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from share_core.command_line import run_command
from share_core.errors import ConfigError

if TYPE_CHECKING:
    from share_core.types import Space, SpaceSpec

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def share_space() -> None:
    """Look at shared subspaces as files, offline."""


@app.command()
def inspect(
    snapshot: Annotated[Path, typer.Argument(help="A snapshot: what 'share-client snapshot' writes.")],
    space: Annotated[str, typer.Option(help="The space.toml it belongs to, or the name of a built-in space.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show version, sizes and tasks of a snapshot."""
    from share_core.spec_file import find_spec
    from share_core.wire import decode_snapshot

    spec = find_spec(space)
    try:
        payload = snapshot.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {snapshot}: {error.strerror}") from None
    summary = summarise(decode_snapshot(payload, spec), spec)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(summary)


def summarise(space: Space, spec: SpaceSpec) -> dict[str, Any]:
    """Return sizes per site and per task, as plain values; bytes count float32."""
    from share_core.linalg import product_norm

    sites = [
        {
            "site": name,
            "d_out": s.d_out,
            "d_in": s.d_in,
            "k_out": space.bases[name].k_out,
            "k_in": space.bases[name].k_in,
        }
        for name, s in spec.sites.items()
    ]
    tasks: list[dict[str, Any]] = [
        {
            "task": task,
            "numbers": sum(core.out.numel() + core.in_.numel() for core in cores.values()),
            "norm": math.hypot(*(float(product_norm(core.out, core.in_)) for core in cores.values())) if cores else 0.0,
        }
        for task, cores in sorted(space.cores.items())
    ]
    return {
        "backbone": spec.backbone,
        "space_id": spec.space_id,
        "version": space.version,
        "bytes_bases": 4 * sum(b.left.numel() + b.right.numel() for b in space.bases.values()),
        "bytes_tasks": 4 * sum(task["numbers"] for task in tasks),
        "sites": sites,
        "tasks": tasks,
    }


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"[bold]{summary['backbone']}[/bold] version {summary['version']}: {len(summary['tasks'])} tasks, "
        f"bases {summary['bytes_bases']:,} bytes, coefficients {summary['bytes_tasks']:,} bytes"
    )
    sites = Table("site", "weight", "left", "right", title="Subspace")
    for site in summary["sites"]:
        sites.add_row(site["site"], f"{site['d_out']} x {site['d_in']}", str(site["k_out"]), str(site["k_in"]))
    tasks = Table("task", "numbers", "norm", title="Tasks")
    for task in summary["tasks"]:
        tasks.add_row(task["task"], f"{task['numbers']:,}", f"{task['norm']:.4g}")
    console.print(sites)
    console.print(tasks)


def main() -> None:
    """Console script."""
    run_command(app, "share-space")
