"""Mixtures of experts in training: one result at every expert-parallel size, checkpoints, recompute, and what
is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scope.errors import ConfigError
from tests.helpers import oracles
from tests.helpers.models import read_weights, save_llama, save_mixtral, save_qwen3_moe
from tests.helpers.rollouts import random_rows, write_rows
from tests.helpers.rows import without_times
from tests.helpers.settings import changed, replayed_steps

TRAIN = "tests.helpers.jobs:train"
LOGPROBS = "tests.helpers.jobs:token_logprobs"
VOCAB = 40
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "ep2": (2, {"expert": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "tp2-sp-ep2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
    "tp2-sp-dp2-ep2": (4, {"tensor": 2, "sequence": True, "expert": 2}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": save_qwen3_moe(root / "student", seed=1),
        "teacher": save_mixtral(root / "teacher", seed=2),
        "dense": save_llama(root / "dense", seed=3),
    }


@pytest.fixture
def settings(models: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """Two of four replayed steps."""
    settings = replayed_steps(
        tmp_path, models["student"], models["teacher"], num_recorded=4, vocab_size=VOCAB
    )
    return changed(settings, run={"steps": 2})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_at_every_expert_parallel_size(pool, models, settings, tmp_path, layout):
    num_ranks, parallel = LAYOUTS[layout]
    alone = pool(1).run(TRAIN, settings)[0]
    spread = changed(settings, run={"output_dir": str(tmp_path / "spread")}, parallel=parallel)
    together = pool(num_ranks).run(TRAIN, spread)[0]
    for got, want in zip(together, alone, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
    start = read_weights(models["student"])
    expected, found = read_weights(tmp_path / "run" / "hf"), read_weights(tmp_path / "spread" / "hf")
    assert found.keys() == expected.keys()
    moved = oracles.norm({name: expected[name] - start[name] for name in start})
    assert oracles.norm({name: found[name] - expected[name] for name in start}) < 1e-4 * moved


def test_a_process_lets_go_of_the_mixtures_that_it_has_trained(pool, settings, tmp_path):
    threads = []
    for number in range(3):
        settings = changed(settings, run={"output_dir": str(tmp_path / str(number)), "steps": 1})
        pool(2).run(TRAIN, changed(settings, parallel={"expert": 2}))
        threads.append(pool(2).run("tests.helpers.jobs:num_threads"))
    assert threads[2] == threads[1]


@pytest.mark.parametrize(
    "parallel", [{"tensor": 2}, {"expert": 2}, {"tensor": 2, "expert": 2}], ids=["tp2", "ep2", "tp2-ep2"]
)
def test_a_mixture_teaches_a_dense_student(pool, models, settings, parallel):
    settings = changed(settings, student={"hf": str(models["dense"])}, parallel=parallel)
    results = pool(2).run(LOGPROBS, settings)
    found = {index: value for result in results for index, value in result["teacher"].items()}
    oracle = oracles.load(models["teacher"])
    oracle.set_experts_implementation("eager")  # the default does not take float64
    lines = Path(settings["rollout"]["file"]).read_text().splitlines()[:12]  # those of step 1
    assert found.keys() == set(range(len(lines)))
    for index, line in enumerate(lines):
        with torch.no_grad():
            logprobs = oracles.logprobs(oracle, json.loads(line), VOCAB)
        np.testing.assert_allclose(found[index], logprobs.numpy(), atol=2e-5)


def test_a_replica_without_a_response_lends_its_experts(pool, settings, tmp_path):
    file = write_rows(tmp_path / "one.jsonl", random_rows(num_prompts=1, num_samples=1, vocab_size=VOCAB))
    settings = changed(settings, rollout={"file": str(file)}, run={"steps": 1})
    alone = pool(1).run(TRAIN, settings)[0][0]
    beside = pool(4).run(TRAIN, changed(settings, parallel={"pipeline": 2, "expert": 2}))[0][0]
    assert beside["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert beside["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_changes_no_bit(pool, settings, tmp_path, recompute):
    settings = changed(settings, parallel=LAYOUTS["ep2"][1])
    kept = pool(2).run(TRAIN, settings)[0]
    again = changed(settings, run={"output_dir": str(tmp_path / "again")}, train={"recompute": recompute})
    assert without_times(pool(2).run(TRAIN, again)[0]) == without_times(kept)
    expected, found = read_weights(tmp_path / "run" / "hf"), read_weights(tmp_path / "again" / "hf")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_embedded_server_gets_the_weights_of_all_expert_ranks(pool, models, settings, tmp_path):
    problems = [{"id": str(i), "prompt": f"{i}+{i}=", "answer": str(2 * i), "task": "math"} for i in range(8)]
    live = changed(
        settings,
        data={
            "train": str(write_rows(tmp_path / "problems.jsonl", problems)),
            "prompt_template": "{prompt}",
            "max_prompt_tokens": 20,
        },
        rollout={
            "engine": "embedded",
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_new_tokens": 12,
        },
        parallel={"expert": 2},
        optimizer={"lr": 1e-2},
    )
    rows = pool(2).run(TRAIN, live)[0]
    assert [row["weight_version"] for row in rows] == [0, 1]
    assert all(row["logprob_gap_max"] < 1e-5 for row in rows)


# ---- checkpoints


SAVING = {"run": {"steps": 4}, "checkpoint": {"every": 2, "keep": 2}}


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("ep2", "bfloat16"), ("tp2-sp", "float32"), ("tp2-sp-dp2-ep2", "bfloat16"), ("pp2-ep2", "float32")],
)
def test_a_stopped_run_goes_on_bit_for_bit(pool, settings, tmp_path, layout, precision):
    num_ranks, parallel = LAYOUTS[layout]
    settings = changed(changed(settings, **SAVING), parallel=parallel, train={"precision": precision})
    whole = pool(num_ranks).run(TRAIN, settings)[0]
    stopped = changed(settings, run={"output_dir": str(tmp_path / "stopped")})
    pool(num_ranks).run(TRAIN, stopped)
    # As a run killed in step 4 leaves it: the checkpoint of step 2 is the newest whole one.
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "stopped" / "hf")
    assert (tmp_path / "stopped" / "checkpoints" / "step_00000002").is_dir()
    resumed = pool(num_ranks).run(TRAIN, stopped, resume=True)[0]
    assert without_times(resumed) == without_times(whole)
    expected, found = read_weights(tmp_path / "run" / "hf"), read_weights(tmp_path / "stopped" / "hf")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("before", "after"), [("tp2-sp-dp2-ep2", "pp2"), ("dp2", "ep2"), ("pp2-ep2", "tp2-sp")]
)
def test_a_checkpoint_goes_on_at_another_layout(pool, settings, tmp_path, before, after):
    settings = changed(settings, **SAVING)
    whole = pool(1).run(TRAIN, settings)[0]
    (num_before, parallel_before), (num_after, parallel_after) = LAYOUTS[before], LAYOUTS[after]
    moved = changed(settings, run={"output_dir": str(tmp_path / "moved"), "steps": 2})
    pool(num_before).run(TRAIN, changed(moved, parallel=parallel_before))
    moved = changed(moved, run={"steps": 4}, parallel=parallel_after)
    resumed = pool(num_after).run(TRAIN, moved, resume=True)[0]
    for got, want in zip(resumed, whole, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


# ---- what is refused


def test_tensor_parallel_training_of_experts_without_sequence_parallel_is_refused(pool, settings):
    with pytest.raises(ConfigError, match=r"has experts, which train with .*; set parallel.sequence=true"):
        pool(2).run(TRAIN, changed(settings, parallel={"tensor": 2}))


def test_a_stage_without_experts_is_refused(pool, models, settings):
    student = {"hf": str(models["student"]), "pipeline_layers": [3, 0]}
    with pytest.raises(ConfigError, match=r"pipeline_layers is \[3, 0\], .*; give every stage a layer"):
        pool(2).run(TRAIN, changed(settings, student=student, parallel={"pipeline": 2}))


def test_an_expert_parallel_size_that_does_not_divide_the_experts_is_refused(pool, settings):
    with pytest.raises(ConfigError, match=r"parallel.expert is 4 but .* has 6 experts"):
        pool(4).run(TRAIN, changed(settings, parallel={"expert": 4}))
