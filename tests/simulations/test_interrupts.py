"""The first signal ends the work in order; those that follow do not disturb it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
import typer

from share_simulations.interrupts import Interrupted, interruptible, reporting, run_tasks


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_block_with_code_130_and_a_second_one_is_not_felt(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before, cleared = handlers(), False
    with pytest.raises(typer.Exit) as ended, interruptible("all is stopped"):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            cleared = True
    assert cleared
    assert ended.value.exit_code == 130
    assert "interrupted; all is stopped" in capsys.readouterr().err
    assert handlers() == before


def test_a_signal_that_was_ignored_from_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible("nothing"):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_tasks_are_cancelled_and_may_clear_up(number: signal.Signals) -> None:
    said: list[str] = []

    async def member(name: str) -> None:
        try:
            if name == "b":  # the signal arrives while a task of a group runs, not in the main one
                os.kill(os.getpid(), number)
            await asyncio.sleep(600)
        finally:
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.01)
            said.append(name)

    async def work() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for name in "abc":
                    group.create_task(member(name))
        finally:
            await asyncio.sleep(0.01)
            said.append("work")

    with pytest.raises(typer.Exit), interruptible("all is stopped"):
        run_tasks(work())
    assert (sorted(said[:3]), said[3:]) == (["a", "b", "c"], ["work"])


@pytest.mark.parametrize("answer", ["result", "error"])
def test_work_that_answers_a_cancellation_in_another_way_is_interrupted_all_the_same(answer: str) -> None:
    async def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            if answer == "error":
                raise ValueError("the hub was interrupted too") from None
        return 1

    with pytest.raises(typer.Exit) as ended, interruptible("all is stopped"):
        run_tasks(work())
    assert ended.value.exit_code == 130


def test_without_an_interrupt_tasks_return_and_fail_as_always() -> None:
    async def work(fails: bool) -> int:
        if fails:
            raise ValueError("wrong")
        return 7

    assert run_tasks(work(False)) == 7
    with interruptible("nothing"):
        assert run_tasks(work(False)) == 7
        with pytest.raises(ValueError, match="wrong"):
            run_tasks(work(True))


def test_an_interrupt_carries_what_was_reached_and_is_no_success() -> None:
    reached = {"points": 0, "ok": True, "complete": True}
    with pytest.raises(Interrupted) as caught, reporting(lambda: reached):
        reached["points"] = 3
        raise KeyboardInterrupt
    assert caught.value.report == {"points": 3, "ok": False, "complete": False}
