"""How a backbone stores the weights that a space adapts: read from its files, and decided by the fingerprints.

A fingerprint is over the weight as the matrix to which ``dW`` is added. A file may hold that matrix, its transpose
(GPT-2's Conv1D) or a kernel (convolutions); only one of them has the fingerprint, so nothing has to be known of the
architecture, and what fits none of them is another backbone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from share_core.errors import SpaceMismatchError
from share_core.fingerprint import check_backbone, fingerprint_weight
from share_core.peft.export import PeftSite
from share_core.space_tool.backbone import read_weight, weight_files
from share_core.types import SiteSpec, SpaceSpec

if TYPE_CHECKING:
    from share_client.backbones import Backbone


@dataclass(frozen=True)
class Frame:
    """A backbone whose weights are those of a space."""

    path: Path | None
    """Directory or file of its weights; None for one that is not in files of its own."""
    sites: dict[str, PeftSite]
    """Module and layout of each site."""


def read_frame(backbone: str, spec: SpaceSpec, sites: Iterable[str]) -> Frame:
    """Return how a backbone stores some sites of a space.

    Args:
        backbone: a directory or file with safetensors weights, or what ``backbone`` in tasks.toml may be.
        spec: the space.
        sites: names of sites of ``spec``.

    Raises:
        SpaceMismatchError: a weight is missing or has another fingerprint; names the site and both.
        ConfigError: there is no such backbone.
    """
    from share_client.backbones import load_backbone
    from share_client.backbones.huggingface import packaged_minilm

    wanted = replace(spec, sites={name: spec.sites[name] for name in sites})
    path = packaged_minilm() if backbone == "minilm" else Path(backbone)
    if not path.exists():
        return Frame(None, _of_loaded(load_backbone(backbone, "cpu"), wanted))
    files = weight_files(path)
    try:
        stored = {name: read_weight(files, name, path)[0] for name in wanted.sites}
    except SpaceMismatchError as error:
        raise SpaceMismatchError(f"{error}; the space is over {spec.backbone!r}") from None
    found: dict[str, PeftSite] = {}
    for name, key in stored.items():
        weight = read_weight(files, name, path)[1]
        kind = _layout(spec.sites[name], weight)
        if kind is None:
            # Raises, and tells the cause by how many sites differ.
            check_backbone(wanted, {n: _matrix(spec.sites[n], read_weight(files, n, path)[1]) for n in stored})
            raise AssertionError("no layout has the fingerprint, and the weights are the space's")
        found[name] = PeftSite(key.removesuffix(".weight"), kind, tuple(weight.shape))
    return Frame(path, found)


def _of_loaded(backbone: Backbone, wanted: SpaceSpec) -> dict[str, PeftSite]:
    """Return module and layout of each site of a backbone that is loaded and not read from files."""
    check_backbone(wanted, backbone.site_weights())
    found: dict[str, PeftSite] = {}
    for name in wanted.sites:
        place = backbone.site(name)
        weight = place.module.weight
        assert isinstance(weight, Tensor)
        found[name] = PeftSite(name, place.kind, tuple(weight.shape))
    return found


def _layouts(site: SiteSpec, weight: Tensor) -> dict[str, Tensor]:
    """Return the matrices of the site's shape that a stored weight may be, by layout."""
    if weight.ndim == 2:
        layouts = {"linear": weight, "conv1d_transposed": weight.T}
    else:
        layouts = {"conv": weight.flatten(1)} if weight.ndim > 2 else {}
    return {kind: matrix for kind, matrix in layouts.items() if matrix.shape == (site.d_out, site.d_in)}


def _layout(site: SiteSpec, weight: Tensor) -> str | None:
    """Return which layout has the site's fingerprint, if any."""
    layouts = _layouts(site, weight).items()
    return next((kind for kind, matrix in layouts if fingerprint_weight(site.name, matrix) == site.sha256), None)


def _matrix(site: SiteSpec, weight: Tensor) -> Tensor:
    """Return a stored weight as the matrix that comes nearest to the site."""
    if (kind := _layout(site, weight)) is not None:
        return _layouts(site, weight)[kind]
    return next(iter(_layouts(site, weight).values()), weight.reshape(weight.shape[0], -1))
