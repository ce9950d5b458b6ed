"""Fingerprints of frozen backbones: what makes two parties sure that they adapt the same matrices.

The fingerprint of one site is the SHA-256 of::

    "fedshare/site/1" NUL  name (UTF-8) NUL  d_out (u64 LE)  d_in (u64 LE)  weight as bfloat16, row-major, LE

bfloat16 because a backbone is the same backbone whether it was loaded in float32, float16 or bfloat16 from bfloat16
weights. The space id is the SHA-256 of ``"fedshare/space/1" NUL`` and the site fingerprints (32 bytes each) in the
order of their names.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from share_core.errors import SpaceMismatchError, TensorShapeError
from share_core.types import SiteSpec, SpaceSpec

if TYPE_CHECKING:
    from torch import Tensor


def fingerprint_weight(name: str, weight: Tensor) -> str:
    """Return the hexadecimal fingerprint of one frozen weight (d_out, d_in).

    Raises:
        TensorShapeError: if the weight is not a matrix.
    """
    if weight.ndim != 2:
        raise TensorShapeError(f"site {name!r}: expected a matrix, got a weight of shape {tuple(weight.shape)}")
    import torch

    digest = hashlib.sha256(b"fedshare/site/1\0" + name.encode() + b"\0")
    digest.update(struct.pack("<QQ", *weight.shape))
    bits = weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
    digest.update(bits.numpy().astype("<i2", copy=False).tobytes())
    return digest.hexdigest()


def space_id_of(sites: Mapping[str, SiteSpec]) -> str:
    """Return ``sha256:<hex>`` over the site fingerprints."""
    digest = hashlib.sha256(b"fedshare/space/1\0")
    for name in sorted(sites):
        digest.update(bytes.fromhex(sites[name].sha256))
    return f"sha256:{digest.hexdigest()}"


def describe_space(
    backbone: str, weights: Mapping[str, Tensor], *, k_max: int = 64, tau: float = 0.05, rank_limit: int = 64
) -> SpaceSpec:
    """Return the description of a space over these frozen weights (d_out, d_in) by site name."""
    sites = {
        name: SiteSpec(name, int(w.shape[0]), int(w.shape[1]), fingerprint_weight(name, w))
        for name, w in sorted(weights.items())
    }
    return SpaceSpec(space_id_of(sites), backbone, sites, k_max=k_max, tau=tau, rank_limit=rank_limit)


def check_backbone(spec: SpaceSpec, weights: Mapping[str, Tensor]) -> None:
    """Refuse a backbone that is not the one of the space.

    Raises:
        SpaceMismatchError: naming the first site that differs, both fingerprints and the likely cause.
    """
    for name, site in spec.sites.items():
        if name not in weights:
            raise SpaceMismatchError(
                f"this backbone has no site {name!r}, which the space over {spec.backbone!r} adapts: "
                f"{_renamed(name, weights)}; load {spec.backbone!r}"
            )
        shape = tuple(weights[name].shape)
        if shape != (site.d_out, site.d_in):
            raise SpaceMismatchError(
                f"site {name!r}: the space has {site.d_out} x {site.d_in}, this backbone {shape[0]} x {shape[1]}: "
                f"it is another size of the architecture; load {spec.backbone!r}"
            )
    found = {name: fingerprint_weight(name, weights[name]) for name in spec.sites}
    differ = [name for name, site in spec.sites.items() if found[name] != site.sha256]
    if differ:
        first = differ[0]
        raise SpaceMismatchError(
            f"site {first!r}: the space has fingerprint {spec.sites[first].sha256[:16]}, this backbone "
            f"{found[first][:16]}: {_cause(spec, weights, differ)}"
        )


def _renamed(name: str, weights: Mapping[str, Tensor]) -> str:
    """Return why a backbone may lack a site."""
    for other in weights:
        if other.endswith(f".{name}") or name.endswith(f".{other}"):
            return f"it calls it {other!r}, so probably it is the same model inside another one"
    return (
        f"it is another architecture, or other sites were chosen: it has {', '.join(list(weights)[:2]) or 'none'}, ..."
    )


def _cause(spec: SpaceSpec, weights: Mapping[str, Tensor], differ: Sequence[str]) -> str:
    """Return the likely cause of other weights of the same shapes."""
    import torch

    one = differ[0]
    # Of weights that went through float16 the last bits of bfloat16 may differ, which can be tried out.
    if fingerprint_weight(one, weights[one].to(torch.float16)) == spec.sites[one].sha256:
        return (
            f"the space was made from a float16 copy of these weights; convert {spec.backbone!r} to float16 and save "
            "it, or ask the operator for a space of the original weights"
        )
    if weights[one].dtype == torch.float16:
        return (
            f"this one is loaded in float16 (dtype), the space was made from other weights or from {spec.backbone!r} "
            "in another dtype; load it in the dtype in which it was published"
        )
    if len(differ) < len(spec.sites):
        return (
            f"{len(differ)} of {len(spec.sites)} sites have other weights and the rest are equal, so probably an "
            f"adapter was merged into {spec.backbone!r} or a part of it was fine-tuned; load it as it was published"
        )
    return (
        f"same shapes, other weights at every site, so probably another revision or a fine-tuned copy of "
        f"{spec.backbone!r}, one with an adapter merged into it, or one that is quantised while the space's is not"
    )
