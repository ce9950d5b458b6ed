"""The README names only commands and options that exist, and only files that are there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
APPS = {
    "share-server": "share_server.cli",
    "share-client": "share_client.cli",
    "share-sim": "share_simulations.cli",
    "share-space": "share_core.space_tool.cli",
}


def command_lines(text: str) -> list[str]:
    """Return every use of one of our programs in code blocks and code spans."""
    prose = "".join(text.split("```")[0::2])
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]*)`", prose)]
    sources = "\n".join([*text.split("```")[1::2], *spans])
    found = re.findall(r"(share-(?:server|client|sim|space)(?: [^\n#]*)?)", sources)
    return sorted({line.split(" > ")[0].strip() for line in found if " " in line.strip()})


def problems(line: str) -> str | None:
    """Return what is wrong with one command line, or None."""
    words = shlex.split(line.replace("...", ""), comments=False)
    command: click.Command = typer.main.get_command(importlib.import_module(APPS[words[0]]).app)
    rest = words[1:]
    while isinstance(command, click.Group) and rest:
        name = rest.pop(0)
        if name not in command.commands:
            return f"{line!r}: there is no command {name!r}; there are {sorted(command.commands)}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in rest if word.startswith("-") and word != "-" and word not in known | {"--help"}]
    return f"{line!r}: unknown options {unknown}; known are {sorted(known)}" if unknown else None


@pytest.mark.parametrize("line", command_lines(README))
def test_every_command_of_the_readme_exists(line: str) -> None:
    assert problems(line) is None


def test_the_readme_shows_each_program() -> None:
    assert {line.split()[0] for line in command_lines(README)} == set(APPS)


@pytest.mark.parametrize("line", ["share-server fly DIR", "share-client join TOKEN --tusks tasks.toml"])
def test_planted_mistake_is_caught(line: str) -> None:
    assert problems(line) is not None


def test_every_path_of_the_readme_is_there() -> None:
    named = set(re.findall(r"`((?:docs|share_core|proto|server|client|simulations)/[\w./-]*)`", README))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def arguments() -> list[tuple[str, click.Parameter]]:
    """Return every argument of every command, with the command's name."""
    found: list[tuple[str, click.Parameter]] = []
    waiting: list[tuple[str, click.Command]] = [
        (name, typer.main.get_command(importlib.import_module(module).app)) for name, module in APPS.items()
    ]
    while waiting:
        name, command = waiting.pop()
        if isinstance(command, click.Group):
            waiting.extend((f"{name} {word}", own) for word, own in command.commands.items())
        found.extend((name, p) for p in command.params if p.param_type_name == "argument")
    return found


def test_help_says_what_every_argument_is() -> None:
    assert len(arguments()) > 10
    assert not [f"{name}: {p.name}" for name, p in arguments() if not getattr(p, "help", None)]
