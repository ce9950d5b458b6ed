"""Kinds of the client's own: found beside tasks.toml, trained like any other, and told where they do not fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from share_client.backbones import Backbone
from share_client.kinds import custom
from share_client.tasks_file import read_tasks
from share_client.training import TrainingOptions, evaluate, prepare_task, train_lora
from share_core.errors import ConfigError

SECRET = "secret-text"
GOOD = '''
from share_client.kinds.text_classification import TextClassification


class Careful(TextClassification):
    """Text classification whose metric is the share of errors that are left out."""

    name = "careful"
    metric = "one-minus-errors"
'''


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Modules of one test are not those of the next."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "MINE", False):
            del sys.modules[name]


@pytest.fixture
def prepared(tmp_path: Path, llama: Backbone) -> Callable[..., Any]:
    """Return a function that prepares a task by the kind that some source text defines."""

    def prepare(source: str, kind: str = "own:Careful", file: str = "own.py") -> Any:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"MINE = True\n{source}")
        rows = [{"text": f"{text} {number}", "label": text} for text in (SECRET, "sun") for number in range(8)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = (
            f'backbone = "minilm"\n[[task]]\nname = "t"\nkind = "{kind}"\ntrain = "rows.jsonl"\ntest = "rows.jsonl"\n'
        )
        (tmp_path / "tasks.toml").write_text(text)
        return prepare_task(read_tasks(tmp_path / "tasks.toml").tasks[0], llama)

    return prepare


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("own:Careful", "own.py"),
        ("own:MADE", "own.py"),
        ("lib/own:Careful", "lib/own.py"),
        ("pack.own:Careful", "pack/own.py"),
    ],
)
def test_a_kind_beside_the_tasks_file_is_trained_like_any_other(
    kind: str, file: str, prepared: Callable[..., Any], llama: Backbone
) -> None:
    task = prepared(f"{GOOD}\n\nMADE = Careful()\n", kind, file)
    trained = train_lora(llama, task, 2, TrainingOptions(epochs=10, batch_size=8, learning_rate=1e-2))
    learned = evaluate(llama, task, trained.adapter, trained.head)
    assert learned.metric == "one-minus-errors"
    assert learned.value > 0.9
    assert not any("test_a_kind_beside" in path for path in sys.path), "the folder is not looked in afterwards"


def changed(method: str) -> str:
    """Return the source of the kind above with one method of its own."""
    return f"{GOOD}\n    def {method}\n"


ABSTRACT = "from share_client.kinds import Kind\nclass Careful(Kind):\n    name = metric = 'x'\n"
LEAKY = "prepare(self, config, backbone): raise ValueError(config.train.read_text())"
INSIDE_TORCH = """loss(self, outputs, targets):
        from torch.nn.functional import nll_loss
        return nll_loss(outputs, outputs)"""
SUMMED = "loss(self, outputs, targets): return super().loss(outputs, targets) * len(outputs)"
CASES = [
    ("x = 1", "module 'own' has no 'Careful'"),
    ("import nowhere_at_all", "there is no module 'nowhere_at_all'"),
    ("1 / 0", "importing 'own' failed with ZeroDivisionError"),
    ("Careful = 3", r"expected a subclass of share_client\.kinds\.Kind or an object of one, got int"),
    (ABSTRACT, "made without arguments, got TypeError: .*abstract"),
    (GOOD.replace('"careful"', "None"), "name: expected a string"),
    (changed("prepare(self, config, backbone): return 3"), r"prepare: expected a .*PreparedTask, got int"),
    (changed(LEAKY), r"prepare failed with ValueError at own\.py, line 12"),
    (changed("head(self, task, width): return None"), "head failed with AttributeError"),
    (changed("outputs(self, backbone, head, batch): return head(batch)"), "outputs failed with TypeError"),
    (changed("loss(self, outputs, targets): return outputs"), r"loss: expected a finite scalar tensor, got \(2, 2\)"),
    (changed("loss(self, outputs, targets): return outputs.sum() / 0"), "loss: expected a finite scalar"),
    (changed(SUMMED), "loss: expected the mean of the losses of the rows"),
    (changed(INSIDE_TORCH), r"loss failed with RuntimeError at own\.py, line 14"),
    (changed("judge(self, outputs, targets): return outputs.mean()"), r"judge: expected a tensor \(2, n\) .* got \(\)"),
    (changed("score(self, judged): return judged.float().mean()"), "score: expected a float, got Tensor"),
]


@pytest.mark.parametrize(("source", "words"), CASES, ids=[case[1] for case in CASES])
def test_what_does_not_fit_is_named_and_no_row_is_quoted(source: str, words: str, prepared: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        prepared(source)
    assert SECRET not in str(caught.value)
    assert not (caught.value.__cause__ and SECRET in str(caught.value.__cause__))


def test_the_check_of_the_loss_is_what_catches_a_sum(
    prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom, "_check_rows", lambda where, task, backbone: None)
    prepared(changed(SUMMED))


def test_a_module_of_another_name_sake_is_told(prepared: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected the module 'json' in .*, got another of that name"):
        prepared(GOOD, "json:Careful", "json.py")


def test_a_word_that_is_no_kind_says_how_to_name_ones_own(prepared: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected one of image-classification, .*, module:object, got 'careful'"):
        prepared(GOOD, "careful")
