"""A mixed batch gives every row what the weights of its own task would give it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from share_client.serving import Serving
from share_client.serving.places import find_places
from share_client.serving.stacks import RowCores, SiteStack
from share_core.errors import ConfigError, SpaceMismatchError, TensorShapeError, UnknownTaskError
from share_core.fingerprint import describe_space
from share_core.types import Core, Space


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - expected).abs().max() <= tolerance * (1 + expected.abs().max()))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(
    k_out=st.integers(1, 5),
    k_in=st.integers(1, 5),
    p=st.integers(1, 4),
    tasks=st.integers(1, 4),
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    positions=st.integers(0, 3),
    missing=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_every_row_of_a_mixed_batch_equals_the_merged_weights(
    make_toy: Any, shapes: Any, make_space: Any, expected: Any,
    k_out: int, k_in: int, p: int, tasks: int, rows: list[int], positions: int, missing: int, seed: int,
) -> None:  # fmt: skip
    model, space = make_toy(seed), make_space(shapes, tasks, k_out, k_in, p, seed, missing=missing)
    names = [f"org/t{row}" if row < tasks else None for row in rows]
    x = draw(seed, len(rows), *([positions] if positions else []), 6)
    with Serving(model, space) as serving, serving.batch(names):
        got = model(x)
    assert got.shape == expected(model, space, names, x).shape
    assert close(got, expected(model, space, names, x))


@pytest.mark.parametrize("p", [1, 4], ids=["factors", "whole cores"])
def test_both_ways_of_holding_cores_are_in_use_and_planted_bugs_are_caught(
    make_toy: Any, shapes: Any, make_space: Any, expected: Any, monkeypatch: pytest.MonkeyPatch, p: int
) -> None:
    model, space = make_toy(), make_space(shapes, 3, 4, 4, p)
    names, x = ["org/t1", None, "org/t0", "org/t2", "org/t1"], draw(1, 5, 3, 6)
    wanted = expected(model, space, names, x)

    def served() -> Tensor:
        with Serving(model, space) as serving, serving.batch(names):
            out: Tensor = model(x)
            return out

    with Serving(model, space) as serving:
        assert {stack.out is None for stack in serving.current.stacks.values()} == {p == 4}
    assert close(served(), wanted)
    rows = SiteStack.rows
    with monkeypatch.context() as planted:  # the neighbour's task
        planted.setattr(SiteStack, "rows", lambda self, entries: rows(self, entries.roll(1)))
        assert not close(served(), wanted)
    with monkeypatch.context() as planted:  # no coefficients
        planted.setattr(RowCores, "apply", lambda self, z: z)
        assert not close(served(), wanted)


def test_rows_without_a_task_are_the_backbone_to_the_bit_and_no_gradient_is_kept(
    make_toy: Any, shapes: Any, make_space: Any
) -> None:
    model, space = make_toy(), make_space(shapes, 2, 3, 3, 2)
    x = draw(2, 4, 3, 6)
    with torch.no_grad():
        alone = model(x)
    with Serving(model, space) as serving:
        with serving.batch([None, "org/t0", None, "org/t1"]):
            mixed = model(x)
        with serving.batch([None] * 4):
            nobody = model(x)
        outside = model(x)
        assert outside.requires_grad
    assert mixed[0].equal(alone[0])
    assert mixed[2].equal(alone[2])
    assert nobody.equal(alone)
    assert outside.equal(alone)
    assert not mixed.requires_grad
    assert not close(mixed[1], alone[1])
    assert not any(part._forward_hooks for part in model.modules())


def test_bfloat16_follows_the_backbone(make_toy: Any, shapes: Any, make_space: Any, expected: Any) -> None:
    model, space = make_toy(), make_space(shapes, 3, 4, 4, 2)
    names, x = ["org/t1", None, "org/t2", "org/t0"], draw(3, 4, 5, 6)
    wanted = expected(model, space, names, x)
    narrow = copy.deepcopy(model).bfloat16()
    with Serving(narrow, space) as serving, serving.batch(names):
        got = narrow(x.bfloat16())
    assert got.dtype == torch.bfloat16
    # Rounding of weights, inputs and three layers: some 2**-8 each, of values of the size of the largest.
    assert close(got.float(), wanted, 8 * 2**-8)
    with Serving(model, space) as serving, serving.batch(names), torch.autocast("cpu", torch.bfloat16):
        cast = model(x)
    assert close(cast.float(), wanted, 8 * 2**-8)


@settings(deadline=None, max_examples=15)
@given(
    kernel=st.sampled_from([(1, 1, "zeros"), (3, 1, "zeros"), (3, 2, "reflect")]),
    p=st.integers(1, 3),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_convolutions(
    make_space: Any, expected: Any, kernel: tuple[int, int, str], p: int, rows: list[int], seed: int
) -> None:
    size, stride, mode = kernel
    modes: Any = {"padding_mode": mode}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 6, size, stride, size // 2, **modes), nn.ReLU(), nn.Conv2d(6, 2, 1))
    shapes = {"0": (6, 3 * size * size), "2": (2, 6)}
    space = make_space(shapes, 2, 2, 3, p, seed)
    names, x = [f"org/t{row}" if row < 2 else None for row in rows], draw(seed, len(rows), 3, 6, 5)
    with Serving(model, space) as serving, serving.batch(names):
        got = model(x)
    assert close(got, expected(model, space, names, x))


def test_a_transformer_whose_fast_path_skips_modules_is_served_all_the_same(make_space: Any, expected: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    space = make_space({"linear1": (16, 8), "linear2": (8, 16)}, 2, 3, 3, 2)
    names, x = ["org/t0", None, "org/t1"], draw(4, 3, 5, 8)
    with Serving(model, space) as serving, serving.batch(names):
        got = model(x)
    assert close(got, expected(model, space, names, x))
    with pytest.raises(ConfigError, match=r"inside nn\.MultiheadAttention"):
        Serving(model, make_space({"self_attn.out_proj": (8, 8)}, 1, 2, 2, 1))


def test_generation_with_a_cache_and_beams(make_space: Any, written: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train(False)
        ids = torch.randint(3, 50, (3, 6))
    sites = {f"model.layers.{layer}.self_attn.{part}_proj": (32, 32) for layer in range(2) for part in "qv"}
    space, names = make_space(sites, 2, 4, 4, 2), ["org/t1", None, "org/t0"]

    def generate(own: nn.Module, rows: Tensor) -> Any:
        options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
        return own.generate(rows, attention_mask=torch.ones_like(rows), **options)  # type: ignore[operator]

    with Serving(model, space) as serving, serving.batch([name for name in names for _ in range(2)]):
        mixed = generate(model, ids)
    alone = [generate(written(model, space, name), ids[row : row + 1])[0] for row, name in enumerate(names)]
    assert [row.tolist() for row in mixed] == [row.tolist() for row in alone]
    assert len({tuple(row[6:].tolist()) for row in mixed}) == 3


def test_a_flattened_input_counts_as_positions_and_other_rows_are_refused(
    make_toy: Any, shapes: Any, make_space: Any, expected: Any
) -> None:
    model, space = make_toy(), make_space(shapes, 2, 3, 3, 2)
    names, x = ["org/t0", "org/t1"], draw(5, 2, 4, 6)
    with Serving(model, space) as serving:
        with serving.batch(names):
            flat = model(x.reshape(8, 6)).reshape(2, 4, 5)
        assert close(flat, expected(model, space, names, x))
        for wrong in (draw(5, 4, 2, 6), draw(5, 3, 6), draw(5, 6)):
            with serving.batch(names), pytest.raises(TensorShapeError, match=r"expected 2 rows first"):
                model(wrong)


def test_two_models_are_served_inside_each_other(make_toy: Any, shapes: Any, make_space: Any, expected: Any) -> None:
    one, two = make_toy(1), make_toy(2)
    first, second = make_space(shapes, 1, 2, 2, 1, seed=1), make_space(shapes, 2, 3, 3, 2, seed=2)
    x = draw(6, 2, 6)
    with Serving(one, first) as outer, Serving(two, second) as inner:
        with outer.batch(["org/t0", None]), inner.batch(["org/t1", "org/t0"]):
            got = one(x), two(x)
        with outer.batch(["org/t0", None]):
            with outer.batch([None, "org/t0"]):
                innermost = one(x)
            after = one(x)
    assert close(got[0], expected(one, first, ["org/t0", None], x))
    assert close(got[1], expected(two, second, ["org/t1", "org/t0"], x))
    assert close(innermost, expected(one, first, [None, "org/t0"], x))
    assert close(after, got[0])


def test_heads_by_row(make_toy: Any, shapes: Any, make_space: Any) -> None:
    model, space = make_toy(), make_space(shapes, 3, 2, 2, 1)
    heads = {"org/t0": {"weight": draw(7, 3, 5), "bias": draw(8, 3)}, "org/t2": {"weight": draw(9, 2, 5)}}
    x = draw(10, 5, 6)
    with Serving(model, space, heads) as serving:
        with serving.batch(["org/t2", "org/t0", None, "org/t1", "org/t0"]) as batch:
            features = model(x)
            outputs = batch.heads(features)
            with pytest.raises(TensorShapeError, match="expected 5 rows"):
                batch.heads(features[:2])
            with pytest.raises(TensorShapeError, match="expected features of width 5"):
                batch.heads(features[:, :3])
        with pytest.raises(ConfigError, match="is over"):
            batch.heads(features)
    assert outputs[2] is None
    assert outputs[3] is None
    for row in (1, 4):
        assert outputs[row] is not None
        assert close(outputs[row], features[row] @ heads["org/t0"]["weight"].T + heads["org/t0"]["bias"])  # type: ignore[arg-type]
    assert close(outputs[0], features[0] @ heads["org/t2"]["weight"].T)  # type: ignore[arg-type]
    with pytest.raises(TensorShapeError, match="head of task 'org/t0': expected weight"):
        Serving(model, space, {"org/t0": {"weight": draw(7, 3)}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_task_is_in_the_weights_and_the_originals_come_back(
    make_toy: Any, shapes: Any, make_space: Any, written: Any, dtype: torch.dtype
) -> None:
    model, space = make_toy().to(dtype), make_space(shapes, 2, 3, 3, 2, missing=1)
    originals = {name: (weight, weight.clone()) for name, weight in model.named_parameters()}
    x = draw(11, 3, 6).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * 2**-8  # what serving holds is rounded like the weights
    with Serving(model, space) as serving:
        with serving.merged("org/t1") as version, torch.no_grad():
            assert version == space.version
            assert close(
                model(x).float(), written(model_before(model, originals), space, "org/t1")(x).float(), tolerance
            )
            with pytest.raises(ConfigError, match="'org/t1' is merged"), serving.batch(["org/t0"] * 3):
                pass
            with pytest.raises(ConfigError, match="'org/t1' is merged"), serving.merged("org/t0"):
                pass
        for name, weight in model.named_parameters():
            assert weight is originals[name][0]
            assert weight.equal(originals[name][1])
        with pytest.raises(UnknownTaskError, match="no task 'org/t9'"), serving.merged("org/t9"):
            pass
        with serving.batch(["org/t0"] * 3):
            assert not close(model(x).float(), model_before(model, originals)(x).float())
            with pytest.raises(ConfigError, match="inside a batch"), serving.merged("org/t0"):
                pass


def model_before(model: nn.Module, originals: dict[str, tuple[nn.Parameter, Tensor]]) -> nn.Module:
    """Return a copy of the model, without hooks, with the weights it had."""
    copied = copy.deepcopy(model)
    for part in copied.modules():
        part._forward_hooks.clear()
    copied.load_state_dict({name: weight for name, (_, weight) in originals.items()})
    return copied


def test_merging_leaves_a_tied_embedding_alone(make_space: Any) -> None:
    embed, lm_head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    lm_head.weight = embed.weight
    model = nn.ModuleDict({"embed": embed, "lm_head": lm_head})
    before = embed.weight.detach().clone()
    with Serving(model, make_space({"lm_head": (7, 4)}, 1, 2, 2, 1)) as serving, serving.merged("org/t0"):
        assert embed.weight.equal(before)
        assert not lm_head.weight.equal(before)
    assert lm_head.weight is embed.weight


def test_sites_are_found_in_a_task_model_and_the_wrong_backbone_is_refused(
    make_toy: Any, shapes: Any, make_space: Any
) -> None:
    space = make_space(shapes, 1, 2, 2, 1)
    inside = nn.ModuleDict({"bert": make_toy()})
    serving = Serving(inside, space)
    assert serving.version == 1
    serving.close()
    for model, why in (
        (nn.ModuleDict({"bert": make_toy(), "model": make_toy()}), "could be bert.block.first or model.block.first"),
        (nn.Linear(2, 2), "has no module 'block.first'"),
    ):
        with pytest.raises(SpaceMismatchError, match=why):
            Serving(model, space)
    with pytest.raises(SpaceMismatchError, match="the space has a weight of 7 x 5, this model 7 x 6"):
        Serving(make_toy(), make_space({"block.first": (7, 5)}, 1, 2, 2, 1))
    weights = {site: place.matrix().detach() for site, place in find_places(make_toy(), space.bases).items()}
    spec = describe_space("toy", weights)
    Serving(make_toy(), space, spec=spec).close()
    with pytest.raises(SpaceMismatchError, match="same shapes, other weights"):
        Serving(make_toy(1), space, spec=spec)


def test_what_cannot_be_served_is_named(make_toy: Any, shapes: Any, make_space: Any) -> None:
    cases: list[tuple[nn.Module, dict[str, tuple[int, int]], str]] = [
        (nn.ModuleDict({"e": nn.Embedding(7, 4)}), {"e": (4, 7)}, "site 'e' is Embedding"),
        (nn.ModuleDict({"c": nn.Conv2d(4, 4, 1, groups=2)}), {"c": (4, 2)}, "site 'c' is a grouped convolution"),
    ]
    shared = nn.Linear(3, 3)
    cases.append((nn.ModuleDict({"a": shared, "b": shared}), {"a": (3, 3), "b": (3, 3)}, "are one module"))
    for model, own, why in cases:
        with pytest.raises(ConfigError, match=why):
            Serving(model, make_space(own, 1, 2, 2, 1))
    model, space = make_toy(), make_space(shapes, 1, 2, 2, 1)
    with Serving(model, space) as serving:
        with pytest.raises(UnknownTaskError, match="no task 'org/t5'; it has: org/t0"), serving.batch(["org/t5"]):
            pass
        assert serving.versions == (1,)
        bad = Core(torch.ones(3, 1), torch.ones(2, 1))
        for cores, why in (({"last": bad}, "expected 2 x 2 coordinates, got 3 x 2"), ({"else": bad}, "site 'else'")):
            with pytest.raises(TensorShapeError, match=why):
                serving.update(Space(2, space.bases, {"org/t0": cores}))
        assert serving.version == 1


def test_a_model_of_another_shape_of_weights_cannot_be_merged(make_space: Any) -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 6)})
    with Serving(model, make_space({"q": (6, 4)}, 1, 2, 2, 1)) as serving:
        model["q"].weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
        packed = model["q"].weight
        with pytest.raises(ConfigError, match="without quantisation"), serving.merged("org/t0"):
            pass
        assert model["q"].weight is packed


def test_bytes_count_what_all_tasks_share_and_what_each_adds(make_toy: Any, shapes: Any, make_space: Any) -> None:
    model = make_toy()
    sizes = {}
    for tasks in (2, 4):
        with Serving(model, make_space(shapes, tasks, 4, 4, 1)) as serving:
            sizes[tasks] = serving.current.shared_bytes, serving.current.task_bytes
    assert sizes[2][0] == sizes[4][0] == 4 * sum(4 * (d_out + d_in) for d_out, d_in in shapes.values())
    assert sizes[4][1] - sizes[2][1] == 2 * 3 * (4 + 4) * 4
