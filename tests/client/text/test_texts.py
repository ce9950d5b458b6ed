"""Numbers and several labels of texts: scales, metrics, refusals; and what every kind promises of its loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from share_client.kinds import find_kind
from share_client.kinds.text_multi_label import TextMultiLabel
from share_client.kinds.text_regression import TextRegression
from share_client.privacy_table import PrivacyConfig
from share_client.tasks_file import TaskConfig
from share_client.training import Backbone, TrainingOptions, evaluate, prepare_task, train_in_space, train_lora
from share_client.training.loop import fresh_head
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.space import empty_space, update_adapter

CPU = torch.device("cpu")
Maker = Callable[..., TaskConfig]
PLACES = ("paris", "rome", "oslo", "lima", "cairo", "quito", "bern", "riga")
SCORES = [
    {"text": f"{word} in {place}", "score": score + 0.01 * number}
    for number, place in enumerate(PLACES)
    for word, score in (("heavy rain", 110.0), ("some clouds", 125.0), ("bright sun", 140.0))
]
TAGS = [
    {"text": f"{text} in {place}", "labels": labels}
    for place in PLACES
    for text, labels in (("rain", ["wet"]), ("snow", ["cold", "wet"]), ("sun", []), ("frost", ["cold"]))
]
NUMBERS = st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=30)


@settings(max_examples=50)
@given(NUMBERS)
def test_pearson_and_rmse_are_those_of_numpy(pairs: list[tuple[float, float]]) -> None:
    judged = torch.tensor(pairs)
    one, other = judged.double().numpy().T
    kind = TextRegression()
    assert kind.details(judged)["rmse"] == pytest.approx(float(np.sqrt(((one - other) ** 2).mean())), rel=1e-6)
    if min(one.std(), other.std()) > 1e-3:
        assert kind.score(judged) == pytest.approx(float(np.corrcoef(one, other)[0, 1]), abs=1e-6)


def test_a_constant_prediction_scores_nothing() -> None:
    judged = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]])
    assert TextRegression().score(judged) == 0.0


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000))
def test_micro_f1_is_that_of_all_decisions_together(rows: int, labels: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(rows, labels, generator=draw)
    targets = (torch.rand(rows, labels, generator=draw) < 0.4).float()
    kind = TextMultiLabel()
    judged = kind.judge(outputs, targets)
    said, true = (outputs > 0).flatten().tolist(), targets.bool().flatten().tolist()
    both = sum(a and b for a, b in zip(said, true, strict=True))
    expected = 2 * both / (sum(said) + sum(true)) if any(said) or any(true) else 1.0
    assert kind.score(judged) == pytest.approx(expected)
    exact = ((outputs > 0) == targets.bool()).all(dim=1).double().mean()
    assert kind.details(judged)["exact_match"] == pytest.approx(float(exact))


def test_a_number_is_learned_and_the_shared_head_predicts_it(llama: Backbone, task_of: Maker) -> None:
    config = task_of("text-regression", SCORES, epochs=20, batch_size=8, learning_rate=1e-2, share_head=True)
    task = prepare_task(config, llama)
    space = empty_space(describe_space("llama", llama.site_weights()))
    trained = train_in_space(llama, task, space, "o/t", TrainingOptions.of(config))
    learned = evaluate(llama, task, update_adapter(trained.update, space.bases), trained.head)
    assert learned.metric == "pearson"
    assert learned.value > 0.95
    assert learned.details["rmse"] < 5.0, "predictions are in the units of the data"
    assert trained.update.head.keys() == {"linear.weight", "linear.bias", "mean", "scale"}
    assert float(trained.update.head["mean"]) == pytest.approx(125.035, rel=1e-5)


def test_labels_are_learned(llama: Backbone, task_of: Maker) -> None:
    task = prepare_task(task_of("text-multi-label", TAGS), llama)
    assert task.classes == ("cold", "wet")
    trained = train_lora(llama, task, 4, TrainingOptions(epochs=20, batch_size=8, learning_rate=1e-2))
    learned = evaluate(llama, task, trained.adapter, trained.head)
    assert (learned.metric, learned.rows) == ("micro-f1", 32)
    assert learned.value > 0.9


def test_the_option_range_sets_the_scale(llama: Backbone, task_of: Maker) -> None:
    options = {"range": [100, 200.0]}
    config = task_of("text-regression", SCORES, options=options, privacy=PrivacyConfig(epsilon=3.0))
    kind = prepare_task(config, llama).kind
    assert kind == TextRegression(mean=150.0, scale=50.0)
    with pytest.raises(ConfigError, match=r"range is missing: without it mean and spread .* dp-sgd adds no noise"):
        prepare_task(replace(config, options={}), llama)


REGRESSION = [
    (
        [{"text": "a", "score": 1}, {"text": "b", "score": 1.0}],
        {},
        "expected numbers that differ .* got numbers that are",
    ),
    ([{"text": "a", "score": "high"}], {}, "line 1: score: expected a number, got str"),
    (SCORES, {"range": [0, 120]}, r"train.jsonl: line 2: score: expected a number from 0 to 120"),
    (SCORES, {"range": [3, 3]}, r"range: expected \[low, high\]"),
    (SCORES, {"ranges": [0, 200]}, "did you mean 'range'"),
]


@pytest.mark.parametrize(("rows", "options", "words"), REGRESSION, ids=[case[2] for case in REGRESSION])
def test_numbers_that_cannot_be_used(
    rows: list[Any], options: dict[str, Any], words: str, llama: Backbone, task_of: Maker
) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare_task(task_of("text-regression", rows, options=options), llama)


def test_labels_that_cannot_be_used(llama: Backbone, task_of: Maker) -> None:
    alien = [*TAGS, {"text": "fog", "labels": ["hidden-label"]}]
    for train, test, words in (
        (TAGS, alien, "test.jsonl: line 33: labels: expected some of the 2 labels of the training rows"),
        ([{"text": "a", "labels": []}], None, "expected at least one label in the training rows"),
        ([{"text": "a", "labels": ["x", 3]}], None, "line 1: labels: expected a list of strings"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            prepare_task(task_of("text-multi-label", train, test), llama)
        assert "hidden-label" not in str(caught.value)


def test_a_label_behind_the_rows_in_use_is_let_pass(llama: Backbone, task_of: Maker) -> None:
    task = prepare_task(task_of("text-multi-label", TAGS, rows=1), llama)
    assert (task.train_rows, task.classes) == (1, ("cold", "wet"))
    _, targets = task.test.batch([1], CPU)
    assert targets.tolist() == [[1.0, 1.0]]


ROWS = {
    "text-classification": [{"text": row["text"], "label": str(row["labels"])} for row in TAGS],
    "text-multi-label": TAGS,
    "text-regression": SCORES,
    "token-classification": [
        {"words": words, "tags": ["B-PLACE" if word in PLACES else "O" for word in words]}
        for row in SCORES
        for words in [str(row["text"]).split()]
    ],
    "causal-lm": TAGS,
    "instruction": [{"prompt": row["text"], "response": json.dumps(row["labels"])} for row in TAGS],
}


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_is_the_mean_over_rows_of_each_rows_own(name: str, llama: Backbone, task_of: Maker) -> None:
    task = prepare_task(task_of(name, ROWS[name]), llama)
    assert find_kind(name).name == name
    head = fresh_head(llama, task, 0, None)

    def loss(rows: list[int]) -> float:
        inputs, targets = task.train.batch(rows, CPU)
        return float(task.kind.loss(task.kind.outputs(llama, head, inputs), targets).detach())

    rows = list(range(0, 24, 3))
    assert loss(rows) == pytest.approx(sum(loss([row]) for row in rows) / len(rows), rel=1e-4)
