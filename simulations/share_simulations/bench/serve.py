"""What a batch of mixed tasks costs: one shared factor set against PEFT, and both against the backbone alone.

All ways run over the same weights in memory and must give the same outputs. They are timed in turns, and what is
reported is the median over repetitions of the ratio within one repetition, so that whatever else the machine does falls
on all of them. On a CPU the same ratio of processor time stands beside it, which other processes disturb less.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from share_client.backbones.backbone import freeze
from share_client.serving import Serving, hot_swap
from share_core.errors import ConfigError
from share_core.space import task_adapter
from share_core.types import Core, SiteBasis, Space
from share_simulations.bench.machine import describe, pick_device, timed

Progress = Callable[[str], None]
Way = Callable[[], Tensor]
Timings = dict[str, list[float]]

_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest difference of two outputs, as a share of the largest output."""
_STRENGTH = 0.1
"""||dW|| of a task as a share of ||W||: outputs change visibly and stay of their size."""


@dataclass(frozen=True)
class ServeOptions:
    """What to measure."""

    models: tuple[str, ...] = ("minilm", "decoder")
    tasks: tuple[int, ...] = (1, 4, 16, 64)
    rows: int = 32
    tokens: int = 32
    directions: int = 32
    rank: int = 8
    repetitions: int = 7
    width: int = 1024
    layers: int = 8
    dtype: str = "float32"
    device: str = "auto"


@dataclass(frozen=True)
class Subject:
    """A backbone and what goes into it."""

    module: nn.Module
    sites: tuple[str, ...]
    inputs: Mapping[str, Tensor]


def run_serve(options: ServeOptions, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure and return the report; its scalars are of the first model at the most tasks.

    Raises:
        ConfigError: an option cannot be, a package is missing, or two ways give different outputs.
    """
    if options.dtype not in _TOLERANCE:
        raise ConfigError(f"--dtype {options.dtype!r}: expected {' or '.join(_TOLERANCE)}")
    unknown = [name for name in options.models if name not in _MODELS]
    if unknown or not options.models:
        raise ConfigError(f"--models: expected {' or '.join(_MODELS)}, got {', '.join(unknown) or 'none'}")
    if options.rank > options.directions:
        raise ConfigError(f"--rank {options.rank}: a task has at most --directions, {options.directions}, ranks")
    device = pick_device(options.device)
    models = {name: _measure_model(name, options, device, progress) for name in options.models}
    first = models[options.models[0]]["by_tasks"][str(max(options.tasks))]
    ours, mixed, switching = (first["ways"][way] for way in ("shared factors", "PEFT mixed", "PEFT switching"))
    return {
        "throughput_ratio_vs_backbone": ours["ratio_to_backbone"],
        "throughput_ratio_vs_peft_mixed": mixed["ours_to_this"],
        "throughput_ratio_vs_peft_switching": switching["ours_to_this"],
        "bytes_per_task": ours["bytes_per_task"],
        "bytes_added_per_task": ours["bytes_added_per_task"],
        "peft_bytes_per_task": mixed["bytes_per_task"],
        "largest_difference": max(row["largest_difference"] for m in models.values() for row in m["by_tasks"].values()),
        "models": models,
        "options": asdict(options),
        "machine": describe(device),
    }


def _measure_model(name: str, options: ServeOptions, device: torch.device, progress: Progress) -> dict[str, Any]:
    progress(f"{name}: loading")
    subject = _MODELS[name](options, device)
    by_tasks = {}
    for tasks in options.tasks:
        by_tasks[str(tasks)] = _measure(subject, tasks, options, device)
        ways = by_tasks[str(tasks)]["ways"]
        found = ", ".join(f"{way} {figures['ratio_to_backbone']:.3f}" for way, figures in ways.items())
        progress(f"{name}, {tasks} tasks, throughput to the backbone's: {found}")
    return {"sites": len(subject.sites), "by_tasks": by_tasks}


def _measure(subject: Subject, tasks: int, options: ServeOptions, device: torch.device) -> dict[str, Any]:
    space = random_space(subject, tasks, options)
    names = [f"bench/t{row % tasks}" for row in range(options.rows)]
    served = _twin(subject.module)
    with torch.no_grad(), Serving(served, space) as serving:
        peft = _peft_model(subject, space, options.rank)
        ways: dict[str, Way] = {
            "backbone": lambda: _hidden(subject.module(**subject.inputs)),
            "shared factors": lambda: _shared(serving, served, names, subject.inputs),
            "PEFT mixed": lambda: _hidden(peft(**subject.inputs, adapter_names=[_plain(name) for name in names])),
            "PEFT switching": lambda: _switching(peft, names, subject.inputs),
        }
        outputs = {way: work().float() for way, work in ways.items()}
        difference = _largest_difference(outputs, options.dtype)
        seconds, processor = _time_in_turns(ways, options.repetitions, device)
        held = serving.current
        lora = sum(p.numel() * p.element_size() for n, p in peft.named_parameters() if "lora_" in n)
    figures = {way: _figures(seconds, processor, way, options.rows) for way in ways}
    figures["shared factors"] |= {
        "bytes_per_task": (held.shared_bytes + held.task_bytes) / tasks,
        "bytes_added_per_task": held.task_bytes / (tasks + 1),  # one entry of the stacks is the backbone alone
        "bytes_shared": held.shared_bytes,
    }
    for way in ("PEFT mixed", "PEFT switching"):
        figures[way] |= {"bytes_per_task": lora / tasks, "bytes_added_per_task": lora / tasks}
    return {"ways": figures, "largest_difference": difference, "tasks_in_batch": len(set(names))}


def _time_in_turns(ways: Mapping[str, Way], repetitions: int, device: torch.device) -> tuple[Timings, Timings]:
    """Return seconds, and processor seconds of this process, of every way in every repetition."""
    seconds: Timings = {way: [] for way in ways}
    processor: Timings = {way: [] for way in ways}
    for turn in range(repetitions):
        order = list(ways)
        for way in order[turn % len(order) :] + order[: turn % len(order)]:
            begun = time.process_time()
            seconds[way].append(timed(ways[way], device)[0])
            processor[way].append(time.process_time() - begun)
    return seconds, processor


def _figures(seconds: Timings, processor: Timings, way: str, rows: int) -> dict[str, Any]:
    to_backbone = [a / b for a, b in zip(seconds["backbone"], seconds[way], strict=True)]
    ours = [b / a for a, b in zip(seconds["shared factors"], seconds[way], strict=True)]
    return {
        "rows_per_second": rows / statistics.median(seconds[way]),
        "ratio_to_backbone": statistics.median(to_backbone),
        "ratio_to_backbone_from": min(to_backbone),
        "ratio_to_backbone_to": max(to_backbone),
        "ours_to_this": statistics.median(ours),
        "ours_to_this_from": min(ours),
        "ours_to_this_to": max(ours),
        "processor_ratio_to_backbone": _median_ratio(processor["backbone"], processor[way]),
        "processor_ours_to_this": _median_ratio(processor[way], processor["shared factors"]),
    }


def _median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _largest_difference(outputs: Mapping[str, Tensor], dtype: str) -> float:
    """Return how far ours is from PEFT's, as a share of the largest output.

    Raises:
        ConfigError: too far, or the tasks change nothing: there is no use in timing that.
    """
    reference = outputs["PEFT switching"]
    size = float(reference.abs().max())
    changed = float((outputs["backbone"] - reference).abs().max()) / size
    worst = max(float((outputs[way] - reference).abs().max()) / size for way in ("shared factors", "PEFT mixed"))
    if not worst <= _TOLERANCE[dtype] or not changed > 2 * worst:
        raise ConfigError(
            f"outputs differ by {worst:.2g} of the largest, expected at most {_TOLERANCE[dtype]:g} and less than half "
            f"of what the tasks change, {changed:.2g}: these ways do not do the same"
        )
    return worst


def random_space(subject: Subject, tasks: int, options: ServeOptions) -> Space:
    """Return a space of random bases and cores, each task's change a tenth of the weight in norm."""
    draw = torch.Generator().manual_seed(0)
    bases: dict[str, SiteBasis] = {}
    cores: dict[str, dict[str, Core]] = {f"bench/t{task}": {} for task in range(tasks)}
    for site in subject.sites:
        weight = subject.module.get_submodule(site).weight
        assert isinstance(weight, Tensor)
        d_out, d_in = weight.shape
        bases[site] = SiteBasis(*(_orthonormal(d, options.directions, draw) for d in (d_out, d_in)))
        wanted = _STRENGTH * float(weight.float().norm())
        for own in cores.values():
            out, in_ = (
                torch.randn(b.shape[1], options.rank, generator=draw) for b in (bases[site].left, bases[site].right)
            )
            own[site] = Core(out * (wanted / float((out @ in_.T).norm())), in_)
    return Space(1, bases, cores)


def _orthonormal(d: int, k: int, draw: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(d, min(d, k), generator=draw)).Q
    return q.contiguous()


def _shared(serving: Serving, model: nn.Module, names: list[str], inputs: Mapping[str, Tensor]) -> Tensor:
    with serving.batch(names):
        return _hidden(model(**inputs))


def _switching(peft: Any, names: list[str], inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the outputs of one pass per task, rows in their order."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    parts = []
    for name, own in rows.items():
        peft.set_adapter(_plain(name))
        parts.append(_hidden(peft(**{key: value[own] for key, value in inputs.items()})))
    order = torch.tensor([row for own in rows.values() for row in own], device=parts[0].device)
    return torch.cat(parts)[order.argsort()]


def _peft_model(subject: Subject, space: Space, rank: int) -> Any:
    """Return the same weights under PEFT, with every task as an adapter."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("bench serve compares with PEFT: pip install 'fedshare[bench]'") from error

    targets = "|".join(re.escape(site) for site in subject.sites)
    model: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that will change
        for task in space.cores:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, inference_mode=True)
            if model is None:
                model = get_peft_model(_twin(subject.module), config, _plain(task))
            else:
                model.add_adapter(_plain(task), config)
            hot_swap(model, _plain(task), task_adapter(space, task))
    return model.eval()


def _plain(task: str) -> str:
    """Return a task's name as PEFT allows it for a module."""
    return task.replace("/", "-")


def _twin(module: nn.Module) -> nn.Module:
    """Return a model of its own over the same tensors."""
    return copy.deepcopy(module, {id(p): p for p in (*module.parameters(), *module.buffers())})


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output.last_hidden_state
    return hidden


def _minilm(options: ServeOptions, device: torch.device) -> Subject:
    from share_client.training import load_backbone

    backbone = load_backbone("minilm", device.type)
    module = backbone.module.to(getattr(torch, options.dtype))
    return Subject(module, backbone.sites, _tokens(options, 30_000, device))


def _decoder(options: ServeOptions, device: torch.device) -> Subject:
    try:
        from transformers import LlamaConfig, LlamaModel
    except ImportError as error:
        raise ConfigError("bench serve needs transformers: pip install 'fedshare[text]'") from error

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = freeze(LlamaModel(config).to(getattr(torch, options.dtype)), device)
    sites = tuple(f"layers.{layer}.self_attn.{part}_proj" for layer in range(options.layers) for part in "qv")
    return Subject(module, sites, _tokens(options, 1000, device))


def _tokens(options: ServeOptions, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (options.rows, options.tokens), generator=draw)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


_MODELS: dict[str, Callable[[ServeOptions, torch.device], Subject]] = {"minilm": _minilm, "decoder": _decoder}


def serve_table(report: dict[str, Any]) -> Table:
    """Return the figures of a report for people."""
    table = Table("model", "tasks", "way", "rows/s", "vs backbone", "bytes per task", "added by one task")
    for model, own in report["models"].items():
        for tasks, row in own["by_tasks"].items():
            for way, figures in row["ways"].items():
                table.add_row(
                    model,
                    tasks,
                    way,
                    f"{figures['rows_per_second']:.1f}",
                    f"{figures['ratio_to_backbone']:.3f}",
                    f"{figures.get('bytes_per_task', 0):,.0f}",
                    f"{figures.get('bytes_added_per_task', 0):,.0f}",
                )
            table.add_section()
    return table
