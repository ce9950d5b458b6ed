"""Lines of a text file, plain or gzip, decoded as UTF-8 one by one, so that a bad line can be named."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from share_core.errors import ConfigError

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of every line, with its end; a UTF-8 byte order mark is passed over.

    Raises:
        ConfigError: unreadable file, or bytes that are not UTF-8; names the line and the likely encoding, and never
            quotes a byte of it.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, _decoded(line, number, path)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot read text: {error}") from error


def _decoded(line: bytes, number: int, path: Path) -> str:
    """Return one line as text."""
    if number == 1:
        if line.startswith(_UTF16_MARKS):
            raise _encoding(path, number, "it begins with the mark of UTF-16", "UTF-16")
        line = line.removeprefix(_UTF8_MARK)
    if b"\0" in line:
        raise _encoding(path, number, "it holds zero bytes, as UTF-16 does", "UTF-16")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        # Not chained: the error holds the whole line.
        raise _encoding(path, number, "it is probably Latin-1 (Windows-1252)", "WINDOWS-1252") from None


def _encoding(path: Path, number: int, why: str, name: str) -> ConfigError:
    return ConfigError(
        f"{path}: line {number}: expected text in UTF-8, got other bytes; {why}: save the file as UTF-8, for example "
        f"with: iconv -f {name} -t UTF-8"
    )
