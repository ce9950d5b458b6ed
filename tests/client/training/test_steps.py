"""What saves memory or time in a step and must not change what is learned: parts, activations computed again, bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from share_client.tasks_file import tasks_from_toml
from share_client.training import Backbone, PreparedTask, TrainingOptions, evaluate, private, steps, train_lora
from share_client.training.factors import LoraFactors
from share_client.training.inject import adapted, injected
from share_client.training.loop import fresh_head
from share_client.training.steps import autocast_dtype, blocks_of, part_losses, parts_of, recomputed
from share_core.errors import ConfigError

PLAIN = TrainingOptions()
ROWS = list(range(30))


@given(st.integers(1, 40), st.integers(1, 50))
def test_parts_are_runs_of_like_length(rows: int, count: int) -> None:
    parts = parts_of(range(rows), count)
    assert [row for part in parts for row in part] == list(range(rows))
    sizes = [len(part) for part in parts]
    assert len(sizes) == min(rows, count)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("batch_size", "accumulate", "most"), [(32, 1, 128), (8, 1, 32), (8, 8, 4), (9, 2, 20)])
def test_who_trains_in_small_parts_is_measured_in_small_parts(
    backbone: Backbone, bars: PreparedTask, batch_size: int, accumulate: int, most: int
) -> None:
    seen: list[int] = []

    class Seen(type(bars.kind)):  # type: ignore[misc]
        def outputs(self, *given: Any) -> Any:
            found = super().outputs(*given)
            seen.append(len(found))
            return found

    config = replace(bars.config, batch_size=batch_size, accumulate=accumulate, patience=1)
    task = replace(bars, config=config, kind=Seen())
    found = train_lora(backbone, task, 2, TrainingOptions.of(config))
    assert max(seen) <= max(most // 4, 1), "training, or the rows that are held out"
    before = evaluate(backbone, bars, found.adapter, found.head)
    seen.clear()
    assert evaluate(backbone, task, found.adapter, found.head) == before
    assert max(seen) <= most


@pytest.fixture(scope="module")
def changes(backbone: Backbone) -> dict[str, LoraFactors]:
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for site in backbone.sites:
            place = backbone.site(site)
            made[site] = LoraFactors(place.d_out, place.d_in, 4, alpha=8.0)
            nn.init.normal_(made[site].out, std=0.1)
    return made


@pytest.fixture(scope="module")
def gradients(backbone: Backbone, bars: PreparedTask, changes: dict[str, LoraFactors]) -> Callable[..., list[Tensor]]:
    """Return a function that gives the gradient of some rows' mean loss in every trained number."""

    def of(options: TrainingOptions, rows: Sequence[int] = ROWS) -> list[Tensor]:
        head = fresh_head(backbone, bars, 0, None)
        trained = [*head.parameters(), *(one for change in changes.values() for one in change.parameters())]
        modules = {site: adapted(backbone.site(site), change) for site, change in changes.items()}
        with injected(backbone, modules), recomputed(backbone, options.checkpointing):
            parts = [torch.autograd.grad(one, trained) for one in part_losses(backbone, bars, head, rows, options)]
        return [torch.stack(one).sum(dim=0) for one in zip(*parts, strict=True)]

    return of


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the norm of the difference over the norm."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    return float((difference / sum(float(a.square().sum()) for a in one)) ** 0.5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40))
def test_parts_have_the_gradient_of_the_whole(gradients: Callable[..., list[Tensor]], rows: int, count: int) -> None:
    whole = gradients(PLAIN, ROWS[:rows])
    assert apart(whole, gradients(replace(PLAIN, accumulate=count), ROWS[:rows])) < 1e-5


def test_a_part_that_counts_too_much_is_seen(
    gradients: Callable[..., list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradients(PLAIN)
    monkeypatch.setattr(steps, "parts_of", lambda rows, count: [rows[:5], rows[4:]] if count > 1 else [rows])
    assert apart(whole, gradients(replace(PLAIN, accumulate=2))) > 1e-3


def test_training_in_parts_learns_the_same(backbone: Backbone, bars: PreparedTask) -> None:
    options = TrainingOptions(epochs=1, batch_size=48)
    whole, parts = (train_lora(backbone, bars, 2, replace(options, accumulate=count)) for count in (1, 5))
    assert parts.steps == whole.steps == 4
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)
    for site, factors in whole.adapter.items():
        assert apart([factors.in_], [parts.adapter[site].in_]) < 1e-2


def kept_bytes(work: Callable[[], object]) -> int:
    """Return how many bytes autograd keeps for the backward pass of what ``work`` computes."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(kept.values())


@pytest.mark.parametrize("bug", [False, True])
def test_activations_computed_again_have_the_same_gradient_and_less_memory(
    bug: bool,
    backbone: Backbone,
    bars: PreparedTask,
    gradients: Callable[..., list[Tensor]],
    changes: dict[str, LoraFactors],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if bug:
        monkeypatch.setattr(steps, "blocks_of", lambda backbone: [])
    again = replace(PLAIN, checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(PLAIN), gradients(again), strict=True))
    head = fresh_head(backbone, bars, 0, None)
    modules = {site: adapted(backbone.site(site), change) for site, change in changes.items()}
    sizes = []
    with injected(backbone, modules):
        for options in (PLAIN, again):
            with recomputed(backbone, options.checkpointing):
                sizes.append(kept_bytes(lambda: list(part_losses(backbone, bars, head, ROWS, PLAIN))))
    assert (sizes[1] < sizes[0] / 4) is not bug
    parted = kept_bytes(lambda: next(part_losses(backbone, bars, head, ROWS, replace(PLAIN, accumulate=6))))
    assert parted < sizes[0] / 4


def test_blocks_are_those_that_repeat_and_are_put_back(backbone: Backbone) -> None:
    blocks = [backbone.module.get_submodule(f"blocks.{number}") for number in range(4)]
    assert blocks_of(backbone) == blocks
    blocks[0].forward = mine = blocks[0].forward  # a wrapper of another library
    try:
        with pytest.raises(RuntimeError, match="stop"), recomputed(backbone, True):
            assert all(getattr(block.forward, "func", None) is steps._again for block in blocks)
            raise RuntimeError("stop")
        assert ["forward" in block.__dict__ for block in blocks] == [True, False, False, False]
        assert blocks[0].forward is mine
    finally:
        del blocks[0].forward


class Nested(nn.Module):
    """Stages of blocks, of which one holds its map in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        block = nn.ModuleDict({"query": nn.Linear(2, 2), "net": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})
        self.stages = nn.ModuleList([nn.ModuleList([block])])


def test_the_deepest_blocks_but_none_inside_another(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Nested()
    monkeypatch.setattr(backbone, "module", model)
    monkeypatch.setattr(backbone, "sites", ("stages.0.0.query", "stages.0.0.net.0.0"))
    assert blocks_of(backbone) == [model.stages[0][0]]  # type: ignore[index]
    monkeypatch.setattr(backbone, "sites", ("first",))
    with pytest.raises(ConfigError, match=r"no repeated blocks around its sites; take checkpointing out"):
        blocks_of(backbone)


@contextmanager
def seen_types(module: nn.Module) -> Iterator[list[torch.dtype]]:
    """Record the type of what a module returns."""
    seen: list[torch.dtype] = []
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    yield seen
    hook.remove()


def test_bf16_computes_in_bf16_and_keeps_what_is_trained_in_fp32(
    backbone: Backbone, gradients: Callable[..., list[Tensor]]
) -> None:
    low = replace(PLAIN, precision="bf16")
    with seen_types(backbone.site(backbone.sites[0]).module) as seen:
        plain, rough = gradients(PLAIN), gradients(low)
    assert seen == [torch.float32, torch.bfloat16]
    assert {one.dtype for one in rough} == {torch.float32}
    assert 1e-5 < apart(plain, rough) < 0.05
    both = gradients(replace(low, accumulate=3, checkpointing=True))
    assert apart(rough, both) < 0.02


def test_bf16_learns_as_well(backbone: Backbone, bars: PreparedTask) -> None:
    plain, rough = (
        train_lora(backbone, bars, 4, TrainingOptions(epochs=2, precision=precision)) for precision in ("fp32", "bf16")
    )
    assert rough.loss == pytest.approx(plain.loss, rel=0.05)
    assert {one.out.dtype for one in rough.adapter.values()} == {torch.float32}


def test_precision_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [autocast_dtype(name, cpu) for name in ("fp32", "auto", "bf16")] == [None, None, torch.bfloat16]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert autocast_dtype("auto", cuda) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert autocast_dtype("auto", cuda) is None
    with pytest.raises(ConfigError, match="no bfloat16"):
        autocast_dtype("bf16", cuda)


TASK = '[[task]]\nname = "a"\nkind = "image-classification"\ntrain = "t.npz"\ntest = "t.npz"\n'
SAMPLES = '[task.privacy]\nmechanism = "dp-sgd"\nnoise_multiplier = 1.0\n'


def test_keys_of_a_tasks_file(tmp_path: Path) -> None:
    (tmp_path / "t.npz").touch()

    def read(keys: str) -> TrainingOptions:
        text = f'backbone = "digits-vit"\n{TASK}{keys}'
        return TrainingOptions.of(tasks_from_toml(text, tmp_path / "tasks.toml").tasks[0])

    assert read("") == TrainingOptions()
    asked = read('precision = "auto"\naccumulate = 4\ncheckpointing = true\n')
    assert asked == TrainingOptions(precision="auto", accumulate=4, checkpointing=True)
    for keys, expected in (
        ('precision = "fp16"\n', "precision: expected one of fp32, bf16, auto"),
        ("accumulate = 0\n", "accumulate: expected an integer from 1"),
        ('checkpointing = "yes"\n', "checkpointing: expected true or false"),
        (f"checkpointing = true\n{SAMPLES}", "checkpointing: expected false with privacy mechanism 'dp-sgd', got true"),
        (f'precision = "bf16"\n{SAMPLES}', "precision: expected fp32 or auto with privacy mechanism 'dp-sgd'"),
    ):
        with pytest.raises(ConfigError, match=expected):
            read(keys)


def test_gradients_of_single_rows_are_the_same_in_parts(backbone: Backbone, bars: PreparedTask) -> None:
    hooks = pytest.importorskip("opacus.grad_sample", reason="DP-SGD needs opacus").GradSampleHooks
    found: list[Any] = []
    for accumulate in (1, 4):
        head = fresh_head(backbone, bars, 0, None)
        wrapped = hooks(private._Model(backbone, head), batch_first=True, loss_reduction="mean")
        loss = private._row_gradients(backbone, bars, head, ROWS, list(head.parameters()), accumulate)
        samples: Any = head.weight.grad_sample  # type: ignore[union-attr]
        found.append((loss, samples if isinstance(samples, Tensor) else torch.cat(samples)))
        wrapped.cleanup()
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1].shape == (30, 4, 64)
    assert apart([found[0][1]], [found[1][1]]) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training(backbone: Backbone, bars: PreparedTask, value: float) -> None:
    class Lost(type(bars.kind)):  # type: ignore[misc]
        def loss(self, *given: Any) -> Tensor:
            found: Tensor = super().loss(*given) * value
            return found

    with pytest.raises(ConfigError, match=f"task 'bars': expected a finite loss, got {value} in step 1; lower"):
        train_lora(backbone, replace(bars, kind=Lost()), 2, PLAIN)
