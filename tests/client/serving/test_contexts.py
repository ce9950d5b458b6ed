"""Which threads and coroutines a batch reaches, and that those it does not reach are never served in silence."""

from __future__ import annotations

import asyncio
import queue
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from share_client.serving import Serving
from share_core.errors import ConfigError
from share_core.types import Space

NAMES = ["org/t0", "org/t1"]


def inputs() -> Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def space(make_space: Any, shapes: Any) -> Space:
    found: Space = make_space(shapes, 2, 3, 3, 2)
    return found


@pytest.fixture
def model(make_toy: Any) -> Any:
    return make_toy()


class Streamer:
    """What ``generate`` gives tokens to while another thread takes them out."""

    def __init__(self) -> None:
        self.tokens: queue.Queue[list[int] | None] = queue.Queue()

    def put(self, value: Tensor) -> None:
        self.tokens.put(value.flatten().tolist())

    def end(self) -> None:
        self.tokens.put(None)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).train(False)


def test_a_thread_with_the_context_streams_the_tasks_tokens(make_space: Any, written: Any) -> None:
    model, ids = llama(), torch.arange(3, 9).reshape(1, 6)
    sites = {f"model.layers.{layer}.self_attn.{part}_proj": (32, 32) for layer in range(2) for part in "qv"}
    space = make_space(sites, 2, 4, 4, 2)
    asked = {"inputs": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    wanted = written(model, space, "org/t1").generate(**asked)[0].tolist()
    assert wanted != model.generate(**asked)[0].tolist()
    streamer = Streamer()
    with Serving(model, space) as serving, serving.batch(["org/t1"]):
        own = Thread(target=copy_context().run, args=(model.generate,), kwargs={**asked, "streamer": streamer})
        own.start()
        got = [token for tokens in iter(lambda: streamer.tokens.get(timeout=60), None) for token in tokens]
        own.join()
    assert got == wanted


def test_coroutines_made_inside_have_the_batch(model: Any, space: Space, expected: Any) -> None:
    async def ask(serving: Serving, names: list[str]) -> Tensor:
        with serving.batch(names):
            task = asyncio.create_task(later())
            one: Tensor = await asyncio.to_thread(model, inputs())
            other = await task
        assert one.equal(other)
        return one

    async def later() -> Tensor:
        await asyncio.sleep(0)
        out: Tensor = model(inputs())
        return out

    async def both(serving: Serving) -> tuple[Tensor, Tensor]:
        return await asyncio.gather(ask(serving, NAMES), ask(serving, NAMES[::-1]))

    with Serving(model, space) as serving:
        got = asyncio.run(both(serving))
    assert torch.is_grad_enabled()  # though the batches ended in the order they began in
    for names, out in zip((NAMES, NAMES[::-1]), got, strict=True):
        assert torch.allclose(out, expected(model, space, names, inputs()), atol=1e-5)


def test_a_thread_without_the_context_is_refused_and_the_block_too(model: Any, space: Space) -> None:
    with ThreadPoolExecutor() as pool, Serving(model, space) as serving:
        with pytest.raises(ConfigError, match="the model was not called in it"), serving.batch(NAMES):
            lost = pool.submit(model, inputs()).exception()
        assert isinstance(lost, ConfigError)
        assert "'block.first' is called without a batch while" in str(lost)
        with serving.batch(NAMES):
            model(inputs())  # what the thread gets is no better for it
            with pytest.raises(ConfigError, match="without a batch"):
                pool.submit(model, inputs()).result()
            with serving.batch([None, None]):
                alone = pool.submit(copy_context().run, model, inputs()).result()
        assert alone.equal(pool.submit(model, inputs()).result())
        with serving.batch([None, None]):  # there is nothing to lose here, and the model need not be called
            assert alone.equal(pool.submit(model, inputs()).result())


def test_a_block_in_which_another_model_or_none_is_called_is_refused(model: Any, make_toy: Any, space: Space) -> None:
    with Serving(model, space) as serving:
        with pytest.raises(ConfigError, match="a batch of 2 rows with tasks is over"), serving.batch(NAMES):
            make_toy()(inputs())
        with serving.batch(NAMES) as batch:
            assert batch.heads(torch.ones(2, 5)) == [None, None]
        with serving.batch(NAMES):
            model(inputs())
        assert not serving._with_tasks


def test_an_error_inside_the_block_is_not_hidden(model: Any, space: Space) -> None:
    with Serving(model, space) as serving:
        with pytest.raises(KeyError, match="before the model was called"), serving.batch(NAMES):
            raise KeyError("before the model was called")
        assert serving.versions == (space.version,)
        assert not serving._with_tasks
        model(inputs())


def test_a_closed_serving_opens_no_batch_and_ends_those_there_are(model: Any, space: Space, expected: Any) -> None:
    serving = Serving(model, space)
    with serving.batch(NAMES):
        serving.close()
        got = model(inputs())
    assert torch.allclose(got, expected(model, space, NAMES, inputs()), atol=1e-5)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    with pytest.raises(ConfigError, match="is closed"), serving.batch(NAMES):
        pass
