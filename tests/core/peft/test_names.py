"""Tensor names, and one site name per weight whatever model class it was trained in."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

from share_core.peft.names import LoraKey, parse_key, site_of, tensor_key

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "pad_token_id": 0,
}
FAMILIES = [
    ("Bert", "BertForSequenceClassification", "BertModel", TINY),
    ("Roberta", "RobertaForMaskedLM", "RobertaModel", TINY),
    ("Albert", "AlbertForSequenceClassification", "AlbertModel", TINY),
    ("Electra", "ElectraForTokenClassification", "ElectraModel", TINY),
    ("MPNet", "MPNetForSequenceClassification", "MPNetModel", TINY),
    ("DebertaV2", "DebertaV2ForSequenceClassification", "DebertaV2Model", TINY),
    ("Esm", "EsmForSequenceClassification", "EsmModel", TINY),
    ("XLMRoberta", "XLMRobertaForSequenceClassification", "XLMRobertaModel", TINY),
    ("DistilBert", "DistilBertForSequenceClassification", "DistilBertModel", {"dim": 16, "n_layers": 1, "n_heads": 2}),
    ("ViT", "ViTForImageClassification", "ViTModel", TINY),
    ("Dinov2", "Dinov2ForImageClassification", "Dinov2Model", TINY),
    ("Wav2Vec2", "Wav2Vec2ForCTC", "Wav2Vec2Model", TINY),
    ("GPT2", "GPT2LMHeadModel", "GPT2Model", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    (
        "GPTNeo",
        "GPTNeoForCausalLM",
        "GPTNeoModel",
        {"hidden_size": 16, "num_layers": 1, "attention_types": [[["global"], 1]]},
    ),
    ("GPTNeoX", "GPTNeoXForCausalLM", "GPTNeoXModel", TINY),
    ("Bloom", "BloomForCausalLM", "BloomModel", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
    ("Falcon", "FalconForCausalLM", "FalconModel", TINY),
    ("Mpt", "MptForCausalLM", "MptModel", {"d_model": 16, "n_layers": 1, "n_heads": 2}),
    ("Llama", "LlamaForCausalLM", "LlamaModel", TINY),
    ("Qwen2", "Qwen2ForSequenceClassification", "Qwen2Model", TINY),
    ("OPT", "OPTForCausalLM", "OPTModel", {**TINY, "ffn_dim": 16, "word_embed_proj_dim": 16}),
    ("Mamba", "MambaForCausalLM", "MambaModel", {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20}),
    ("XLNet", "XLNetLMHeadModel", "XLNetModel", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}),
    ("Bart", "BartForConditionalGeneration", "BartModel", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}),
    ("T5", "T5ForConditionalGeneration", "T5Model", {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}),
    (
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperModel",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
    ),
]


def weights(model: nn.Module) -> set[str]:
    """Return the modules that LoRA can adapt."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize(("config", "task", "bare", "options"), FAMILIES, ids=[f[1] for f in FAMILIES])
def test_a_task_model_and_its_bare_model_have_the_same_sites(
    config: str, task: str, bare: str, options: dict[str, object]
) -> None:
    with torch.device("meta"):
        made = getattr(transformers, f"{config}Config")(**options)
        task_modules = weights(getattr(transformers, task)(made))
        bare_modules = weights(getattr(transformers, bare)(made))
    bare_sites, task_sites = {site_of(m) for m in bare_modules}, {site_of(m) for m in task_modules}
    assert bare_sites == bare_modules, "a bare model's own names are the sites"
    optional = {site for site in bare_sites if site.startswith("pooler.")}
    assert bare_sites - task_sites <= optional
    assert len(task_sites) == len(task_modules), "no two modules become one site"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("base_model.model.a.b.lora_A.weight", LoraKey("a.b", "A", False)),
        ("base_model.model.a.b.lora_B.default.weight", LoraKey("a.b", "B", False)),
        ("base_model.model.a.lora_embedding_A", LoraKey("a", "A", True)),
        ("base_model.model.a.lora_embedding_B.default", LoraKey("a", "B", True)),
        ("a.lora_A.weight", LoraKey("a", "A", False)),
        ("base_model.model.model.layers.0.lora_A.weight", LoraKey("model.layers.0", "A", False)),
        ("base_model.model.a.lora_A.bias", None),
        ("base_model.model.a.lora_B.default.bias", None),
        ("base_model.model.a.lora_A", None),
        ("base_model.model.a.lora_A.x.y.weight", None),
        ("base_model.model.a.lora_C.weight", None),
        ("base_model.model.lora_A.weight", None),
        ("base_model.model.a.lora_magnitude_vector", None),
        ("base_model.model.classifier.weight", None),
        ("base_model.model.a\n.lora_A.weight", None),
        ("", None),
    ],
)
def test_keys(key: str, expected: LoraKey | None) -> None:
    assert parse_key(key) == expected


@pytest.mark.parametrize("embedding", [True, False])
def test_written_keys_are_read_again(embedding: bool) -> None:
    assert parse_key(tensor_key("bert.x.y", "B", embedding)) == LoraKey("bert.x.y", "B", embedding)


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("bert.encoder.layer.0.query", "encoder.layer.0.query"),
        ("distilbert.transformer.layer.0.q_lin", "transformer.layer.0.q_lin"),
        ("transformer.layer.0.q_lin", "transformer.layer.0.q_lin"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("transformer.wte", "wte"),
        ("transformer.layer.0.ff.layer_1", "layer.0.ff.layer_1"),
        ("transformer.layer.0.ffn.lin1", "transformer.layer.0.ffn.lin1"),
        ("0.auto_model.encoder.layer.0.query", "encoder.layer.0.query"),
        ("bert", "bert"),
        ("model", "model"),
        ("bertha.layer", "bertha.layer"),
        ("classifier", "classifier"),
        ("encoder.bert.layer", "encoder.bert.layer"),
    ],
)
def test_sites(module: str, site: str) -> None:
    assert site_of(module) == site
    assert re.sub(r"^.*?(?=" + re.escape(site) + "$)", "", module) == site, "only the front is cut"
