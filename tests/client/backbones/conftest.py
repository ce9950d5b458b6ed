"""Model directories made here: random weights, the layout of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a maker of tiny Hugging Face directories by type of model, each made once."""
    pytest.importorskip("transformers", reason="Hugging Face models need transformers")
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type.replace("-", "_"))
            _save(model_type, made[model_type])
        return made[model_type]

    return make


def _save(model_type: str, folder: Path) -> None:
    import transformers as hf

    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    text = {**small, "vocab_size": 8, "max_position_embeddings": 16}
    configs: dict[str, Any] = {
        "bert": lambda: hf.BertConfig(**text),
        "wide-bert": lambda: hf.BertConfig(**{**text, "hidden_size": 64, "intermediate_size": 64}),
        "roberta": lambda: hf.RobertaConfig(**text),
        "distilbert": lambda: hf.DistilBertConfig(vocab_size=8, dim=16, n_layers=2, n_heads=2, hidden_dim=16),
        "gpt2": lambda: hf.GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=8, n_positions=16, bos_token_id=0, eos_token_id=0
        ),
        "llama": lambda: hf.LlamaConfig(**text, num_key_value_heads=2, bos_token_id=0, eos_token_id=0),
        "t5": lambda: hf.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        "clip": lambda: hf.CLIPConfig(
            text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=16
        ),
        "vit": lambda: hf.ViTConfig(**small, image_size=8, patch_size=4, num_channels=3),
        "resnet": lambda: hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=3),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        auto: Any = hf.AutoModel
        auto.from_config(configs[model_type]()).save_pretrained(folder)
    if model_type in ("vit", "resnet"):
        hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        return
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "red": 2, "blue": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = hf.PreTrainedTokenizerFast
    make(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
