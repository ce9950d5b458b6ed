"""The commands ``share-sim chaos ...``: break a hub on purpose and count the promises it broke."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from share_simulations.interrupts import Interrupted, interruptible

chaos_app = typer.Typer(
    no_args_is_help=True,
    help="Break a hub on purpose and count what it promised and did not keep; exit code 1 if that is anything. "
    "Ctrl-C prints what was reached.",
)
Seed = Annotated[int, typer.Option(help="Seed of the workloads and of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Progress to standard error; the last line is one JSON object.")]
Mutants = Annotated[
    bool, typer.Option("--mutants", help="Also plant bugs, one by one, and fail if one of them goes unnoticed.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Processes side by side, each with its own seed.")]
Folder = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder for the stores under test. Default: memory, if this machine offers it."),
]
Disk = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder for the server directories. Default: the system's place for temporary files."),
]


@chaos_app.command()
def syscalls(
    points: Annotated[int, typer.Option(min=1, help="Kills in all.")] = 10_000,
    mutants: Mutants = False,
    seed: Seed = 0,
    jobs: Jobs = 1,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Kill a hub before each system call that changes a file, and look at what is left.

    The hub opens a store (empty, filled, or left by a kill), takes updates of several members at once, merges,
    publishes, collects and closes. It is killed before its first such call, then before its second, and so on; then
    with another workload. After each kill a second process opens the store and everything is counted: acknowledged
    updates, merges, versions, payloads. About 0.15 s per point. Quick look: --points 300 --mutants.
    """
    from share_simulations.chaos.parts import run_in_parts
    from share_simulations.chaos.syscalls import SyscallOptions, run_syscalls

    def part(count: int, own_seed: int, plant: bool) -> dict[str, Any]:
        return run_syscalls(SyscallOptions(count, own_seed, plant, folder))

    run_campaign(lambda: run_in_parts(part, points, seed, mutants, jobs), as_json)


@chaos_app.command()
def disk(
    points: Annotated[int, typer.Option(min=1, help="Failures in all.")] = 3_000,
    every: Annotated[
        bool, typer.Option("--every", help="No sample: every call of one life from each start, EIO and ENOSPC.")
    ] = False,
    mutants: Mutants = False,
    seed: Seed = 0,
    jobs: Jobs = 1,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Let each system call that changes a file fail once: EIO, ENOSPC, EDQUOT and short writes.

    After the failure nothing may be acknowledged whose row was not durable before, the hub must end with exit code 1,
    and the next start on a healthy disk must keep every promise. About 0.2 s per point. Quick look: --points 200.
    --every makes about 3,000 points, in each of the --jobs.
    """
    from share_simulations.chaos.disk import DiskOptions, run_disk
    from share_simulations.chaos.parts import run_in_parts

    def part(count: int, own_seed: int, plant: bool) -> dict[str, Any]:
        return run_disk(DiskOptions(count, own_seed, plant, folder, every))

    run_campaign(lambda: run_in_parts(part, points, seed, mutants, jobs), as_json)


@chaos_app.command()
def power(
    cuts: Annotated[int, typer.Option(min=1, help="Power cuts in all.")] = 1_000,
    mutants: Mutants = False,
    seed: Seed = 0,
    jobs: Jobs = 1,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Cut the power of a hub at random moments, on a modelled disk that keeps only what was flushed.

    One life of a hub is traced with the bytes of all its writes. For each cut a disk is built from it: flushed data and
    names are there; of the rest nothing, everything, or a random part survives, torn at 512-byte sectors and out of
    order. The hub must come back on it with everything it had acknowledged. About 0.1 s per cut.
    """
    from share_simulations.chaos.parts import run_in_parts
    from share_simulations.chaos.power import PowerOptions, run_power

    def part(count: int, own_seed: int, plant: bool) -> dict[str, Any]:
        return run_power(PowerOptions(count, own_seed, plant, folder))

    run_campaign(lambda: run_in_parts(part, cuts, seed, mutants, jobs), as_json)


@chaos_app.command()
def bitflip(
    flips: Annotated[int, typer.Option(min=1, help="Flipped bits in all.")] = 10_000,
    mutants: Mutants = False,
    seed: Seed = 0,
    jobs: Jobs = 1,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Flip one bit of a store on disk, again and again: each start must refuse it before it serves.

    Three stores are damaged: one closed in good order and two left by a kill, so that there is a write-ahead log too.
    Kinds of files take turns: update, original, delta, snapshot, journal, log, page sums, anchor. A flip that opens is
    a miss, unless all content is provably as it was ("unneeded"). About 0.05 s per flip.
    """
    from share_simulations.chaos.bitflip import BitflipOptions, run_bitflip
    from share_simulations.chaos.parts import run_in_parts

    def part(count: int, own_seed: int, plant: bool) -> dict[str, Any]:
        return run_bitflip(BitflipOptions(count, own_seed, plant, folder))

    run_campaign(lambda: run_in_parts(part, flips, seed, mutants, jobs), as_json)


@chaos_app.command()
def replay(
    replays: Annotated[int, typer.Option(min=1, help="Captured submissions that are sent again.")] = 10_000,
    mutants: Mutants = False,
    seed: Seed = 0,
    folder: Disk = None,
    as_json: Json = False,
) -> None:
    """Send captured, signed submissions again, as they were, stolen and changed byte by byte: nothing may come of it.

    First every byte, of header and payload, of one submission that the hub has taken and of one that it never saw;
    then replays in sixteen ways: by another member, under another id, task or number, with another signature. After
    each attempt every row of the journal, its chain, all payloads and the staging folder must be what they were. About
    5 ms per attempt.
    """
    from share_simulations.chaos.replay import ReplayOptions, run_replay

    run_campaign(lambda: run_replay(ReplayOptions(replays, seed, mutants, folder)), as_json)


@chaos_app.command()
def kill(
    acks: Annotated[int, typer.Option(min=1, help="Acknowledgements in all.")] = 100_000,
    kills: Annotated[int, typer.Option(min=0, help="SIGKILLs in all.")] = 300,
    per_round: Annotated[int, typer.Option(min=1, help="Acknowledgements per server directory.")] = 10_000,
    clients: Annotated[int, typer.Option(min=4, help="Clients that send at the same time, in 4 connections.")] = 200,
    twice: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the updates that are sent twice at once.")
    ] = 0.05,
    replay: Annotated[bool, typer.Option("--replay", help="Also make every version again after each round.")] = False,
    mutants: Mutants = False,
    seed: Seed = 0,
    folder: Disk = None,
    as_json: Json = False,
) -> None:
    """Kill a real hub (SIGKILL) at random moments while 200 clients send, and start it again each time.

    Clients keep the manners of an outbox: the same id and bytes until acknowledged. A tenth of the kills hits a hub in
    its recovery. Rounds have a server directory of their own, because a start verifies everything in it. After
    each round: every acknowledged update is in the journal with its bytes and its number, every update merged once,
    no published version is lost or another one. Quick look: --acks 2000 --kills 12 --per-round 1000 --mutants.
    """
    from share_simulations.chaos.kill import KillOptions, run_kill
    from share_simulations.chaos.load import Crowd

    crowd = Crowd(clients=clients, twice=twice)
    options = KillOptions(acks, kills, per_round, crowd, seed, replay, mutants, folder)
    run_campaign(lambda: run_kill(options), as_json)


@chaos_app.command()
def network(
    seconds: Annotated[float, typer.Option(min=1, help="How long new updates are begun.")] = 120.0,
    clients: Annotated[int, typer.Option(min=1, help="Members that upload several MiB at a time.")] = 4,
    followers: Annotated[int, typer.Option(min=1, help="Members that follow versions.")] = 3,
    mutants: Mutants = False,
    seed: Seed = 0,
    folder: Disk = None,
    as_json: Json = False,
) -> None:
    """Put a bad network between real clients and a real hub: latency, resets, blackholes, slices, half-open ends.

    Every update must arrive, none twice, with at most 1.1 bytes sent for each byte of payload although connections are
    reset in the middle of uploads; every follower must end with the bytes of one that has a good line. TLS is not
    touched. Quick look: --seconds 15. With --mutants a client that starts again at zero, a hub without deduplication, a
    deaf follower, and a network that changes bits.
    """
    from share_simulations.chaos.network import NetworkOptions, run_network

    options = NetworkOptions(seconds, clients, followers, seed=seed, mutants=mutants, directory=folder)
    run_campaign(lambda: run_network(options), as_json)


@chaos_app.command()
def day(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the 24 hours last.")] = 10.0,
    clients: Annotated[int, typer.Option(min=2, help="Client processes.")] = 12,
    hub_kills: Annotated[int, typer.Option(min=0, help="SIGKILLs of the hub, spread over the day.")] = 24,
    seed: Seed = 0,
    folder: Disk = None,
    out: Annotated[Path | None, typer.Option(help="Folder for day.png and day.json.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Live through a day in ten minutes: clients join, leave, are killed, go stale and send twice; the hub dies hourly.

    Clients are processes with the real session; only their training is sleep. The network between is a bad one. In the
    evening every outbox must be empty, every promise kept, and the journal, replayed in one thread, must give the same
    state. Quick look: --minutes 1 --clients 6 --out day.
    """
    from share_simulations.chaos.day import DayOptions, run_day

    options = DayOptions(minutes, clients, hub_kills=hub_kills, seed=seed, directory=folder)
    run_campaign(lambda: run_day(options, out), as_json)


@chaos_app.command()
def bombs(
    throws: Annotated[int, typer.Option(min=1, help="How often each bomb is thrown; the worst counts.")] = 5,
    mutants: Mutants = False,
    folder: Disk = None,
    as_json: Json = False,
) -> None:
    """Throw what wants to become large at a real hub: gzip, headers, shapes, ranks, a million submessages.

    Each must be refused within 100 ms, while hub and parsers grow by at most 16 MiB, and the hub must serve after it.
    Needs a machine that does nothing else. Quick look: --throws 1.
    """
    from share_simulations.chaos.bombs import BombOptions, run_bombs

    run_campaign(lambda: run_bombs(BombOptions(throws, mutants=mutants, directory=folder)), as_json)


@chaos_app.command()
def client(
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs in all.")] = 300,
    mutants: Mutants = False,
    seed: Seed = 0,
    folder: Disk = None,
    as_json: Json = False,
) -> None:
    """Kill a real client session (SIGKILL) at any moment of training, saving and sending, and let it continue.

    Clients with two small tasks and the packaged backbone train, keep, sign and send to a real hub. Each is killed up
    to three times: before a system call that changes a file, of any kind, of the outbox or of the records, or after
    some time. Then it is left alone until nothing is left to do: nothing that was kept is lost or trained again, and
    the hub has taken each training once. Quick look: --kills 12.
    """
    from share_simulations.chaos.client import ClientOptions, run_client_kills

    run_campaign(lambda: run_client_kills(ClientOptions(kills, seed, mutants, folder)), as_json)


def run_campaign(run: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Run a campaign and print its report; exit code 1 if a promise was broken or a planted bug survived.

    After Ctrl-C or SIGTERM its processes are ended, what was reached is printed, and the exit code is 130.
    """
    with interruptible("every process of the campaign was stopped; the report is of what was reached"):
        try:
            report = run()
        except Interrupted as interrupt:
            _print(interrupt.report, as_json)
            raise
    _print(report, as_json)
    if not report["ok"]:
        raise typer.Exit(1)


def _print(report: dict[str, Any], as_json: bool) -> None:
    """Print a report: one line of JSON, or a table."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table("figure", "value", title=f"chaos {report.get('campaign', '')}", title_justify="left")
    for key, value in report.items():
        if isinstance(value, dict):
            for name, detail in value.items():
                table.add_row(f"{key}: {name}", str(detail))
        else:
            table.add_row(key, "\n".join(map(str, value)) if isinstance(value, list) else str(value))
    Console().print(table)
