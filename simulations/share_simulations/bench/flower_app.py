"""The Flower app that the peer's figures come from: random arrays as replies, and a ServerApp that notes what it got.

Flower imports this module in processes of its own. Everything is told through files in the folder of the environment
variable :data:`FOLDER`: ``job.json`` (``nodes``, ``bytes``), ``hold`` (while it exists, no reply is pulled),
``replies.jsonl``, one line per pulled reply, and ``alive``, touched in every round.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

FOLDER = "FEDSHARE_BENCH_FOLDER"
"""Environment variable with the folder that the benchmark and the app share."""

DEPTH = 2
"""Messages on their way to one node: the next one waits at the SuperLink while one is worked on."""
HELD_DEPTH = 20
"""The same while no reply is pulled."""
POLL_S = 0.05
"""Pause between two looks for replies; Flower's own send_and_receive looks every 3 s."""

server = ServerApp()
client = ClientApp()


@client.train()
def reply(message: Message, context: Context) -> Message:
    """Reply with random floats of the wanted size at once: no training, no model."""
    count = int(dict(message.content.config_records["ask"])["bytes"]) // 4  # type: ignore[arg-type]
    floats = np.random.default_rng().standard_normal(count, dtype=np.float32)
    content = RecordDict(
        {"update": ArrayRecord({"x": Array(floats)}), "told": ConfigRecord({"reply": secrets.token_hex(8)})}
    )
    return Message(content=content, reply_to=message)


class Asking:
    """Keeps messages on their way to all nodes and writes down the replies."""

    def __init__(self, grid: Grid, folder: Path) -> None:
        self._grid = grid
        self._folder = folder
        job: dict[str, Any] = json.loads((folder / "job.json").read_bytes())
        self._bytes = int(job["bytes"])
        self._wanted = int(job["nodes"])
        self._sent: dict[str, tuple[int, float]] = {}

    def round(self) -> None:
        """Send what is missing, then take what is there."""
        nodes = list(self._grid.get_node_ids())
        if len(nodes) < self._wanted:
            return
        held = (self._folder / "hold").exists()
        for node in nodes:
            waiting = sum(to == node for to, _ in self._sent.values())
            for _ in range(waiting, HELD_DEPTH if held else DEPTH):
                self._push(node)
        if held or not self._sent:
            return
        with (self._folder / "replies.jsonl").open("a") as file:
            for answer in self._grid.pull_messages(list(self._sent)):
                _, pushed = self._sent.pop(answer.metadata.reply_to_message_id, (0, time.monotonic()))
                now = time.monotonic()
                line: dict[str, Any] = {"at": now, "seconds": now - pushed, "error": answer.has_error()}
                if not answer.has_error():
                    line["bytes"] = sum(
                        array.numpy().nbytes for array in answer.content.array_records["update"].values()
                    )
                file.write(json.dumps(line) + "\n")

    def _push(self, node: int) -> None:
        content = RecordDict({"ask": ConfigRecord({"bytes": self._bytes, "number": secrets.token_hex(8)})})
        for message_id in self._grid.push_messages([Message(content, node, "train", ttl=3600.0)]):
            if message_id:
                self._sent[message_id] = (node, time.monotonic())


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Ask until the run is stopped."""
    asking = Asking(grid, Path(os.environ[FOLDER]))
    while True:
        asking.round()
        (Path(os.environ[FOLDER]) / "alive").touch()
        time.sleep(POLL_S)
