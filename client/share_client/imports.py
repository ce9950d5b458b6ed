"""Python objects named by import path in a client's own files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError


def import_object(path: str, what: str, folder: Path | None = None) -> Any:
    """Return the object that ``package.module:name`` names; ``name`` may have dots.

    The code of that module runs: it is the client's own, named in its own file.

    Args:
        path: ``package.module:name``.
        what: what asks for it, for messages.
        folder: where to look first; None: only where Python looks.

    Raises:
        ConfigError: no such module, an exception while it is imported, no such name in it, or a module of that name
            from elsewhere that was imported before.
    """
    module, _, name = path.partition(":")
    try:
        with _looking_in(folder):
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what}: cannot import {module!r}: there is no module {error.name!r}; install it, or set PYTHONPATH to "
            "the folder it is in"
        ) from error
    except Exception as error:
        raise ConfigError(f"{what}: importing {module!r} failed with {type(error).__name__}: {error}") from error
    here = None if folder is None else folder / module.partition(".")[0]
    if here is not None and (here.is_dir() or here.with_suffix(".py").is_file()):
        file = getattr(found, "__file__", None)
        if file is None or not Path(file).resolve().is_relative_to(folder.resolve()):  # type: ignore[union-attr]
            raise ConfigError(
                f"{what}: expected the module {module!r} in {folder}, got another of that name, which was imported "
                f"before: {file}; rename yours"
            )
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{what}: module {module!r} has no {name!r}: expected the name of an object in it")
        found = getattr(found, part)
    return found


@contextmanager
def _looking_in(folder: Path | None) -> Iterator[None]:
    """Look for modules in a folder before anywhere else while the context lasts."""
    if folder is None:
        yield
        return
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
