"""Batches in which every row has a task of its own, over a model that stays as it is.

Forward hooks add each row's change to what an adapted module returns. Nothing in the model is replaced or written to,
and outside a batch it is the backbone alone. A batch holds one version from its first layer to its last, whatever is
published meanwhile.

A batch belongs to a context (:mod:`contextvars`): a coroutine has that of the one that made it, a new thread an empty
one. What would be the backbone alone by that mistake is refused, never served.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from share_client.backbones.places import Place
from share_client.serving.places import find_places
from share_client.serving.stacks import Heads, RowCores, ServedVersion, SiteStack, build_version
from share_core.errors import ConfigError, TensorShapeError, UnknownTaskError
from share_core.fingerprint import check_backbone
from share_core.types import Space, SpaceSpec

_BATCH: ContextVar[Batch | None] = ContextVar("share_serving_batch", default=None)
"""The innermost batch of this thread or coroutine."""
_ROUTED = re.compile(r"(^|\.)experts?[._\d]")
"""In a site's name: an expert, to which a router sends any positions of any rows."""


class _Gradients(threading.local):
    """Off in a thread while any batch is open in it: those of coroutines do not end in the order they began in."""

    _open = 0
    _before = True

    def __enter__(self) -> None:
        if not self._open:
            self._before = torch.is_grad_enabled()
        self._open += 1
        torch.set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        self._open -= 1
        torch.set_grad_enabled(not self._open and self._before)


_NO_GRADIENTS = _Gradients()


class Serving:
    """One model with the tasks of a space. Batches may run in any number of threads while :meth:`update` runs in one.

    At most two versions are held: the current one, and either the one that batches still run on or the one being built.
    """

    def __init__(
        self, model: nn.Module, space: Space, heads: Heads | None = None, spec: SpaceSpec | None = None
    ) -> None:
        """Install the hooks.

        Args:
            model: the backbone, alone or inside a task model, batch first; put it on its device before.
            space: the version to begin with; every site of it must exist in the model.
            heads: of the tasks that have one, for :meth:`Batch.heads`.
            spec: compare the weights with its fingerprints, so that a wrong backbone is refused; None: only shapes.

        Raises:
            SpaceMismatchError: another backbone.
            ConfigError: a module that cannot be served, see :func:`~share_client.serving.places.find_places`.
            TensorShapeError: a core or head that does not fit.
        """
        self._places = find_places(model, space.bases)
        if spec is not None:
            check_backbone(spec, {site: place.matrix().detach().cpu() for site, place in self._places.items()})
        self._changed = threading.Condition()
        self._updating = threading.Lock()
        self._current = build_version(space, self._places, heads or {})
        self._in_use: dict[ServedVersion, int] = {}
        self._with_tasks: set[Batch] = set()
        self._closed = False
        self._merged: str | None = None
        self._hooks = [
            place.module.register_forward_hook(self._hook(site, place), with_kwargs=True)
            for site, place in self._places.items()
        ]
        self._hooks.append(model.register_forward_pre_hook(self._look(), with_kwargs=True))

    def __enter__(self) -> Serving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks out, once no batch runs any more: the model is the backbone alone again."""
        with self._changed:
            self._closed = True
            self._release()

    def _release(self) -> None:
        if self._closed and not self._in_use:
            for hook in self._hooks:
                hook.remove()

    @property
    def current(self) -> ServedVersion:
        """What the next batch will run on."""
        with self._changed:
            return self._current

    @property
    def version(self) -> int:
        """Number of the version that the next batch will run on."""
        return self.current.version

    @property
    def versions(self) -> tuple[int, ...]:
        """Numbers of the versions held, the current one first; one more only while batches still run on it."""
        with self._changed:
            return (self._current.version, *(held.version for held in self._in_use if held is not self._current))

    @contextmanager
    def batch(self, tasks: Sequence[str | None]) -> Iterator[Batch]:
        """Give every row of what the model is called with inside the block its task; None is the backbone alone.

        No gradients are recorded inside. The block is of this thread or coroutine and of those it makes; into a new
        thread it goes by ``contextvars.copy_context().run``, to be waited for inside the block.

        Raises:
            UnknownTaskError: the current version has no such task.
            ConfigError: a task is merged into the weights, or this serving is closed; at the end of the block: tasks
                were named, and neither the model ran in it nor :meth:`Batch.heads`. While a batch names tasks, the
                model raises it too where it is called without any batch.
        """
        with self._changed:
            if self._closed:
                raise ConfigError("this serving is closed, the model is the backbone alone: make another Serving of it")
            if self._merged is not None:
                raise ConfigError(f"task {self._merged!r} is merged into the weights: leave that block first")
            held = self._current
            self._in_use[held] = self._in_use.get(held, 0) + 1
        try:
            batch = Batch(self, held, tasks, _BATCH.get())
            token = _BATCH.set(batch)
            if not batch.idle:
                self._with_tasks.add(batch)
            try:
                with _NO_GRADIENTS:
                    yield batch
                batch.check_used()
            finally:
                self._with_tasks.discard(batch)
                _BATCH.reset(token)
                batch.end()
        finally:
            with self._changed:
                self._in_use[held] -= 1
                if not self._in_use[held]:
                    del self._in_use[held]
                self._release()
                self._changed.notify_all()

    def update(self, space: Space, heads: Heads | None = None) -> None:
        """Build another version beside the current one; batches that begin afterwards run on it.

        Waits until no batch runs on an older version than the current one. If it fails, the current one stays.

        Args:
            space: of the same backbone.
            heads: None keeps those there are.

        Raises:
            TensorShapeError: a core or head that does not fit.
            ConfigError: called inside a batch that runs on an older version, which would wait for itself.
        """
        own = self._own_batch()
        with self._updating:
            if own is not None and own.held is not self.current:
                raise ConfigError("a batch that runs on an older version cannot update again: end the batch first")
            self._await_room()
            fresh = build_version(space, self._places, self.current.heads if heads is None else heads)
            with self._changed:
                self._current = fresh

    def _await_room(self) -> None:
        """Wait until only the current version is held, so that another one makes two."""
        with self._changed:
            self._changed.wait_for(lambda: all(held is self._current for held in self._in_use))

    @contextmanager
    def merged(self, task: str) -> Iterator[int]:
        """Add a task to the weights themselves while the block lasts, for all rows of all threads; yields its version.

        Costs nothing per call and a second copy of the adapted weights. The original weights are put back, not computed
        back. Waits until no batch runs; batches are refused inside.

        Raises:
            UnknownTaskError: the current version has no such task.
            ConfigError: inside a batch or another such block, or the weights are quantised.
        """
        if self._own_batch() is not None:
            raise ConfigError("a task cannot be merged inside a batch: end the batch first")
        with self._changed:
            if self._merged is not None:
                raise ConfigError(f"task {self._merged!r} is merged into the weights: leave that block first")
            self._merged = task  # from here on no batch begins
        originals: list[tuple[Place, Any]] = []
        try:
            held = self._await_quiet()
            for site, stack in held.stacks.items():
                place = self._places[site]
                total = place.matrix().detach().float() + stack.change(entry_of(held, task))
                # Another parameter, not other numbers in it: an embedding tied to this weight must not change.
                originals.append((place, place.module.weight))
                place.module.weight = nn.Parameter(place.as_stored(total), requires_grad=False)
            yield held.version
        finally:
            for place, original in originals:
                place.module.weight = original
            with self._changed:
                self._merged = None

    def _await_quiet(self) -> ServedVersion:
        """Wait until no batch runs; return the version that is current then."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_use)
            return self._current

    def _own_batch(self) -> Batch | None:
        """Return the innermost batch of this serving; those of other models may lie around or inside it."""
        batch = _BATCH.get()
        while batch is not None and batch.serving is not self:
            batch = batch.outer
        return batch

    def _hook(self, site: str, place: Place) -> Callable[..., Tensor | None]:
        add = _add_to_convolution if place.kind == "conv" else _add_to_linear

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
            batch = self._own_batch()
            if batch is None:
                self._refuse_stray(site)
                return None
            batch.used = True
            stack = batch.held.stacks.get(site)
            cores = None if stack is None else batch.cores(site, stack)
            if stack is None or cores is None:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            batch.check_rows(place, x)
            return add(place, stack, cores, x, y)

        return hook

    def _refuse_stray(self, site: str) -> None:
        """Refuse a call without a batch while another thread or coroutine is inside one that names tasks."""
        if self._with_tasks:
            raise ConfigError(
                f"site {site!r} is called without a batch while one with tasks is open elsewhere, as in a new thread, "
                "which knows of no batch: start it with contextvars.copy_context().run inside the block, or, for the "
                "backbone alone, call the model in a batch of None for every row"
            )

    def _look(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            batch = self._own_batch()
            if batch is not None:
                batch.look_at_input(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

        return hook


class Batch:
    """What one ``with serving.batch(...)`` block runs on."""

    def __init__(self, serving: Serving, held: ServedVersion, tasks: Sequence[str | None], outer: Batch | None) -> None:
        self.serving = serving
        self.outer = outer
        self.tasks = tuple(tasks)
        self.version = held.version
        """Number of the version that every layer of this batch sees; readable after the block too."""
        self._held: ServedVersion | None = held
        entries = [0 if task is None else entry_of(held, task) for task in self.tasks]
        self._entries: Tensor | int = entries[0] if len(set(entries)) == 1 else torch.tensor(entries)
        self.idle = not any(entries)
        """Whether no row has a task."""
        self.used = False
        """Whether anything has run in this batch."""
        self._seen = threading.local()  # calls of the model side by side see different inputs
        self._gathered: dict[str, RowCores] = {}

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.tasks)

    @property
    def held(self) -> ServedVersion:
        """The version that every layer of this batch uses, whatever has become the current one since.

        Raises:
            ConfigError: the block is over.
        """
        if self._held is None:
            raise ConfigError("this batch is over: use it inside its block")
        return self._held

    def end(self) -> None:
        """Let the version go: a batch that somebody keeps must not keep a version."""
        self._held = None
        self._gathered.clear()

    def check_used(self) -> None:
        """Refuse that tasks were named and served to nobody.

        Raises:
            ConfigError: nothing has run in this batch.
        """
        if not self.used and not self.idle:
            raise ConfigError(
                f"a batch of {self.rows} rows with tasks is over and the model was not called in it: what came out "
                "meanwhile is the backbone alone. Call the model that Serving got inside the block; a new thread knows "
                "of no batch, start it with contextvars.copy_context().run and wait for it inside the block"
            )

    def cores(self, site: str, stack: SiteStack) -> RowCores | None:
        """Return the coefficients of the rows at a site, looked up once per batch; None if all rows have no task."""
        if self.idle:
            return None
        if site not in self._gathered:
            entries = self._entries if isinstance(self._entries, int) else self._entries.to(stack.in_.device)
            self._gathered[site] = stack.rows(entries)
        return self._gathered[site]

    def look_at_input(self, inputs: Iterable[Tensor]) -> None:
        """Note how many positions the model is called with: a layer may get them all as one matrix."""
        if self.idle:
            return
        flattened = self._seen.flattened = {self.rows}
        for x in inputs:  # numbers are (..., d), everything else is names of tokens
            positions = x.shape[:-1].numel() if x.is_floating_point() else x.numel()
            if x.ndim == 2 and x.is_floating_point() and positions % self.rows == 0:
                flattened.add(positions)  # flattened by the caller
            elif x.ndim > 1 and x.shape[0] == self.rows:
                flattened.add(positions)

    def check_rows(self, place: Place, x: Tensor) -> None:
        """Refuse an input in which the rows of this batch cannot be told apart, unless all have one task.

        They come first. A matrix has one position per row, or as many as the model itself was called with; which rows
        the positions of an expert are of, only its router knows.

        Raises:
            TensorShapeError: other rows.
        """
        if isinstance(self._entries, int):
            return
        if place.kind != "conv" and x.ndim == 2:
            told = int(x.shape[0]) in getattr(self._seen, "flattened", {self.rows}) and not _ROUTED.search(place.site)
        else:
            told = x.ndim > 2 and int(x.shape[0]) == self.rows
        if not told:
            raise TensorShapeError(
                f"site {place.site!r} is called with {tuple(x.shape)}, expected {self.rows} rows first, as many as the "
                "batch has tasks: name a task for every row that the model sees; beams and windows of an image are "
                "rows too. Experts and projections of relative positions have no rows: serve one task per batch"
            )

    def heads(self, features: Tensor) -> list[Tensor | None]:
        """Return each row's outputs by the head of its task; None for rows without a task or with a task without head.

        Args:
            features: (rows, ..., width); an output is (..., classes).

        Raises:
            TensorShapeError: another number of rows, or another width.
        """
        self.used = True
        if int(features.shape[0]) != self.rows:
            raise TensorShapeError(f"heads: expected {self.rows} rows of features, got {tuple(features.shape)}")
        outputs: list[Tensor | None] = [None] * self.rows
        for task in sorted({task for task in self.tasks if task is not None}):
            head = self.held.heads.get(task)
            if head is None:
                continue
            if head["weight"].shape[1] != features.shape[-1]:
                raise TensorShapeError(
                    f"head of task {task!r}: expected features of width {head['weight'].shape[1]}, got "
                    f"{tuple(features.shape)}"
                )
            mine = [row for row, own in enumerate(self.tasks) if own == task]
            tensors = {name: tensor.to(features) for name, tensor in head.items()}
            for row, output in zip(mine, nn.functional.linear(features[mine], **tensors), strict=True):
                outputs[row] = output
        return outputs


def entry_of(held: ServedVersion, task: str) -> int:
    """Return a task's entry in the stacks of a version.

    Raises:
        UnknownTaskError: it has no such task.
    """
    try:
        return held.entries[task]
    except KeyError:
        known = ", ".join(list(held.entries)[:8]) or "none"
        raise UnknownTaskError(f"version {held.version} has no task {task!r}; it has: {known}") from None


def _add_to_linear(place: Place, stack: SiteStack, cores: RowCores, x: Tensor, y: Tensor) -> Tensor:
    """Return y + left C right^T x for inputs (rows, ..., d_in) or (rows * n, d_in)."""
    z = x.to(stack.right.dtype).reshape(cores.rows, -1, place.d_in) @ stack.right
    z = cores.apply(z).reshape(-1, stack.left_t.shape[0])
    if z.dtype != y.dtype:
        return y + (z @ stack.left_t).reshape(y.shape).to(y.dtype)
    return torch.addmm(y.reshape(-1, place.d_out), z, stack.left_t).reshape(y.shape)


def _add_to_convolution(place: Place, stack: SiteStack, cores: RowCores, x: Tensor, y: Tensor) -> Tensor:
    """Return y + left C (right * x) for inputs (rows, channels, ...); ``right`` is a convolution to k_in channels."""
    weight, convolve = place.module.weight, place.module._conv_forward
    assert isinstance(weight, Tensor)
    assert callable(convolve)
    z: Tensor = convolve(x.to(stack.right.dtype), stack.right.T.reshape(-1, *weight.shape[1:]), None)
    z = cores.apply(z.flatten(2 - weight.ndim).transpose(-1, -2)) @ stack.left_t
    return y + z.transpose(-1, -2).reshape(y.shape).to(y.dtype)
