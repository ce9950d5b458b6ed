"""``share-space``: shared subspaces as files, offline.

Exit codes: 0 done; 1 refused or failed, with one clear sentence on standard error; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from share_core.command_line import run_command
from share_core.errors import AdapterError, ConfigError, StorageError

if TYPE_CHECKING:
    from share_core.space_tool.build import Progress
    from share_core.space_tool.spacefile import FilePolicy, SpaceFile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Many LoRA adapters of one backbone as one shared subspace in one file: merge, look, check, export.",
)

Space = Annotated[
    Path, typer.Argument(help="A space file, as 'share-space merge' writes it.", show_default=False, readable=False)
]
Adapters = Annotated[
    list[str], typer.Argument(metavar="ADAPTER...", help="PEFT adapter directories: DIR, or NAME=DIR to name the task.")
]
Output = Annotated[
    Path, typer.Option("--out", "-o", help="Where to write; replaced whole or not at all.", readable=False)
]
InPlace = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Where to write. Default: replace SPACE.", show_default=False, readable=False),
]
Cap = Annotated[int | None, typer.Option(help="Most directions per site and side. Default: 64.", show_default=False)]
Budget = Annotated[
    float | None, typer.Option(help="Most of each adapter's norm that may be lost, e.g. 0.05.", show_default=False)
]
Rank = Annotated[int | None, typer.Option(help="Most ranks of a task's coefficients.", show_default="the adapter's")]
SiteCap = Annotated[
    list[str] | None, typer.Option(help="PATTERN=K: another cap for sites of this name.", show_default=False)
]
Backbone = Annotated[
    Path | None,
    typer.Option(help="Local model to take the sites' fingerprints from.", show_default=False, readable=False),
]
Json = Annotated[bool, typer.Option("--json", help="Progress to standard error; the last line is one JSON object.")]


@app.command()
def merge(
    adapters: Adapters,
    out: Output,
    cap: Cap = None,
    budget: Budget = None,
    rank: Rank = None,
    site_cap: SiteCap = None,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Merge adapters into one new space. Any ranks and scales; sites may differ.

    With --cap the space never holds more directions per site and loses as little as that allows; with --budget it holds
    as many as every adapter needs to lose no more than that share of its norm.
    """
    from share_core.space_tool.build import merge_sources, parse_sources

    policy = _policy(cap, budget, rank, site_cap)
    sources = parse_sources(adapters)
    with _timed(out, as_json, 2 * len(sources)) as (progress, finish):
        finish(merge_sources(sources, policy, backbone, progress))


@app.command()
def add(
    space: Space, adapters: Adapters, out: InPlace = None, backbone: Backbone = None, as_json: Json = False
) -> None:
    """Merge further adapters into a space; a task of the same name is replaced."""
    from share_core.space_tool.build import add_sources, parse_sources
    from share_core.space_tool.spacefile import read_space

    before = None if out else _stamp(space)
    file, sources = read_space(space), parse_sources(adapters)
    with _timed(out or space, as_json, 2 * len(sources) + len(file.sources), before) as (progress, finish):
        finish(add_sources(file, sources, backbone, progress))


@app.command()
def remove(
    space: Space,
    tasks: Annotated[list[str] | None, typer.Argument(help="Tasks to remove.", show_default=False)] = None,
    contributor: Annotated[
        str | None, typer.Option(help="Remove all tasks named CONTRIBUTOR/...", show_default=False)
    ] = None,
    anew: Annotated[
        bool, typer.Option(help="Merge the other adapters anew, so that no trace remains; needs their directories.")
    ] = False,
    out: InPlace = None,
    as_json: Json = False,
) -> None:
    """Remove tasks. The others do not move; directions that nobody uses any more go too."""
    from share_core.space_tool.build import rebuild, remove_tasks, tasks_of
    from share_core.space_tool.spacefile import read_space

    before = None if out else _stamp(space)
    file = read_space(space)
    gone = [*(tasks or []), *(tasks_of(file, contributor) if contributor else [])]
    if not gone:
        raise ConfigError("name the tasks to remove, or a contributor that has some")
    steps = (4 if anew else 1) * len(file.sources.keys() - set(gone))
    with _timed(out or space, as_json, steps, before) as (progress, finish):
        rest = remove_tasks(file, gone, progress)
        finish(rebuild(rest, file.policy, progress) if anew and rest.sources else rest)


@app.command(name="rebuild")
def rebuild_command(
    space: Space,
    out: InPlace = None,
    cap: Cap = None,
    budget: Budget = None,
    rank: Rank = None,
    site_cap: SiteCap = None,
    as_json: Json = False,
) -> None:
    """Merge a space's adapters anew at another size; needs their directories."""
    from share_core.space_tool.build import rebuild
    from share_core.space_tool.spacefile import read_space

    before = None if out else _stamp(space)
    file, policy = read_space(space), _policy(cap, budget, rank, site_cap)
    with _timed(out or space, as_json, 3 * len(file.sources), before) as (progress, finish):
        finish(rebuild(file, policy, progress))


@app.command()
def inspect(
    space: Annotated[
        Path, typer.Argument(help="A space file, or a snapshot that 'share-client snapshot' wrote.", readable=False)
    ],
    spec: Annotated[
        str | None,
        typer.Option("--space", help="For a snapshot: its space.toml or built-in space.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw spectra and errors: .png, .svg, .pdf.", readable=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show sites, sizes, spectra and every task's error."""
    from share_core.space_tool.plot import write_plot
    from share_core.space_tool.report import site_table, space_summary, task_table
    from share_core.space_tool.spacefile import read_space

    summary = _snapshot(space, spec) if spec else space_summary(read_space(space))
    if plot is not None:
        if spec:
            raise ConfigError("a snapshot carries no errors to draw: give a space file without --space")
        write_plot(summary, plot)
    if as_json:
        typer.echo(json.dumps(summary))
        return
    backbone = summary["backbone"] or "unnamed backbone"
    typer.echo(f"{backbone} version {summary['version']}: {len(summary['tasks'])} tasks")
    _print(site_table(summary))
    _print(task_table(summary))


@app.command()
def export(
    space: Space,
    task: Annotated[str, typer.Argument(help="The task to write.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New or empty directory.", readable=False)],
    own_ranks: Annotated[
        bool, typer.Option(help="Keep each site's rank (rank_pattern) instead of padding to one.")
    ] = False,
    heads: Annotated[bool, typer.Option(help="Copy heads and biases from the adapter it was merged from.")] = False,
    engine: Annotated[
        str | None,
        typer.Option("--for", metavar="vllm", help="Refuse what this engine would not serve.", show_default=False),
    ] = None,
) -> None:
    """Write a task as a PEFT adapter directory."""
    from share_core.peft.reader import PeftExport
    from share_core.peft.writer import write_adapter
    from share_core.space import task_adapter
    from share_core.space_tool.build import original_of
    from share_core.space_tool.spacefile import read_space

    if engine not in (None, "vllm"):
        raise typer.BadParameter(f"--for {engine!r}: only vllm has rules that are known here")
    file = read_space(space)
    factors = task_adapter(file.space, task)
    source = file.sources[task]
    original = original_of(source) if heads else None
    if heads and original is None:
        raise AdapterError(
            f"the heads of task {task!r} cannot be copied: {source.path} is gone or holds another adapter than the one "
            "merged; export without --heads"
        )
    extra = original.extra if original else None
    try:
        write_adapter(out, factors, PeftExport.from_json(source.export), uniform_rank=not own_ranks, extra=extra)
    except OSError as error:
        raise StorageError(
            f"cannot write {out}: {error.strerror}: make room or choose another place with -o; nothing was changed"
        ) from None
    needs = "" if engine is None else f"; start vLLM with --max-lora-rank {_rank_for_vllm(out)} or more"
    ledger = file.ledger[task]
    typer.echo(
        f"{out}: task {task}, relative error {ledger.bound:.4g} ({'measured' if ledger.measured else 'upper bound'}), "
        f"{'with' if extra else 'without'} heads{needs}"
    )


def _rank_for_vllm(out: Path) -> int:
    """Return what vLLM needs for an adapter just written, or remove it."""
    from share_core.peft.vllm import check_vllm

    try:
        return check_vllm(out)
    except AdapterError:
        shutil.rmtree(out)
        raise


@app.command()
def verify(
    space: Space,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Check a space: layout, orthonormal bases, and the ledger against the adapters that are at hand."""
    from share_core.space_tool import check
    from share_core.space_tool.report import finding_table
    from share_core.space_tool.spacefile import read_space

    findings = check.verify(read_space(space))
    ok = all(finding.ok for finding in findings)
    if as_json:
        rows = [{"checked": f.what, "ok": f.ok, "detail": f.detail} for f in findings]
        typer.echo(json.dumps({"ok": ok, "findings": rows}))
    else:
        _print(finding_table(findings))
    if not ok:
        wrong = [finding.what for finding in findings if not finding.ok]
        some = ", ".join(wrong[:8]) + (", ..." if len(wrong) > 8 else "")
        raise ConfigError(
            f"{space} does not hold what it says ({some}): rebuild it from its adapters or take an undamaged copy"
        )


@app.command()
def diff(
    first: Space,
    second: Annotated[Path, typer.Argument(help="Another space file.", show_default=False, readable=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Compare two spaces: tasks, errors, and how far their subspaces lie apart."""
    from share_core.space_tool import check
    from share_core.space_tool.report import diff_summary, diff_tables
    from share_core.space_tool.spacefile import read_space

    difference = check.diff(read_space(first), read_space(second))
    if as_json:
        typer.echo(json.dumps(diff_summary(difference)))
        return
    for what, tasks in (("only in the second", difference.added), ("only in the first", difference.removed)):
        if tasks:
            typer.echo(f"{what}: {', '.join(tasks)}")
    for table in diff_tables(difference):
        _print(table)


def _policy(cap: int | None, budget: float | None, rank: int | None, site_cap: list[str] | None) -> FilePolicy:
    from share_core.space_tool.header import MAX_CAP, FilePolicy

    if cap is not None and budget is not None:
        raise typer.BadParameter("give --cap or --budget, not both")
    if any(limit is not None and not 1 <= limit <= MAX_CAP for limit in (cap, rank)):
        raise typer.BadParameter(f"--cap and --rank must be from 1 to {MAX_CAP}")
    if budget is not None and not 0 <= budget < 1:
        raise typer.BadParameter("--budget must be at least 0 and below 1")
    caps = {}
    for entry in site_cap or []:
        pattern, _, value = entry.rpartition("=")
        if not pattern or not value.isdecimal() or not 1 <= int(value[:9]) <= MAX_CAP:
            raise typer.BadParameter(f"--site-cap {entry!r}: expected PATTERN=K with K from 1 to {MAX_CAP}")
        caps[pattern] = int(value)
    return FilePolicy(None if budget is not None else cap or 64, budget or 0.0, rank, caps)


Stamp = tuple[int, int, int]
"""Inode, time of change and size of a file: differs when somebody replaced it."""


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _target(out: Path) -> Path:
    """Return the file to write, refusing before the work what would fail or destroy something after it."""
    from share_core.space_tool.spacefile import is_space

    target = Path(os.path.realpath(out))
    if target.is_dir():
        raise ConfigError(f"{out} is a directory: give a file name, as in {out / 'merged.space'}")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no directory {target.parent}: make it, or choose another place with -o")
    if target.exists() and not is_space(target):
        raise ConfigError(f"{out} exists and is no space file: choose another name with -o; nothing was overwritten")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(f"{out} may not be written: choose another place with -o")
    return target


@contextmanager
def _timed(out: Path, as_json: bool, steps: int, before: Stamp | None = None) -> Iterator[tuple[Progress, Any]]:
    """Show progress while a space is built, then write it and say what came out.

    Args:
        out: where to write.
        as_json: say it as JSON.
        steps: calls of the progress function.
        before: of the file that is changed in place; refused if somebody else changed it meanwhile.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from share_core.space_tool.report import merge_summary
    from share_core.space_tool.spacefile import write_space

    begun, target = time.perf_counter(), _target(out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task("", total=steps)

        def progress(what: str, task: str) -> None:
            if what == "note":
                typer.echo(f"share-space: note: {task}", err=True)
                return
            bar.update(row, advance=1, description=f"{what} {task}")

        made: list[SpaceFile] = []
        yield progress, made.append
    if before is not None and _stamp(target) != before:
        raise ConfigError(
            f"{out} was changed by another command while this one ran, which it would undo: nothing was written; run "
            "this again"
        )
    size = write_space(target, made[0])
    for pattern in made[0].policy.site_caps:
        if not any(fnmatchcase(name, pattern) for name in made[0].sites):
            typer.echo(f"share-space: note: no site matches the cap for {pattern!r}", err=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    summary = merge_summary(made[0], size, time.perf_counter() - begun, peak)
    if as_json:
        typer.echo(json.dumps(summary))
        return
    typer.echo(
        f"{out}: {summary['adapters']} tasks at {summary['sites']} sites, {size:,} bytes for "
        f"{summary['bytes_adapters']:,} bytes of adapters; relative error mean {summary['mean_error']:.4f}, "
        f"max {summary['max_error']:.4f}"
    )


def _snapshot(path: Path, spec_name: str) -> dict[str, Any]:
    from share_core.space_tool.report import snapshot_summary
    from share_core.spec_file import find_spec
    from share_core.wire import decode_snapshot

    spec = find_spec(spec_name)
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return snapshot_summary(decode_snapshot(payload, spec), spec)


def _print(what: object) -> None:
    from rich.console import Console

    Console().print(what)


def main() -> None:
    """Console script."""
    run_command(app, "share-space")
