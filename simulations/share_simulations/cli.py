"""The command ``share-sim``.

Exit codes: 0 done; 1 refused or failed, with one clear sentence on standard error; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from share_core.command_line import run_command
from share_simulations.bench_cli import bench_app
from share_simulations.chaos_cli import chaos_app
from share_simulations.fuzz_cli import fuzz

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from share_simulations.federation import RunFolders
    from share_simulations.progress import LineProgress, LiveProgress
    from share_simulations.scenario import Scenario

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Local federations of real processes: a real server and real clients on this machine.",
)
run_app = typer.Typer(no_args_is_help=True, help="Run a federation to its end and report what came out.")
data_app = typer.Typer(no_args_is_help=True, help="Write data to try the commands by hand with.")
app.add_typer(run_app, name="run")
app.add_typer(bench_app, name="bench")
app.add_typer(chaos_app, name="chaos")
app.add_typer(data_app, name="data")
app.command()(fuzz)

Seed = Annotated[int, typer.Option(help="Seed of data, initial values and order of the rows.")]
Json = Annotated[bool, typer.Option("--json", help="Progress to standard error; the last line is one JSON object.")]
Out = Annotated[
    Path | None, typer.Option(help="Run folder, new or empty. Default: runs/SCENARIO-TIME.", show_default=False)
]
Keep = Annotated[bool, typer.Option("--keep", help="Keep the server's and the clients' folders of a finished run.")]


@run_app.command()
def quickstart(
    clients: Annotated[int, typer.Option(help="1 to 3 organisations.")] = 3,
    tasks: Annotated[int, typer.Option(help="Tasks in all, at least one per client.")] = 8,
    epochs: Annotated[int, typer.Option(help="Passes over each task's training rows.")] = 20,
    seed: Seed = 0,
    as_json: Json = False,
    out: Out = None,
    keep: Keep = False,
) -> None:
    """Handwritten digits, seen differently by each client: split, rotated, inverted, mirrored, noisy.

    Needs no download and no GPU; takes about two minutes on two cores.
    """
    from share_simulations.digits import QuickstartOptions, prepare_quickstart

    options = QuickstartOptions(clients=clients, tasks=tasks, epochs=epochs, seed=seed)
    _run("quickstart", lambda folders: prepare_quickstart(folders.clients, options), as_json, out, keep)


@run_app.command()
def text(
    data: Annotated[
        Path, typer.Option(help="Folder with TASK/train.jsonl[.gz] and TASK/test.jsonl[.gz].", file_okay=False)
    ],
    tasks: Annotated[str, typer.Option(help="Folder names, comma-separated, in the order of arrival.")],
    rows: Annotated[int, typer.Option(min=1, help="Training rows per task, after a seeded shuffle.")] = 1500,
    test_rows: Annotated[int, typer.Option(min=1, help="At most so many test rows per task.")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="Clients; tasks are dealt to them in turn.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over each task's training rows.")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
    out: Out = None,
    keep: Keep = False,
) -> None:
    """Text classification with the packaged MiniLM, on your own JSON lines (text, optional text_b, label)."""
    from share_simulations.text import TextOptions, prepare_text

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    options = TextOptions(data, names, rows, test_rows, clients, epochs, seed)
    _run("text", lambda folders: prepare_text(folders.clients, options), as_json, out, keep)


@app.command()
def show(run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Print the report of an earlier run again."""
    from rich.console import Console

    from share_simulations.report import print_report
    from share_simulations.results import read_results

    print_report(read_results(run_dir), Console())


@data_app.command("quickstart")
def data_quickstart(
    out: Annotated[Path, typer.Option(help="Folder to write; one folder per client appears in it.")],
    clients: Annotated[int, typer.Option(help="1 to 3 organisations.")] = 3,
    tasks: Annotated[int, typer.Option(help="Tasks in all, at least one per client.")] = 8,
    epochs: Annotated[int, typer.Option(help="Passes over each task's training rows.")] = 20,
    seed: Seed = 0,
) -> None:
    """Write each quickstart client's private data and tasks.toml, to type the commands by hand."""
    from share_simulations.digits import QuickstartOptions, prepare_quickstart
    from share_simulations.scenario import write_tasks_file

    scenario = prepare_quickstart(out, QuickstartOptions(clients, tasks, epochs, seed))
    for client in scenario.clients:
        path = write_tasks_file(out, scenario, client, client.tasks)
        names = ", ".join(t.name for t in client.tasks)
        typer.echo(f"{client.organisation}: {path} ({names})")


def _run(
    name: str,
    prepare: Callable[[RunFolders], Scenario],
    as_json: bool,
    out: Path | None,
    keep: bool,
) -> None:
    """Prepare, run and report one scenario."""
    # The children are forked while gRPC's threads run; they exec at once and use none of its state.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from rich.console import Console

    from share_simulations.interrupts import interruptible
    from share_simulations.progress import progress_console
    from share_simulations.report import print_report
    from share_simulations.results import as_json as json_of
    from share_simulations.run import new_run_folder, simulate

    folders = new_run_folder(name, out, datetime.now())
    with (
        interruptible("every process of the federation was stopped"),
        _progress(progress_console(), live=not as_json) as progress,
    ):
        progress.note(f"run folder {folders.root}")
        results = simulate(prepare(folders), folders, progress, keep)
    if as_json:
        print_report(results, progress_console())
        typer.echo(json.dumps(json_of(results)))
    else:
        print_report(results, Console())
        typer.echo(f"pictures: {folders.root / 'matrix.png'} and {folders.root / 'curves.png'}")


def _progress(console: Console, live: bool) -> AbstractContextManager[LiveProgress | LineProgress]:
    """Return a table on a terminal, lines elsewhere."""
    from share_simulations.progress import LineProgress, LiveProgress

    if live and console.is_terminal:
        return LiveProgress(console)
    return nullcontext(LineProgress(console))


def main() -> None:
    """Console script."""
    run_command(app, "share-sim")


if __name__ == "__main__":
    main()
