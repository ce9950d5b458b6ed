"""Adapter directories made by hand, without the PEFT library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

KEY = "base_model.model.encoder.layer.0.query.lora_{}.weight"


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a directory: LoRA of rank 2 at one 6 x 4 linear site, with changes.

    ``config`` replaces keys of the config, ``tensors`` those of the file; a tensor of None is left out.
    """

    def make(
        config: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor | None] | None = None, name: str = "task"
    ) -> Path:
        generator = torch.Generator().manual_seed(3)
        own: dict[str, Tensor | None] = {
            KEY.format("A"): torch.randn(2, 4, generator=generator),
            KEY.format("B"): torch.randn(6, 2, generator=generator),
        }
        directory = tmp_path / name
        directory.mkdir()
        raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], **(config or {})}
        (directory / "adapter_config.json").write_text(json.dumps(raw))
        kept = {key: tensor for key, tensor in {**own, **(tensors or {})}.items() if tensor is not None}
        save_file(kept, directory / "adapter_model.safetensors")
        return directory

    return make
