"""DP-SGD where a row has many outputs: the gradient that Opacus keeps of a row is that of the row alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from share_client.kinds import Kind
from share_client.kinds.instruction import Instruction
from share_client.kinds.token_classification import TokenClassification
from share_client.privacy_table import PrivacyConfig
from share_client.tasks_file import TaskConfig
from share_client.training import Backbone, TrainingOptions, declare, prepare_task, private, train_in_space
from share_client.training.factors import SpaceFactors
from share_client.training.inject import injected
from share_client.training.loop import fresh_head
from share_core.fingerprint import describe_space
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import empty_space, update_adapter
from share_core.types import Core

pytest.importorskip("opacus", reason="DP-SGD needs opacus")
ROWS = [
    {"prompt": "who", "response": "the cat"},
    {"prompt": "who wrote the book about the sea", "response": "a man in rome"},
    {"prompt": "rain", "response": "sun"},
]


WORDS = [{"words": row["prompt"].split(), "tags": [word[0] for word in row["prompt"].split()]} for row in ROWS]


def whole_tokens(kind: Instruction, outputs: Tensor, targets: Tensor) -> Tensor:
    """The usual loss: the mean over all tokens of the batch."""
    return outputs[:, 0].sum() / targets.sum()


def whole_words(kind: TokenClassification, outputs: Tensor, targets: Tensor) -> Tensor:
    """The usual loss: the mean over all words of the batch."""
    return torch.nn.functional.cross_entropy(outputs.mT, targets[:, : outputs.shape[1]])


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "rows", "wrong"),
    [
        ("llama", Instruction, ROWS, whole_tokens),
        ("gpt2", Instruction, ROWS, whole_tokens),
        ("minilm", TokenClassification, WORDS, whole_words),
    ],
)
def test_gradients_of_rows(
    name: str,
    kind: type[Kind],
    rows: Sequence[Mapping[str, Any]],
    wrong: Callable[..., Tensor],
    bug: bool,
    task_of: Callable[..., TaskConfig],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone: Backbone = request.getfixturevalue(name)
    if bug:
        monkeypatch.setattr(kind, "loss", wrong)
    task = prepare_task(task_of(kind.name, rows), backbone)
    bases = empty_space(describe_space(name, backbone.site_weights())).bases
    draw = torch.Generator().manual_seed(0)
    linears = {}
    for site, basis in bases.items():
        core = Core(torch.zeros(0, 0), torch.zeros(0, 0))
        change = SpaceFactors(basis, core, torch.randn(basis.right.shape[0], 2, generator=draw))
        torch.nn.init.normal_(change.free_out, std=0.1, generator=draw)
        linears[site] = private.PrivateLinear(backbone.site(site), change)
    head = fresh_head(backbone, task, 0, None)
    maps = [one for linear in linears.values() for one in (linear.free_in, linear.free_out) if one]
    trained: list[Any] = [*head.parameters(), *(one.weight for one in maps)]
    hooks = pytest.importorskip("opacus.grad_sample").GradSampleHooks
    with injected(backbone, linears):
        wrapped = hooks(private._Model(backbone, head), batch_first=True, loss_reduction="mean")
        private._row_gradients(backbone, task, head, [0, 1, 2], trained)
        kept = [one.grad_sample.clone() for one in trained]
        wrapped.cleanup()
        apart = 0.0
        for row in range(3):
            inputs, targets = task.train.batch([row], backbone.device)
            loss = task.kind.loss(task.kind.outputs(backbone, head, inputs), targets)
            for own, sample in zip(torch.autograd.grad(loss, trained), kept, strict=True):
                apart = max(apart, float((own - sample[row]).norm() / own.norm()))
    assert (apart < 1e-3) is not bug


def test_a_language_model_is_trained_with_noise(llama: Backbone, task_of: Callable[..., TaskConfig]) -> None:
    config = task_of("causal-lm", [{"text": row["prompt"]} for row in ROWS], privacy=PrivacyConfig(epsilon=8.0))
    task = prepare_task(config, llama)
    space = empty_space(describe_space("llama", llama.site_weights()))
    declared = declare(config, task.train_rows)
    trained = train_in_space(llama, task, space, "o/t", TrainingOptions(epochs=1), declared=declared)
    assert trained.declared == declared
    assert trained.update.sites.keys() == set(llama.sites)


def test_noise_on_coefficients_leaves_the_loss_of_the_training(
    llama: Backbone, task_of: Callable[..., TaskConfig]
) -> None:
    spec = describe_space("llama", llama.site_weights())
    rows = [{"text": row["prompt"]} for row in ROWS]
    config = task_of("causal-lm", rows, privacy=PrivacyConfig("coefficients", noise_multiplier=1.0))
    task = prepare_task(config, llama)
    first = train_in_space(llama, task, empty_space(spec), "o/first", TrainingOptions(epochs=2))
    adapter = update_adapter(first.update, empty_space(spec).bases)
    space = merge(empty_state(spec), "o/first", adapter, MergePolicy(tau=0.0)).state.space
    trained = train_in_space(llama, task, space, "o/t", TrainingOptions(epochs=1), declared=declare(config, 3))
    assert trained.loss == pytest.approx(first.loss, rel=0.5), "there is no head to be trained again"
    assert trained.steps == 1
