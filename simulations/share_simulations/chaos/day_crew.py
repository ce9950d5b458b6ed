"""The clients of the scaled day as processes: who comes, goes, is killed and comes back, and when."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from share_client.member import ClientLayout
from share_client.outbox import list_outbox
from share_proto.v1 import hub_pb2
from share_server.local import LocalHub
from share_simulations.chaos.day_client import EXIT_TOKEN, ClientPlan, run_client
from share_simulations.chaos.endcheck import Book

if TYPE_CHECKING:
    from share_simulations.chaos.day_report import Diary

_EXCUSED = ("RebaseError: ", "VersionError: ")
"""Why an update may end among the refused ones: its training was thrown away and done again."""

# One server forks hubs and clients; it has imported what both need and opened nothing.
_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(["share_server.hub.__main__", "share_simulations.chaos.day_client"])


@dataclass
class _Member:
    """One client over all its lives."""

    plan: ClientPlan
    process: BaseProcess | None = None
    lives: int = 0
    kills: int = 0
    left: bool = False
    """It has gone by itself, with an empty outbox."""
    problems: list[str] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()


class Crew:
    """All clients of one day."""

    def __init__(self, server: LocalHub, clients: int, plan: Callable[[int], ClientPlan], seed: int) -> None:
        self._server = server
        self._members = [_Member(plan(number)) for number in range(clients)]
        self._random = random.Random(seed + 5)
        self._leaving = False
        self.address = ""
        """The hub as the clients reach it; set it before the day."""

    @property
    def alive(self) -> int:
        """Clients that run now."""
        return sum(member.alive for member in self._members)

    @property
    def joined(self) -> int:
        """Clients that have ever run."""
        return sum(member.lives > 0 for member in self._members)

    @property
    def killed(self) -> int:
        """SIGKILLs of clients."""
        return sum(member.kills for member in self._members)

    async def day(self, diary: Diary) -> None:
        """Let everybody live through the day; it ends with some of them running."""
        await asyncio.gather(*(self._live(number, member, diary) for number, member in enumerate(self._members)))

    async def evening(self, diary: Diary, most_s: float) -> None:
        """Let everybody who has ever come bring the outbox to its end, and go."""
        self._leaving = True
        end = diary.now() + most_s
        for member in self._members:
            member.plan.leave.touch()
        while any(not self._gone(member) for member in self._members) and diary.now() < end:
            await asyncio.sleep(0.05)
        for member in self._members:
            if not member.left:
                member.problems.append(f"{member.plan.root.name} did not bring its outbox to its end")

    def kill_all(self) -> None:
        """End whatever still runs."""
        for member in self._members:
            self._kill(member)

    def tell(self, version: int) -> None:
        """Write the newest version onto the board that the clients see."""
        board = self._members[0].plan.board
        temporary = board.with_suffix(".new")
        temporary.write_text(str(version))
        temporary.replace(board)

    def fill(self, book: Book) -> None:
        """Write what the clients have noted into ``book``."""
        for member in self._members:
            for line in _lines(member):
                if line["event"] == "sent":
                    book.send(line["update_id"], line["sha256"])
                else:
                    fields = {key: value for key, value in line.items() if key != "event"}
                    book.acknowledge(line["update_id"], hub_pb2.SubmitResponse(**fields))

    def sends(self) -> int:
        """Return how many Submit calls the clients have begun."""
        return sum(line["event"] == "sent" for member in self._members for line in _lines(member))

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return every line with this event from the session logs."""
        found = []
        for member in self._members:
            path = ClientLayout(member.plan.root).session_log
            if path.exists():
                lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
                found += [line for line in lines if line.get("event") == event]
        return found

    def outboxes(self) -> tuple[int, list[str]]:
        """Return (updates that still wait in an outbox, what is wrong with what clients hold)."""
        waiting, problems = 0, [text for member in self._members for text in member.problems]
        for member in self._members:
            left, refused = list_outbox(ClientLayout(member.plan.root).outbox)
            waiting += len(left)
            problems += [f"{member.plan.root.name} still holds update {entry.update_id}" for entry in left]
            problems += [
                f"{member.plan.root.name}: update {entry.update_id} was refused: {reason}"
                for entry, reason in refused
                if not reason.startswith(_EXCUSED)
            ]
        return waiting, problems

    async def _live(self, number: int, member: _Member, diary: Diary) -> None:
        """One client's day: come, be killed and come back, perhaps leave early."""
        draw = random.Random(f"{number} {self._random.random()}")
        some = number % 3 == 2  # a third come later than the others
        await asyncio.sleep(draw.uniform(0.1, 0.6) * diary.seconds if some else draw.uniform(0, 1))
        leaves = draw.uniform(0.7, 0.95) * diary.seconds if number % 4 == 1 else float("inf")
        next_kill = diary.now() + _pause(draw, diary)
        self._start(member, diary)
        while diary.now() < diary.seconds:
            await asyncio.sleep(0.05)
            if diary.now() > leaves and not member.plan.leave.exists():
                member.plan.leave.touch()
                diary.mark("client leaves")
            if self._gone(member):
                return
            if diary.now() > next_kill and member.alive:
                self._kill(member)
                member.kills += 1
                diary.mark("client killed")
                await asyncio.sleep(draw.uniform(0.1, 2.0))
                self._start(member, diary)
                next_kill = diary.now() + _pause(draw, diary)

    def _start(self, member: _Member, diary: Diary) -> None:
        if member.lives == 0:
            member.plan = replace(member.plan, address=self.address)
            diary.mark("client joins")
        self._launch(member)

    def _launch(self, member: _Member) -> None:
        """Begin one more life."""
        member.lives += 1
        token = self._server.invite(f"org{member.plan.seed % 1000}/client")
        process = _WARM.Process(target=run_client, args=(member.plan, token), daemon=True)
        process.start()
        member.process = process

    def _kill(self, member: _Member) -> None:
        if member.process is not None:
            member.process.kill()
            member.process.join()

    def _gone(self, member: _Member) -> bool:
        """Whether the client has gone by itself; one that was killed in the evening's dusk comes back."""
        if member.left or member.process is None:
            member.left = True
            return True
        code = member.process.exitcode
        if code is None:
            return False
        if code == 0:
            member.left = True
            return True
        if code not in (-signal.SIGKILL, EXIT_TOKEN) and len(member.problems) < 3:
            lines = member.plan.log.read_text(errors="replace").strip().splitlines() or ["nothing in its log"]
            member.problems.append(f"{member.plan.root.name} ended with code {code}: {lines[-1][-400:]}")
        if len(member.problems) >= 3:
            return False
        self._launch(member)
        return False


def _pause(draw: random.Random, diary: Diary) -> float:
    """Return the seconds until the next kill of one client: three a day and client, but none right away."""
    return max(1.0, draw.uniform(0.1, 0.5) * diary.seconds)


def _lines(member: _Member) -> Iterator[dict[str, Any]]:
    """Return what one client has noted, in order."""
    if member.plan.ledger.exists():
        for line in member.plan.ledger.read_text().splitlines():
            yield json.loads(line)
