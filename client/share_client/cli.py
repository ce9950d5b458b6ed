"""``share-client``: join a federation, contribute and pull adapters, follow versions, describe a backbone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from share_core.command_line import plain_errors, run_command
from share_core.errors import ConfigError

app = typer.Typer(
    name="share-client",
    help="A member of a fedshare federation: trains on private data, sends only low-rank factors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Directory = Annotated[Path, typer.Option("--dir", metavar="CDIR", help="The client directory made by 'join'.")]
Follow = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Follow versions from this relay; everything else goes to the hub. 'hub': from the hub again. "
        "[default: as at the last join]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON for machines instead of text.")]


@app.command()
def join(
    token: Annotated[
        str | None,
        typer.Argument(
            metavar="[TOKEN]",
            help="Join token, a file that holds it, or - for standard input. Not needed to come back.",
        ),
    ] = None,
    tasks: Annotated[Path, typer.Option(help="The tasks file: backbone, data, how to train.")] = Path("tasks.toml"),
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="CDIR", help="Where this client keeps everything.")
    ] = None,
    follow: Follow = None,
) -> None:
    """Enrol if needed, then train under leases until stopped with Ctrl-C."""
    from rich.console import Console

    from share_client.join import ensure_member, follow_address, only_join, remember_follow
    from share_client.join import join as work
    from share_client.member import ClientLayout
    from share_client.tasks_file import read_tasks

    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def tell(text: str) -> None:
        console.print(f"[dim]{datetime.now():%H:%M:%S}[/dim] ", end="")
        console.print(text, markup=False)

    with plain_errors("share-client"):
        text = _read_token(token)
        layout = ClientLayout(directory or _default_directory(text))
        # A mistake in an address or in the file must not cost a token.
        if follow is not None:
            follow_address(follow)
        read_tasks(tasks)
        with only_join(layout):
            member = remember_follow(layout, ensure_member(layout, text, datetime.now(UTC), tell), follow)
            work(layout, member, tasks, tell)


@app.command()
def check(
    tasks: Annotated[Path, typer.Argument(metavar="[TASKS]", help="The tasks file.")] = Path("tasks.toml"),
    space: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Try in this version, written by 'share-client snapshot'. [default: the empty space]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try every task before joining: problems, memory, time, what would leave. Exit code 1 if anything is wrong."""
    import dataclasses

    from share_client.check import check_tasks, print_check

    with plain_errors("share-client"):
        found = check_tasks(tasks, space, _tell)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        print_check(found, typer.echo)
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def enrol(
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="Join token, a file that holds it, or - for standard input.")
    ],
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="CDIR", help="Where this client keeps everything.")
    ] = None,
) -> None:
    """Enrol and end: enough for who only contributes adapters and pulls tasks, and never trains."""
    from share_client.join import ensure_member, only_join
    from share_client.member import ClientLayout

    with plain_errors("share-client"):
        text = _read_token(token)
        layout = ClientLayout(directory or _default_directory(text))
        with only_join(layout):
            ensure_member(layout, text, datetime.now(UTC), _tell)


@app.command()
def status(directory: Directory, as_json: Json = False) -> None:
    """Show what this client has trained, sent and measured. Needs no server."""
    from share_client.member import ClientLayout
    from share_client.status import client_status, print_status

    with plain_errors("share-client"):
        found = client_status(ClientLayout(directory))
        if as_json:
            typer.echo(json.dumps(found))
        else:
            print_status(found)


@app.command()
def history(
    task: Annotated[str | None, typer.Argument(metavar="[TASK]", help="Only this task.", show_default=False)] = None,
    directory: Annotated[
        Path, typer.Option("--dir", metavar="CDIR", help="The client directory made by 'join'.")
    ] = Path(),
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw it into this .png or .svg file.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how well each task did after every version, and why it was trained. Needs no server."""
    from share_client.history import check_picture, client_history, plot_history, print_history
    from share_client.member import ClientLayout

    with plain_errors("share-client"):
        if plot is not None:
            check_picture(plot)
        found = client_history(ClientLayout(directory), task)
        if plot is not None:
            plot_history(found, plot)
        if as_json:
            typer.echo(json.dumps(found))
        else:
            print_history(found)


@app.command()
def watch(directory: Directory, as_json: Json = False, follow: Follow = None) -> None:
    """Follow the versions of the space until stopped."""
    from share_client.join import follow_address
    from share_client.member import ClientLayout, load_credentials, load_member
    from share_client.renewal import kept_renewed
    from share_client.sources import Sources, open_relay
    from share_client.status import watch_versions

    with plain_errors("share-client"), _linked(directory) as link:
        layout = ClientLayout(directory)
        address = load_member(layout).follow_address if follow is None else follow_address(follow)
        credentials = load_credentials(layout, datetime.now(UTC))
        with open_relay(address, credentials) as relay, kept_renewed(layout, [link, relay], _tell):
            sources = Sources(link, relay, _tell)
            for line in watch_versions(sources, credentials):
                typer.echo(json.dumps(line) if as_json else line["text"])


@app.command()
def tasks(directory: Directory, as_json: Json = False) -> None:
    """List every task of the space."""
    from share_client.status import print_tasks, task_list

    with plain_errors("share-client"), _connected(directory) as link:
        found = task_list(link)
        if as_json:
            typer.echo(json.dumps(found))
        else:
            print_tasks(found)


@app.command()
def egress(
    directory: Directory,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also compare with what the hub says that it received.")
    ] = False,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only what left since then, such as 2026-11-29T08:30.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show everything that left this building: what, how much, to whom. Exit code 1 if the log does not hold."""
    import dataclasses
    from contextlib import nullcontext

    from share_client.egress_check import look, print_egress, read_since
    from share_client.member import ClientLayout, load_member

    with plain_errors("share-client"):
        moment, layout = read_since(since), ClientLayout(directory)
        load_member(layout)
        with _connected(directory) if verify else nullcontext() as link:
            found = look(layout, moment, link)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        print_egress(found, typer.echo)
        if not found.problems:
            compared = f", and {found.updates} updates are what the hub received" if verify else ""
            typer.echo(f"the log holds{compared}")
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def snapshot(
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("space.safetensors"),
    version: Annotated[int, typer.Option(help="Which version; 0 is the newest.", min=0)] = 0,
) -> None:
    """Save one version of the space, bases and coefficients of every task, for 'share-space inspect'."""
    from share_client.member import ClientLayout, load_credentials
    from share_client.status import fetch_snapshot

    with plain_errors("share-client"), _connected(directory) as link:
        credentials = load_credentials(ClientLayout(directory), datetime.now(UTC))
        fetched, payload = fetch_snapshot(link, credentials, version)
        output.write_bytes(payload)
    typer.echo(f"{output}: version {fetched}, {len(payload)} bytes")


@app.command()
def space(
    backbone: Annotated[
        str | None, typer.Option(help="digits-vit, minilm, or the path of a model directory.", show_default=False)
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="A tasks file whose backbone to describe instead.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The space.toml to write.")] = Path("space.toml"),
    k_max: Annotated[int, typer.Option(help="Most basis vectors per site and side.", min=1)] = 64,
    tau: Annotated[float, typer.Option(help="Share of a task's norm that a merge may leave out.")] = 0.05,
) -> None:
    """Describe a backbone for the operator: 'share-server init --space' takes the file."""
    from share_client.tasks_file import read_tasks
    from share_client.training import load_backbone
    from share_core.fingerprint import describe_space
    from share_core.spec_file import spec_to_toml

    with plain_errors("share-client"):
        if not 0 <= tau < 1:
            raise ConfigError(f"tau must be at least 0 and below 1, got {tau:g}")
        if (backbone is None) == (tasks is None):
            raise ConfigError("expected either --backbone or --tasks")
        loaded = load_backbone(backbone or read_tasks(cast(Path, tasks)).backbone, "cpu")
        spec = describe_space(loaded.name, loaded.site_weights(), k_max=k_max, tau=tau)
        output.write_text(spec_to_toml(spec), encoding="utf-8")
    typer.echo(f"{output}: space {spec.space_id} of {spec.backbone}, {len(spec.sites)} sites")


@app.command()
def contribute(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER_DIR...", help="Directories that PEFT's save_pretrained wrote.")
    ],
    directory: Directory,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="The task it is for. [default: the directory's name]")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The backbone it was trained on; its weights are compared with the space."),
    ] = None,
    approval: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The operator's approval, where the backbone is not at hand.")
    ] = None,
    share_head: Annotated[
        bool, typer.Option("--share-head", help="Let the modules under modules_to_save leave too.")
    ] = False,
    share_with: Annotated[
        str | None,
        typer.Option(metavar="ORG,...", help="Who else may contribute to the task that this makes, or 'everybody'."),
    ] = None,
    owner: Annotated[
        str | None, typer.Option(metavar="ORG", help="Whose task it is, if not your own organisation's.")
    ] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="For shared tasks: the kind of the task.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="For shared tasks: the labels in the order of the outputs.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is merged.")] = False,
    as_json: Json = False,
) -> None:
    """Submit PEFT adapters that exist already: no data, no training. Exit code 1 unless all were taken."""
    import dataclasses

    from share_client.contribute import contribute as send
    from share_client.contribute import outcome_text, read_contributions
    from share_client.member import ClientLayout
    from share_client.sharing import read_terms

    with plain_errors("share-client"):
        wanted = read_contributions(adapters, task, share_head, read_terms(share_with, owner, kind, labels))
        with _connected(directory) as link:
            found = send(
                ClientLayout(directory), link, wanted, backbone=backbone, approval=approval, wait=wait, tell=_tell
            )
    if as_json:
        typer.echo(json.dumps({"adapters": [dataclasses.asdict(one) for one in found]}))
    else:
        for one in found:
            typer.echo(outcome_text(one))
    taken = ("merged",) if wait else ("merged", "sent", "set_aside")
    raise typer.Exit(0 if all(one.state in taken for one in found) else 1)


@app.command()
def pull(
    task: Annotated[str, typer.Option(metavar="NAME", help="An own task, or organisation/name.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to make.")],
    directory: Directory,
    version: Annotated[int, typer.Option(help="Which version; 0 is the newest.", min=0)] = 0,
    rank: Annotated[int | None, typer.Option(help="Largest rank; cuts what is weakest.", min=1)] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="PATH", help="The backbone: compared, and asked how its layers are stored.")
    ] = None,
    merged_into: Annotated[
        Path | None,
        typer.Option(metavar="BACKBONE_PATH", help="Write a copy of this model with the task in its weights instead."),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="ADAPTER_DIR", help="Take module names and base model from this adapter.")
    ] = None,
    head: Annotated[bool, typer.Option(help="Put in the head that is shared, or the own one.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace what 'pull' wrote there before.")] = False,
    as_json: Json = False,
) -> None:
    """Write a task as a PEFT adapter directory for inference, from the newest signed version."""
    import dataclasses

    from share_client.member import ClientLayout
    from share_client.pull import PullOptions, pulled_text
    from share_client.pull import pull as write

    with plain_errors("share-client"), _connected(directory) as link:
        options = PullOptions(version, rank, backbone, merged_into, like, head, force)
        made = write(ClientLayout(directory), link, task, out, options)
    typer.echo(json.dumps(dataclasses.asdict(made)) if as_json else pulled_text(made))


def _read_token(argument: str | None) -> str | None:
    """Return the token given as text, file or standard input."""
    if argument is None:
        return None
    if argument == "-":
        return sys.stdin.buffer.readline().decode("utf-8", "replace").strip()
    if argument.startswith("fs1."):
        return argument
    path = Path(argument)
    if not path.is_file():
        raise ConfigError(f"{argument!r} is neither a join token (it would begin with fs1.) nor a file")
    return path.read_text(encoding="utf-8", errors="replace").strip()


def _default_directory(token: str | None) -> Path:
    """Return ./fedshare-<name> of the token."""
    from share_core.identity import token_decode

    if token is None:
        raise ConfigError("give a join token to enrol, or --dir CDIR to come back")
    return Path(f"fedshare-{token_decode(token).name}")


def _tell(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _linked(directory: Path) -> Iterator[Any]:
    """Open a link to the hub with the identity of a client directory."""
    from share_client.link import HubLink
    from share_client.member import ClientLayout, load_credentials, load_member

    layout = ClientLayout(directory)
    member = load_member(layout)
    with HubLink(member.hub_address, load_credentials(layout, datetime.now(UTC))) as link:
        yield link


@contextmanager
def _connected(directory: Path) -> Iterator[Any]:
    """Open such a link for a command that ends soon; an identity that is due is renewed meanwhile."""
    from share_client.member import ClientLayout
    from share_client.renewal import kept_renewed

    with _linked(directory) as link, kept_renewed(ClientLayout(directory), [link], _tell):
        yield link


def main() -> None:
    """Console script."""
    run_command(app, "share-client")


if __name__ == "__main__":
    main()
