"""Hubs that some bomb goes off in: the campaign is shown to notice each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core import tensorfile, wire
from share_core.errors import FedshareError
from share_server.hub import chunks, intake
from share_server.hub.gate import parsers, worker
from share_simulations.chaos.planted import replace_step

_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Planted:
    """A planted bug."""

    plant: Callable[[], None]
    """Plants it into this process."""
    bombs: tuple[str, ...]
    """Bombs that must notice it."""


def write_hub(bug: str, folder: Path) -> Path:
    """Write the script of the hub with this bug into ``folder`` and return its path."""
    script = folder / f"hub_{bug}.py"
    script.write_text(f"from share_simulations.chaos.bombs_planted import main\nmain({bug!r})\n")
    return script


def main(bug: str) -> None:
    """Be the hub of the directory named on the command line, with a planted bug."""
    from share_server.hub import __main__

    BUGS[bug].plant()
    sys.exit(__main__.main(sys.argv[1:]))


def _unbounded_requests() -> None:
    """Protobuf makes objects of a request of any size."""
    replace_step(chunks, "MOST_REQUEST_BYTES", _ENDLESS)


def _unbounded_headers() -> None:
    """The header of an upload may be as large as any message."""
    replace_step(chunks, "MOST_HEADER_BYTES", _ENDLESS)


def _no_header_limit() -> None:
    """The header of a payload may be as long as the payload."""
    replace_step(tensorfile, "MAX_HEADER_BYTES", _ENDLESS)
    replace_step(tensorfile, "MAX_TENSORS", _ENDLESS)
    replace_step(wire, "update_limits", lambda spec: tensorfile.Limits(header_bytes=_ENDLESS))


def _any_payload_size() -> None:
    """An announced payload of any size is waited for."""
    honest = intake.Intake.__init__

    def begin(self: Any, *arguments: Any, **named: Any) -> None:
        honest(self, *arguments, **named)
        self.max_payload_bytes = _ENDLESS

    replace_step(intake.Intake, "__init__", begin)


def _no_rank_limit() -> None:
    """Factors of any rank are taken."""
    honest = wire._site_update

    def site_update(site: str, parts: Any, spec: Any) -> Any:
        unbounded = type(spec)(**{**vars(spec), "rank_limit": _ENDLESS})
        return honest(site, parts, unbounded)

    replace_step(wire, "_site_update", site_update)


def _falls_over() -> None:
    """The hub ends with the parser that has met something it refuses."""
    honest = parsers.Parsers._examine

    def examine(self: Any, staged: Any) -> Any:
        try:
            return honest(self, staged)
        except FedshareError:
            os._exit(3)

    replace_step(parsers.Parsers, "_examine", examine)


def _reads_all_first() -> None:
    """The whole payload and three copies of it are in memory before its header is looked at."""
    honest = wire.examine_update

    def examine(payload: Any, spec: Any) -> Any:
        copies = [bytearray(payload[0 : len(payload)]) for _ in range(4)]
        return honest(bytes(copies[0]), spec)

    replace_step(worker, "examine_update", examine)


BUGS: Mapping[str, Planted] = {
    "unbounded_requests": Planted(_unbounded_requests, ("million submessages",)),
    "unbounded_headers": Planted(_unbounded_headers, ("million names",)),
    "no_header_limit": Planted(_no_header_limit, ("100,000 tensors",)),
    "any_payload_size": Planted(_any_payload_size, ("payload of 100 MB",)),
    "no_rank_limit": Planted(_no_rank_limit, ("rank of 4,096",)),
    "falls_over": Planted(_falls_over, ("shape by zero",)),
    "reads_all_first": Planted(_reads_all_first, ("100,000 tensors",)),
}
"""Planted bugs by name."""
