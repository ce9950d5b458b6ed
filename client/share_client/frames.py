"""How a backbone stores the weights that a space adapts: read from its files, and decided by the fingerprints.

A fingerprint is over the weight as the matrix to which ``dW`` is added. A file may hold that matrix, its transpose
(GPT-2's Conv1D) or a kernel (convolutions); only one of them has the fingerprint, so nothing has to be known of the
architecture, and what fits none of them is another backbone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from share_core.errors import SpaceMismatchError
from share_core.fingerprint import check_backbone, fingerprint_weight
from share_core.peft.export import PeftSite
from share_core.space_tool.backbone import read_weight, weight_files
from share_core.types import SiteSpec, SpaceSpec


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

    path = packaged_minilm() if backbone == "minilm" else Path(backbone)
    found: dict[str, PeftSite] = {}
    if not path.exists():
        loaded = load_backbone(backbone, "cpu")
        for name in sites:
            if name not in loaded.sites:
                check_backbone(_only(spec, name), {})
            place = loaded.site(name)
            check_backbone(_only(spec, name), {name: place.matrix()})
            weight = place.module.weight
            assert isinstance(weight, Tensor)
            found[name] = PeftSite(name, place.kind, tuple(weight.shape))
        return Frame(None, found)
    files = weight_files(path)
    for name in sites:
        try:
            key, weight = read_weight(files, name, path)
        except SpaceMismatchError as error:
            raise SpaceMismatchError(f"{error}; the space is over {spec.backbone!r}") from None
        found[name] = _layout(spec, spec.sites[name], key.removesuffix(".weight"), weight)
    return Frame(path, found)


def _layout(spec: SpaceSpec, site: SiteSpec, module: str, weight: Tensor) -> PeftSite:
    """Return which layout of a stored weight has the site's fingerprint."""
    shape = tuple(int(n) for n in weight.shape)
    layouts = {"conv": weight.flatten(1)} if weight.ndim > 2 else {"linear": weight}
    if weight.ndim == 2:
        layouts["conv1d_transposed"] = weight.T
    for kind, matrix in layouts.items():
        if tuple(matrix.shape) == (site.d_out, site.d_in) and fingerprint_weight(site.name, matrix) == site.sha256:
            return PeftSite(module, kind, shape)
    fitting = [matrix for matrix in layouts.values() if tuple(matrix.shape) == (site.d_out, site.d_in)]
    # None has it, so this raises and says how they differ.
    check_backbone(_only(spec, site.name), {site.name: (fitting or list(layouts.values()))[0]})
    raise AssertionError("unreachable")


def _only(spec: SpaceSpec, site: str) -> SpaceSpec:
    return replace(spec, sites={site: spec.sites[site]})
