"""Next tokens: what is predicted from what, the loss beside that of transformers, rows as they are rendered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_client.backbones import DecoderBackbone, load_backbone
from share_client.check import check_tasks
from share_client.kinds import PreparedTask, find_kind, next_token
from share_client.kinds.next_token import Tokens, token_rows
from share_client.privacy_table import PrivacyConfig
from share_client.tasks_file import TaskConfig
from share_client.training import TrainingOptions, evaluate, prepare_task, train_in_space, train_lora
from share_client.training.loop import fresh_head, head_tensors
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.space import empty_space, update_adapter

CPU = torch.device("cpu")
SENTENCES = ("the cat sat on the mat", "who wrote the book", "rain in paris", "a fine film and a dull ending")
Maker = Callable[..., TaskConfig]


def lm_rows(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


def outputs_of(task: PreparedTask, backbone: DecoderBackbone, rows: list[int]) -> tuple[Tensor, Tensor]:
    inputs, targets = task.train.batch(rows, CPU)
    return task.kind.outputs(backbone, torch.nn.Identity(), inputs), targets


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_is_that_of_transformers(name: str, task_of: Maker, request: pytest.FixtureRequest) -> None:
    backbone = request.getfixturevalue(name)
    task = prepare_task(task_of("causal-lm", lm_rows(*SENTENCES)), backbone)
    theirs = []
    for row in range(4):
        inputs, targets = task.train.batch([row], CPU)
        tokens = inputs["input_ids"]
        theirs.append(float(backbone.whole(input_ids=tokens, labels=tokens).loss))
        outputs, _ = outputs_of(task, backbone, [row])
        assert float(task.kind.loss(outputs, targets)) == pytest.approx(theirs[-1], rel=1e-5)
        assert int(targets) == tokens.shape[1] - 1
    outputs, targets = outputs_of(task, backbone, [0, 1, 2, 3])
    assert float(task.kind.loss(outputs, targets)) == pytest.approx(sum(theirs) / 4, rel=1e-5), "padding counts"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 280), min_size=1, max_size=6), st.lists(st.integers(0, 280), min_size=1, max_size=6)
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 20),
)
def test_only_predicted_tokens_count_in_slices_of_any_size(
    llama: DecoderBackbone, rows: list[tuple[list[int], list[int]]], size: int
) -> None:
    kind = find_kind("instruction")
    split = token_rows([Tokens(*row) for row in rows], llama)
    inputs, targets = split.batch(range(len(rows)), CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "SCORES", size * llama.vocabulary)
        judged = kind.judge(kind.outputs(llama, torch.nn.Identity(), inputs), targets)
    for (given_, predicted), (cost, right, count) in zip(rows, judged.tolist(), strict=True):
        with torch.no_grad():
            logits = llama.whole(input_ids=torch.tensor([[*given_, *predicted]])).logits[0, len(given_) - 1 : -1]  # type: ignore[attr-defined]
        wanted = torch.tensor(predicted)
        assert count == len(predicted)
        assert right == int((logits.argmax(dim=1) == wanted).sum())
        assert cost == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")), rel=1e-4
        )
    expected = judged[:, 1].sum() / judged[:, 2].sum()
    assert kind.score(judged) == pytest.approx(float(expected))
    mean = float(judged[:, 0].sum() / judged[:, 2].sum())
    details = kind.details(judged)
    assert details["perplexity"] == pytest.approx(float(torch.tensor(mean).exp()), rel=1e-4)
    assert details["exact_match"] == sum(right == count for _, right, count in judged.tolist()) / len(rows)


def test_gradients_are_the_same_in_slices(
    llama: DecoderBackbone, task_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = prepare_task(task_of("causal-lm", lm_rows(*SENTENCES)), llama)
    options = TrainingOptions(epochs=1, batch_size=4)
    whole = train_lora(llama, task, 2, options)
    monkeypatch.setattr(next_token, "SCORES", 3 * llama.vocabulary)
    sliced = train_lora(llama, task, 2, options)
    assert sliced.loss == pytest.approx(whole.loss, rel=1e-5)
    for site, factors in whole.adapter.items():
        torch.testing.assert_close(sliced.adapter[site].out, factors.out, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_kinds_learn_in_a_space(name: str, task_of: Maker, request: pytest.FixtureRequest) -> None:
    backbone = request.getfixturevalue(name)
    space = empty_space(describe_space(name, backbone.site_weights()))
    pairs = [{"prompt": text, "response": text.split()[-1]} for text in SENTENCES]
    for kind, rows in (("causal-lm", lm_rows(*SENTENCES)), ("instruction", pairs)):
        task = prepare_task(task_of(kind, rows, epochs=60, batch_size=2, learning_rate=2e-2), backbone)
        frozen = evaluate(backbone, task, None, head_tensors(fresh_head(backbone, task, 0, None)))
        trained = train_in_space(backbone, task, space, "o/t", TrainingOptions.of(task.config))
        learned = evaluate(backbone, task, update_adapter(trained.update, space.bases), trained.head)
        assert trained.head == {}
        assert (learned.metric, learned.rows) == ("token-accuracy", 4)
        assert learned.value > frozen.value + 0.2
        assert learned.details["perplexity"] < frozen.details["perplexity"] / 5


def test_without_anything_to_train_no_step_is_taken(llama: DecoderBackbone, task_of: Maker) -> None:
    task = prepare_task(task_of("causal-lm", lm_rows(*SENTENCES)), llama)
    assert train_lora(llama, task, 0, TrainingOptions()).steps == 0


def tokens_of(task: PreparedTask, backbone: Any, row: int = 0) -> tuple[str, str]:
    """Return what is given and what is predicted of a row, as text."""
    inputs, _ = task.train.batch([row], CPU)
    scored = inputs["scored"][0].bool()
    decode = backbone._tokenizer.decode
    return decode(inputs["input_ids"][0][~scored]), decode(inputs["input_ids"][0][scored])


def test_rows_of_causal_language_modelling(llama: DecoderBackbone, task_of: Maker) -> None:
    config = task_of("causal-lm", lm_rows("the cat sat on the mat"))
    whole = "the cat sat on the mat<end>"
    first, rest = tokens_of(prepare_task(config, llama), llama)
    assert first + rest == whole
    assert first == whole[: len(first)] != ""
    cut = prepare_task(replace(config, max_length=4), llama)
    assert cut.train.lengths() == [4]
    split = prepare_task(replace(config, max_length=4, options={"split": True}), llama)
    assert max(split.train.lengths()) == 4
    assert "".join(tokens_of(split, llama, row)[1] for row in range(split.train_rows)) == rest
    assert split.train_rows == -(-(len(llama.encode(whole)) - 1) // 3)


CONVERSATION = [
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "where"},
    {"role": "assistant", "content": "the mat"},
]


def test_rows_of_instructions(llama: DecoderBackbone, gpt2: DecoderBackbone, task_of: Maker) -> None:
    pair = task_of("instruction", [{"prompt": "who wrote it", "response": "the dog"}])
    assert tokens_of(prepare_task(pair, llama), llama) == ("<user> who wrote it <assistant> ", "the dog<end> ")
    plain = replace(pair, options={"template": False})
    assert tokens_of(prepare_task(plain, llama), llama) == ("who wrote it\n", "the dog<end>")
    assert tokens_of(prepare_task(pair, gpt2), gpt2) == ("who wrote it\n", "the dog<end>")
    arrow = replace(pair, options={"separator": " -> "})
    assert tokens_of(prepare_task(arrow, gpt2), gpt2) == ("who wrote it -> ", "the dog<end>")
    short = prepare_task(replace(pair, max_length=6), gpt2)
    given_, predicted = tokens_of(short, gpt2)
    assert "who wrote it\n".endswith(given_)
    assert predicted == "the dog<end>"[: len(predicted)]
    assert short.train.lengths() == [6]
    chat = task_of("instruction", [{"messages": CONVERSATION}])
    expected = "<user> who <assistant> the cat<end> <user> where <assistant> "
    assert tokens_of(prepare_task(chat, llama), llama) == (expected, "the mat<end> ")


def chat(*messages: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"messages": CONVERSATION}, {"messages": list(messages)}]


SECRET = "secret-text"
USER = {"role": "user", "content": SECRET}
CASES: list[tuple[str, str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("llama", "causal-lm", lm_rows("a b c", ""), {}, "line 2: text: expected at least two tokens"),
    ("llama", "instruction", [{"text": SECRET}], {}, "expected the columns prompt and response, or messages, got none"),
    (
        "llama",
        "instruction",
        [{"prompt": SECRET}],
        {},
        "expected the columns prompt and response, or messages, got prompt",
    ),
    ("llama", "instruction", [{"prompt": SECRET, "response": ""}], {}, "line 1: response: expected text, got none"),
    ("gpt2", "instruction", [{"prompt": "", "response": SECRET}], {}, "line 1: prompt: expected text, got none"),
    ("llama", "instruction", chat(USER), {}, "line 2: messages: expected at least two, the last with role assistant"),
    ("llama", "instruction", chat(USER, USER), {}, "line 2: messages: expected at least two, the last with role"),
    ("llama", "instruction", chat({"role": SECRET, "content": "x"}), {}, "line 2: messages: number 0: expected role"),
    ("gpt2", "instruction", chat(), {}, "line 1: messages: expected prompt and response, as .* has no chat template"),
    (
        "gpt2",
        "instruction",
        [{"prompt": "a", "response": "b"}],
        {"options": {"template": True}},
        "template: expected false",
    ),
    ("llama", "causal-lm", lm_rows("a b c"), {"options": {"splits": True}}, "did you mean 'split'"),
    (
        "llama",
        "causal-lm",
        lm_rows("a b"),
        {"options": {"split": True}, "privacy": PrivacyConfig()},
        "split: expected false",
    ),
    ("minilm", "causal-lm", lm_rows("a b c"), {}, "expects a backbone that predicts the next token, got minilm"),
]


@pytest.mark.parametrize(("name", "kind", "rows", "keys", "words"), CASES, ids=[case[4] for case in CASES])
def test_what_cannot_be_used_is_named_and_not_quoted(
    name: str,
    kind: str,
    rows: list[dict[str, Any]],
    keys: dict[str, Any],
    words: str,
    task_of: Maker,
    request: pytest.FixtureRequest,
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        prepare_task(task_of(kind, rows, **keys), request.getfixturevalue(name))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception(messages[0]['content']) }}", "line 1: the chat template of .* refuses the conversation"),
        (
            "{{ messages | length }}{{ messages[0]['content'] }}",
            "renders a conversation as its prompt and what follows",
        ),
    ],
)
def test_templates_that_do_not_fit(
    template: str, words: str, llama: Any, task_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama._tokenizer, "chat_template", template)
    with pytest.raises(ConfigError, match=words) as caught:
        prepare_task(task_of("instruction", [{"prompt": SECRET, "response": "b"}]), llama)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_model_that_makes_scores_in_its_own_way_is_refused(save_decoder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="CohereForCausalLM, which changes them on the way"):
        load_backbone(str(save_decoder("cohere")), "cpu")


def test_a_decoder_has_one_space_for_labels_and_tokens(llama: DecoderBackbone, task_of: Maker) -> None:
    assert all(site.startswith("layers.") for site in llama.sites)
    rows = [{"text": "a fine film", "label": "good"}, {"text": "a dull film", "label": "bad"}]
    task = prepare_task(task_of("text-classification", rows), llama)
    assert train_lora(llama, task, 2, TrainingOptions(epochs=1)).adapter.keys() == set(llama.sites)


def test_check_tries_language_models(save_decoder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": t, "response": t}) + "\n" for t in SENTENCES))
    (tmp_path / "tasks.toml").write_text(
        f'backbone = "{save_decoder()}"\ndevice = "cpu"\n[[task]]\nname = "t"\nkind = "instruction"\n'
        'train = "rows.jsonl"\ntest = "rows.jsonl"\naccumulate = 2\ncheckpointing = true\nshare_head = true\n'
    )
    found = check_tasks(tmp_path / "tasks.toml")
    assert found.problems == ()
    assert (found.tasks[0].train_rows, found.tasks[0].reports, found.tasks[0].stays) == (4, "token-accuracy", ())
    assert {line.name.split("/")[0] for line in found.tasks[0].leaves} == {"A", "B"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("directions = 0", "version 0 of the space has none; give --space"),
        ("directions = 0\npseudo_rank = 0", "directions = 0 and pseudo_rank = 0 leave nothing"),
    ],
)
def test_check_says_why_nothing_would_be_trained(
    save_decoder: Callable[..., Path], tmp_path: Path, keys: str, words: str
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lm_rows(*SENTENCES)))
    (tmp_path / "tasks.toml").write_text(
        f'backbone = "{save_decoder()}"\ndevice = "cpu"\n[[task]]\nname = "t"\nkind = "causal-lm"\n'
        f'train = "rows.jsonl"\ntest = "rows.jsonl"\n{keys}\n'
    )
    (problem,) = check_tasks(tmp_path / "tasks.toml").problems
    assert "task 't': expected something that is trained, got no step: " in problem
    assert words in problem
