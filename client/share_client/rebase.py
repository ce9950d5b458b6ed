"""Expressing what was learned in the bases of a newer version, instead of training it again.

An update says ``dW = left C right.T + residual`` in the bases of one version. When the hub no longer keeps that version
it cannot read the update, but the client still knows dW: the ambient factors lie beside the payload in the outbox,
unless the payload has no cores and is made of them anyway. dW is projected into the newest bases; what they do not
express stays as residual. Nothing is lost but rounding (about 1e-7 of the norm), and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from share_client.outbox import Entry
from share_core.errors import PayloadError, UnavailableError
from share_core.linalg import balanced, canonical, float64, numerical_rank
from share_core.merge import project
from share_core.privacy import CoefficientNoise, declaration_from_text
from share_core.space import empty_space, update_adapter
from share_core.types import Adapter, Factors, SiteBasis, SiteUpdate, Space, SpaceSpec, Update
from share_core.wire import decode_adapter, decode_update, encode_adapter, encode_update

MOST_REBASES = 3
"""How often one training is expressed anew before it is trained again: by then it is old."""

_NOISE = 1e-6
"""Share of an adapter's strongest direction below which a direction is what float32 left over."""


def kept_adapter(update: Update, space: Space) -> bytes:
    """Return what an outbox entry must hold beside the payload to be expressed anew; empty if the payload is enough."""
    return encode_adapter(update_adapter(update, space.bases)) if _has_cores(update) else b""


def _has_cores(update: Update) -> bool:
    """Whether an update means something only together with the bases of its version."""
    return any(part.core is not None for part in update.sites.values())


@dataclass(frozen=True)
class Expressed:
    """One update in the coordinates of a newer version."""

    payload: bytes
    """The encoded update."""
    adapter: bytes
    """What an entry must hold beside it, as :func:`kept_adapter` says."""
    space: Space
    """The version."""


class Rebaser:
    """Expresses outbox entries in the newest version that this client holds."""

    def __init__(self, spec: SpaceSpec, newest: Callable[[], Space], hub: Callable[[], tuple[int, int]]) -> None:
        """``newest`` gives the newest version held, ``hub`` the hub's (newest version, oldest base version)."""
        self._spec = spec
        self._newest = newest
        self._hub = hub

    def express(self, entry: Entry) -> Expressed | None:
        """Return what to send instead of an entry; None if only training again helps.

        Raises:
            UnavailableError: the version held here is too old as well; a newer one is on its way.
        """
        if entry.training.rebases >= MOST_REBASES:
            return None
        try:
            update = decode_update(entry.read_payload(), self._spec)
            adapter = self._adapter(entry, update)
        except (PayloadError, OSError):
            return None  # damaged: the data is still there, so training again loses nothing
        if adapter is None:
            return None
        newest, oldest = self._hub()
        space = self._newest()
        if space.version < max(oldest, entry.training.base_version + 1):
            if newest <= space.version:
                return None
            raise UnavailableError(
                f"update {entry.update_id} is to be expressed in version {newest}, and {space.version} is held here: "
                "waiting for the newer one"
            )
        if isinstance(declaration_from_text(entry.submission.privacy), CoefficientNoise):
            # Nothing but coefficients may leave: what the newer bases do not hold is left out. Noise stays noise.
            sites = {site: SiteUpdate(core=core) for site, core in project(space.bases, adapter).items()}
            if not sites:
                return None
        else:
            sites = express(adapter, space, self._spec.rank_limit)
        fresh = Update(space.version, sites, update.head)
        # Exactly what was trained: an adapter computed from the new payload would gather rounding from time to time.
        return Expressed(encode_update(fresh), encode_adapter(adapter) if _has_cores(fresh) else b"", space)

    def _adapter(self, entry: Entry, update: Update) -> Adapter | None:
        kept = entry.read_adapter()
        if kept:
            return decode_adapter(kept, self._spec)
        if _has_cores(update):
            return None  # put in by an older release, and its bases are gone
        return update_adapter(update, empty_space(self._spec).bases)


def express(adapter: Adapter, space: Space, rank_limit: int) -> dict[str, SiteUpdate]:
    """Return an adapter in the coordinates of ``space``, at every site in the smaller of two forms.

    Either coordinates plus what the bases leave out, or plain factors: far outside of the bases the first would need up
    to twice the rank. Sites where the adapter is zero are left out.

    Args:
        adapter: ambient factors, rank at most ``rank_limit`` at every site.
        space: the version to express it in.
        rank_limit: largest rank of one update at one site.
    """
    sites = {site: _site(factors, space.bases[site], rank_limit) for site, factors in adapter.items()}
    return {site: made for site, made in sites.items() if made is not None}


def _site(factors: Factors, basis: SiteBasis, rank_limit: int) -> SiteUpdate | None:
    u, s, v = canonical(factors.out, factors.in_)
    keep = int(numerical_rank(s))
    if keep == 0:
        return None
    plain = _factors(u, s, v, keep)
    core = project({"": basis}, {"": factors}).get("")
    if core is None:
        return SiteUpdate(residual=plain)
    out = torch.cat([float64(factors.out), -(float64(basis.left) @ float64(core.out))], dim=1)
    in_ = torch.cat([float64(factors.in_), float64(basis.right) @ float64(core.in_)], dim=1)
    u_left, s_left, v_left = canonical(out, in_)
    left_out = int((s_left > _NOISE * s[0]).sum())
    width, columns = factors.out.shape[0] + factors.in_.shape[0], basis.k_out + basis.k_in
    smaller = columns * core.rank + width * left_out < width * keep
    if not smaller or core.rank + left_out > rank_limit:
        return SiteUpdate(residual=plain)
    return SiteUpdate(core=core, residual=_factors(u_left, s_left, v_left, left_out) if left_out else None)


def _factors(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, keep: int) -> Factors:
    left, right = balanced(u[:, :keep], s[:keep], v[:, :keep])
    return Factors(left.to(torch.float32), right.to(torch.float32))
