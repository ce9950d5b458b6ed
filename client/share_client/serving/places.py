"""Where the sites of a space lie in a model that serves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from share_client.backbones.places import Place, place_of
from share_core.errors import ConfigError, SpaceMismatchError
from share_core.peft.names import site_of
from share_core.types import SiteBasis


def find_places(model: nn.Module, bases: Mapping[str, SiteBasis]) -> dict[str, Place]:
    """Return where each site of a space lies in a model, by site name.

    A site is the module of that path, or else the one module whose path in its bare model it is:
    ``encoder.layer.0.query`` is ``bert.encoder.layer.0.query`` in a classifier.

    Raises:
        SpaceMismatchError: the model has no such module, several, or one of another shape.
        ConfigError: a module whose change cannot be served: an embedding, a grouped convolution, the output map inside
            ``nn.MultiheadAttention``, or one module under the names of two sites.
    """
    by_site: dict[str, list[str]] = {}
    for path, _ in model.named_modules():
        by_site.setdefault(site_of(path), []).append(path)
    found: dict[str, Place] = {}
    taken: dict[int, str] = {}
    for site, basis in bases.items():
        place = place_of(site, _module(model, site, by_site))
        expected = (int(basis.left.shape[0]), int(basis.right.shape[0]))
        if expected != (place.d_out, place.d_in):
            raise SpaceMismatchError(
                f"site {site!r}: the space has a weight of {expected[0]} x {expected[1]}, this model {place.d_out} x "
                f"{place.d_in}: load the backbone that the space was made for"
            )
        other = taken.setdefault(id(place.module), site)
        if other != site:
            raise ConfigError(
                f"sites {other!r} and {site!r} are one module of this model, which can have one change only: use a "
                "backbone whose layers have weights of their own"
            )
        found[site] = place
    return found


def _module(model: nn.Module, site: str, by_site: Mapping[str, Iterable[str]]) -> nn.Module:
    try:
        return model.get_submodule(site)
    except AttributeError:
        paths = list(by_site.get(site, ()))
    if not paths:
        raise SpaceMismatchError(
            f"this model ({type(model).__name__}) has no module {site!r}, which the space adapts: load the backbone "
            "that the space was made for"
        )
    if len(paths) > 1:
        raise SpaceMismatchError(
            f"site {site!r} could be {' or '.join(paths[:3])} in this model: serve the bare model, in which its path "
            "is the site's name"
        )
    return model.get_submodule(paths[0])
