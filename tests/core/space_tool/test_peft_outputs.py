"""From PEFT through ``share-space`` back to PEFT: while the directions fit, no output of a model changes.

Planted bugs: a scale that is forgotten, and a space whose cap is too small.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
TOKENS = 30
TOLERANCE = 2e-5
"""Relative; models, factors and bases are float32."""


class Convolution(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, 6)
        self.conv = nn.Conv2d(1, 4, (3, 2))
        self.end = nn.Linear(4, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.conv(self.table(input_ids).unsqueeze(1))
        result: Tensor = self.end(torch.tanh(x).mean((2, 3)))
        return result


def _model(name: str) -> nn.Module:
    torch.manual_seed(3)
    small: dict[str, Any] = {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    makers: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: BertModel(BertConfig(**small, intermediate_size=24, max_position_embeddings=16)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
        "convolution": Convolution,
    }
    return makers[name]().eval()


CASES: dict[str, list[dict[str, Any]]] = {
    "bert": [
        {"r": 4, "lora_alpha": 10, "target_modules": ["query", "value"]},
        {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["query", "key"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["query"], "rank_pattern": {"layer.1.attention.self.query": 5}},
    ],
    "gpt2": [
        {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"r": 2, "lora_alpha": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ],
    "convolution": [
        {"r": 2, "lora_alpha": 5, "target_modules": ["table", "conv", "end"]},
        {"r": 1, "lora_alpha": 3, "target_modules": ["conv"]},
    ],
}


def _made(model: str, lora: dict[str, Any], folder: Path, seed: int) -> Path:
    """Save a random adapter with PEFT."""
    adapted = get_peft_model(_model(model), LoraConfig(**lora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def _output(model: str, adapter: Path) -> Tensor:
    loaded = PeftModel.from_pretrained(_model(model), str(adapter)).eval()
    with torch.no_grad():
        result = loaded(input_ids=torch.arange(2 * 8).reshape(2, 8) % TOKENS)
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def _there_and_back(run: Any, model: str, folder: Path, *limits: object) -> list[float]:
    """Return by how much each task's output changed, relative to its largest entry."""
    sources = [_made(model, lora, folder / f"t{i}", 11 + i) for i, lora in enumerate(CASES[model])]
    assert run("merge", *sources, "-o", folder / "space", *limits).code == 0
    changes = []
    for source in sources:
        back = folder / f"{source.name}-back"
        assert run("export", folder / "space", source.name, "-o", back).code == 0
        before, after = _output(model, source), _output(model, back)
        changes.append(float((after - before).abs().max() / before.abs().max()))
    return changes


@pytest.mark.parametrize("limit", [("--cap", 64), ("--budget", 0)])
@pytest.mark.parametrize("model", CASES)
def test_no_output_changes_while_the_directions_fit(
    model: str, limit: tuple[str, object], run: Any, tmp_path: Path
) -> None:
    assert max(_there_and_back(run, model, tmp_path, *limit)) < TOLERANCE
    outputs = [_output(model, tmp_path / f"t{i}") for i in range(len(CASES[model]))]
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-2  # the tasks differ, so mixing them up would show


def test_a_cap_that_is_too_small_changes_outputs(run: Any, tmp_path: Path) -> None:
    assert max(_there_and_back(run, "bert", tmp_path, "--cap", 2)) > 100 * TOLERANCE


def test_a_forgotten_scale_changes_outputs(run: Any, tmp_path: Path) -> None:
    with mock.patch("share_core.peft.config.PeftConfig.scale_of", lambda self, module: 1.0):
        assert max(_there_and_back(run, "bert", tmp_path)) > 100 * TOLERANCE
