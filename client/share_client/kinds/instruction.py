"""Instruction tuning: the response to a prompt, or the last turn of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from share_client import values
from share_client.backbones import Backbone, DecoderBackbone
from share_client.data import Field, Table, read_splits
from share_client.kinds.kind import PreparedTask
from share_client.kinds.next_token import NextToken, Tokens, decoder, token_rows
from share_client.tasks_file import TaskConfig, read_options
from share_core.errors import ConfigError

FIELDS = tuple(
    Field(name, (type_,), required=False) for name, type_ in (("prompt", str), ("response", str), ("messages", list))
)
"""What a row holds: prompt and response, or messages, each with ``role`` and ``content``."""
ROLES = ("system", "user", "assistant")


class Instruction(NextToken):
    """The tokens of a response, from the prompt and those before it; the prompt itself is not learned."""

    name = "instruction"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read, render and tokenise both files.

        Raises:
            ConfigError: unreadable data, neither or both forms of a row, an empty prompt or response, a conversation
                that the chat template does not take, an unknown option, or a backbone that predicts no next token.
        """
        takes = decoder(config, backbone)
        options = read_options(config, {"separator": values.text, "template": values.boolean})
        template = bool(options.get("template", takes.has_template))
        if template and not takes.has_template:
            raise ConfigError(
                f"task {config.name!r}: options: template: expected false, as the tokenizer of {takes.name} has no "
                "chat template, got true"
            )
        separator = None if template else str(options.get("separator", "\n"))
        train, test = (
            token_rows([_tokens(table, row, takes, config.max_length, separator) for row in range(table.rows)], takes)
            for table in read_splits(config, FIELDS)
        )
        return PreparedTask(config=config, kind=self, train=train, test=test, classes=())

    def details(self, judged: Tensor) -> Mapping[str, float]:
        """Return perplexity, and the fraction of rows whose response is right from first to last token.

        Those are the rows for which greedy decoding gives the response itself: as long as every token is the likeliest
        one, what it has written is what was given here.
        """
        exact = (judged[:, 1] == judged[:, 2]).to(torch.float64).mean()
        return {**super().details(judged), "exact_match": float(exact)}


def _tokens(table: Table, row: int, backbone: DecoderBackbone, longest: int, separator: str | None) -> Tokens:
    """Return one row; where it is too long, the start of the prompt goes first, and then the end of the response."""
    where = table.where(row)
    if separator is None:
        given, predicted = _rendered(_messages(table, row), backbone, where)
    elif "messages" in table.columns:
        raise ConfigError(
            f"{where}: messages: expected prompt and response, as {backbone.name} renders no conversations: its "
            "tokenizer has no chat template, or options.template is false; got messages"
        )
    else:
        prompt, response = _pair(table, row)
        given = backbone.encode(f"{prompt}{separator}")
        if given and given[-1] == backbone.end:  # some tokenizers end every text
            given = given[:-1]
        predicted = backbone.encode(response, start=False)
        if backbone.end is not None:
            predicted = [*predicted, backbone.end]
    if not given or not predicted:
        what = "response" if given else "prompt"
        raise ConfigError(f"{where}: {what}: expected at least one token, got none; fill it in or take the row out")
    predicted = predicted[: longest - 1]
    return Tokens(given[-(longest - len(predicted)) :], predicted)


def _pair(table: Table, row: int) -> tuple[str, str]:
    found = {name: values_[row] for name, values_ in table.columns.items()}
    if set(found) != {"prompt", "response"}:
        raise ConfigError(
            f"{table.path}: expected the columns prompt and response, or messages, got "
            f"{', '.join(sorted(found)) or 'none of them'}; name them in the [[task]]: "
            'columns = { prompt = "...", response = "..." }'
        )
    for name, text in found.items():
        if not text:
            raise ConfigError(f"{table.where(row)}: {name}: expected text, got none; fill it in or take the row out")
    return found["prompt"], found["response"]


def _messages(table: Table, row: int) -> Sequence[Mapping[str, str]]:
    """Return the conversation of a row, whose last message is the response."""
    if set(table.columns) != {"messages"}:
        prompt, response = _pair(table, row)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    messages: list[Any] = table.columns["messages"][row]
    where = f"{table.where(row)}: messages"
    for number, one in enumerate(messages):
        good = isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str)
        if not good:
            raise ConfigError(
                f"{where}: number {number}: expected role (one of {', '.join(ROLES)}) and content (a string), got "
                "something else"
            )
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise ConfigError(
            f"{where}: expected at least two, the last with role assistant and some content, which is what is learned; "
            "got another; take the row out, or cut it behind a message of the assistant"
        )
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def _rendered(
    messages: Sequence[Mapping[str, str]], backbone: DecoderBackbone, where: str
) -> tuple[list[int], list[int]]:
    """Return the tokens up to where the response starts, and those of the response."""
    try:
        prompt, whole = backbone.render(messages[:-1], True), backbone.render(messages, False)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not whole.startswith(prompt):
        raise ConfigError(
            f"{where}: expected a chat template that renders a conversation as its prompt and what follows, got one of "
            f"{backbone.name} that changes the prompt once there is a response; set options.template = false, with "
            "prompt and response"
        )
    return backbone.encode(prompt, start=False), backbone.encode(whole[len(prompt) :], start=False)
