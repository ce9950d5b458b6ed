"""Which rows an input has: told where every row can have a task of its own, and of no matter where all have one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from share_client.serving import Serving
from share_client.serving import serving as module
from share_core.errors import TensorShapeError
from share_core.types import Space

MIXED, ALONE = ["org/t0", "org/t1"], ["org/t1", "org/t1"]
Run = Callable[[nn.Module], Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def sites_of(model: nn.Module, *ends: str) -> dict[str, tuple[int, int]]:
    return {
        path: (part.out_features, part.in_features)
        for path, part in model.named_modules()
        if isinstance(part, nn.Linear) and path.rpartition(".")[2] in ends
    }


@torch.no_grad()
def check_one_task(model: nn.Module, space: Space, written: Any, run: Run) -> None:
    """A batch of one task gives what the weights of that task give, whatever the layers are called with."""
    with Serving(model, space) as serving, serving.batch(ALONE):
        got = run(model)
    wanted = run(written(model, space, ALONE[0]))
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, run(model), rtol=1e-2, atol=1e-2)


def check_mixed_is_refused(model: nn.Module, space: Space, run: Run) -> None:
    with Serving(model, space) as serving, serving.batch(MIXED), pytest.raises(TensorShapeError, match="one task per"):
        run(model)


@pytest.mark.parametrize("seed", range(4))  # of 3, every expert gets a multiple of two tokens
def test_routed_experts_serve_one_task_per_batch(make_space: Any, written: Any, seed: int) -> None:
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    config = SwitchTransformersConfig(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_sparse_encoder_layers=1, num_heads=2,
        num_experts=4, expert_capacity=64,
    )  # fmt: skip
    model = seeded(lambda: SwitchTransformersEncoderModel(config))
    space = make_space(sites_of(model, "wi", "wo"), 2, 4, 4, 2)
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(seed))

    def run(own: nn.Module) -> Tensor:
        out: Tensor = own(input_ids=ids).last_hidden_state
        return out

    check_mixed_is_refused(model, space, run)
    check_one_task(model, space, written, run)


def test_projections_of_relative_positions_serve_one_task_per_batch(make_space: Any, written: Any) -> None:
    from transformers import DebertaV2Config, DebertaV2Model

    make_config: Any = DebertaV2Config
    config = make_config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
        position_buckets=8, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    model = seeded(lambda: DebertaV2Model(config))
    space = make_space(sites_of(model, "query_proj", "value_proj"), 2, 4, 4, 2)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))

    def run(own: nn.Module) -> Tensor:
        out: Tensor = own(input_ids=ids).last_hidden_state
        return out

    check_mixed_is_refused(model, space, run)
    check_one_task(model, space, written, run)


class Routed(nn.Module):
    """Sends two positions to each of three experts, whichever rows they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        order = x.reshape(-1, 6)[[5, 0, 4, 1, 3, 2]].reshape(3, 2, 6)  # some routing or other
        return torch.cat([expert(own) for expert, own in zip(self.experts, order, strict=True)])


def test_an_expert_with_as_many_positions_as_rows_is_refused_too(
    make_space: Any, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(Routed)
    space = make_space({f"experts.{i}": (5, 6) for i in range(3)}, 2, 3, 3, 2)
    check_mixed_is_refused(model, space, lambda own: own(draw(2, 3, 6)))
    check_one_task(model, space, written, lambda own: own(draw(2, 3, 6)))
    monkeypatch.setattr(module, "_ROUTED", re.compile("no such name"))  # planted
    with Serving(model, space) as serving, serving.batch(MIXED):
        model(draw(2, 3, 6))


class Flat(nn.Module):
    """Embeds tokens, gives a layer all positions as one matrix, and another one the first of each row."""

    def __init__(self, labels: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.wide = nn.Linear(6, 6)
        self.pooled = nn.Linear(6, 6)
        self.labels = labels

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = self.wide(hidden.reshape(-1, 6)).reshape(hidden.shape)
        first: Tensor = self.pooled(torch.tanh(hidden[:, 0]))
        return first @ self.wide(self.embed.weight[: self.labels]).T if self.labels else first


@pytest.mark.parametrize("positions", [1, 2, 3])
def test_all_positions_as_one_matrix_and_one_of_each_row(make_space: Any, expected: Any, positions: int) -> None:
    model = seeded(Flat)
    space = make_space({"wide": (6, 6), "pooled": (6, 6)}, 2, 3, 3, 2)
    ids = torch.arange(2 * positions).reshape(2, positions)
    with Serving(model, space) as serving, serving.batch(MIXED):
        got = model(ids)
    assert torch.allclose(got, expected(model, space, MIXED, ids), atol=1e-5)


def test_a_matrix_of_something_else_than_the_rows_is_refused(make_space: Any, written: Any) -> None:
    model = seeded(lambda: Flat(labels=4))  # twice as many as rows, and the model is called with three positions
    space = make_space({"wide": (6, 6), "pooled": (6, 6)}, 2, 3, 3, 2)
    run: Run = lambda own: own(torch.arange(6).reshape(2, 3))  # noqa: E731
    check_mixed_is_refused(model, space, run)
    check_one_task(model, space, written, run)


@pytest.mark.parametrize("shape", [(5, 3, 6, 5), (3, 6, 5)], ids=["other rows", "an image without a batch"])
def test_a_convolution_of_one_task_takes_what_it_takes(make_space: Any, written: Any, shape: tuple[int, ...]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2)))
    space = make_space({"0": (6, 27)}, 2, 2, 3, 2)
    check_mixed_is_refused(model, space, lambda own: own(draw(*shape)))
    check_one_task(model, space, written, lambda own: own(draw(*shape)))
