"""Token classification: a tag for every word of a text, as for names, parts of speech or redaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone, Batch, DecoderBackbone, TextBackbone
from share_client.data import Field, Table, read_splits
from share_client.kinds.kind import Kind, PreparedTask
from share_client.kinds.texts import TextRows, micro_f1, strings_of, text_backbone
from share_client.tasks_file import TaskConfig, read_options
from share_core.errors import ConfigError

FIELDS = (Field("words", (list,)), Field("tags", (list,)))
"""What a row holds: the words of a text, and a tag for each."""
_NONE = -100
"""Target of a token that has no tag: PyTorch's cross entropy leaves it out."""
_PREFIXES = frozenset("BIESLU")
_BEGIN, _END = "BSU", "ESLU"
"""Prefixes of a tag that begin a span whatever was before, and that end one whatever follows."""


@dataclass(frozen=True)
class TokenClassification(Kind):
    """A tag for every word. What is measured are whole spans: type, first and last word must be right."""

    tags: tuple[str, ...] = ()
    """In order of their index."""

    name = "token-classification"
    metric = "span-f1"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read and tokenise both files.

        Raises:
            ConfigError: unreadable data, words and tags that are no strings or not as many, a row with more tokens than
                ``max_length``, a word without tokens, a tag that no training row has, an option, or a backbone that
                takes no text.
        """
        takes = text_backbone(config, backbone)
        read_options(config, {})
        train, test = read_splits(config, FIELDS)
        tags = _tags(train, test, config)
        return PreparedTask(
            config=config,
            kind=TokenClassification(tags),
            train=_rows(train, tags, takes, config),
            test=_rows(test, tags, takes, config),
            classes=tags,
        )

    def head(self, task: PreparedTask, width: int) -> nn.Module:
        """Return a linear map from the hidden state of a token to one score for each tag."""
        return nn.Linear(width, len(task.classes))

    def outputs(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of every token, (rows, tokens, tags)."""
        assert isinstance(backbone, TextBackbone), "prepare has checked it"
        out: Tensor = head(backbone.hidden(batch))
        return out

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over rows of each row's mean cross entropy over its words.

        Long rows weigh no more than short ones: so the loss of a row does not depend on the others in its batch.
        """
        targets = targets[:, : outputs.shape[1]]
        costs = nn.functional.cross_entropy(outputs.float().mT, targets, ignore_index=_NONE, reduction="none")
        return (costs.sum(dim=1) / (targets != _NONE).sum(dim=1)).mean()

    def judge(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return of each row the spans found, in error and missed, its right words and all words, (rows, 5)."""
        targets, tags = targets[:, : outputs.shape[1]].cpu(), _typed(self.tags)
        judged = []
        for said, true in zip(outputs.argmax(dim=2).cpu(), targets, strict=True):
            scored = true != _NONE
            both = [[tags[tag] for tag in row[scored].tolist()] for row in (said, true)]
            ours, theirs = (spans(one) for one in both)
            found, right = len(ours & theirs), sum(one == other for one, other in zip(*both, strict=True))
            judged.append([found, len(ours) - found, len(theirs) - found, right, len(both[0])])
        return torch.tensor(judged)

    def score(self, judged: Tensor) -> float:
        """Return micro F1 over spans, as conlleval and seqeval do."""
        return micro_f1(judged)

    def details(self, judged: Tensor) -> Mapping[str, float]:
        """Return the fraction of words with the right tag."""
        _, _, _, right, words = judged.double().sum(dim=0).tolist()
        return {"word_accuracy": right / words}


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the spans in the tags of a row: type, first word, word after the last.

    Tags are ``O`` for nothing, or a prefix, a hyphen and the type: IOB1, IOB2, IOBES and BILOU are read, by the rules
    of conlleval (CoNLL-2000), under which an I that nothing begins begins a span. Another tag is a span of one word, so
    that for parts of speech F1 over spans is the accuracy of words.
    """
    found = set()
    kind, first, open_ = "", 0, False
    for place, tag in enumerate([*tags, "O"]):
        prefix, hyphen, rest = tag.partition("-")
        if not (hyphen and prefix in _PREFIXES):
            prefix, rest = ("O", "") if tag == "O" else ("U", tag)
        if open_ and (prefix in "O" + _BEGIN or rest != kind):
            found.add((kind, first, place))
            open_ = False
        if prefix != "O":
            kind, first = rest, first if open_ else place
            open_ = prefix not in _END
            if not open_:
                found.add((kind, first, place + 1))
    return found


def _typed(tags: Sequence[str]) -> Sequence[str]:
    """Return the tags, with a hyphen behind bare prefixes where there are no others: spans of one nameless type."""
    return [tag if tag == "O" else f"{tag}-" for tag in tags] if {*tags} <= _PREFIXES | {"O"} else tags


def _tags(train: Table, test: Table, config: TaskConfig) -> tuple[str, ...]:
    """Return the sorted tags of both splits, every row of which has as many tags as words.

    Raises:
        ConfigError: it has not, there is only one tag, or test rows have one that no training row has.
    """
    found = []
    for table in (train, test):
        words, tags = strings_of(table, "words"), strings_of(table, "tags")
        for row, (some, own) in enumerate(zip(words, tags, strict=True)):
            if not some or len(some) != len(own):
                raise ConfigError(
                    f"{table.where(row)}: tags: expected one for each word, and at least one word, got {len(own)} for "
                    f"{len(some)}; mend the row or take it out"
                )
        found.append(tags)
    known = {tag for row in found[0] for tag in row}
    for row, own in enumerate(found[1]):
        if not known.issuperset(own) and config.rows is None:
            raise ConfigError(
                f"{test.where(row)}: tags: expected some of the {len(known)} tags of the training rows, got another: "
                "it cannot be learned; add training rows of it, or take it out"
            )
    whole = known.union(*found[1])
    if len(whole) < 2:
        raise ConfigError(f"{config.train}: tags: expected at least two different ones, got one")
    return tuple(sorted(whole))


def _rows(table: Table, tags: Sequence[str], backbone: TextBackbone, config: TaskConfig) -> TextRows:
    """Tokenise the rows. A word's first token has its tag as target; in a decoder the last, which has seen the word."""
    index = {tag: number for number, tag in enumerate(tags)}
    rows = backbone.tokenize_words(strings_of(table, "words"))
    found: list[dict[int, int]] = []
    for number, (row, own) in enumerate(zip(rows, strings_of(table, "tags"), strict=True)):
        if len(row.words) > config.max_length:
            raise ConfigError(
                f"{table.where(number)}: words: expected at most max_length = {config.max_length} tokens, got "
                f"{len(row.words)}; set max_length in tasks.toml, or cut the row in two"
            )
        places = list(enumerate(row.words))
        # Of several places of a word the last that is written down stays.
        at = {word: place for place, word in (places if isinstance(backbone, DecoderBackbone) else reversed(places))}
        for word in range(len(own)):
            if word not in at:
                raise ConfigError(
                    f"{table.where(number)}: words: expected words with a token of their own, got one, number "
                    f"{word + 1}, which the tokenizer of {backbone.name} drops or joins with the next; take it out "
                    "with its tag, or make one word of both"
                )
        found.append({at[word]: index[tag] for word, tag in enumerate(own)})
    targets = torch.full((len(rows), max(len(row.words) for row in rows)), _NONE)
    for number, wanted in enumerate(found):
        targets[number, list(wanted)] = torch.tensor(list(wanted.values()))
    return TextRows([row.columns for row in rows], targets, backbone)
