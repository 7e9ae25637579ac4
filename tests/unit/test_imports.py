"""Imports run downward: cli -> trainer -> stages -> {kernels, convert, data} -> {records, config} -> errors.

Read off the syntax trees, imports inside functions included, so that nothing need be importable.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_scope"

# What each part may import of ours, besides itself: `data` allows all of it, `data.jsonl` that module alone.
# config does without records, which bring numpy.
_BASE = ("errors", "records")
ALLOWED: dict[str, tuple[str, ...]] = {
    "__init__": (),
    "errors": (),
    "records": ("errors",),
    "environment": ("errors",),
    "config": ("errors",),
    "kernels": ("errors",),  # process groups come in as arguments
    "weight_group": (),  # both ends of a broadcast make it in the same way
    "task_groups": (),
    "convert": (*_BASE, "config"),
    # The stages do not know each other; the trainer hands one's results to the next.
    "data": (*_BASE, "config"),
    "rollout": (*_BASE, "config", "data.jsonl", "weight_group", "task_groups"),
    "teacher": (*_BASE, "rollout.http", "rollout.wire"),  # asked over HTTP as a rollout server is
    "verify": (*_BASE, "config", "data.jsonl"),
    "objective": (*_BASE, "config", "data.jsonl", "kernels"),
    # A token loss is called with TokenTerms: the shape of the hook, which its two sides must share.
    "backend": (
        *_BASE,
        "config",
        "data.jsonl",
        "kernels",
        "convert",
        "environment",
        "objective.losses.TokenTerms",
        "weight_group",
    ),
    "sync": (*_BASE, "config", "data.jsonl", "convert", "task_groups"),
    "evaluate": (*_BASE, "config", "data.jsonl"),
    # What joins stages.
    "controller": (*_BASE, "config", "data", "rollout", "sync", "teacher", "verify", "task_groups"),
    "publishing": (
        *(*_BASE, "config", "backend", "controller", "convert", "run_folder", "sync", "weight_group"),
    ),
    "preflight": (*_BASE, "config", "convert", "data"),
    "metrics": (*_BASE, "config", "data.jsonl", "backend", "objective"),
    "parity": (*_BASE, "config", "backend", "scoring"),
    "arriving": (*_BASE, "config", "backend", "controller", "data"),
    "scoring": (*_BASE, "config", "backend", "objective", "arriving"),
    "progress": (*_BASE, "config"),
    "run_folder": (*_BASE, "config", "data.jsonl"),
    "evaluator": (*_BASE, "config", "controller", "convert", "data", "evaluate", "rollout", "verify"),
    "trainer": (
        *(
            *_BASE,
            "config",
            "kernels",
            "convert",
            "data",
            "rollout",
            "verify",
            "objective",
            "backend",
            "sync",
        ),
        *(
            "evaluate",
            "controller",
            "preflight",
            "metrics",
            "arriving",
            "scoring",
            "parity",
            "publishing",
            "progress",
            "run_folder",
        ),
    ),
    "launch": (*_BASE, "config", "trainer"),
    "certificate": (*_BASE, "config", "data.jsonl", "environment", "convert", "backend", "launch"),
    "__main__": ("cli",),
}
ALLOWED["cli"] = tuple(ALLOWED)

_HTTP = ("aiohttp", "requests", "httpx", "urllib.request", "urllib3", "http.client", "http.server")
# Libraries that only some parts may import.
CONFINED: dict[str, tuple[str, ...]] = {
    "megatron.training": (),
    "megatron": ("backend", "convert"),
    **dict.fromkeys(_HTTP, ("rollout",)),
    **dict.fromkeys(
        ("torch", "transformers"),
        tuple(set(ALLOWED) - {"__init__", "errors", "records", "config", "environment"}),
    ),
    "numpy": tuple(set(ALLOWED) - {"__init__", "errors", "config", "environment"}),
}


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` gives a.b, relative names are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def lies_in(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def violations(source: str, path: str) -> list[str]:
    """What a file of the package (path relative to it) imports against the rules, as `path:line: ...`."""
    parts = path.removesuffix(".py").split("/")
    part, is_package = parts[0], parts[-1] == "__init__"
    if part not in ALLOWED:
        return [f"{path}: {part} is new; give it a line in ALLOWED"]
    module = ".".join([PACKAGE, *(parts[:-1] if is_package else parts)])
    found = []
    for line, name in imported(ast.parse(source), module, is_package):
        if lies_in(name, PACKAGE):
            ours = name.removeprefix(PACKAGE).removeprefix(".")
            is_attribute = ours in ("", "__version__")
            if not is_attribute and not any(lies_in(ours, allowed) for allowed in (part, *ALLOWED[part])):
                found.append(f"{path}:{line}: {part} may not import {name}")
        for library, homes in CONFINED.items():
            if lies_in(name, library) and part not in homes:
                found.append(f"{path}:{line}: {part} may not import {library}")
    return found


def package_files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def test_the_package_keeps_the_import_directions():
    files = package_files()
    assert len(files) > 5
    found = []
    for file in files:
        found += violations(file.read_text(encoding="utf-8"), file.relative_to(ROOT / PACKAGE).as_posix())
    assert not found, "\n".join(found)


def test_every_folder_of_code_is_a_package():
    folders = {file.parent for file in package_files()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("config/load.py", "import numpy as np"),
        ("config/load.py", "def f():\n    from torch import nn"),
        ("config/load.py", "from megatron_scope.records import Prompt"),
        ("records.py", "import torch"),
        ("errors.py", "from megatron_scope import records"),
        ("kernels/vocab_parallel.py", "from megatron_scope.records import MicroBatch"),
        ("kernels/vocab_parallel.py", "from megatron.core import parallel_state"),
        ("objective/losses.py", "import megatron.core"),
        ("verify/pool.py", "from megatron import core"),
        ("evaluate/metrics.py", "from megatron_scope.backend.model import build"),
        ("rollout/client.py", "from megatron_scope.verify.pool import VerifierPool"),
        ("rollout/client.py", "from megatron_scope.data import prompts"),
        ("rollout/embedded/app.py", "from ...verify import pool"),
        ("rollout/__init__.py", "from ..backend import model"),
        ("backend/update.py", "from megatron_scope.objective.weighting import path_weights"),
        ("backend/update.py", "from megatron.training import get_args"),
        ("backend/update.py", "import megatron.training.arguments"),
        ("backend/update.py", "import aiohttp"),
        ("trainer.py", "import urllib.request"),
        ("trainer.py", "from http import client"),
        ("trainer.py", "from megatron_scope import cli"),
        ("trainer.py", "import importlib\nimportlib.import_module('megatron.core')"),
        ("evaluator.py", "from megatron_scope.trainer import train"),
        ("controller/core.py", "import megatron_scope.trainer"),
        ("launch.py", "from megatron_scope.cli import main"),
        ("unheard_of.py", ""),
    ],
)
def test_a_wrong_import_is_caught(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "config/load.py",
            "import yaml\nfrom megatron_scope.errors import ConfigError\nfrom . import schema",
        ),
        ("kernels/reference.py", "import torch\nfrom .vocab_parallel import distill_stats"),
        (
            "verify/command.py",
            "from megatron_scope.data.jsonl import read_rows\nfrom megatron_scope.data import jsonl",
        ),
        (
            "backend/update.py",
            "from megatron.core import parallel_state\nfrom megatron_scope.kernels import reference",
        ),
        ("rollout/client.py", "import aiohttp\nimport urllib.parse\nfrom megatron_scope import __version__"),
        ("trainer.py", "import urllib.parse\nfrom megatron_scope.backend import setup"),
        ("cli.py", "def f():\n    from megatron_scope.trainer import train"),
    ],
)
def test_a_right_import_passes(path, source):
    assert violations(source, path) == []
