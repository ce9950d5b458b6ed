"""Nothing in the source unpickles or evaluates, whatever name it goes by. Read from the source, not by running it.

``ruff`` (S301, S302) sees the plain spellings; this also follows ``import torch as t``, ``from torch import load as
read``, ``read = torch.load``, ``getattr(torch, "load")`` and ``import_module("pickle")``.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / name for name in ("share_core", "server", "client", "proto", "simulations")]
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "pickletools", "code"}
"""Modules that are not imported at all."""
NAMES = {
    "eval",
    "exec",
    "builtins.eval",
    "builtins.exec",
    "torch.load",
    "torch.serialization.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "torch.storage._load_from_bytes",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "numpy.lib.format.read_array",
    "numpy.core.multiarray._reconstruct",
    "pandas.read_pickle",
    "logging.config.listen",
}
"""Functions that are not even named."""
WEIGHTS = "client/share_client/backbones/weights.py"
"""The one file that may call torch.load, with weights_only=True: many published backbones are saved by torch alone."""
IMPORTERS = {"__import__", "builtins.__import__", "importlib.import_module", "importlib.__import__"}


class Reader(ast.NodeVisitor):
    """Follows names through one file and notes the dangerous ones."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: list[str] = []
        self._known: dict[str, str] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._module(alias.name, node)
            if alias.asname:
                self._known[alias.asname] = alias.name
            else:
                top = alias.name.split(".")[0]
                self._known[top] = top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or node.module is None:
            return
        self._module(node.module, node)
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self._known[alias.asname or alias.name] = name
            self._name(name, node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        name = self._dotted(node.value)
        for target in node.targets:
            if name and isinstance(target, ast.Name):
                self._known[target.id] = name

    def visit_Call(self, node: ast.Call) -> None:
        if self.where == WEIGHTS and self._dotted(node.func) == "torch.load" and _restricted(node):
            for part in (*node.args, *node.keywords):
                self.visit(part)
            return
        self.generic_visit(node)
        name = self._dotted(node)
        if name:
            self._name(name, node)
        if self._dotted(node.func) in IMPORTERS and node.args and isinstance(node.args[0], ast.Constant):
            self._module(str(node.args[0].value), node)
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                self.found.append(f"{self.where}:{node.lineno} allows pickle")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self._dotted(node)
        if name:
            self._name(name, node)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._name(self._known.get(node.id, node.id), node)

    def _dotted(self, node: ast.expr) -> str:
        """Return the full name of an expression, if it has one."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            owner = self._dotted(node.value)
            return f"{owner}.{node.attr}" if owner else ""
        if isinstance(node, ast.Call):
            function = self._dotted(node.func)
            first = node.args[0] if node.args else None
            if function in IMPORTERS and isinstance(first, ast.Constant):
                return str(first.value)
            if function in {"getattr", "builtins.getattr"} and len(node.args) > 1 and first is not None:
                owner, name = self._dotted(first), node.args[1]
                return f"{owner}.{name.value!s}" if owner and isinstance(name, ast.Constant) else ""
        return ""

    def _module(self, name: str, node: ast.AST) -> None:
        if name.split(".", maxsplit=1)[0] in MODULES:
            self.found.append(f"{self.where}:{getattr(node, 'lineno', 0)} imports {name}")

    def _name(self, name: str, node: ast.AST) -> None:
        if name in NAMES:
            self.found.append(f"{self.where}:{getattr(node, 'lineno', 0)} uses {name}")


def _restricted(node: ast.Call) -> bool:
    """Return whether a call of torch.load says weights_only=True: it then builds tensors and plain values only."""
    return any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords)


def dangers(text: str, where: str = "planted.py") -> list[str]:
    reader = Reader(where)
    reader.visit(ast.parse(text))
    return reader.found


def test_nothing_is_unpickled_or_evaluated() -> None:
    files = [path for folder in FOLDERS for path in folder.rglob("*.py")]
    assert len(files) > 150
    found = [danger for path in files for danger in dangers(path.read_text("utf-8"), str(path.relative_to(ROOT)))]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import os, marshal",
        "import shelve as s",
        "from joblib import load",
        "import dill.source",
        "def f():\n    import cloudpickle",
        "__import__('pickle')",
        "p = __import__('pickle')\np.loads(b'')",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module as get\nget('marshal')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load\nload('x')",
        "from torch import load as read\nread('x')",
        "from torch import serialization as s\ns.load('x')",
        "import torch.serialization\ntorch.serialization.load('x')",
        "import torch\nread = torch.load",
        "import torch\nt = torch\nt.load('x')",
        "import torch\nlist(map(torch.load, []))",
        "import torch\ngetattr(torch, 'load')('x')",
        "import importlib\nimportlib.import_module('torch').load('x')",
        "import torch\ntorch.jit.load('x')",
        "import yaml\nyaml.load('x')",
        "from yaml import unsafe_load as safe\nsafe('x')",
        "eval('1')",
        "exec('1')",
        "f = eval\nf('1')",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import exec as run\nrun('1')",
        "getattr(__import__('builtins'), 'eval')('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import pandas as pd\npd.read_pickle('x')",
    ],
)
def test_a_planted_line_is_found(text: str) -> None:
    assert dangers(text)


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.save",
        "import json\njson.load(open('x'))",
        "from safetensors.torch import load\nload(b'')",
        "import yaml\nyaml.safe_load('x')",
        "import ast\nast.literal_eval('1')",
        "class A:\n    def load(self) -> None: ...\nA().load()",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "model.eval()",
        "import re\nre.compile('x')",
        "settings = {'pickle': 1}",
    ],
)
def test_an_honest_line_is_left_alone(text: str) -> None:
    assert not dangers(text)


def test_the_one_file_that_reads_weights_may_do_it_in_one_way_only() -> None:
    assert not dangers("import torch\ntorch.load('x', weights_only=True)", WEIGHTS)
    assert dangers("import torch\ntorch.load('x', weights_only=False)", WEIGHTS)
    assert dangers("import torch\ntorch.load('x')", WEIGHTS)
