"""The commands ``share-sim chaos ...``: break a hub on purpose and count the promises it broke."""

from __future__ import annotations

import typer

chaos_app = typer.Typer(
    no_args_is_help=True,
    help="Break a hub on purpose and count what it promised and did not keep; exit code 1 if that is anything.",
)
