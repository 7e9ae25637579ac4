"""The gap between trainer and engine: corrected as the float64 oracle has it, and stopped at its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_scope.errors import DataError, ParityError
from tests.helpers import oracles
from tests.helpers.models import CHARACTERS, read_weights, save_llama, save_qwen2
from tests.helpers.rollouts import random_rows, write_rows
from tests.helpers.settings import changed, replayed

VOCAB = len(CHARACTERS)
TEMPERATURE = 0.7
CAP = 1.4
TRAIN = "tests.helpers.jobs:train"

OBJECTIVES: dict[str, tuple[dict[str, Any], oracles.Loss]] = {
    "scope": ({}, oracles.scope()),
    "official": ({"preset": "official"}, oracles.official),
    "opd": ({"name": "opd"}, oracles.opd),
    "grpo": ({"name": "grpo", "kl_coefficient": 0.5}, oracles.grpo(0.2, 0.5)),
    "reverse kl": ({"divergence": "reverse_kl"}, oracles.scope(divergence="reverse_kl")),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one response a micro-batch": (1, {}, 1),
    "dp2 packed": (2, {}, 4096),
    "tp2-pp2-sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}, 64),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_qwen2(root / "student", seed=1), save_llama(root / "teacher", seed=2, hidden_size=32)


@pytest.fixture(scope="module")
def rows(models: tuple[Path, Path]) -> list[dict[str, Any]]:
    """Rows whose engine drew from a policy beside the student's: some ratios lie over the cap."""
    student, noise = oracles.load(models[0]), np.random.default_rng(9)
    rows = random_rows(num_prompts=6, num_samples=4, vocab_size=VOCAB, seed=5)
    for row in rows:
        exact = oracles.logprobs(student, row, VOCAB, TEMPERATURE).detach().numpy()
        row["engine_logprobs"] = (exact + 0.5 * noise.normal(size=len(exact))).tolist()
    return rows


@pytest.fixture
def settings(models: tuple[Path, Path], rows: list[dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    settings = replayed(tmp_path, *models, rows, temperature=TEMPERATURE)
    return changed(settings, rollout={"correction": "truncated_importance", "correction_cap": CAP})


def batch_of(
    objective: dict[str, Any], rows: list[dict[str, Any]], student: Any, teacher: Any, start: Any
) -> oracles.Batch:
    """The rows as a corrected update reads them; `start` is the student at the start of the step."""
    temperature = TEMPERATURE if objective.get("preset") == "official" else 1.0
    exact = "divergence" in objective
    with torch.no_grad():
        old, old_at_rollout = (
            [oracles.logprobs(start, row, VOCAB, at) for row in rows] for at in (temperature, TEMPERATURE)
        )
        theirs = [oracles.logprobs(teacher, row, VOCAB) for row in rows]
        theirs_all = [oracles.distributions(teacher, row, VOCAB) for row in rows] if exact else ()
    return oracles.Batch(
        rows,
        [oracles.logprobs(student, row, VOCAB, temperature) for row in rows],
        old,
        theirs,
        reference=old,
        student_all=[oracles.distributions(student, row, VOCAB) for row in rows] if exact else (),
        teacher_all=theirs_all,
        old_at_rollout=old_at_rollout,
        correction_cap=CAP,
    )


def ratios(batch: oracles.Batch) -> np.ndarray:
    return np.concatenate([batch.engine_ratio(i).numpy() for i in range(len(batch.rows))])


def check_correction_metrics(row: dict[str, Any], ratio: np.ndarray) -> None:
    assert 0.05 < (ratio > CAP).mean() < 0.6  # some are held back, most are not
    assert row["correction_clip_rate"] == pytest.approx((ratio > CAP).mean())
    assert row["correction_mean"] == pytest.approx(np.minimum(ratio, CAP).mean(), rel=1e-5)


# Every objective at the layout that asks the most of it, and one of them at all.
AT_LAYOUTS = [(name, "tp2-pp2-sp") for name in OBJECTIVES] + [
    ("scope", layout) for layout in LAYOUTS if layout != "tp2-pp2-sp"
]


@pytest.mark.parametrize(("name", "layout"), AT_LAYOUTS)
def test_corrected_loss_and_gradient_equal_the_oracles(pool, models, settings, rows, tmp_path, name, layout):
    objective, loss_of = OBJECTIVES[name]
    num_ranks, parallel, micro_batch_tokens = LAYOUTS[layout]
    settings = changed(
        settings,
        objective=objective,
        parallel=parallel,
        train={"micro_batch_tokens": micro_batch_tokens},
    )
    (row,) = pool(num_ranks).run(TRAIN, settings)[0]
    student = oracles.load(models[0])
    batch = batch_of(objective, rows, student, oracles.load(models[1]), start=student)
    loss = loss_of(batch)
    loss.backward()
    gradient = oracles.gradients(student)
    assert oracles.relative_l2(load_file(tmp_path / "gradient.safetensors"), gradient) < 1e-5
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(oracles.norm(gradient), rel=1e-5)
    check_correction_metrics(row, ratios(batch))


def test_without_a_correction_the_gap_is_measured_and_changes_nothing(pool, settings):
    plain = changed(settings, rollout={"correction": "none"})
    (row,) = pool(1).run(TRAIN, plain)[0]
    assert row["correction_clip_rate"] is None and row["correction_mean"] is None
    assert row["logprob_gap_mean"] > 0.1
    (corrected,) = pool(1).run(TRAIN, settings)[0]
    assert corrected["logprob_gap_mean"] == row["logprob_gap_mean"]
    assert corrected["loss"] != pytest.approx(row["loss"], rel=0.01)


# A large epsilon keeps Adam's update smooth where a gradient is nearly zero.
OPTIMIZER = {"lr": 2e-2, "eps": 1e-2, "weight_decay": 0.01, "clip_grad": 0.5}


@pytest.mark.parametrize(
    ("objective", "loss_of", "num_ranks", "parallel"),
    [
        ({}, oracles.scope(), 4, {"tensor": 2, "pipeline": 2}),
        ({"preset": "official"}, oracles.official, 2, {}),
        ({"name": "grpo", "kl_coefficient": 0.5, "ratio_clip": 0.05}, oracles.grpo(0.05, 0.5), 2, {}),
    ],
    ids=["scope tp2-pp2", "official dp2", "grpo dp2"],
)
def test_a_second_update_is_corrected_by_the_policy_at_the_start_of_the_step(
    pool, models, settings, rows, tmp_path, objective, loss_of, num_ranks, parallel
):
    """Official scores the student at rollout temperature, the others do not."""
    settings = changed(
        settings,
        objective=objective,
        parallel=parallel,
        optimizer=OPTIMIZER,
        train={"updates_per_batch": 2},
    )
    (row,) = pool(num_ranks).run(TRAIN, settings)[0]
    start, student, teacher = oracles.load(models[0]), oracles.load(models[0]), oracles.load(models[1])
    adam = torch.optim.AdamW(student.parameters(), lr=2e-2, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.01)
    losses, found = [], []
    for prompts in (("p0", "p1", "p2"), ("p3", "p4", "p5")):
        adam.zero_grad()
        chosen = [given for given in rows if given["prompt_id"] in prompts]
        batch = batch_of(objective, chosen, student, teacher, start)
        loss = loss_of(batch)
        loss.backward()
        losses.append(loss.item())
        found.append(ratios(batch))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        adam.step()
    begun = {name: value.detach() for name, value in start.named_parameters()}
    moved = read_weights(tmp_path / "run" / "hf")
    assert (
        oracles.relative_l2(
            {name: moved[name].double() - begun[name] for name in begun},
            {name: value.detach() - begun[name] for name, value in student.named_parameters()},
        )
        < 1e-4
    )
    assert row["updates"] == 2 and row["ratio_max"] > 1.1
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)
    check_correction_metrics(row, np.concatenate(found))


def test_a_row_without_engine_logprobs_cannot_be_corrected(pool, settings, rows, tmp_path):
    lacking = [{**row, "engine_logprobs": None} if row["prompt_id"] == "p4" else row for row in rows]
    settings = changed(settings, rollout={"file": str(write_rows(tmp_path / "lacking.jsonl", lacking))})
    with pytest.raises(DataError, match="prompt p4, sample 0 has no finite engine log-prob for"):
        pool(2).run(TRAIN, settings)


# ---- the limit


@pytest.mark.parametrize(
    ("num_ranks", "parallel"), [(1, {}), (4, {"tensor": 2, "pipeline": 2})], ids=["one", "tp2-pp2"]
)
def test_a_gap_over_the_limit_stops_every_rank_before_the_optimizer(
    pool, models, settings, rows, tmp_path, num_ranks, parallel
):
    student = oracles.load(models[0])
    batch = batch_of({}, rows, student, oracles.load(models[1]), start=student)
    gap = np.abs(np.log(ratios(batch)))
    uncorrected = {"correction": "none"}
    allowed = changed(
        settings, parallel=parallel, rollout={**uncorrected, "logprob_gap_limit": gap.mean() + 1e-3}
    )
    (row,) = pool(num_ranks).run(TRAIN, allowed)[0]
    assert row["logprob_gap_mean"] == pytest.approx(gap.mean(), rel=1e-5)
    refused = changed(allowed, rollout={**uncorrected, "logprob_gap_limit": gap.mean() - 1e-3})
    errors = pool(num_ranks).run("tests.helpers.jobs:error_of_training", refused)
    assert {kind for kind, _ in errors} == {ParityError.__name__}
    (said,) = {message for _, message in errors}
    assert f"{gap.mean():.3g} nats a token" in said and f"at most {gap.max():.3g}" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "run" / "hf").exists()
