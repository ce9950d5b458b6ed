"""Names of tensors in an adapter file, and the one name a module gets whatever model class it was trained in.

PEFT writes ``base_model.model.<module>.lora_A.weight`` (older versions ``lora_A.default.weight``), and for embeddings
``lora_embedding_A`` without ``.weight``. ``<module>`` depends on the class: ``bert.encoder...`` in a classifier is
``encoder...`` in the bare encoder. PEFT itself loads the one into the other without an exception and leaves every B
zero; here both are the same **site**.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WRAPPER = "base_model.model."
_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?!weight$)[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>[AB])(?:\.[^.]+)?")

_PREFIXES = frozenset((
    "albert", "audio_spectrogram_transformer", "beit", "bert", "biogpt", "bit", "camembert", "canine", "clap", "clip",
    "convbert", "convnext", "convnextv2", "data2vec_audio", "data2vec_text", "data2vec_vision", "deberta", "deit",
    "dinat", "dinov2", "dinov2_with_registers", "distilbert", "efficientnet", "electra", "ernie", "esm", "flaubert",
    "fnet", "focalnet", "funnel", "gpt_neox", "gpt_neox_japanese", "hiera", "hubert", "ibert", "ijepa", "layoutlm",
    "layoutlmv2", "layoutlmv3", "led", "levit", "lilt", "longformer", "luke", "lxmert", "markuplm", "mobilebert",
    "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "model", "mpnet", "mra", "nomic_bert", "nystromformer",
    "perceiver", "poolformer", "prophetnet", "pvt", "pvt_v2", "reformer", "regnet", "rembert", "resnet", "roberta",
    "roberta_prelayernorm", "roc_bert", "roformer", "rwkv", "segformer", "sew", "siglip", "splinter", "squeezebert",
    "swiftformer", "swin", "swinv2", "tapas", "timesformer", "unispeech", "videomae", "vilt", "visual_bert", "vit",
    "vit_mae", "vit_msn", "vivit", "wav2vec2", "wav2vec2_bert", "wav2vec2_conformer", "wavlm", "xlm_roberta", "xmod",
    "yoso",
))  # fmt: skip
"""``base_model_prefix`` of transformers: the attribute under which a task model keeps its bare model. Left out are
those that are also a part of some bare model (``encoder``, ``decoder``, ``vision_model``, ``backbone``)."""
_AMBIGUOUS = re.compile(
    r"transformer\.(?=(?:h|blocks|attentions|ffns)\.\d|(?:wte|wpe|ln_f|word_embeddings?|embeddings)$|layer\.\d+\.(?:rel_attn|ff)\.)"
    r"|backbone\.(?=layers\.\d+\.mixer|embeddings$)"
    r"|0\.auto_model\."
)
"""Prefixes by what follows: GPT-2's ``transformer`` is a prefix, DistilBERT's is a part of the bare model; Mamba's
``backbone``; a SentenceTransformer's first module."""


@dataclass(frozen=True)
class LoraKey:
    """One LoRA tensor's place."""

    module: str
    """Path of the adapted module in the model."""
    part: str
    """A or B."""
    embedding: bool


def parse_key(key: str) -> LoraKey | None:
    """Return the place of a LoRA tensor, or None for any other tensor."""
    name = key.removeprefix(WRAPPER)
    if match := _LINEAR.fullmatch(name):
        return LoraKey(match["module"], match["part"], embedding=False)
    if match := _EMBEDDING.fullmatch(name):
        return LoraKey(match["module"], match["part"], embedding=True)
    return None


def site_of(module: str) -> str:
    """Return the site of a module: its path in the bare model."""
    first, _, rest = module.partition(".")
    if rest and first in _PREFIXES:
        return rest
    match = _AMBIGUOUS.match(module)
    return module[match.end() :] if match else module


def tensor_key(module: str, part: str, embedding: bool) -> str:
    """Return the name under which PEFT expects a LoRA tensor."""
    return f"{WRAPPER}{module}.lora_embedding_{part}" if embedding else f"{WRAPPER}{module}.lora_{part}.weight"
