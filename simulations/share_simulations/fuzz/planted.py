"""The reader with one of its guards taken out: the corpus of hostile files and the fuzzer are shown to miss each.

A guard is a piece of source text and what stands there instead. The modules are compiled anew from their own source
with that one change, so that a guard that was rewritten is noticed: its text is no longer found.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, ModuleType

from share_core.errors import ConfigError

_MODULES = ("share_core.tensorfile", "share_core.wire")
_ALSO = "share_simulations.fuzz.target"


@dataclass(frozen=True)
class Guard:
    """One guard of the reader and how it is taken out."""

    module: str
    """Module that holds it."""
    old: str
    """Its text, which must occur exactly once."""
    new: str
    """What stands there instead."""


def _reader(old: str, new: str) -> Guard:
    return Guard(_MODULES[0], old, new)


def _wire(old: str, new: str) -> Guard:
    return Guard(_MODULES[1], old, new)


GUARDS: Mapping[str, Guard] = {
    "too short": _reader("if len(payload) < 8:", "if False:"),
    "header limit": _reader("if length > most:", "if False:"),
    "header fits the file": _reader("if 8 + length > len(payload):", "if False:"),
    "begins with a brace": _reader('if not raw.startswith(b"{"):', "if False:"),
    "ascii": _reader('raw.decode("ascii")', 'raw.decode("utf-8-sig", "replace")'),
    "duplicate keys": _reader("if len(found) != len(pairs):", "if False:"),
    "floats": _reader("parse_float=_no_number", "parse_float=float"),
    "constants": _reader("parse_constant=_no_number", "parse_constant=lambda text: 0"),
    "minus zero": _reader('if text == "-0" else int(text)', "if False else int(text)"),
    "nesting": _reader("if _depth(text) > MAX_DEPTH:", "if False:"),
    "broken json": _reader("except ValueError as error:", "except TimeoutError as error:"),
    "metadata is an object": _reader("if not isinstance(raw, dict) or len(raw) > 16:", "if False:"),
    "metadata entries": _reader("or len(raw) > 16:", "or False:"),
    "metadata strings": _reader("if not isinstance(value, str) or len(key) > 128", "if len(key) > 128"),
    "metadata key length": _reader("or len(key) > 128 or", "or"),
    "metadata ascii": _reader("if not key.isascii() or not value.isascii():", "if False:"),
    "number of tensors": _reader("if len(header) > MAX_TENSORS:", "if False:"),
    "name length": _reader("if not 1 <= len(name) <= MAX_NAME or", "if"),
    "name ascii": _reader("or not name.isascii() or", "or"),
    "name printable": _reader(" or not name.isprintable():", ":"),
    "exact fields": _reader(
        'if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:',
        'if not isinstance(raw, dict) or not set(raw) >= {"dtype", "shape", "data_offsets"}:',
    ),
    "entry is an object": _reader("if not isinstance(raw, dict) or set(raw) !=", "if set(raw) !="),
    "dtype allowed": _reader('"BF16": torch.bfloat16}\n', '"BF16": torch.bfloat16, "F64": torch.float64}\n'),
    "dtype a string": _reader(' if isinstance(raw["dtype"], str) else None', ""),
    "shape of whole numbers": _reader("if not _whole_numbers(shape) or not 1", "if not 1"),
    "number of dimensions": _reader("or not 1 <= len(shape) <= 4 or 0 in shape", "or 0 in shape"),
    "positive dimensions": _reader(" or 0 in shape:", ":"),
    "offsets of whole numbers": _reader("if not _whole_numbers(offsets) or", "if"),
    "two offsets": _reader(" or len(offsets) != 2:", ":"),
    "size of the shape": _reader("if offsets[1] - offsets[0] != size:", "if False:"),
    "numbers not bools": _reader("type(n) is int and 0 <= n", "isinstance(n, int) and 0 <= n"),
    "numbers not negative": _reader("type(n) is int and 0 <= n < 1 << 62", "type(n) is int and n < 1 << 62"),
    "contiguous": _reader("if entry.begin != position:", "if False:"),
    "to the end": _reader("if 8 + length + position != len(payload):", "if False:"),
    "finite": _reader("if math.isfinite(low) and math.isfinite(high) else None", "if low == low else 0.0"),
    "finite halves": _reader("if bits >= _INFINITY[dtype]:", "if False:"),
    "norm": _reader("if norm > limits.norm:", "if False:"),
    "shown briefly": _reader('return f"a {type(value).__name__} with {len(value)} entries"', "return str(value)"),
    "plain metadata": _wire("if any(isinstance(part, list | dict) for part in", "if any(False for part in"),
    "header limit of an update": _wire("header_bytes=min(MAX_HEADER_BYTES, entries + (64 << 10)), ", ""),
    "norm of an update": _wire(", norm=MAX_NORM)", ")"),
    "format": _wire("if got != expected:", "if False:"),
    "whole base version": _wire(
        "if type(value) is not int or not 0 <= value < 1 << 62:", "if not isinstance(value, int):"
    ),
    "base version within bounds": _wire(" or not 0 <= value < 1 << 62:", ":"),
    "known parts": _wire("or part not in allowed:", "or False:"),
    "owner": _wire("if not slash or not owner or part", "if part"),
    "known sites": _wire("    if known is None:\n", "    if False:\n"),
    "pairs": _wire("    if a is None or b is None:\n", "    if False:\n"),
    "matrices": _wire("    if tensor.ndim != 2:\n", "    if False:\n"),
    "ranks of a core": _wire("if pair[0].shape[1] != pair[1].shape[1]:", "if False:"),
    "rows of B": _wire("if b.shape[0] != known.d_out or ", "if "),
    "columns of A": _wire("or a.shape[1] != known.d_in or", "or"),
    "ranks of factors": _wire(" or b.shape[1] != a.shape[0]:", ":"),
    "rank limit": _wire("if rank > spec.rank_limit:", "if False:"),
}
"""Every guard between the bytes of an update and its merge, by what it demands."""

Compile = Callable[[str, str], CodeType]
"""(source, file name) -> code; a fuzzer instruments it."""


def plain(source: str, name: str) -> CodeType:
    """Compile a module."""
    return compile(source, name, "exec")


@contextmanager
def without(guard: Guard | None, build: Compile = plain) -> Iterator[Mapping[str, ModuleType]]:
    """Give the reader's modules and the fuzzer's target, made anew without ``guard``; the real ones are left alone.

    Raises:
        ConfigError: the guard's text is not found once.
    """
    kept = {name: sys.modules.get(name) for name in (*_MODULES, _ALSO)}
    made: dict[str, ModuleType] = {}
    try:
        for name in kept:
            made[name] = sys.modules[name] = _made(name, guard, build)
            _hang(name, made[name])
        yield made
    finally:
        for name, module in kept.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
                _hang(name, module)


def _hang(name: str, module: ModuleType) -> None:
    """Let ``from package import module`` find this one."""
    package, _, own = name.rpartition(".")
    setattr(sys.modules[package], own, module)


def _made(name: str, guard: Guard | None, build: Compile) -> ModuleType:
    known = importlib.util.find_spec(name) if name not in sys.modules else sys.modules[name].__spec__
    assert known is not None
    assert known.origin is not None
    loader = _Loader(known.origin, guard if guard is not None and guard.module == name else None, build)
    spec = importlib.util.spec_from_loader(name, loader, origin=known.origin)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    loader.exec_module(module)
    return module


class _Loader(InspectLoader):
    """Loads a module from its file, one piece of its text replaced."""

    def __init__(self, path: str, guard: Guard | None, build: Compile) -> None:
        self._path = path
        self._guard = guard
        self._build = build

    def get_source(self, fullname: str) -> str:
        """Return the text of the module.

        Raises:
            ConfigError: the guard's text is not found once.
        """
        source, guard = Path(self._path).read_text("utf-8"), self._guard
        if guard is None:
            return source
        if source.count(guard.old) != 1:
            raise ConfigError(f"{fullname} does not hold {guard.old!r} once: the planted bug does not fit it any more")
        return source.replace(guard.old, guard.new)

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the module."""
        return self._build(self.get_source(fullname), self._path)
