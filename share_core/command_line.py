"""How every command of fedshare ends: 0 done, 1 one sentence on standard error, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from share_core.errors import FedshareError

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


@contextmanager
def plain_errors(program: str) -> Iterator[None]:
    """Turn a refusal into one sentence on standard error and exit code 1."""
    try:
        yield
    except FedshareError as error:
        typer.echo(f"{program}: {error}", err=True)
        raise typer.Exit(1) from error
    except BrokenPipeError:
        raise  # somebody closed our output, as head does: typer ends quietly
    except OSError as error:
        typer.echo(f"{program}: {error}: put that right, then run the same command again", err=True)
        raise typer.Exit(1) from error


def run_command(app: typer.Typer, program: str) -> None:
    """Run a command line as a console script does; it ends in SystemExit."""
    try:
        with plain_errors(program):
            app()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
