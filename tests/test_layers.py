"""Dependencies point one way. Read from the source, not from running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "share_core": ROOT / "share_core",
    "share_proto": ROOT / "proto" / "share_proto",
    "share_server": ROOT / "server" / "share_server",
    "share_client": ROOT / "client" / "share_client",
    "share_simulations": ROOT / "simulations" / "share_simulations",
}
MAY_IMPORT = {
    "share_core": set(),
    "share_proto": set(),
    "share_server": {"share_core", "share_proto"},
    "share_client": {"share_core", "share_proto"},
    "share_simulations": {"share_core", "share_proto", "share_server", "share_client"},
}
CORE_MAY_NOT_IMPORT = {"flwr", "grpc", "socket", "asyncio", "httpx", "sqlite3", "requests"}
CORE_CLOCK_CALLS = {"now", "utcnow", "today", "time", "time_ns", "monotonic"}


def sources(package: str) -> list[Path]:
    return [p for p in PACKAGES[package].rglob("*.py") if "_pb2" not in p.name]


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def layer_violations(package: str, text: str, name: str) -> list[str]:
    """Return what this source text imports against the rules of its package."""
    tree = ast.parse(text)
    found = []
    for module in imports(tree):
        top = module.split(".")[0]
        if top in PACKAGES and top != package and top not in MAY_IMPORT[package]:
            found.append(f"{name} imports {module}")
        if package == "share_core" and top in CORE_MAY_NOT_IMPORT:
            found.append(f"{name} imports {module}: share_core is pure")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if package == "share_core" and owner in {"time", "datetime"} and node.func.attr in CORE_CLOCK_CALLS:
                found.append(f"{name} reads the clock: pass it in")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_layers(package: str) -> None:
    found = [v for p in sources(package) for v in layer_violations(package, p.read_text(), str(p.relative_to(ROOT)))]
    # The lifeline asks the operating system who its parent is; it is the one module of share_core about processes.
    assert not [v for v in found if not v.startswith("share_core/lifeline.py reads the clock")]


@pytest.mark.parametrize(
    ("package", "text"),
    [
        ("share_core", "import grpc"),
        ("share_core", "import share_server.hub"),
        ("share_core", "import time\ntime.time()"),
        ("share_core", "from datetime import datetime\ndatetime.now()"),
        ("share_server", "from share_client.link import HubLink"),
        ("share_client", "import share_server"),
        ("share_proto", "import share_core"),
    ],
)
def test_planted_violation_is_caught(package: str, text: str) -> None:
    assert layer_violations(package, text, "planted.py")


LIGHT = (
    "share_server.fleet.gateway",
    "share_server.fleet.supervisor",
    "share_server.relay.process",
    "share_client.fleet.forwarder",
    "share_client.fleet.supernode",
    "share_client.join",
)
"""Long-lived processes that compute nothing: PyTorch would cost each a second at its start and 150 MB."""


@pytest.mark.parametrize(("modules", "loaded"), [(LIGHT, False), (("share_core.wire",), True)], ids=["", "planted"])
def test_processes_that_compute_nothing_do_without_torch(modules: tuple[str, ...], loaded: bool) -> None:
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(loaded)


@pytest.mark.parametrize("package", ["share_core", "share_server", "share_client", "share_simulations"])
def test_files_and_functions_stay_readable(package: str) -> None:
    long = []
    for path in sources(package):
        text = path.read_text()
        if len(text.splitlines()) > 500:
            long.append(f"{path.relative_to(ROOT)} has {len(text.splitlines())} lines, at most 500")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines, at most 60")
    assert not long, long
