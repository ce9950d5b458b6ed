"""The command ``share-sim fuzz``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from share_simulations.chaos_cli import Json, Mutants, Seed, run_campaign


def fuzz(
    runs: Annotated[
        int, typer.Option(min=1, help="Files in all, those of earlier runs on the same --dir included.")
    ] = (10_000_000),
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Keeps corpus and count, so that a later run goes on. Default: nothing."),
    ] = None,
    seeds: Annotated[
        list[Path] | None,
        typer.Option("--seeds", help="Folder of files to begin with, for instance tests/attacks/files."),
    ] = None,
    mutants: Mutants = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Give the reader files that nobody wrote, guided by coverage, and compare it with safetensors.

    What the reader accepts safetensors must accept with the same names, shapes, dtypes and bytes; what it refuses must
    be refused by a named error; nothing may crash or hang. Needs the extra "fuzz". A few thousand files per second and
    processor. Quick look: --runs 20000 --mutants.
    """
    from share_simulations.fuzz.campaign import FuzzOptions, run_fuzz

    options = FuzzOptions(runs, jobs, folder, tuple(seeds or ()), seed=seed, mutants=mutants)
    run_campaign(lambda: run_fuzz(options), as_json)
