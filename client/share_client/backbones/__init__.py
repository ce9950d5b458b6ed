"""Frozen encoders with named adaptable matrices."""

from __future__ import annotations

from share_client.backbones.backbone import (
    Backbone,
    Batch,
    DecoderBackbone,
    ImageBackbone,
    TextBackbone,
    WordTokens,
)
from share_client.backbones.registry import load_backbone

__all__ = ["Backbone", "Batch", "DecoderBackbone", "ImageBackbone", "TextBackbone", "WordTokens", "load_backbone"]
