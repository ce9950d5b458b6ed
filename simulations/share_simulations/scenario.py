"""What a simulated federation consists of, as frozen values: clients, their tasks and when these arrive.

A scenario describes files that are already written: each client has a folder of its own with its private
data, laid out as ``<client>/<task>/train.*``. The federation only ever writes the ``tasks.toml`` beside them,
one task at a time, which is exactly what a person does who gets new data while the client runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from share_core.durable import PUBLIC, write_atomic
from share_core.errors import ConfigError
from share_core.names import check_name

TomlValue = str | bool | int | float
"""What this project writes into TOML files by itself."""


@dataclass(frozen=True)
class Arrival:
    """When a task reaches its client. Both conditions must hold."""

    merged: int = 0
    """Number of tasks of the federation that must be merged before."""
    seconds: float = 0.0
    """Seconds since the clients were started."""

    def due(self, merged: int, elapsed: float) -> bool:
        """Return whether the task is there, given merged tasks and seconds since the clients were started."""
        return merged >= self.merged and elapsed >= self.seconds


@dataclass(frozen=True)
class TaskPlan:
    """One task of one client."""

    name: str
    """Without the organisation."""
    kind: str
    """``image-classification`` or ``text-classification``."""
    train: str
    """Training file, relative to the client's folder."""
    test: str
    """Test file, relative to the client's folder."""
    arrival: Arrival = Arrival()
    options: Mapping[str, TomlValue] = field(default_factory=lambda: MappingProxyType({}))
    """Further keys of ``[[task]]`` in tasks.toml."""


@dataclass(frozen=True)
class ClientPlan:
    """One client: one organisation with one machine."""

    organisation: str
    tasks: tuple[TaskPlan, ...]
    """In the order in which they arrive."""
    name: str = "trainer"
    defaults: Mapping[str, TomlValue] = field(default_factory=lambda: MappingProxyType({}))
    """``[defaults]`` of tasks.toml: pace, epochs and the like."""

    @property
    def member(self) -> str:
        """``organisation/name`` as the certificate will say it."""
        return f"{self.organisation}/{self.name}"

    def task_id(self, task: TaskPlan) -> str:
        """Return ``organisation/task``, the id under which the hub knows the task."""
        return f"{self.organisation}/{task.name}"


@dataclass(frozen=True)
class Scenario:
    """A whole federation."""

    name: str
    backbone: str
    """As in tasks.toml; also the name of the built-in space the server is made for."""
    clients: tuple[ClientPlan, ...]
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    """What updates are encoded in; the LoRA bytes are counted in the same."""
    baseline_threads: int | None = None
    """Threads for the baselines, which run alone; None takes all cores. Small models are fastest with one."""
    stall_s: float = 300.0
    """The run is given up when the hub sees nothing new for so long."""

    def __post_init__(self) -> None:
        organisations = [c.organisation for c in self.clients]
        if len(set(organisations)) != len(organisations):
            raise ConfigError(f"scenario {self.name}: two clients of one organisation in {organisations}")
        for client in self.clients:
            check_name(client.organisation, "organisation")
            for task in client.tasks:
                check_name(task.name, "task name")
        if len(set(self.task_ids)) != len(self.task_ids):
            raise ConfigError(f"scenario {self.name}: a task is listed twice in {list(self.task_ids)}")
        self._check_arrivals()

    def _check_arrivals(self) -> None:
        """Refuse a scenario whose last tasks wait for more merges than can ever happen."""
        for present, (merged, task_id) in enumerate(sorted((t.arrival.merged, i) for i, t in self._tasks())):
            if merged > present:
                raise ConfigError(
                    f"scenario {self.name}: task {task_id} waits for {merged} merged tasks, "
                    f"but only {present} can be merged before it"
                )

    def _tasks(self) -> Iterable[tuple[str, TaskPlan]]:
        return ((c.task_id(t), t) for c in self.clients for t in c.tasks)

    @property
    def task_ids(self) -> tuple[str, ...]:
        """Ids of all tasks, client by client."""
        return tuple(task_id for task_id, _ in self._tasks())

    @property
    def owners(self) -> Mapping[str, ClientPlan]:
        """Client of every task id."""
        return {c.task_id(t): c for c in self.clients for t in c.tasks}


def client_folder(root: Path, client: ClientPlan) -> Path:
    """Return the folder of a client below ``root``, where its data and its tasks.toml lie."""
    return root / client.organisation


def tasks_toml(scenario: Scenario, client: ClientPlan, tasks: Iterable[TaskPlan]) -> str:
    """Return the text of a client's tasks.toml with the given tasks in it."""
    blocks = [_pairs({"backbone": scenario.backbone, "device": scenario.device})]
    if client.defaults:
        blocks.append("[defaults]\n" + _pairs(client.defaults))
    for task in tasks:
        known = {"name": task.name, "kind": task.kind, "train": task.train, "test": task.test}
        blocks.append("[[task]]\n" + _pairs({**known, **task.options}))
    return "\n".join(blocks)


def write_tasks_file(root: Path, scenario: Scenario, client: ClientPlan, tasks: Iterable[TaskPlan]) -> Path:
    """Write a client's tasks.toml and return its path. A reader sees either the old list or the new one."""
    path = client_folder(root, client) / "tasks.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, tasks_toml(scenario, client, tasks).encode(), PUBLIC)
    return path


def _pairs(values: Mapping[str, TomlValue]) -> str:
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in values.items())


def toml_value(value: TomlValue) -> str:
    """Return one scalar as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        if any(ord(c) < 32 or ord(c) == 127 for c in escaped):
            raise ConfigError(f"a control character in {value!r} cannot be written into tasks.toml")
        return f'"{escaped}"'
    return repr(value)
