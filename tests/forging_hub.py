"""A hub that signs with another key than the one its members were told of; runs in place of ``share_server.hub``."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from share_core.identity import Identity, make_authority, make_signer
from share_core.types import SpaceSpec
from share_server.config import ServerConfig
from share_server.hub import __main__
from share_server.hub.engine import Engine

honest = Engine.open


async def forged(root: Path, spec: SpaceSpec, config: ServerConfig, signing_key: bytes, *rest: Any) -> Engine:
    """Open the engine with a key of another authority."""
    now = datetime.now(UTC)
    _, key = make_signer(*make_authority("other", now), Identity("signer", "server", "hub"), now, 30)
    return await honest(root, spec, config, key, *rest)


Engine.open = forged  # type: ignore[method-assign, assignment]
sys.exit(__main__.main(sys.argv[1:]))
