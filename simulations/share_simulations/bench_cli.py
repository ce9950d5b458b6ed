"""The commands ``share-sim bench ...``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from share_core.errors import ConfigError
from share_simulations.interrupts import interruptible

if TYPE_CHECKING:
    from rich.table import Table

bench_app = typer.Typer(
    no_args_is_help=True, help="Benchmarks: a peer or the machine's limit beside ours, in the same run."
)
Directory = Annotated[
    Path | None,
    typer.Option(help="Disk that is measured: the hub's store lies in here. Default: a temporary directory."),
]
Json = Annotated[bool, typer.Option("--json", help="Progress to standard error; the last line is one JSON object.")]


@bench_app.command("merge")
def bench_merge(
    tasks: Annotated[str, typer.Option(help="Stored tasks to measure at, comma-separated.")] = "10,100,500",
    sites: Annotated[int, typer.Option(min=1, help="Adapted matrices; Mistral-7B has 128 (q k v o).")] = 128,
    dim: Annotated[int, typer.Option(min=2, help="Rows and columns of each matrix.")] = 4096,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    cap: Annotated[int, typer.Option(min=1, help="Directions per site and side.")] = 256,
    peers: Annotated[bool, typer.Option(help="Also time the published merge and the peers.")] = True,
    peer_sites: Annotated[int, typer.Option(min=1, help="Sites that peers are timed on, then scaled.")] = 1,
    error_sites: Annotated[int, typer.Option(min=0, help="Sites that errors are compared on.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """What one merge costs, by default at Mistral-7B shapes with 10, 100 and 500 tasks stored (about half an hour).

    A quick look: --sites 4 --tasks 10,100. Scalars are at 100 stored tasks.
    """
    from share_simulations.bench.generated import Shape
    from share_simulations.bench.merge import MergeOptions, run_merge

    shape = Shape(sites, dim, dim, rank, cap)
    options = MergeOptions(shape, _numbers(tasks, "--tasks"), device, peer_sites, error_sites, peers)
    report = run_merge(options, _note)
    _finish(report, as_json, _merge_table)


@bench_app.command("compress")
def bench_compress(
    pools: Annotated[
        list[Path] | None,
        typer.Option("--pool", help="Folder of PEFT adapter directories; repeat. Default: a generated pool."),
    ] = None,
    caps: Annotated[str, typer.Option(help="Directions per site and side, comma-separated.")] = "16,24,32,48,64",
    orders: Annotated[int, typer.Option(min=1, help="Random orders of arrival.")] = 5,
    peers: Annotated[bool, typer.Option(help="Also run the packages of others.")] = True,
    as_json: Json = False,
) -> None:
    """What each task loses at a given size: ours, the optimum, the published merge and every package."""
    from share_simulations.bench.compress import CompressOptions, compress_table, run_compress

    options = CompressOptions(tuple(pools or ()), _numbers(caps, "--caps"), orders, peers)
    report = run_compress(options, _note)
    _finish(report, as_json, compress_table)


@bench_app.command("endurance")
def bench_endurance(
    merges: Annotated[int, typer.Option(min=1, help="Merges in a row.")] = 10_000, as_json: Json = False
) -> None:
    """Ten thousand merges: orthonormal bases, a true ledger, flat memory."""
    from share_simulations.bench.endurance import EnduranceOptions, run_endurance

    report = run_endurance(EnduranceOptions(merges=merges), _note)
    _finish(report, as_json, _plain_table)


@bench_app.command("hub")
def bench_hub(
    clients: Annotated[int, typer.Option(min=1, help="Connections; each always has one update on its way.")] = 200,
    payload_mib: Annotated[float, typer.Option(help="Size of every update in MiB.")] = 1.0,
    seconds: Annotated[float, typer.Option(min=1, help="Counted time of the main phase.")] = 60.0,
    overload: Annotated[int, typer.Option(min=0, help="Times as many submitters afterwards; 0: no such phase.")] = 10,
    overload_seconds: Annotated[float, typer.Option(min=1, help="Counted time of the overload phase.")] = 30.0,
    organisations: Annotated[int, typer.Option(min=1, help="The clients belong to so many.")] = 10,
    processes: Annotated[int, typer.Option(min=1, help="Load processes.")] = 2,
    limit_seconds: Annotated[float, typer.Option(min=1, help="Each measurement of the machine's limits.")] = 10.0,
    directory: Directory = None,
    peers: Annotated[bool, typer.Option("--peers", help="Also Flower's own path; kill both servers.")] = False,
    peer_nodes: Annotated[int, typer.Option(min=1, help="SuperNodes of the peer: about 4 processes each.")] = 2,
    as_json: Json = False,
) -> None:
    """How many durable updates a real hub takes per second, against the least that one costs on this machine.

    The limit is the slower of two, measured before and after with the hub stopped still: files of the same size made
    durable at the same concurrency, and the same bytes sent to a bare gRPC server over TLS that only counts them.
    fraction_of_limit is the figure to read. Then ten times as many clients: the hub must refuse most of them quickly
    and still take nearly as many updates, in flat memory. Every receipt is looked up in the journal at the end
    (promises). It writes about as much as it receives: some ten GiB with the defaults. A quick look: --clients 16
    --seconds 5 --overload-seconds 5 --limit-seconds 2.
    """
    from share_simulations.bench.hub import HubOptions, run_hub

    options = HubOptions(
        clients=clients,
        payload_mib=payload_mib,
        seconds=seconds,
        overload=overload,
        overload_seconds=overload_seconds,
        organisations=organisations,
        processes=processes,
        limit_seconds=limit_seconds,
        directory=directory,
        peers=peers,
        peer_nodes=peer_nodes,
    )
    _finish(_interruptible(lambda: run_hub(options, _note)), as_json, _flat_table)


@bench_app.command("broadcast")
def bench_broadcast(
    subscribers: Annotated[int, typer.Option(min=1, help="FollowVersions streams in all.")] = 1000,
    stalled: Annotated[float, typer.Option(help="Share of them that never read after their first message.")] = 0.1,
    versions: Annotated[int, typer.Option(min=1, help="Versions that are measured.")] = 10,
    every: Annotated[float, typer.Option(min=0, help="Seconds between two updates.")] = 3.0,
    delta_kb: Annotated[float, typer.Option(help="Size of a delta in thousand bytes, about.")] = 100.0,
    streams_per_connection: Annotated[
        int, typer.Option(min=1, max=100, help="Healthy subscribers that share a TLS connection.")
    ] = 10,
    organisations: Annotated[int, typer.Option(min=1, help="The subscribers belong to so many.")] = 20,
    processes: Annotated[int, typer.Option(min=1, help="Load processes of the healthy subscribers.")] = 2,
    relays: Annotated[int, typer.Option(min=0, help="Relays on every level of a tree; 0: no tree.")] = 0,
    relay_levels: Annotated[int, typer.Option(min=1, help="Levels of that tree; subscribers are at the lowest.")] = 2,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """How soon every subscriber has a new version, and what those cost the hub that stopped reading.

    One writer publishes versions at a real hub. A lag runs from the hub's log line of a version until a subscriber
    holds it whole, on the same clock. stalled_mib is the hub's growth per stalled reader, an upper bound; stalled_cut
    counts those that the hub has shut out by the end. hub_sent_per_version is the number of copies of a delta that
    left the hub: with --relays, one per relay of the first level. delta_bytes beside snapshot_bytes shows what
    following saves. A quick look: --subscribers 40 --versions 5 --every 1.
    """
    from share_simulations.bench.broadcast import BroadcastOptions, run_broadcast

    options = BroadcastOptions(
        subscribers=subscribers,
        stalled=stalled,
        versions=versions,
        every_s=every,
        delta_kb=delta_kb,
        streams_per_connection=streams_per_connection,
        organisations=organisations,
        processes=processes,
        relays=relays,
        relay_levels=relay_levels,
        directory=directory,
    )
    _finish(_interruptible(lambda: run_broadcast(options, _note)), as_json, _flat_table)


@bench_app.command("privacy")
def bench_privacy(
    data: Annotated[Path, typer.Option(help="Folder of text tasks: <task>/{train,test}.jsonl[.gz].")],
    out: Annotated[Path, typer.Option(help="Folder for privacy.json and privacy.png.")],
    tasks: Annotated[str, typer.Option(help="Tasks to train privately, comma-separated.")] = "sst2,trec",
    others: Annotated[str, typer.Option(help="Tasks that the space is learned from.")] = "snips,subj",
    rows: Annotated[int, typer.Option(min=1, help="Training rows of a task.")] = 2000,
    test_rows: Annotated[int, typer.Option(min=1, help="Most test rows of a task.")] = 1000,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 100,
    max_length: Annotated[int, typer.Option(min=4, help="Longest text in tokens.")] = 32,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 3,
    accountant_schedules: Annotated[
        int, typer.Option(min=0, help="Random schedules on which our accountant is compared with dp-accounting.")
    ] = 10_000,
    as_json: Json = False,
) -> None:
    """What privacy costs: accuracy against epsilon on real text, for DP-SGD and for noise on coefficients.

    MiniLM on the CPU takes about an hour with the defaults. Also compares the accountant of the hub's ledger with
    dp-accounting on random schedules: the largest difference, and by how much it is ever below (optimistic).
    """
    from share_simulations.bench.accountants import compare_accountants
    from share_simulations.bench.privacy import PrivacyOptions, run_privacy

    options = PrivacyOptions(
        data=data,
        out=out,
        tasks=_names(tasks, "--tasks"),
        others=_names(others, "--others"),
        rows=rows,
        test_rows=test_rows,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        seeds=seeds,
    )
    compared = compare_accountants(accountant_schedules)
    _finish(run_privacy(options, _note, {"accountant": compared}), as_json, _privacy_table)


def _names(text: str, option: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ConfigError(f"{option} {text!r}: expected names, comma-separated")
    return names


@bench_app.command("attacks")
def bench_attacks(
    data: Annotated[Path, typer.Option(help="Folder with <task>/{train,test}.jsonl.gz.")],
    adapters: Annotated[Path, typer.Option(help="Folder of PEFT adapters with head.safetensors, by task.")],
    rows: Annotated[int, typer.Option(min=8, help="Training rows of each client and task.")] = 100,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for what was trained: a run with the same options finds it again.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the picture.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Settings that are run side by side.")] = 2,
    as_json: Json = False,
) -> None:
    """What hostile organisations can do to shared tasks and to what is stored, with the defence and without it.

    20 organisations train three real text tasks on MiniLM (training takes minutes to an hour; --keep does it once);
    0, 10, 20 or 30 % of them are hostile, in nine ways. Every setting goes through the hub's own merge. Losses are
    fractions of accuracy, against the same 20 all honest without a defence. wins_at_20 names what the defence does not
    stop.
    """
    from share_simulations.bench.attacks.campaign import run_attacks
    from share_simulations.bench.attacks.options import AttackOptions
    from share_simulations.bench.attacks.report import table, write_plot

    report = run_attacks(AttackOptions(data, adapters, rows=rows), keep, processes, _note)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_plot(report, out)
    _finish(report, as_json, table)


@bench_app.command("serve")
def bench_serve(
    models: Annotated[str, typer.Option(help="minilm, decoder (random weights), or both.")] = "minilm,decoder",
    tasks: Annotated[str, typer.Option(help="Tasks held, comma-separated.")] = "1,4,16,64",
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch; they take the tasks in turn.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 32,
    directions: Annotated[int, typer.Option(min=1, help="Basis vectors per site and side.")] = 32,
    rank: Annotated[int, typer.Option(min=1, help="Rank of every task, with us and with PEFT.")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="Timings of each way, in turns; medians are reported.")] = 7,
    width: Annotated[int, typer.Option(min=64, help="Of the decoder, a multiple of 64.")] = 1024,
    layers: Annotated[int, typer.Option(min=1, help="Of the decoder.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for serve.json and serve.png.")] = None,
    as_json: Json = False,
) -> None:
    """How fast a batch of mixed tasks is, against the backbone alone and PEFT's two ways, at equal outputs.

    The scalars are of the first model at the most tasks. throughput_ratio_vs_backbone: 1 would be free. PEFT mixed is
    adapter_names=[...], switching is set_adapter and a pass for each task of the batch. bytes_per_task counts the bases
    too, divided among the tasks; bytes_added_per_task is what one more task costs. A quick look: --models minilm
    --tasks 1,8 --rows 8 --repetitions 3.
    """
    from share_simulations.bench.serve import ServeOptions, run_serve, serve_table

    options = ServeOptions(
        models=tuple(name.strip() for name in models.split(",")),
        tasks=_numbers(tasks, "--tasks"),
        rows=rows,
        tokens=tokens,
        directions=directions,
        rank=rank,
        repetitions=repetitions,
        width=width,
        layers=layers,
        dtype=dtype,
        device=device,
    )
    report = run_serve(options, _note)
    if out is not None:
        from share_simulations.bench.serve_plot import write_serve_plot

        out.mkdir(parents=True, exist_ok=True)
        (out / "serve.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write_serve_plot(report, out / "serve.png")
    _finish(report, as_json, serve_table)


@bench_app.command("transfer")
def bench_transfer(
    data: Annotated[Path, typer.Option(help="Folder with <task>/{train,test}.jsonl.gz.")],
    adapters: Annotated[Path, typer.Option(help="Folder of PEFT adapters for MiniLM, by task.")],
    tasks: Annotated[
        str, typer.Option(help="New tasks, comma-separated; the adapters of all others are merged first.")
    ] = "agnews,cr,snips,trec,tweet_emotion,mrpc",
    rows: Annotated[int, typer.Option(min=8, help="Training rows of a new task.")] = 100,
    test_rows: Annotated[int, typer.Option(min=1, help="Most test rows of a task.")] = 1000,
    epochs: Annotated[str, typer.Option(help="Passes over the rows, each trained anew.")] = "1,10",
    seeds: Annotated[int, typer.Option(min=1, help="Each draws other rows, starts and random bases.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Tasks that are trained side by side.")] = 2,
    ways: Annotated[str | None, typer.Option(help="Ways to train, learned among them. Default: all.")] = None,
    k_max: Annotated[int, typer.Option(min=1, help="Largest number of basis vectors per site and side.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for transfer.json and transfer.png.")] = None,
    as_json: Json = False,
) -> None:
    """What a new task with few rows gains from the subspace that others filled: MiniLM on real text.

    learned: the space as a client uses it; learned_coefficients: coefficients alone; learned_zero: those, without the
    stored cores; random_basis and backbone_basis: those in as many directions of another origin; random_basis_default:
    as a client, in random ones; lora and lora_double_rate: a separate adapter of rank 8, same rows and passes.
    Averages are fractions, intervals are over tasks. By estimate the defaults take two hours on two cores.
    """
    from share_simulations.bench.transfer import WAYS, TransferOptions, run_transfer, transfer_table

    options = TransferOptions(
        data=data,
        adapters=adapters,
        tasks=_names(tasks, "--tasks"),
        rows=rows,
        test_rows=test_rows,
        epochs=_numbers(epochs, "--epochs"),
        seeds=seeds,
        processes=processes,
        ways=_names(ways, "--ways") if ways else WAYS,
        k_max=k_max,
    )
    report = run_transfer(options, out, _note)
    _finish(report, as_json, transfer_table)


@bench_app.command("sequence")
def bench_sequence(
    data: Annotated[Path, typer.Option(help="Folder with <task>/{train,test}.jsonl.gz.")],
    out: Annotated[Path, typer.Option(help="Folder for sequence.json and .png; what is finished there is kept.")],
    tasks: Annotated[str | None, typer.Option(help="In order of arrival, comma-separated. Default: twelve.")] = None,
    modes: Annotated[
        str, typer.Option(help="Ways to adapt, auto among them.")
    ] = "auto,coefficients,directions,free,frozen",
    clients: Annotated[int, typer.Option(min=1, help="Clients that the tasks arrive at in turn.")] = 4,
    rows: Annotated[int, typer.Option(min=8, help="Training rows of a task.")] = 1500,
    test_rows: Annotated[int, typer.Option(min=1, help="Most test rows of a task. Default: all.")] = 100_000,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows, of LoRA too.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other rows and starts.")] = 3,
    fixed_seeds: Annotated[int, typer.Option(min=1, help="Of these, those that the fixed modes run too.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Ways and seeds that run side by side.")] = 2,
    as_json: Json = False,
) -> None:
    """Twelve text tasks in sequence at four clients, against a separate LoRA for each: accuracy, forgetting, bytes.

    auto is the default way of adapting, the other modes fix it: coefficients only, two directions at every site, or
    plain LoRA that is projected. Differences are on the same rows, intervals over tasks. An interrupted run goes on
    where it was. By estimate the defaults take three hours on two cores.
    """
    from share_simulations.bench.sequence import TASKS, SequenceOptions, run_sequence
    from share_simulations.bench.sequence_report import sequence_table

    options = SequenceOptions(
        data=data,
        out=out,
        tasks=TASKS if tasks is None else _names(tasks, "--tasks"),
        modes=_names(modes, "--modes"),
        clients=clients,
        rows=rows,
        test_rows=test_rows,
        epochs=epochs,
        seeds=seeds,
        fixed_seeds=fixed_seeds,
        processes=processes,
    )
    _finish(run_sequence(options, _note), as_json, sequence_table)


@bench_app.command("tasks")
def bench_tasks(
    tasks: Annotated[Path, typer.Argument(help="A tasks.toml.")],
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other starts and orders of rows.")] = 3,
    space: Annotated[
        Path | None, typer.Option(help="Version of the space to train in, from share-client snapshot. Default: empty.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Own tasks, each alone: what a client reaches, a separate LoRA of rank 8, and a head on the frozen backbone.

    Same rows, passes and rate; noise is left out. Nothing leaves this machine.
    """
    from share_simulations.bench.tasks import TasksOptions, run_tasks, tasks_table

    _finish(run_tasks(TasksOptions(tasks, seeds, space), _note), as_json, tasks_table)


def _interruptible(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run something that starts processes; Ctrl-C and SIGTERM end them all before this returns."""
    # The children are forked while gRPC's threads run; they exec at once and use none of its state.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    with interruptible("every process of the benchmark was stopped"):
        return work()


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option} {text!r}: expected whole numbers of at least 1, comma-separated")
    return numbers


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _finish(report: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], Table]) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(json.dumps(report))
    else:
        Console().print(table(report))


def _plain_table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("figure", "value")
    for key, value in report.items():
        if not isinstance(value, dict):
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def _flat_table(report: dict[str, Any]) -> Table:
    """Return every figure, one level of nested ones included."""
    table = _plain_table(report)
    for key, value in report.items():
        if isinstance(value, dict):
            for name, figure in value.items():
                table.add_row(f"{key}: {name}", f"{figure:.4g}" if isinstance(figure, float) else str(figure))
    return table


def _privacy_table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("task", "training", "accuracy", "least", "most")
    for task, own in report["tasks"].items():
        for key, figures in own["accuracy"].items():
            table.add_row(task, key, *(f"{figures[name]:.3f}" for name in ("mean", "min", "max")))
        table.add_section()
    return table


def _merge_table(report: dict[str, Any]) -> Table:
    table = _plain_table(report)
    for tasks, row in report["by_tasks"].items():
        table.add_row(f"seconds at {tasks} tasks", f"{row['seconds_per_update']:.4g}")
    for name, peer in report.get("peers", {}).items():
        table.add_row(name, f"{peer['speedup']:.1f} x slower, error {peer['error']:.3f}; {peer['note']}")
    return table
