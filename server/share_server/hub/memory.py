"""Memory that goes back: payloads are large and short-lived, and the C library would rather keep their space.

glibc raises the size from which blocks are mapped by themselves each time one is freed, up to 32 MiB; from then on
freed payloads stay in the heap of whichever thread had them, and a hub that was busy once stays large. A fixed
threshold makes every payload its own mapping, which is returned when it is freed. Elsewhere than on glibc nothing is
done.
"""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2

MAPPED_BYTES = 4 * 2**20
"""Blocks of at least this size are returned at once."""


def keep_flat() -> None:
    """Tell the C library; called once, before threads are started."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
        mallopt(_M_TOP_PAD, 16 * 2**20)
