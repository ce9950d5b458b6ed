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
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?:\.(?!weight$)[A-Za-z0-9_-]+)?(?P<weight>\.weight)?"
)
_MODEL_PREFIXES = (
    "albert", "bert", "camembert", "deberta", "distilbert", "electra", "esm", "gpt_neox", "longformer", "model", "mpnet",
    "roberta", "vit", "xlm_roberta", "dinov2", "clip", "beit", "deit", "swin", "wav2vec2", "hubert", "whisper",
)  # fmt: skip
"""Attribute under which a task model of transformers keeps its bare model."""
_GPT = re.compile(r"transformer\.(?=h\.|wte|wpe|ln_f)")
"""GPT models call theirs ``transformer``, which in DistilBERT is a part of the bare model."""


@dataclass(frozen=True)
class LoraKey:
    """One LoRA tensor's place."""

    module: str
    part: str
    """A or B."""
    embedding: bool


def parse_key(key: str) -> LoraKey | None:
    """Return the place of a LoRA tensor, or None for any other tensor."""
    match = _LORA.fullmatch(key.removeprefix(WRAPPER))
    if match is None:
        return None
    return LoraKey(match["module"], match["part"], embedding=match["embedding"] is not None)


def site_of(module: str) -> str:
    """Return the site of a module: its path in the bare model."""
    first, _, rest = module.partition(".")
    if rest and first in _MODEL_PREFIXES:
        return rest
    return _GPT.sub("", module, count=1) if _GPT.match(module) else module


def tensor_key(module: str, part: str, embedding: bool) -> str:
    """Return the name under which PEFT expects a LoRA tensor."""
    return f"{WRAPPER}{module}.lora_embedding_{part}" if embedding else f"{WRAPPER}{module}.lora_{part}.weight"
