"""Readers of single values of a TOML file: each returns what it read, or says what was expected and what is there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence

from share_core.errors import ConfigError

Reader = Callable[[object, str], object]
"""Takes a value and where it stands, for the message; raises ConfigError."""


def show(value: object) -> str:
    """Return a value and its type, short enough for a message."""
    return f"{repr(value)[:80]} ({type(value).__name__})"


def table(value: object, where: str) -> dict[str, object]:
    """Read a table."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a table, got {show(value)}")
    return value


def text(value: object, where: str) -> str:
    """Read a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: expected a non-empty string, got {show(value)}")
    return value


def one_of(value: object, allowed: tuple[str, ...], where: str) -> str:
    """Read one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{where}: expected one of {', '.join(allowed)}, got {show(value)}")
    return value


def boolean(value: object, where: str) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: expected true or false, got {show(value)}")
    return value


def integer(low: int, high: int) -> Callable[[object, str], int]:
    """Return a reader of integers from ``low`` to ``high``."""

    def read(value: object, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{where}: expected an integer from {low} to {high}, got {show(value)}")
        return value

    return read


def number(low: float, high: float, above: bool = False) -> Callable[[object, str], float]:
    """Return a reader of finite numbers from ``low`` (excluded if ``above``) to ``high``."""
    bound = "above" if above else "from"

    def read(value: object, where: str) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not low <= value <= high or (above and value == low):  # type: ignore[operator]
            raise ConfigError(f"{where}: expected a number {bound} {low:g} to {high:g}, got {show(value)}")
        return float(value)  # type: ignore[arg-type]

    return read


def unknown(found: Iterable[str], known: Sequence[str], where: str) -> list[ConfigError]:
    """Return one error for each key that is none of the known ones."""
    errors = []
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            expected = f"one of {', '.join(known)}" if known else "none here"
            errors.append(ConfigError(f"{where}: unknown key {key!r}: expected {expected}{hint}"))
    return errors


def read_keys(given: Mapping[str, object], readers: Mapping[str, Reader], where: str) -> dict[str, object]:
    """Read every value of a table by the reader of its key.

    Raises:
        ConfigError: the first unknown key, or the first value that its reader refuses.
    """
    for error in unknown(given, list(readers), where):
        raise error
    return {key: readers[key](value, f"{where}: {key}") for key, value in given.items()}
