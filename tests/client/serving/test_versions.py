"""A batch sees one version whole, memory holds two at most, and a stream that fails leaves the last good one."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from share_client.serving import Follower, Serving, stacks
from share_client.serving import serving as module
from share_client.serving.serving import Batch
from share_client.serving.stacks import ServedVersion
from share_core.errors import ConfigError, ManifestError, TensorShapeError, VersionError
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import update_adapter
from share_core.types import Core, Delta, Space, SpaceSpec

NAMES = ["org/t0", "org/t1"]


def inputs() -> Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def versions(make_space: Any, shapes: Any) -> list[Space]:
    """Three versions whose bases and cores have nothing in common."""
    return [make_space(shapes, 2, 2 + v, 3, 1 + v, seed=v, version=v) for v in range(3)]


@pytest.fixture
def model(make_toy: Any) -> Any:
    return make_toy()


@pytest.fixture
def whole(model: Any, versions: list[Space], expected: Any) -> list[Tensor]:
    """What a batch of each version gives."""
    return [expected(model, space, NAMES, inputs()) for space in versions]


def which(got: Tensor, whole: list[Tensor]) -> list[int]:
    """Return the versions that an output can come from; none if it is torn."""
    return [v for v, wanted in enumerate(whole) if torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)]


def swapped_between_layers(model: Any, versions: list[Space]) -> tuple[Tensor, Tensor]:
    """Return the output of a batch during which version 1 replaces version 0, and of one after it."""
    with Serving(model, versions[0]) as serving:
        model.between = lambda: serving.update(versions[1])
        with serving.batch(NAMES) as batch:
            torn = model(inputs())
            assert batch.version == 0
            assert list(serving.versions) == [1, 0]
        model.between = lambda: None
        assert list(serving.versions) == [1]
        with serving.batch(NAMES) as batch:
            assert batch.version == 1
            return torn, model(inputs())


def test_a_swap_between_two_layers_does_not_tear_the_batch(
    model: Any, versions: list[Space], whole: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    during, after = swapped_between_layers(model, versions)
    assert which(during, whole) == [0]
    assert which(after, whole) == [1]
    # Planted: layers look up the current version instead of the batch's own.
    monkeypatch.setattr(Batch, "held", property(lambda self: self.serving.current))
    during, after = swapped_between_layers(model, versions)
    assert which(during, whole) == []
    assert which(after, whole) == [1]


def test_threads_never_see_a_torn_version(model: Any, versions: list[Space], whole: list[Tensor]) -> None:
    seen: list[list[int]] = []
    enough = threading.Event()

    def run(serving: Serving) -> None:
        while not enough.is_set():
            with serving.batch(NAMES) as batch:
                got = which(model(inputs()), whole)
            seen.append(got if got == [batch.version] else [])

    with Serving(model, versions[0]) as serving:
        workers = [threading.Thread(target=run, args=(serving,)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for turn in range(40):
            serving.update(versions[turn % 3])
        enough.set()
        for worker in workers:
            worker.join()
        assert serving.versions == (versions[39 % 3].version,)
    assert seen
    assert [] not in seen


class Counted:
    """Counts the versions in memory whenever one more has been built."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: list[weakref.ref[ServedVersion]] = []
        self.peak = 0
        build = stacks.build_version

        def counting(*args: Any) -> ServedVersion:
            fresh = build(*args)
            self._made.append(weakref.ref(fresh))
            self.peak = max(self.peak, sum(ref() is not None for ref in self._made))
            return fresh

        monkeypatch.setattr(module, "build_version", counting)


def most_versions(model: Any, versions: list[Space], counted: Counted, waits: bool) -> int:
    """Return the most versions in memory while one batch stays on the first and two more are published."""
    with Serving(model, versions[0]) as serving:
        asked = threading.Event()
        room = serving._await_room

        def noticed() -> None:
            asked.set()
            room()

        with serving.batch(NAMES) as kept:
            model(inputs())
            serving.update(versions[1])
            serving._await_room = noticed  # type: ignore[method-assign]
            last = threading.Thread(target=serving.update, args=(versions[2],))
            last.start()
            asked.wait()
            if not waits:
                last.join()
        last.join()
        assert serving.versions == (2,)
        assert kept.version == 0
    return counted.peak


def test_at_most_two_versions_are_held(model: Any, versions: list[Space], monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_versions(model, versions, Counted(monkeypatch), waits=True) == 2
    monkeypatch.setattr(Serving, "_await_room", lambda self: None)  # planted: nobody waits
    assert most_versions(model, versions, Counted(monkeypatch), waits=False) == 3


def test_a_batch_that_somebody_keeps_does_not_keep_its_version(
    model: Any, versions: list[Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak() -> int:
        counted, kept = Counted(monkeypatch), []
        with Serving(model, versions[0]) as serving:
            for space in versions:
                serving.update(space)
                with serving.batch(NAMES) as batch:
                    model(inputs())
                kept.append(batch)
        return counted.peak

    assert peak() == 2
    monkeypatch.setattr(Batch, "end", lambda self: None)
    assert peak() > 2


def test_an_update_that_would_wait_for_its_own_batch_is_refused(model: Any, versions: list[Space]) -> None:
    with Serving(model, versions[0]) as serving, serving.batch(NAMES):
        model(inputs())
        serving.update(versions[1])
        with pytest.raises(ConfigError, match="end the batch first"):
            serving.update(versions[2])


def merged_beside_a_batch(model: Any, versions: list[Space], waits: bool) -> tuple[list[str], list[Tensor]]:
    """Return what happened in which order, and outputs: twice merged, with an update in between, and mixed after it."""
    order: list[str] = []
    got: list[Tensor] = []
    with Serving(model, versions[0]) as serving:
        asked = threading.Event()
        quiet = serving._await_quiet

        def noticed() -> ServedVersion:
            asked.set()
            return quiet()

        serving._await_quiet = noticed  # type: ignore[method-assign]

        def merge_one() -> None:
            with serving.merged("org/t1"), torch.no_grad():
                order.append("merged")
                if not waits:
                    return  # the model refuses to be called beside a batch
                got.append(model(inputs()))
                serving.update(versions[1])
                got.append(model(inputs()))

        thread = threading.Thread(target=merge_one)
        with serving.batch(NAMES):
            model(inputs())
            thread.start()
            asked.wait()
            if not waits:
                thread.join()
            order.append("batch over")
        thread.join()
        with serving.batch(NAMES):
            got.append(model(inputs()))
    return order, got


def test_merging_waits_for_batches_and_an_update_meanwhile_counts_afterwards(
    model: Any, versions: list[Space], whole: list[Tensor], written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, got = merged_beside_a_batch(model, versions, waits=True)
    assert order == ["batch over", "merged"]
    with torch.no_grad():
        wanted = written(model, versions[0], "org/t1")(inputs())
    assert torch.allclose(got[0], wanted, atol=1e-5)
    assert got[1].equal(got[0])
    assert which(got[2], whole) == [1]
    monkeypatch.setattr(Serving, "_await_quiet", lambda self: self.current)  # planted: nobody waits
    assert merged_beside_a_batch(model, versions, waits=False)[0] == ["merged", "batch over"]


class Events:
    """A feed that gives these events, then waits to be closed."""

    def __init__(self, events: Sequence[Delta | Space | Exception]) -> None:
        self._events = events
        self._closed = threading.Event()
        self.given = threading.Event()

    def events(self) -> Iterator[Delta | Space]:
        for event in self._events:
            if isinstance(event, Exception):
                raise event
            yield event
        self.given.set()
        self._closed.wait()

    def close(self) -> None:
        self._closed.set()


@pytest.fixture
def history(fake: Any, spec: SpaceSpec) -> list[tuple[Delta | None, Space]]:
    """Versions 0 to 3 made by real merges, each with the delta that leads to it."""
    state = empty_state(spec)
    made: list[tuple[Delta | None, Space]] = [(None, state.space)]
    for number in range(1, 4):
        adapter = update_adapter(fake.make_update(state.space, number), state.space.bases)
        merged = merge(state, f"org/t{number}", adapter, MergePolicy(k_max=2))
        state = merged.state
        made.append((merged.delta, state.space))
    return made


@pytest.fixture
def backbone(fake: Any) -> torch.nn.Module:
    model = torch.nn.ModuleDict()
    for site, weight in fake.site_weights().items():
        model[site] = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        model[site].weight.data = weight
    return model


def outputs(serving: Serving, backbone: torch.nn.Module, tasks: list[str | None]) -> Tensor:
    with serving.batch(tasks):
        out: Tensor = backbone["one"](torch.ones(len(tasks), 8))  # type: ignore[index]
        return out


def test_a_follower_serves_every_version_and_its_heads(
    history: Any, backbone: torch.nn.Module, dense_change: Callable[..., Tensor]
) -> None:
    assert history[3][0].compacts
    feed, done = Events([history[1][0], history[2][1], history[3][0]]), list[int]()
    heads = {v: {"org/t1": {"weight": torch.full((2, 12), float(v))}} for v in (1, 2)}
    with (
        Serving(backbone, history[0][1]) as serving,
        Follower(serving, history[0][1], feed, heads.get, done.append) as follower,
    ):
        feed.given.wait()
        assert done == [1, 2, 3]
        assert follower.failure is None
        assert serving.versions == (3,)
        got = outputs(serving, backbone, ["org/t3", None])
        with serving.batch(["org/t1"]) as batch:
            head = batch.heads(torch.ones(1, 12))[0]
    weight = backbone["one"].weight.double()  # type: ignore[index]
    wanted = (weight + dense_change(history[3][1], "org/t3", "one")).sum(dim=1).float()
    assert torch.allclose(got[0], wanted, atol=1e-5)
    assert head is not None
    assert head.tolist() == [24.0, 24.0]  # version 3 brought none, so those of version 2 stay


@pytest.mark.parametrize("what", ["manifest", "skipped", "core", "memory", "disk"])
def test_a_stream_that_fails_leaves_the_last_good_version(history: Any, backbone: torch.nn.Module, what: str) -> None:
    good: Delta = history[1][0]
    wide = {"org/t1": {"one": Core(torch.ones(99, 1), torch.ones(1, 1))}}
    bad: dict[str, tuple[Delta | Space | Exception, type[Exception]]] = {
        "manifest": (ManifestError("forged"), ManifestError),
        "skipped": (history[3][0], VersionError),
        "core": (Space(2, history[2][1].bases, wide), TensorShapeError),
        "memory": (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError),
        "disk": (OSError("no such disk"), OSError),
    }
    event, error = bad[what]
    with Serving(backbone, history[0][1]) as serving:
        with Follower(serving, history[0][1], Events([good, event])) as follower:
            follower._thread.join()
            assert isinstance(follower.failure, error)
        assert serving.versions == (1,)
        assert outputs(serving, backbone, ["org/t1", None]).isfinite().all()
