"""A version of the space on disk, so that coming back does not mean downloading everything again.

What is kept is the version evaluated last: the versions after it are then followed, and none is skipped.
"""

from __future__ import annotations

from pathlib import Path

from share_client.chain import ManifestChain
from share_client.durable import make_private_directory
from share_core.durable import write_atomic
from share_core.errors import PayloadError
from share_core.types import Space, SpaceSpec
from share_core.wire import decode_snapshot, encode_snapshot


class SpaceCache:
    """``cache/<space id>.safetensors``; the space id in the name keeps two spaces apart."""

    def __init__(self, directory: Path, spec: SpaceSpec, chain: ManifestChain | None = None) -> None:
        self._spec = spec
        self._chain = chain
        self._path = make_private_directory(directory) / f"{spec.space_id.replace(':', '-')}.safetensors"
        self._version = -1

    def load(self) -> Space | None:
        """Return the kept version; None if there is none or it cannot be read (then it is removed)."""
        if not self._path.exists():
            return None
        try:
            space = decode_snapshot(self._path.read_bytes(), self._spec)
        except PayloadError:
            self._path.unlink()  # a cache only: the hub has everything that was in it
            return None
        self._version = space.version
        return space

    def save(self, space: Space) -> None:
        """Keep ``space`` unless it is kept already; first what its successor must link to."""
        if space.version != self._version:
            if self._chain is not None:
                self._chain.before_cached(space.version)
            write_atomic(self._path, encode_snapshot(space))
            self._version = space.version


def chain_path(directory: Path, spec: SpaceSpec) -> Path:
    """Return where the chain of manifests lies beside the cached version."""
    return make_private_directory(directory) / f"{spec.space_id.replace(':', '-')}.chain.json"
