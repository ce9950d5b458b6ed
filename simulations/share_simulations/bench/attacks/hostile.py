"""What hostile organisations send instead of what they have learned: pure functions of adapters.

They know everything: the stored task, what every honest client will send, and the rules of the defence. Notation:
``b`` the stored task, ``c_i`` what client i changes in it, ``m`` and ``s`` mean and standard deviation of the honest
changes, entry by entry.

==================  ===================================================================================================
``sign-flip``       ``b - 5 c_i``
``scale``           ``b + 10^6 c_i``
``random``          ``b`` and a random matrix of rank 8, three times as long as ``b``
``alie``            ``b + m - 1.5 s``: inside the spread of the honest (Baruch et al., 2019, "A Little Is Enough")
``ipm``             ``b - 4 m``: at one fifth hostile the mean learns nothing (Xie et al., 2019, inner product
                    manipulation)
``stealth``         ``b + c``, the same from all of them: along just so many honest changes that with the colluders
                    they are half of all votes, and as far against the others as that allows, as long as an honest one
==================  ===================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.linalg import balanced, canonical, small_svd
from share_core.types import Adapter, Factors, SiteUpdate, Update
from share_core.wire import encode_update

RANK = 24
"""Rank that crafted matrices are cut to; honest updates have up to 10."""

Dense = dict[str, Tensor]
"""dW of every site, (d_out, d_in) float64."""


@dataclass(frozen=True)
class Knowledge:
    """What the hostile clients of one task know."""

    stored: Dense
    """``b``."""
    changes: Sequence[Dense]
    """``c_i`` of every honest client."""
    cosine: float
    """The share of the usual agreement that the defence asks for."""
    colluders: int
    """How many they are."""


def dense(adapter: Adapter, sites: Sequence[str]) -> Dense:
    """Return dW of every site; the matrices of this backbone are small."""
    found: Dense = {}
    for site in sites:
        if site in adapter:
            found[site] = adapter[site].out.double() @ adapter[site].in_.double().T
    return found


def minus(a: Dense, b: Dense) -> Dense:
    """Return ``a - b``; both name the same sites."""
    return {site: a[site] - b[site] for site in a}


def mix(*parts: tuple[float, Dense]) -> Dense:
    """Return the weighted sum."""
    return {site: torch.stack([w * part[site] for w, part in parts]).sum(0) for site in parts[0][1]}


def length(a: Dense) -> float:
    """Return the norm over all sites."""
    return math.hypot(*(float(torch.linalg.matrix_norm(x)) for x in a.values()))


def payload_of(change: Dense, version: int) -> bytes:
    """Return a matrix per site as an update of a version, cut to :data:`RANK`, as free directions."""
    sites: dict[str, SiteUpdate] = {}
    for site, x in change.items():
        u, s, v = small_svd(x)
        out, in_ = balanced(u[:, :RANK], s[:RANK], v[:, :RANK])
        sites[site] = SiteUpdate(residual=Factors(out.float(), in_.float()))
    return encode_update(Update(version, sites))


def _mean(known: Knowledge) -> Dense:
    return mix(*((1 / len(known.changes), change) for change in known.changes))


def _sign_flip(known: Knowledge, own: Dense, _: torch.Generator) -> Dense:
    return mix((1.0, known.stored), (-5.0, own))


def _scale(known: Knowledge, own: Dense, _: torch.Generator) -> Dense:
    return mix((1.0, known.stored), (1e6, own))


def _random(known: Knowledge, own: Dense, draw: torch.Generator) -> Dense:
    noise = {
        site: torch.randn(x.shape[0], 8, generator=draw, dtype=torch.float64)
        @ torch.randn(8, x.shape[1], generator=draw, dtype=torch.float64)
        for site, x in own.items()
    }
    return mix((1.0, known.stored), (3 * length(known.stored) / length(noise), noise))


def _alie(known: Knowledge, own: Dense, _: torch.Generator) -> Dense:
    mean = _mean(known)
    spread = {site: torch.stack([c[site] for c in known.changes]).std(0) for site in own}
    return mix((1.0, known.stored), (1.0, mean), (-1.5, spread))


def _ipm(known: Knowledge, own: Dense, _: torch.Generator) -> Dense:
    return mix((1.0, known.stored), (-4.0, _mean(known)))


def _stealth(known: Knowledge, own: Dense, _: torch.Generator) -> Dense:
    """Win half of the votes and push against the other half.

    ``c = sum of friends - x sum of foes`` with the largest x for which every friend still agrees with it by more than
    the rule asks. The friends and the other colluders are half of the others.
    """
    flat = torch.stack([torch.cat([change[site].flatten() for site in own]) for change in known.changes])
    gram = flat @ flat.T
    lengths = torch.diagonal(gram).sqrt()
    count = len(known.changes)
    pairs = (gram / lengths[:, None] / lengths[None, :])[torch.triu_indices(count, count, 1).unbind()]
    wanted = 1.1 * known.cosine * float(pairs.median())
    friends = max(1, (count + known.colluders) // 2 - known.colluders + 1)
    weights = torch.ones(count, dtype=gram.dtype)
    for step in range(40, -1, -1):
        weights[friends:] = -step / 10
        made = float((weights @ gram @ weights).clamp_min(0).sqrt())
        if made > 0 and float(((gram @ weights)[:friends] / lengths[:friends] / made).min()) >= wanted:
            break
    change = mix(*((float(w), one) for w, one in zip(weights, known.changes, strict=True)))
    return mix((1.0, known.stored), (float(lengths.median()) / length(change), change))


CRAFTED: Mapping[str, Callable[[Knowledge, Dense, torch.Generator], Dense]] = {
    "sign-flip": _sign_flip,
    "scale": _scale,
    "random": _random,
    "alie": _alie,
    "ipm": _ipm,
    "stealth": _stealth,
}
"""Attacks that are made from what others send: (what is known, the client's own honest change, random) -> dW."""


def crowd_out(shapes: Mapping[str, tuple[int, int]], rank: int, draw: torch.Generator) -> Sequence[bytes]:
    """Return the private tasks with which one organisation fills the space: all in one random subspace.

    Args:
        shapes: (d_out, d_in) of every site.
        rank: directions that are to be taken, the cap of the space.
        draw: where they come from.
    """
    found: list[bytes] = []
    bases = {
        site: [torch.linalg.qr(torch.randn(d, rank, generator=draw)).Q for d in shape] for site, shape in shapes.items()
    }
    for _ in range(CROWD):
        sites: dict[str, SiteUpdate] = {}
        for site, (left, right) in bases.items():
            turned = torch.linalg.qr(torch.randn(rank, rank, generator=draw)).Q
            u, s, v = canonical(left @ turned, right)
            sites[site] = SiteUpdate(residual=Factors((u * s).float(), v.float()))
        found.append(encode_update(Update(0, sites)))
    return found


CROWD = 10
"""Private tasks per hostile organisation."""
