"""A backbone that the client's own code makes: ``model = "package.module:factory"``."""

from __future__ import annotations

import torch
from torch import nn

from share_client.backbone_config import BackboneConfig
from share_client.backbones.backbone import Backbone
from share_client.backbones.modules import ModuleBackbone
from share_client.backbones.weights import load_weights
from share_client.imports import import_object
from share_core.errors import ConfigError


def load(config: BackboneConfig, device: str) -> Backbone:
    """Call the factory, which returns a module from pixels (rows, channels, height, width) to features (rows, width).

    A factory may return a :class:`~.backbone.Backbone` instead; it is taken as it is.

    Raises:
        ConfigError: it cannot be imported or called, returns something else, or ``sites`` or ``image`` is missing.
    """
    where = f"backbone {config.model}"
    factory = import_object(config.model, where)
    if not callable(factory):
        raise ConfigError(f"{where}: expected a function without arguments, got {type(factory).__name__}")
    with torch.random.fork_rng(devices=[]):
        made = factory()
    if isinstance(made, Backbone):
        if config.weights or config.sites or config.image:
            raise ConfigError(f"{where}: it returns a whole Backbone: take weights, sites and image out of [backbone]")
        return made
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{where}: expected it to return a torch.nn.Module, got {type(made).__name__}")
    if config.sites is None or config.image is None:
        key = "sites" if config.sites is None else "image"
        raise ConfigError(
            f"{where}: key {key} is missing: a module does not say which of its parts to adapt nor what it takes; add "
            'sites = ["NAME"] and image = [channels, height, width] to [backbone]'
        )
    if config.weights is not None:
        load_weights(made, config.weights)
    return ModuleBackbone(config.model, made, config.sites, config.image, device)
