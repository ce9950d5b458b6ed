"""The modules of a model that a space adapts, and how each of them takes a change of its weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from share_core.errors import ConfigError, SpaceMismatchError
from share_core.peft.names import site_of
from share_core.types import SiteBasis

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Place:
    """One adapted module."""

    site: str
    """Its name in the space."""
    module: nn.Module
    """``nn.Linear``, a convolution, or the ``Conv1D`` of transformers."""
    kind: str
    """``linear``, ``conv1d_transposed`` or ``conv``, as :class:`share_core.peft.export.PeftSite` has them."""
    d_out: int
    """Rows of the weight as a matrix."""
    d_in: int
    """Columns of the weight as a matrix; of a convolution, channels times kernel."""

    def matrix(self) -> Tensor:
        """Return the weight as a matrix (d_out, d_in).

        Raises:
            ConfigError: the weight is stored quantised.
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point() or weight.numel() != self.d_out * self.d_in:
            raise ConfigError(
                f"site {self.site!r}: its weight is stored as {weight.dtype} of shape {tuple(weight.shape)}, expected "
                f"{self.d_out} x {self.d_in} floating-point numbers: load the backbone without quantisation for this"
            )
        return weight.T if self.kind == "conv1d_transposed" else weight.reshape(self.d_out, self.d_in)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix (d_out, d_in) in the shape and dtype of the weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        shaped = matrix.T if self.kind == "conv1d_transposed" else matrix.reshape(weight.shape)
        return shaped.to(weight.dtype).contiguous()


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
        place = _place(site, _module(model, site, by_site))
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


def _place(site: str, module: nn.Module) -> Place:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ConfigError(
            f"site {site!r} is the output map inside nn.MultiheadAttention, which reads its weight without calling it: "
            "use a backbone whose attention is made of linear layers"
        )
    if isinstance(module, nn.Linear):  # quantised ones are its subclasses, and their weights have other shapes
        return Place(site, module, "linear", module.out_features, module.in_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        d_in, d_out = (int(n) for n in module.weight.shape)  # type: ignore[union-attr]
        return Place(site, module, "conv1d_transposed", d_out, d_in)
    if isinstance(module, _CONVOLUTIONS) and module.groups == 1:
        weight = module.weight
        return Place(site, module, "conv", int(weight.shape[0]), int(weight[0].numel()))
    what = "a grouped convolution" if isinstance(module, _CONVOLUTIONS) else type(module).__name__
    raise ConfigError(
        f"site {site!r} is {what}: only linear layers, Conv1D and convolutions without groups can be served with a "
        "task for each row; export the task and load it with PEFT"
    )
