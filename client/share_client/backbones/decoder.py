"""Language models that predict the next token: any Hugging Face directory of a causal language model, offline.

The sites are those of the bare model inside, so that a decoder has one space whatever is trained on it: next tokens,
or labels of whole texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_client.backbone_config import BackboneConfig
from share_client.backbones.backbone import Batch, DecoderBackbone
from share_client.backbones.huggingface import HuggingFaceBackbone
from share_core.errors import ConfigError


class HuggingFaceDecoder(HuggingFaceBackbone, DecoderBackbone):
    """A causal language model: the bare model, and beside it the frozen map from hidden states to tokens."""

    AUTO = "AutoModelForCausalLM"

    def __init__(self, config: BackboneConfig, device: str = "auto") -> None:
        super().__init__(config, device)
        end = self._tokenizer.eos_token_id
        self.end = None if end is None else int(end)
        self.has_template = bool(getattr(self._tokenizer, "chat_template", None))
        self.vocabulary = int(self.whole.get_output_embeddings().weight.shape[0])
        self._check_scores()

    def _check_scores(self) -> None:
        """Refuse a model that makes scores of hidden states otherwise than :meth:`scores` does.

        Raises:
            ConfigError: such as one that scales them by a number of its own.
        """
        tokens = torch.tensor([[0, 1]], device=self.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.inference_mode():
            ours, theirs = self.scores(self.hidden(inputs)).float(), self.whole(**inputs).logits.float()
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max())):
            raise ConfigError(
                f"backbone {self.name}: expected a model whose scores are its output map of the last hidden states, "
                f"got {type(self.whole).__name__}, which changes them on the way: use another model"
            )

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states (rows, tokens, width)."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        out: Tensor = self.module(**inputs).last_hidden_state
        return out

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the score of every token of the vocabulary, (..., vocabulary), of hidden states (..., width)."""
        out: Tensor = self.whole.get_output_embeddings()(hidden)
        softcap = getattr(self.whole.config, "final_logit_softcapping", None)
        return out if softcap is None else softcap * torch.tanh(out / softcap)

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Return the tokens of a text, with what the tokenizer puts before a text only where it is a start."""
        return [int(token) for token in self._tokenizer(text, add_special_tokens=start)["input_ids"]]

    def render(self, messages: Sequence[Mapping[str, str]], reply: bool) -> str:
        """Return a conversation by the tokenizer's chat template; ``reply``: up to where the next reply starts.

        Raises:
            ConfigError: the template refuses such a conversation.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(one) for one in messages], add_generation_prompt=reply, tokenize=False
                )
            )
        except Exception as error:  # templates raise errors of jinja2 and of their own
            # Not chained and not quoted: a template may show the conversation.
            raise ConfigError(
                f"the chat template of {self.name} refuses the conversation with {type(error).__name__}; it may want "
                "turns of user and assistant one after the other, or no system message"
            ) from None


def is_decoder(directory: Path) -> bool:
    """Return whether a directory says that it holds a whole causal language model.

    Raises:
        ConfigError: transformers is not installed.
    """
    if not (directory / "config.json").is_file():
        return False
    try:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise ConfigError("Hugging Face backbones need transformers: pip install 'fedshare[text]'") from error
    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return False  # loading says what is wrong
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return known is not None and known in (config.architectures or [])
