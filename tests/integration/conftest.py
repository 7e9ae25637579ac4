from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import sglang
from tests.helpers.models import save_qwen2
from tests.helpers.ranks import RankPool
from tests.helpers.rows import without_times
from tests.helpers.settings import changed

COMMAND = [sys.executable, "-m", "megatron_scope"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/integration" in str(item.path):
            item.add_marker(pytest.mark.integration)


PAIRS = [(a, b) for a in range(10) for b in range(10)]


@pytest.fixture(scope="session")
def train(pool: Callable[[int], RankPool]) -> Callable[..., list[dict[str, Any]]]:
    """`train(settings)` trains on `num_ranks` of the session's ranks, as the command of that name does but
    without its start of processes; returns the rows of metrics.jsonl.
    """

    def to_the_end(settings: dict[str, Any], num_ranks: int = 1) -> list[dict[str, Any]]:
        return pool(num_ranks).run("tests.helpers.jobs:train", settings, resume=True)[0]

    return to_the_end


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, train: Any) -> dict[str, Path]:
    """Both learnt the larger of two digits by sft: the teacher well, the student from noise."""
    root = tmp_path_factory.mktemp("models")
    save_qwen2(root / "student", seed=1, tie_word_embeddings=False)
    save_qwen2(root / "teacher", seed=2, num_hidden_layers=3, tie_word_embeddings=False)
    return {
        "student": _learnt(train, root, "student", steps=60, noise=0.5),
        "teacher": _learnt(train, root, "teacher", steps=200, noise=0.1),
    }


def _learnt(train: Any, root: Path, name: str, *, steps: int, noise: float) -> Path:
    rng = random.Random(name)

    def digit(a: int, b: int) -> int:
        return rng.randrange(10) if rng.random() < noise else max(a, b)

    rows = [
        {"prompt": f"max {a} {b}=", "response": f"{digit(a, b)}$"}
        for _ in range(steps)
        for a, b in rng.sample(PAIRS, 64)
    ]
    data = root / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"output_dir": str(root / f"{name}_run"), "steps": steps},
        "student": {"hf": str(root / name)},
        "data": {"train": str(data), "prompt_template": "{prompt}", "shuffle": False},
        "rollout": {"prompts_per_step": 64},
        "objective": {"name": "sft"},
        "train": {"precision": "float32"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 10, "schedule": "cosine", "weight_decay": 0.0},
        "checkpoint": {"every": 0},
    }
    train(config)
    return root / f"{name}_run" / "hf"


@pytest.fixture
def config(models: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """Two steps of SCOPE with the embedded server on the larger of two digits."""
    rows = [
        {"id": f"{a}{b}", "prompt": f"max {a} {b}=", "answer": str(max(a, b)), "task": "math"}
        for a, b in PAIRS
    ]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"output_dir": str(tmp_path / "run"), "steps": 2},
        "student": {"hf": str(models["student"])},
        "teacher": {"hf": str(models["teacher"])},
        "data": {"train": str(data), "prompt_template": "{prompt}", "max_prompt_tokens": 16},
        "rollout": {
            "engine": "embedded",
            "prompts_per_step": 6,
            "samples_per_prompt": 4,
            "max_new_tokens": 8,
            "temperature": 1.0,
        },
        "train": {"precision": "float32", "micro_batch_tokens": 128},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of some mebibytes."""
    folder = tmp_path / "disk"

    def mount(size: int) -> Path:
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode != 0:
            pytest.skip("mounting a small disk needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def to_file(config: dict[str, Any]) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return to_file


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of the package to its end."""

    def command(*arguments: str, timeout_s: float = 400.0) -> subprocess.CompletedProcess[str]:
        words = [*COMMAND, *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, env=environment())

    return command


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """A python that has SGLang for the CPU; made by tools/install_sglang_cpu.py the first time."""
    reason = sglang.unsupported()
    if reason is not None:
        pytest.skip(reason)
    return sglang.install()


@pytest.fixture(scope="session")
def sglang_servers(
    sglang_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[sglang.SglangServers]:
    """Real SGLang servers; those that tests share end with the session."""
    servers = sglang.SglangServers(sglang_python, tmp_path_factory.mktemp("sglang"))
    yield servers
    servers.close()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts a command of the package in a process group of its own."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    return without_times([json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()])


# ---- runs that are long enough to learn something

LEAST_GAIN = 0.1  # what every method and engine gains at the least
EDGE_STEPS = 5


def learning(config: dict[str, Any]) -> dict[str, Any]:
    """The config with enough steps and samples to lift its weak student."""
    sizes = {"prompts_per_step": 32, "samples_per_prompt": 8, "max_new_tokens": 4}
    optimizer = {"lr": 1e-3, "weight_decay": 0.0}
    return changed(config, run={"steps": 25}, rollout=sizes, optimizer=optimizer)


def accuracy_gain(run_dir: Path) -> float:
    """Accuracy of fresh samples at the rollout temperature: the last five steps over the first five."""
    accuracy = [row["accuracy"] for row in metrics(run_dir)]
    return (sum(accuracy[-EDGE_STEPS:]) - sum(accuracy[:EDGE_STEPS])) / EDGE_STEPS
