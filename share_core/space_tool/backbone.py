"""Fingerprints of a backbone's adapted weights, read from its files without building the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from share_core.errors import ConfigError, SpaceMismatchError
from share_core.fingerprint import fingerprint_weight
from share_core.peft.reader import PeftSite
from share_core.types import SiteSpec


def fingerprinted(backbone: Path, sites: Mapping[str, SiteSpec], kinds: Mapping[str, PeftSite]) -> dict[str, SiteSpec]:
    """Return the sites with the fingerprints of this backbone's weights.

    Args:
        backbone: a directory with ``model.safetensors`` (or its sharded form), or one such file.
        sites: the adapted matrices; a weight is found by ``SITE.weight`` with any model prefix.
        kinds: how each weight is stored, see :class:`share_core.peft.reader.PeftSite`.

    Raises:
        ConfigError: if there is no readable safetensors model.
        SpaceMismatchError: if a site is missing or has another shape: it is another backbone.
    """
    if not sites:
        return {}
    files = weight_files(backbone)
    found: dict[str, SiteSpec] = {}
    for name, site in sites.items():
        weight = _as_matrix(read_weight(files, name, backbone)[1], kinds[name])
        if tuple(weight.shape) != (site.d_out, site.d_in):
            raise SpaceMismatchError(
                f"site {name!r}: the adapters have {site.d_out} x {site.d_in}, {backbone} has "
                f"{weight.shape[0]} x {weight.shape[1]}: they were made for another backbone"
            )
        found[name] = SiteSpec(name, site.d_out, site.d_in, fingerprint_weight(name, weight))
    return found


def weight_files(backbone: Path) -> dict[str, Path]:
    """Return every tensor name of a backbone, a directory or one file, with the file that holds it.

    Raises:
        ConfigError: there is no readable safetensors model.
    """
    files = [backbone] if backbone.is_file() else sorted(backbone.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{backbone} holds no safetensors model: save the backbone with save_pretrained(...), which writes "
            "model.safetensors, and give that directory"
        )
    return {name: path for path in files for name in _names(path)}


def _names(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as file:
            yield from file.keys()
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def read_weight(files: Mapping[str, Path], site: str, backbone: Path) -> tuple[str, Tensor]:
    """Return name and value of the weight of a site: ``SITE.weight``, with any model prefix.

    Raises:
        SpaceMismatchError: there is none, or more than one.
    """
    wanted = f"{site}.weight"
    matches = [wanted] if wanted in files else [name for name in files if name.endswith(f".{wanted}")]
    if len(matches) != 1:
        raise SpaceMismatchError(
            f"{backbone} holds {len(matches)} weights named {wanted!r}, expected one: it is another architecture"
        )
    with safe_open(files[matches[0]], framework="pt") as file:
        weight: Tensor = file.get_tensor(matches[0])
        return matches[0], weight


def _as_matrix(weight: Tensor, kind: PeftSite) -> Tensor:
    """Return the weight as d_out x d_in, the orientation in which ``dW = B A`` is added to it."""
    if weight.ndim < 2:
        return weight.reshape(-1, 1)
    if kind.kind in ("conv1d_transposed", "embedding"):
        return weight.mT
    return weight.flatten(1)
