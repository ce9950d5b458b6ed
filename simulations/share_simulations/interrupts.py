"""Ctrl-C and SIGTERM: the first one ends a command in order, those that follow do not disturb its clearing up."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

import typer

from share_core.command_line import INTERRUPTED

_T = TypeVar("_T")
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """An interrupt that carries the report of what was reached before it."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.report = report


class _Once:
    """A signal handler that interrupts once. GNU timeout and wrappers send the same signal twice."""

    def __init__(self) -> None:
        self.came = False
        self.cancel: Callable[[], object] | None = None
        """What to do instead of raising KeyboardInterrupt."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            return
        self.came = True
        if self.cancel is None:
            raise KeyboardInterrupt
        self.cancel()


@contextlib.contextmanager
def interruptible(stopped: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM interrupt the block, then say what ``stopped`` and end the command with exit code 130.

    The block gets one KeyboardInterrupt; it ends its processes on the way out. A signal that this process was told to
    ignore when it was started stays ignored.
    """
    once = _Once()
    before = {n: signal.signal(n, once) for n in _NUMBERS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    except KeyboardInterrupt:  # typer itself would answer with exit code 1
        typer.echo(f"share-sim: interrupted; {stopped}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_tasks(work: Coroutine[Any, Any, _T]) -> _T:
    """Do what ``asyncio.run`` does; in an :func:`interruptible` block an interrupt first cancels ``work``.

    KeyboardInterrupt in the middle of an event loop would end some task and leave the ``finally`` of others undone.
    """
    handler = next((h for h in map(signal.getsignal, _NUMBERS) if isinstance(h, _Once)), None)
    if handler is None:
        return asyncio.run(work)

    async def main() -> _T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(task.cancel)

        handler.cancel = cancel
        return await work

    try:
        result = asyncio.run(main())
    except (asyncio.CancelledError, Exception) as error:
        if handler.came:  # an error as well: a terminal interrupts the hub too, which looks like one that died
            raise KeyboardInterrupt from error
        raise
    finally:
        handler.cancel = None
    if handler.came:  # the work had just ended, or answered the cancellation with a result
        raise KeyboardInterrupt
    return result


@contextlib.contextmanager
def reporting(report: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Let an interrupt of the block carry ``report()``, marked as incomplete: nobody takes it for a campaign passed."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted({**report(), "ok": False, "complete": False}) from None
