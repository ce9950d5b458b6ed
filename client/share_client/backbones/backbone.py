"""What training asks of a backbone: a frozen encoder with named adaptable matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from share_client.backbones.places import Place, place_of
from share_core.errors import ConfigError

Batch = Mapping[str, Tensor]
"""Inputs of one step by name, rows first."""


class Backbone(ABC):
    """A frozen encoder. Training injects adapters at its sites and takes them out again; it never changes it."""

    name: str
    """For people; the identity is the fingerprint of :meth:`site_weights`."""
    module: nn.Module
    """Frozen, in evaluation mode, on :attr:`device`."""
    sites: tuple[str, ...]
    """Module paths of the adapted linear maps and convolutions inside :attr:`module`."""
    width: int
    """Length of one row's feature vector."""
    device: torch.device
    """Where the module lives."""

    def site_weights(self) -> dict[str, Tensor]:
        """Return the frozen weight of every site as a matrix (d_out, d_in), by name, on the CPU."""
        return {site: self.site(site).matrix().detach().to("cpu") for site in self.sites}

    def site(self, site: str) -> Place:
        """Return the frozen module at a site, with the shape of its weight as a matrix.

        Raises:
            ConfigError: the module there cannot be adapted.
        """
        return place_of(site, self.module.get_submodule(site))

    @abstractmethod
    def features(self, batch: Batch) -> Tensor:
        """Return features (rows, width) of a batch that is on :attr:`device`."""


class ImageBackbone(Backbone):
    """A backbone that takes ``batch["pixels"]`` (rows, channels, height, width)."""

    image_shape: tuple[int, int, int]
    """(channels, height, width) it was made for."""


@dataclass(frozen=True)
class WordTokens:
    """The tokens of one row that is cut into words already."""

    columns: Mapping[str, list[int]]
    """Token columns by name, unpadded."""
    words: Sequence[int]
    """Of each token the index of the word it belongs to, -1 where there is none: those that the tokenizer adds."""


class TextBackbone(Backbone):
    """A backbone that takes ``input_ids`` and ``attention_mask`` (rows, tokens)."""

    positions: int | None = None
    """Most tokens of a row, where there are only so many."""

    @abstractmethod
    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> list[dict[str, list[int]]]:
        """Return the unpadded token columns of every row, cut to ``max_length`` tokens."""

    @abstractmethod
    def tokenize_words(self, rows: Sequence[Sequence[str]]) -> list[WordTokens]:
        """Return the tokens of rows that are cut into words already, none left out.

        Raises:
            ConfigError: the tokenizer does not tell where its tokens are in a text.
        """

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Return a batch on the CPU, padded behind to its longest row."""

    @abstractmethod
    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states (rows, tokens, width)."""


class DecoderBackbone(TextBackbone):
    """A text backbone that also predicts the next token; a hidden state sees only the tokens up to its own."""

    end: int | None
    """The token that ends a text, where there is one."""
    has_template: bool
    """Whether conversations can be rendered."""
    vocabulary: int
    """Number of tokens that are scored."""

    @abstractmethod
    def scores(self, hidden: Tensor) -> Tensor:
        """Return the score of every token of the vocabulary to come next, (..., vocabulary), of (..., width)."""

    @abstractmethod
    def encode(self, text: str, start: bool = True) -> list[int]:
        """Return the tokens of a text; ``start``: with what the tokenizer puts around a whole text."""

    @abstractmethod
    def render(self, messages: Sequence[Mapping[str, str]], reply: bool) -> str:
        """Return a conversation as the one text that the model was taught; ``reply``: up to where the next one starts.

        Raises:
            ConfigError: the template refuses such a conversation.
        """


def choose_device(device: str) -> torch.device:
    """Return the torch device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: another word, or ``cuda`` where torch sees none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device: expected a CUDA device, torch sees none; use device = "auto" or "cpu"')
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def freeze(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module on ``device``, in evaluation mode, with no parameter asking for a gradient."""
    module.to(device)
    module.eval()
    return module.requires_grad_(False)
