"""The corpus of hostile files: each one is an acceptable update with one lie in it.

Every file comes with the error class that it is refused with and words of its sentence. Files with an empty class are
honest edges that must be accepted, so that nobody makes the reader stricter than it says. Small files are kept in
``tests/attacks/files``, larger ones are made at test time by :func:`large` and :func:`huge`. Nothing here uses the code
under test or the library.
"""

from __future__ import annotations

from share_simulations.fuzz.hostile.edges import edges, huge, large
from share_simulations.fuzz.hostile.files import INNER, RANK_LIMIT, SITES, Case, honest, pack
from share_simulations.fuzz.hostile.headers import dtypes, encodings, entries, inners, jsons, lengths, metadata
from share_simulations.fuzz.hostile.tensors import ends, fits, names, offsets, shapes, values

__all__ = ["INNER", "RANK_LIMIT", "SITES", "Case", "corpus", "honest", "huge", "large", "pack"]


def corpus() -> list[Case]:
    """Return every small file."""
    groups = (
        lengths,
        encodings,
        jsons,
        entries,
        dtypes,
        shapes,
        fits,
        offsets,
        ends,
        metadata,
        inners,
        names,
        values,
        edges,
    )
    cases = [case for group in groups for case in group()]
    assert len({case.name for case in cases}) == len(cases)
    return cases
