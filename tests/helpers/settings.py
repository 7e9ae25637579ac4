"""Configs of tests as mappings of sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.rollouts import random_rows, write_rows


def changed(settings: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """The settings with some keys of some sections replaced."""
    return {**settings, **{name: {**settings.get(name, {}), **values} for name, values in sections.items()}}


def replayed(
    folder: Path, student: Path, teacher: Path, rows: list[dict[str, Any]], *, temperature: float = 1.0
) -> dict[str, Any]:
    """One step of recorded `rows` in float32; `folder` takes them, the run, and the gradient."""
    return {
        "run": {
            "output_dir": str(folder / "run"),
            "steps": 1,
            "dump_gradients": str(folder / "gradient.safetensors"),
        },
        "student": {"hf": str(student)},
        "teacher": {"hf": str(teacher)},
        "rollout": {
            "engine": "replay",
            "file": str(write_rows(folder / "rows.jsonl", rows)),
            "temperature": temperature,
        },
        "train": {"precision": "float32", "micro_batch_tokens": 64},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }


def replayed_steps(
    folder: Path, student: Path, teacher: Path, *, num_recorded: int, vocab_size: int
) -> dict[str, Any]:
    """The same of made-up steps, each in several micro-batches, without a gradient file."""
    rows = [
        row
        for step in range(1, num_recorded + 1)
        for row in random_rows(num_prompts=3, num_samples=4, vocab_size=vocab_size, seed=step, step=step)
    ]
    settings = replayed(folder, student, teacher, rows)
    return changed(settings, run={"dump_gradients": None}, train={"micro_batch_tokens": 40})
