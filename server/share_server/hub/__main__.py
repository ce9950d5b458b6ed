"""``python -m share_server.hub DIR``: run the hub of one server directory in the foreground."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from share_core.errors import FedshareError
from share_server.hub import log
from share_server.hub.chunks import require_native_protobuf
from share_server.hub.gate.nursery import Nursery
from share_server.hub.memory import keep_flat
from share_server.hub.process import serve
from share_server.layout import Layout

_SWITCH_S = 0.001
"""How long a thread may keep the others waiting: a commit asks for the interpreter a hundred times."""


def main(arguments: list[str]) -> int:
    """Run until stopped; return the exit code: 0 stopped, 1 failed, 2 wrong usage."""
    if len(arguments) != 1:
        print("usage: python -m share_server.hub DIR", file=sys.stderr)
        return 2
    keep_flat()
    sys.setswitchinterval(_SWITCH_S)
    nursery = Nursery.start()  # first of all: what it forks later has what this process has now, which is nothing
    log.start_logging()
    try:
        require_native_protobuf()
        return asyncio.run(serve(Layout(Path(arguments[0])), nursery))
    except (FedshareError, OSError) as error:
        log.warning("cannot run", error=type(error).__name__, reason=str(error))
        print(f"share-server hub: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    os._exit(code)  # as after a kill: nothing may write to a failed store while the interpreter takes itself apart
