"""Causal language modelling: every next token of each text."""

from __future__ import annotations

from share_client import values
from share_client.backbones import Backbone, DecoderBackbone
from share_client.data import Field, Table, read_splits
from share_client.kinds.kind import PreparedTask
from share_client.kinds.next_token import NextToken, Tokens, decoder, token_rows
from share_client.tasks_file import TaskConfig, read_options
from share_core.errors import ConfigError
from share_core.privacy import SAMPLES

FIELDS = (Field("text", (str,)),)
"""What a row holds."""


class CausalLanguageModelling(NextToken):
    """Every token of a text, from all before it; its end too, where the tokenizer has a token for that."""

    name = "causal-lm"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read and tokenise both files.

        Raises:
            ConfigError: unreadable data, a text of less than two tokens, an unknown option, the option ``split`` with
                DP-SGD, or a backbone that predicts no next token.
        """
        takes = decoder(config, backbone)
        split = bool(read_options(config, {"split": values.boolean}).get("split", False))
        if split and config.privacy is not None and config.privacy.mechanism == SAMPLES:
            raise ConfigError(
                f"task {config.name!r}: options: split: expected false with privacy mechanism {SAMPLES!r}, got true: "
                "it would hide parts of a text and not the whole; cut the file into the rows that are to be hidden"
            )
        train, test = (
            token_rows(
                [row for number in range(table.rows) for row in _tokens(table, number, takes, config, split)], takes
            )
            for table in read_splits(config, FIELDS)
        )
        return PreparedTask(config=config, kind=self, train=train, test=test, classes=())


def _tokens(table: Table, row: int, backbone: DecoderBackbone, config: TaskConfig, split: bool) -> list[Tokens]:
    """Return the row of a text, or those of all its parts."""
    tokens = backbone.encode(table.columns["text"][row])
    if backbone.end is not None and tokens[-1:] != [backbone.end]:
        tokens.append(backbone.end)
    if len(tokens) < 2:
        raise ConfigError(
            f"{table.where(row)}: text: expected at least two tokens, got {len(tokens)}; take the row out"
        )
    # Parts share one token, so that every token but the first is predicted once.
    step = config.max_length - 1
    starts = range(0, len(tokens) - 1, step) if split else range(1)
    parts = [tokens[start : start + config.max_length] for start in starts]
    return [Tokens(part[:1], part[1:]) for part in parts]
