"""A teacher behind a server gives the step that the same teacher on the ranks gives (float32), whatever the
layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.process import EmbeddedServer
from tests.helpers import oracles
from tests.helpers.models import CHARACTERS, save_llama, save_qwen2
from tests.helpers.rollouts import random_rows, write_rows
from tests.helpers.rows import numbers
from tests.helpers.settings import changed

VOCAB = len(CHARACTERS)
TRAIN = "tests.helpers.jobs:train"
ROWS = random_rows(num_prompts=6, num_samples=4, vocab_size=VOCAB, seed=5)
for _row in ROWS[::5]:
    _row["finish_reason"] = "length"

CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "scope": (1, {}),
    "scope, its own stop token": (2, {"teacher": {"stop_token_id": 3}, "train": {"micro_batch_tokens": 64}}),
    "opd": (4, {"objective": {"name": "opd"}, "parallel": {"tensor": 2, "pipeline": 2, "sequence": True}}),
    "scope, scored as they arrive": (
        2,
        {
            "parallel": {"tensor": 2},
            "rollout": {"overlap_scoring": True},
            "train": {"micro_batch_tokens": 30},
        },
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and a teacher with a shorter table, of another family."""
    root = tmp_path_factory.mktemp("models")
    return save_qwen2(root / "student", seed=1, rows=VOCAB + 3), save_llama(root / "teacher", seed=2)


@pytest.fixture(scope="module")
def url(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("logs") / "teacher.log"
    with EmbeddedServer(ServeOptions(model=str(models[1])), log_path=log) as server:
        yield server.url


@pytest.fixture
def settings(models: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    return {
        "run": {"output_dir": str(tmp_path / "run"), "steps": 1},
        "student": {"hf": str(models[0])},
        "rollout": {"engine": "replay", "file": str(rows)},
        "train": {"precision": "float32", "path_gradients_every": 0},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }


def step(pool: Any, num_ranks: int, settings: dict[str, Any], folder: Path) -> tuple[dict[str, float], Any]:
    """A step's metrics without what depends on the clock, and its gradient."""
    dump = folder / "gradient.safetensors"
    settings = changed(settings, run={"output_dir": str(folder / "run"), "dump_gradients": str(dump)})
    (row,) = pool(num_ranks).run(TRAIN, settings)[0]
    return numbers(row), load_file(dump)


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_the_teacher_on_the_ranks(pool, models, url, settings, tmp_path, case):
    num_ranks, sections = CASES[case]
    settings = changed(settings, **sections)
    on_ranks = changed(settings, teacher={"hf": str(models[1])}, parallel={"tensor": 1, "pipeline": 1})
    expected_row, expected_gradient = step(
        pool, 1, changed(on_ranks, parallel={"sequence": False}), tmp_path / "ranks"
    )
    # Config and tokenizer alone: nothing to build a model from.
    card = tmp_path / "card"
    shutil.copytree(models[1], card, ignore=shutil.ignore_patterns("*.safetensors"))
    served = changed(settings, teacher={"hf": str(card), "server": [url]})
    row, gradient = step(pool, num_ranks, served, tmp_path / "served")
    assert abs(expected_row["kl_incorrect"]) > 1e-3
    assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-6, nan_ok=True)
    assert oracles.relative_l2(gradient, expected_gradient) < 1e-5
