"""A tag for every word: spans, which token speaks for a word, learning, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from share_client.backbones import huggingface
from share_client.kinds import token_classification
from share_client.kinds.token_classification import TokenClassification, spans
from share_client.tasks_file import TaskConfig
from share_client.training import Backbone, TrainingOptions, evaluate, prepare_task, train_lora
from share_core.errors import ConfigError

Maker = Callable[..., TaskConfig]
KIND = "token-classification"
PLACES = ("paris", "rome", "oslo", "lima", "new york", "san marino", "bern", "el paso")
ROWS = [
    {
        "words": [*before.split(), *place.split(), *after.split()],
        "tags": ["O"] * len(before.split())
        + ["B-PLACE", "I-PLACE"][: len(place.split())]
        + ["B-TIME" if word == "tomorrow" else "O" for word in after.split()],
    }
    for place in PLACES
    for before, after in (("rain in", "tomorrow"), ("", "is far"), ("who went to", "and back"))
]
BAD_SPANS: Sequence[Callable[[Sequence[str]], set[tuple[str, int, int]]]] = (
    lambda tags: {(tag[2:], place, place + 1) for place, tag in enumerate(tags) if tag[:2] == "B-"},
    lambda tags: {span for span in token_classification.spans(tags) if tags[span[1]][0] != "I"},
)
"""Planted: spans of one word only; spans that only a B begins."""


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-A I-A O B-A", [("A", 0, 2), ("A", 3, 4)]),
        ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("I-A I-A I-B", [("A", 0, 2), ("B", 2, 3)]),
        ("B-A I-B", [("A", 0, 1), ("B", 1, 2)]),
        ("S-A B-B I-B E-B I-B", [("A", 0, 1), ("B", 1, 4), ("B", 4, 5)]),
        ("U-A B-B L-B E-C", [("A", 0, 1), ("B", 1, 3), ("C", 3, 4)]),
        ("NOUN NOUN O", [("NOUN", 0, 1), ("NOUN", 1, 2)]),
        ("B- I-X-Y I-X-Y X-Z", [("", 0, 1), ("X-Y", 1, 3), ("X-Z", 3, 4)]),
        ("B- I- O E-", [("", 0, 2), ("", 3, 4)]),
    ],
)
def test_spans(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert sorted(spans(tags.split()), key=lambda span: span[1]) == expected


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), max_size=12))
def test_spans_are_those_of_a_pattern(tags: list[str]) -> None:
    """The same rule told otherwise: a B or I of a type, and the I's of it that follow."""
    text = "".join({"O": "o", "B-A": "A", "I-A": "a", "B-B": "B", "I-B": "b"}[tag] for tag in tags)
    expected = {(found.group()[0].upper(), *found.span()) for found in re.finditer("[Aa]a*|[Bb]b*", text)}
    assert spans(tags) == expected


@pytest.mark.parametrize("bug", BAD_SPANS)
def test_the_pattern_catches_a_planted_bug(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "spans", bug)
    with pytest.raises(AssertionError):
        test_spans_are_those_of_a_pattern()


@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9), min_size=1))
def test_score_and_details(rows: list[list[tuple[int, int]]]) -> None:
    tags = ("B-A", "B-B", "I-A", "I-B", "O")
    kind = TokenClassification(tags)
    longest = max(map(len, rows)) + 2
    outputs, targets = torch.zeros(len(rows), longest, 5), torch.full((len(rows), longest + 1), -100)
    for number, row in enumerate(rows):
        for place, (said, true) in enumerate(row, start=1):  # before and after it stand tokens without a word
            outputs[number, place, said] = 1.0
            targets[number, place] = true
    judged = kind.judge(outputs, targets)
    ours, theirs = (
        [(number, span) for number, row in enumerate(rows) for span in spans([tags[pair[which]] for pair in row])]
        for which in (0, 1)
    )
    both = len(set(ours) & set(theirs))
    assert kind.score(judged) == pytest.approx(2 * both / (len(ours) + len(theirs)) if ours or theirs else 1.0)
    pairs = [pair for row in rows for pair in row]
    accuracy = sum(said == true for said, true in pairs) / len(pairs)
    assert kind.details(judged)["word_accuracy"] == pytest.approx(accuracy)


@pytest.fixture(params=["minilm", "llama", "gpt2"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    found: Backbone = request.getfixturevalue(request.param)
    return found


def test_a_word_is_the_text_of_its_tokens(backbone: Any) -> None:
    rows = [["unbelievable", "news", "from", "Łódź", ",", "to", "day"], ["a", "..."], ["naïve  two"]]
    for words, found in zip(rows, backbone.tokenize_words(rows), strict=True):
        ids = found.columns["input_ids"]
        assert len(found.words) == len(ids)
        for number, word in enumerate(words):
            own = [token for token, at in zip(ids, found.words, strict=True) if at == number]
            text = backbone._tokenizer.decode(own).replace(" ", "").lower()
            plain = word.replace(" ", "").lower()
            assert text in (plain, plain.replace("ó", "o").replace("ź", "z").replace("ï", "i"))


def test_the_token_that_speaks_for_a_word(backbone: Any, task_of: Maker) -> None:
    words = ["zymurgical", "antidisestablishment"]
    task = prepare_task(task_of(KIND, [{"words": words, "tags": ["X", "Y"]}]), backbone)
    _, targets = task.train.batch([0], torch.device("cpu"))
    at = [place for place, target in enumerate(targets[0].tolist()) if target != -100]
    assert targets[0, at].tolist() == [0, 1]
    (found,) = backbone.tokenize_words([words])
    own = [[place for place, word in enumerate(found.words) if word == number] for number in (0, 1)]
    assert all(len(places) > 1 for places in own), "words of several tokens, or it shows nothing"
    causal = hasattr(backbone, "vocabulary")
    assert at == [places[-1 if causal else 0] for places in own]


def test_spans_are_learned(llama: Backbone, task_of: Maker) -> None:
    task = prepare_task(task_of(KIND, ROWS), llama)
    assert task.classes == ("B-PLACE", "B-TIME", "I-PLACE", "O")
    options = TrainingOptions(epochs=30, batch_size=8, learning_rate=1e-2)
    trained = train_lora(llama, task, 4, options)
    learned = evaluate(llama, task, trained.adapter, trained.head)
    assert (learned.metric, learned.rows) == ("span-f1", 24)
    assert learned.value > 0.9
    assert learned.details["word_accuracy"] > 0.9
    probe = train_lora(llama, task, 0, options)
    assert evaluate(llama, task, None, probe.head).value < learned.value - 0.1


ROW: Mapping[str, Any] = {"words": ["hidden-word", "b"], "tags": ["X", "O"]}


@pytest.mark.parametrize(
    ("train", "test", "keys", "words"),
    [
        ([{**ROW, "tags": ["X"]}], None, {}, "line 1: tags: expected one for each word.* got 1 for 2"),
        ([ROW, {"words": [], "tags": []}], None, {}, "line 2: tags: .*at least one word, got 0 for 0"),
        ([{**ROW, "tags": [3, 4]}], None, {}, "line 1: tags: expected a list of strings.* got int; write strings"),
        ([{**ROW, "words": "a b"}], None, {}, "line 1: words: expected a list, got str; write it as JSON"),
        ([{**ROW, "tags": ["O", "O"]}], None, {}, "tags: expected at least two different ones, got one"),
        ([ROW], [ROW, {**ROW, "tags": ["hidden-tag", "O"]}], {}, "test.jsonl: line 2: tags: .* got another"),
        (
            [{**ROW, "words": ["a", " "]}],
            None,
            {},
            "line 1: words: .* one, number 2, which the tokenizer of minilm",
        ),
        ([ROW], None, {"max_length": 4}, r"line 1: words: expected at most max_length = 4 tokens, got \d+; set"),
        ([{"text": "a", "tags": ["O"]}], None, {}, "words"),
        ([ROW], None, {"options": {"scheme": "iob"}}, "scheme"),
    ],
)
def test_what_is_refused(
    train: Any, test: Any, keys: Mapping[str, Any], words: str, minilm: Backbone, task_of: Maker
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        prepare_task(task_of(KIND, train, test, **keys), minilm)
    assert "hidden" not in str(caught.value)


def test_a_tag_beyond_the_rows_that_are_taken_is_let_pass(llama: Backbone, task_of: Maker) -> None:
    train = [ROW, {**ROW, "tags": ["Y", "O"]}]
    task = prepare_task(task_of(KIND, train, [train[1]], rows=1), llama)
    assert task.classes == ("O", "X", "Y")


def test_bare_prefixes_are_spans_only_where_there_is_nothing_else() -> None:
    targets = torch.tensor([[0, 1, 1, 2]])
    for tags, spans_there in ((("B", "I", "O"), 1), (("B", "I", "V"), 4)):
        judged = TokenClassification(tags).judge(torch.eye(3)[targets], targets)
        assert judged.tolist() == [[spans_there, 0, 0, 4, 4]]


def test_a_token_belongs_to_the_last_word_in_it() -> None:
    # "a b c": nothing, "a ", "b", " ", all of it from "a" on, and "c"
    offsets = [(0, 0), (0, 2), (2, 3), (3, 4), (0, 4), (4, 5)]
    assert huggingface._words_of(["a", "b", "c"], offsets) == [-1, 0, 1, -1, 1, 2]


@pytest.mark.parametrize("kind", [KIND, "text-classification"])
def test_a_row_beyond_the_positions_is_refused(kind: str, minilm: Backbone, task_of: Maker) -> None:
    rows = [
        {"text": "a " * length, "label": length % 2, "words": ["a"] * length, "tags": ["O", "X"] * (length // 2)}
        for length in (510, 512)
    ] + [{"text": "a", "label": 1, "words": ["a"], "tags": ["O"]}]
    assert minilm.positions == 512  # type: ignore[attr-defined]
    assert prepare_task(task_of(kind, [rows[0], rows[2]], max_length=8000), minilm).train.lengths()[0] == 512
    with pytest.raises(ConfigError, match=r"at most 512 tokens, .* got one of 514; set max_length = 512 or less"):
        prepare_task(task_of(kind, rows, max_length=8000), minilm)


def test_no_room_is_made_for_a_row_that_is_refused(
    llama: Backbone, task_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch, "full")
    with pytest.raises(ConfigError, match="at most max_length = 64"):
        prepare_task(task_of(KIND, [ROW, {"words": ["a"] * 99, "tags": ["O"] * 99}]), llama)


def test_a_slow_tokenizer_is_refused(llama: Any, task_of: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr(llama, "_tokenizer", Slow())
    with pytest.raises(ConfigError, match="got Slow: save it as a fast one"):
        prepare_task(task_of(KIND, [ROW]), llama)


def test_a_wrong_place_is_noticed(llama: Backbone, task_of: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a decoder whose first token speaks for a word has not seen the rest of it."""
    rows = [{"words": [f"aaaa{end}"], "tags": [end.upper()]} for end in "xyz" for _ in range(4)]

    def value() -> float:
        task = prepare_task(task_of(KIND, rows), llama)
        trained = train_lora(llama, task, 4, TrainingOptions(epochs=20, batch_size=6, learning_rate=1e-2))
        return evaluate(llama, task, trained.adapter, trained.head).value

    assert value() == 1.0
    monkeypatch.setattr(token_classification, "DecoderBackbone", type("Never", (), {}))
    assert value() < 0.5
