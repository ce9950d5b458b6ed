"""Frozen encoders with named adaptable matrices."""

from __future__ import annotations

from pathlib import Path

from share_client.backbones.backbone import Backbone, Batch, ImageBackbone, TextBackbone

__all__ = ["Backbone", "Batch", "ImageBackbone", "TextBackbone", "load_backbone"]


def load_backbone(name_or_path: str, device: str = "auto") -> Backbone:
    """Load ``digits-vit``, ``minilm`` or a Hugging Face encoder directory; nothing is ever downloaded.

    Args:
        name_or_path: one of the two names, or a directory with ``config.json``.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.

    Raises:
        ConfigError: unknown name, unreadable directory, missing package, or no query and value maps found.
    """
    if name_or_path == "digits-vit":
        from share_client.backbones.digits_vit import DigitsBackbone

        return DigitsBackbone(device)
    from share_client.backbones.huggingface import HuggingFaceBackbone, packaged_minilm

    if name_or_path == "minilm":
        return HuggingFaceBackbone("minilm", packaged_minilm(), device)
    return HuggingFaceBackbone(Path(name_or_path).name, Path(name_or_path), device)
