"""Responses scored while others are still being generated: the same numbers, at every layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.process import EmbeddedServer
from tests.helpers.models import save_llama, save_qwen2
from tests.helpers.proxy import Proxy
from tests.helpers.settings import changed

TRAIN = "tests.helpers.jobs:train"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
}
HELD_S = 4.0  # how long the last response of a step is kept back


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"student": save_qwen2(root / "student", seed=1), "teacher": save_llama(root / "teacher", seed=2)}


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with EmbeddedServer(ServeOptions(model=str(models["student"])), log_path=log) as server:
        yield server.url


@pytest.fixture(scope="module")
def base(
    pool, models: dict[str, Path], server: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run whose answers are what the student itself says first, so that some of its responses are right."""
    folder = tmp_path_factory.mktemp("base")
    settings = {
        "run": {"output_dir": str(folder / "run"), "steps": 1},
        "student": {"hf": str(models["student"])},
        "teacher": {"hf": str(models["teacher"])},
        "data": {"prompt_template": "{prompt}", "max_prompt_tokens": 16},
        "rollout": {
            "engine": "sglang",
            "servers": [server],
            "prompts_per_step": 6,
            "samples_per_prompt": 4,
            "max_new_tokens": 12,
            "temperature": 1.0,
        },
        "train": {"precision": "float32", "micro_batch_tokens": 32},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }
    settings = changed(settings, data={"train": write_prompts(folder / "unknown.jsonl", {})})
    pool(1).run(TRAIN, settings)
    said = {
        row["prompt_id"]: row["extracted"]
        for row in read(folder / "run" / "rollouts" / "step_000001.jsonl")
        if row["extracted"] is not None
    }
    assert said
    return changed(settings, data={"train": write_prompts(folder / "known.jsonl", said)})


@pytest.fixture
def settings(base: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return changed(base, run={"output_dir": str(tmp_path / "run"), "steps": 2})


def write_prompts(path: Path, answers: dict[str, str]) -> str:
    rows = [
        {"id": name, "prompt": f"say {name}", "answer": answers.get(name, "12345"), "task": "math"}
        for name in "012345"
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def hold_the_last(path: str, body: Any) -> float:
    return HELD_S if path == "/generate" and body["rid"].endswith("/5/3") else 0.0


@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        ("tp2-pp2", {}),
        ("dp2", {"divergence": "reverse_kl"}),
        ("dp2", {"name": "grpo", "kl_coefficient": 0.1}),
    ],
    ids=["scope-tp2-pp2", "reverse_kl-dp2", "grpo-dp2"],
)
def test_scoring_behind_generation_changes_no_number(pool, settings, server, tmp_path, layout, objective):
    settings = changed(settings, objective=objective)
    waiting = changed(settings, rollout={"overlap_scoring": False})
    expected = pool(1).run(TRAIN, waiting)[0]
    assert [row["scoring_hidden_share"] for row in expected] == [0.0, 0.0]
    assert 0.0 < expected[0]["accuracy"] < 1.0
    num_ranks, parallel = LAYOUTS[layout]
    with Proxy(server, hold_the_last) as proxy:
        settings = changed(
            settings,
            run={"output_dir": str(tmp_path / "behind")},
            rollout={"servers": [proxy.url]},
            parallel=parallel,
        )
        found = pool(num_ranks).run(TRAIN, settings)[0]
    for got, want in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "accuracy", "student_ppl_correct", "teacher_ppl_incorrect"):
            if want[key] is None:  # a mean over nothing
                assert got[key] is None, key
            else:
                assert got[key] == pytest.approx(want[key], rel=1e-5), key
        assert 0.0 < got["scoring_hidden_share"] < 1.0
    for step in (1, 2):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert rollouts(tmp_path / "behind" / name) == rollouts(tmp_path / "run" / name)


def rollouts(path: Path) -> list[tuple[str, int, list[int], bool]]:
    return [(row["prompt_id"], row["sample"], row["output_ids"], row["correct"]) for row in read(path)]
