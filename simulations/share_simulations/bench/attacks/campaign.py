"""Every attack at every share of hostile organisations, with and without the defence, through the hub's own merge."""

from __future__ import annotations

import logging
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from share_client.backbones import Backbone, load_backbone
from share_client.tasks_file import TaskConfig
from share_client.training import prepare_task
from share_core.peft.reader import read_adapter
from share_core.space import task_adapter, update_adapter
from share_core.spec_file import find_spec
from share_core.types import Adapter, SiteUpdate, Update
from share_core.wire import decode_update, encode_update
from share_server.config import RobustConfig, ServerConfig
from share_simulations.bench.attacks.crew import FLIPPED, HONEST, TRIGGERED, Crew, Work
from share_simulations.bench.attacks.ground import Outcome, Sent, run_store, signing_key
from share_simulations.bench.attacks.hostile import CRAFTED, Dense, Knowledge, crowd_out, dense, minus, payload_of
from share_simulations.bench.attacks.options import (
    FRACTIONS,
    OWNER,
    AttackOptions,
    organisation,
    shared_id,
    stored_id,
)
from share_simulations.bench.attacks.report import Setting, summary
from share_simulations.bench.attacks.scoring import Head, accuracy, features_of, fooled
from share_simulations.text import choose_rows, read_lines

FORGETTING = "forgetting"
"""Hostile organisations fill the space with private tasks of one random subspace."""

ATTACKS = (*CRAFTED, FLIPPED, TRIGGERED, FORGETTING)
"""All of them, in the order of the table."""

DEFENCES = {"off": RobustConfig(filter="off", influence=1.0, past=1.0), "on": RobustConfig()}
"""The server's settings without and with the defence; with it they are the defaults."""


class Campaign:
    """One run. Everything that takes long is kept in the folder of the crew."""

    def __init__(self, options: AttackOptions, folder: Path, told: Callable[[str], None]) -> None:
        self._options = options
        self._told = told
        self._backbone: Backbone = load_backbone("minilm", "cpu")
        self._crew = Crew(options, folder, self._backbone, told)
        self._spec = find_spec("minilm")
        self._key = signing_key()
        self._base = self._crew.folder / "base" / "store"
        self._ground: Outcome
        self._firsts: dict[str, Work] = {}
        self._dense: dict[tuple[str, int], Dense] = {}

    def prepare(self) -> None:
        """Make the space that is attacked: stored tasks of others, then a first adapter of every shared task."""
        shutil.rmtree(self._base.parent, ignore_errors=True)
        self._base.parent.mkdir(parents=True)
        old = [Sent("archive", stored_id(task), self._finished(task), 0) for task in self._options.stored]
        first = run_store(self._base, self._spec, ServerConfig(), self._key, old)
        self._firsts = {task: self._crew.first(task, first.space) for task in self._options.shared}
        owned = [
            Sent(organisation(OWNER), shared_id(task), work.payload, first.space.version, open=True)
            for task, work in self._firsts.items()
        ]
        self._ground = run_store(self._base, self._spec, ServerConfig(), self._key, owned)

    def settings(self, processes: int) -> list[Setting]:
        """Run and measure everything, ``processes`` settings side by side; the figures do not depend on how many."""
        wanted = [("none", 0.0, name) for name in DEFENCES]
        wanted += [(attack, share, name) for share in FRACTIONS for attack in ATTACKS for name in DEFENCES]
        self._train_all()
        with multiprocessing.get_context("fork").Pool(processes, _RUNNING.append, (self,)) as pool:
            found = []
            for setting in pool.imap(_measured, wanted):
                self._told(
                    f"{setting.attack} {setting.fraction:.0%}, defence {setting.defence}: "
                    f"accuracy {setting.accuracy:.3f}, {setting.seconds:.0f} s"
                )
                found.append(setting)
        return found

    def _train_all(self) -> None:
        """Train whatever is not there yet, before the settings are run side by side."""
        for task in self._options.shared:
            self._crew.prepared(task, OWNER, TRIGGERED)
            for client in range(self._options.clients):
                self._change(task, client)
            for client in self._options.most_hostile:
                for kind in (FLIPPED, TRIGGERED):
                    self._trained(task, client, kind)

    def measured(self, wanted: tuple[str, float, str]) -> Setting:
        """Run one setting: (attack, share of hostile organisations, defence)."""
        attack, fraction, defence = wanted
        began = time.monotonic()
        hostile = self._options.hostile(fraction)
        config = ServerConfig(robust=DEFENCES[defence])
        with ExitStack() as stack:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedshare-attacks-"))) / "store"
            shutil.copytree(self._base, root)
            outcome = run_store(root, self._spec, config, self._key, self._wave(attack, hostile))
        enemies = {organisation(client) for client in hostile}
        honest = {organisation(client) for client in range(self._options.clients)} - enemies
        scores = {task: self._score(outcome, task, attack) for task in self._options.shared}
        old = self._stored_accuracy(outcome) if attack in ("none", FORGETTING) else None
        return Setting(
            attack=attack,
            fraction=fraction,
            defence=defence,
            accuracy=_mean([own for own, _ in scores.values()]),
            by_task={task: own for task, (own, _) in scores.items()},
            fooled=_mean([other for _, other in scores.values()]) if attack in ("none", TRIGGERED) else None,
            stored_accuracy=old,
            worst_stored_error=max(outcome.state.ledger[stored_id(task)].bound for task in self._options.stored),
            hostile_stopped=outcome.kept_out(enemies) if attack == FORGETTING else outcome.stopped(enemies),
            honest_refused=outcome.stopped(honest),
            seconds=time.monotonic() - began,
        )

    def _wave(self, attack: str, hostile: range) -> list[Sent]:
        """Return what everybody submits, in a random order."""
        version = self._ground.space.version
        wave = [
            Sent(organisation(client), shared_id(task), self._payload(attack, task, client, hostile), version)
            for client in range(self._options.clients)
            for task in self._options.shared
        ]
        if attack == FORGETTING:
            shapes = {site.name: (site.d_out, site.d_in) for site in self._spec.sites.values()}
            for client in hostile:
                draw = torch.Generator().manual_seed(self._options.seed)  # the same subspace for all of them
                crowd = crowd_out(shapes, min(self._spec.k_max, self._spec.rank_limit), draw)
                name = organisation(client)
                wave += [Sent(name, f"{name}/own{n}", payload, 0) for n, payload in enumerate(crowd)]
        random.Random(self._options.seed).shuffle(wave)
        return wave

    def _payload(self, attack: str, task: str, client: int, hostile: range) -> bytes:
        if client in hostile and attack in (FLIPPED, TRIGGERED):
            return self._trained(task, client, attack).payload
        if client in hostile and attack in CRAFTED:
            stored = dense(task_adapter(self._ground.space, shared_id(task)), tuple(self._spec.sites))
            changes = [self._change(task, one) for one in range(self._options.clients) if one not in hostile]
            known = Knowledge(stored, changes, RobustConfig().cosine, len(hostile))
            draw = torch.Generator().manual_seed(self._options.seed * 1000 + client)
            made = CRAFTED[attack](known, self._change(task, client), draw)
            return payload_of(made, self._ground.space.version)
        return self._trained(task, client, HONEST).payload

    def _trained(self, task: str, client: int, kind: str) -> Work:
        return self._crew.work(task, client, kind, self._ground.space, self._firsts[task].head)

    def _change(self, task: str, client: int) -> Dense:
        """Return what an honest client changes in the stored adapter."""
        if (task, client) not in self._dense:
            payload = self._trained(task, client, HONEST).payload
            adapter = update_adapter(decode_update(payload, self._spec), self._ground.space.bases)
            stored = dense(task_adapter(self._ground.space, shared_id(task)), tuple(self._spec.sites))
            self._dense[task, client] = minus(dense(adapter, tuple(self._spec.sites)), stored)
        return self._dense[task, client]

    def _score(self, outcome: Outcome, task: str, attack: str) -> tuple[float, float]:
        """Return (accuracy on the plain test rows, share of triggered rows that are taken for the first class)."""
        adapter = task_adapter(outcome.space, shared_id(task))
        heads = [self._trained(task, client, HONEST).head for client in range(self._options.evaluators)]
        own = accuracy(*features_of(self._backbone, self._crew.prepared(task, OWNER), adapter), heads)
        if attack not in ("none", TRIGGERED):
            return own, 0.0
        triggered = features_of(self._backbone, self._crew.prepared(task, OWNER, TRIGGERED), adapter)
        return own, fooled(*triggered, heads)

    def _stored_accuracy(self, outcome: Outcome) -> float:
        return _mean([self._stored_score(task_adapter(outcome.space, stored_id(t)), t) for t in self._options.stored])

    def _stored_score(self, adapter: Adapter, task: str) -> float:
        options = self._options
        path = self._crew.folder / "rows" / f"stored-{task}.jsonl"
        lines = choose_rows(read_lines(options.data / task, "test"), options.test_rows, f"{options.seed}/{task}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        config = TaskConfig(task, "text-classification", path, path, max_length=48)
        head: Head = load((options.adapters / task / "head.safetensors").read_bytes())
        return accuracy(*features_of(self._backbone, prepare_task(config, self._backbone), adapter), [head])

    def _finished(self, task: str) -> bytes:
        factors = read_adapter(self._options.adapters / task).factors
        return encode_update(Update(0, {site: SiteUpdate(residual=own) for site, own in factors.items()}))


_RUNNING: list[Campaign] = []
"""The campaign that a forked process works for; it cannot be sent to it."""


def _measured(wanted: tuple[str, float, str]) -> Setting:
    return _RUNNING[0].measured(wanted)


def run_attacks(
    options: AttackOptions, keep: Path | None, processes: int = 2, told: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Run every setting; return the figures, with ``table`` one row per setting.

    Args:
        options: what to run.
        keep: folder for what was trained, which a later run with the same options finds again; None: thrown away.
        processes: settings that are run side by side.
        told: is told how far it is.
    """
    torch.set_num_threads(1)
    logging.getLogger("share_server.hub").addHandler(logging.NullHandler())  # what it warns of is counted
    with ExitStack() as stack:
        folder = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedshare-attacks-"))) if keep is None else keep
        )
        campaign = Campaign(options, folder, told)
        campaign.prepare()
        return summary(options, campaign.settings(processes))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
