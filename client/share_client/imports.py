"""Python objects named by import path in a client's own files."""

from __future__ import annotations

import importlib
from typing import Any

from share_core.errors import ConfigError


def import_object(path: str, what: str) -> Any:
    """Return the object that ``package.module:name`` names; ``name`` may have dots.

    The code of that module runs: it is the client's own, named in its own file.

    Raises:
        ConfigError: no such module, an exception while it is imported, or no such name in it.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what}: cannot import {module!r}: there is no module {error.name!r}; install it, or set PYTHONPATH to "
            "the folder it is in"
        ) from error
    except Exception as error:
        raise ConfigError(f"{what}: importing {module!r} failed with {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{what}: module {module!r} has no {name!r}: expected the name of an object in it")
        found = getattr(found, part)
    return found
