"""Every objective through the trainer: its loss and full gradient equal the float64 oracle's, whatever the
layout and packing (float32).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import oracles
from tests.helpers.models import CHARACTERS, read_weights, save_llama, save_qwen2
from tests.helpers.rollouts import random_rows, write_rows
from tests.helpers.settings import changed, replayed

VOCAB = len(CHARACTERS)
ROWS = random_rows(num_prompts=6, num_samples=4, vocab_size=VOCAB, seed=5)
for _row in ROWS[::5]:
    _row["finish_reason"] = "length"
TRAIN = "tests.helpers.jobs:train"

OBJECTIVES: dict[str, tuple[dict[str, Any], oracles.Loss]] = {
    "scope": ({}, oracles.scope()),
    "tau": ({"tau": 0.5}, oracles.scope(2.0, -2.0)),
    "without student weights": ({"student_exponent": 0}, oracles.scope(student_power=0.0)),
    "without teacher weights": ({"teacher_exponent": 0}, oracles.scope(teacher_power=0.0)),
    "opposite student": ({"student_exponent": -1}, oracles.scope(student_power=-1.0)),
    "opposite teacher": ({"teacher_exponent": 1}, oracles.scope(teacher_power=1.0)),
    "official": ({"preset": "official"}, oracles.official),
    "opd": ({"name": "opd"}, oracles.opd),
    "grpo": ({"name": "grpo", "kl_coefficient": 0.5}, oracles.grpo(0.2, 0.5)),
    "reverse kl": ({"divergence": "reverse_kl"}, oracles.scope(divergence="reverse_kl")),
    "forward kl": ({"divergence": "forward_kl"}, oracles.scope(divergence="forward_kl")),
    "jsd": ({"divergence": "jsd"}, oracles.scope(divergence="jsd")),
    "opd forward kl": ({"name": "opd", "divergence": "forward_kl"}, oracles.exact_opd),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one response a micro-batch": (1, {}, 1),
    "dp2 packed": (2, {}, 4096),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}, 30),
    "tp2-pp2-sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}, 64),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tied Qwen2 student and an untied Llama teacher of another depth, width and table length."""
    root = tmp_path_factory.mktemp("models")
    student = save_qwen2(root / "student", seed=1, rows=VOCAB + 3)
    return student, save_llama(root / "teacher", seed=2, hidden_size=32)


@pytest.fixture
def settings(models: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    return replayed(tmp_path, *models, ROWS, temperature=0.7)


def batch_of(
    objective: dict[str, Any], rows: list[dict[str, Any]], student: Any, teacher: Any, old: Any = None
) -> oracles.Batch:
    """The rows as an update reads them; `old` is the student at the start of the step and of the run."""
    temperature = 0.7 if objective.get("preset") == "official" else 1.0
    # Without a teacher, nothing narrows the student's own table.
    vocab = VOCAB + 3 if objective.get("name") == "grpo" else VOCAB
    ours = [oracles.logprobs(student, row, vocab, temperature) for row in rows]
    with torch.no_grad():
        before = [oracles.logprobs(old or student, row, vocab, temperature) for row in rows]
        theirs = [oracles.logprobs(teacher, row, VOCAB) for row in rows]
    if objective.get("divergence") is None:
        return oracles.Batch(rows, ours, before, theirs, reference=before)
    ours_all = [oracles.distributions(student, row, VOCAB) for row in rows]
    with torch.no_grad():
        theirs_all = [oracles.distributions(teacher, row, VOCAB) for row in rows]
    return oracles.Batch(rows, ours, before, theirs, before, ours_all, theirs_all)


@pytest.fixture(scope="module")
def expected(models: tuple[Path, Path]) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradient of every objective."""
    found = {}
    teacher = oracles.load(models[1])
    for name, (objective, loss_of) in OBJECTIVES.items():
        student = oracles.load(models[0])
        loss = loss_of(batch_of(objective, ROWS, student, teacher))
        loss.backward()
        found[name] = (loss.item(), oracles.gradients(student))
    return found


# Every objective at the two layouts that ask the most of it, and two of them at all.
AT_LAYOUTS = [(name, layout) for name in OBJECTIVES for layout in ("dp2 packed", "tp2-pp2-sp")] + [
    (name, layout) for name in ("scope", "jsd") for layout in ("one response a micro-batch", "tp2-pp2")
]


@pytest.mark.parametrize(("name", "layout"), AT_LAYOUTS)
def test_loss_and_gradient_equal_the_oracles(pool, settings, expected, tmp_path, name, layout):
    num_ranks, parallel, micro_batch_tokens = LAYOUTS[layout]
    settings = changed(
        settings,
        objective=OBJECTIVES[name][0],
        parallel=parallel,
        train={"micro_batch_tokens": micro_batch_tokens, "path_gradients_every": 0},
    )
    (row,) = pool(num_ranks).run(TRAIN, settings)[0]
    loss, gradient = expected[name]
    assert oracles.relative_l2(load_file(tmp_path / "gradient.safetensors"), gradient) < 1e-5
    assert row["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7)  # GRPO's is zero, but for rounding
    assert row["grad_norm"] == pytest.approx(oracles.norm(gradient), rel=1e-5)


@pytest.mark.parametrize(
    ("overflow", "num_ranks", "parallel"),
    [
        ("file", 2, {"tensor": 2}),
        ("recompute", 1, {}),
        ("recompute", 2, {}),
        ("recompute", 4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    ],
    ids=["file tp2", "recompute one", "recompute dp2", "recompute tp2-pp2-sp"],
)
def test_hidden_states_beyond_the_limit_change_no_number(
    pool, settings, expected, tmp_path, overflow, num_ranks, parallel
):
    settings = changed(
        settings,
        objective={"divergence": "reverse_kl"},
        parallel=parallel,
        train={"micro_batch_tokens": 30},  # several windows of one micro-batch
        teacher={"hidden_states_gb": 1e-6, "hidden_states_overflow": overflow},
    )
    (row,) = pool(num_ranks).run(TRAIN, settings)[0]
    loss, gradient = expected["reverse kl"]
    assert oracles.relative_l2(load_file(tmp_path / "gradient.safetensors"), gradient) < 1e-5
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["divergence_incorrect"] > 0


@pytest.mark.parametrize("name", ["sft", "kd"])
def test_given_responses_equal_the_oracle(pool, models, settings, tmp_path, name):
    given = [
        {"prompt": "".join(CHARACTERS[i] for i in row["prompt_ids"]), "output_ids": row["output_ids"]}
        for row in ROWS
    ]
    settings = changed(
        settings,
        data={"train": str(write_rows(tmp_path / "given.jsonl", given)), "prompt_template": "{prompt}"},
        objective={"name": name},
        rollout={"prompts_per_step": len(ROWS)},
        parallel={"tensor": 2, "pipeline": 2},
    )
    (row,) = pool(4).run(TRAIN, settings)[0]
    student = oracles.load(models[0])
    logprobs = [oracles.logprobs(student, given_row, VOCAB + 3) for given_row in ROWS]
    loss = oracles.nll(oracles.Batch(ROWS, logprobs, [], [], []))
    loss.backward()
    gradient = load_file(tmp_path / "gradient.safetensors")
    assert oracles.relative_l2(gradient, oracles.gradients(student)) < 1e-5
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)


def cut(batch: oracles.Batch, kept: list[bool]) -> oracles.Batch:
    """Rows that are not kept stay in every denominator but are cut off from the gradient."""
    ours, ours_all = (
        [value if keep else value.detach() for value, keep in zip(values, kept, strict=False)]
        for values in (batch.student, batch.student_all)
    )
    return dataclasses.replace(batch, student=ours, student_all=ours_all)


@pytest.mark.parametrize("name", ["scope", "official", "opd", "grpo"])
def test_the_norm_of_each_paths_gradient_is_measured_without_changing_the_update(
    pool, models, settings, tmp_path, name
):
    settings = changed(settings, objective=OBJECTIVES[name][0], parallel={"tensor": 2})
    (plain,) = pool(2).run(TRAIN, settings)[0]
    for key in ("grad_norm_correct", "grad_norm_incorrect", "grad_noise_incorrect"):
        assert plain[key] is None
    (row,) = pool(2).run(TRAIN, changed(settings, train={"path_gradients_every": 1}))[0]
    assert row["grad_norm"] == plain["grad_norm"]
    teacher = oracles.load(models[1])
    for correct, key in ((True, "grad_norm_correct"), (False, "grad_norm_incorrect")):
        student = oracles.load(models[0])
        batch = batch_of(OBJECTIVES[name][0], ROWS, student, teacher)
        OBJECTIVES[name][1](cut(batch, [given["correct"] == correct for given in ROWS])).backward()
        assert row[key] == pytest.approx(oracles.norm(oracles.gradients(student)), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "num_prompts", "layout"),
    [
        ("scope", 6, "one response a micro-batch"),
        ("scope", 5, "dp2 packed"),
        ("reverse kl", 6, "tp2-pp2"),
        ("official", 6, "one response a micro-batch"),
        ("grpo", 6, "dp2 packed"),
    ],
)
def test_the_noise_of_the_incorrect_paths_gradient_is_the_difference_of_its_halves(
    pool, models, settings, tmp_path, name, num_prompts, layout
):
    rows = ROWS[: 4 * num_prompts]
    num_ranks, parallel, micro_batch_tokens = LAYOUTS[layout]
    settings = changed(
        settings,
        run={"seed": 3},
        objective=OBJECTIVES[name][0],
        rollout={"file": str(write_rows(tmp_path / "some.jsonl", rows))},
        parallel=parallel,
        train={"micro_batch_tokens": micro_batch_tokens, "path_gradients_every": 1},
    )
    (row,) = pool(num_ranks).run(TRAIN, settings)[0]
    half = np.random.default_rng([3, 1]).permutation(num_prompts)[: num_prompts // 2]
    teacher, gradients = oracles.load(models[1]), []
    for in_half in (True, False):
        student = oracles.load(models[0])
        batch = batch_of(OBJECTIVES[name][0], rows, student, teacher)
        kept = [not given["correct"] and (i // 4 in half) == in_half for i, given in enumerate(rows)]
        OBJECTIVES[name][1](cut(batch, kept)).backward()
        gradients.append(oracles.gradients(student))
    odds = (num_prompts / (num_prompts // 2) - 1) ** 0.5
    noise = {key: odds * value - gradients[1][key] / odds for key, value in gradients[0].items()}
    assert row["grad_noise_incorrect"] == pytest.approx(oracles.norm(noise), rel=1e-5)


# ---- several updates a step


# A large epsilon keeps Adam's update smooth where a gradient is nearly zero.
OPTIMIZER = {"lr": 2e-2, "eps": 1e-2, "weight_decay": 0.01, "clip_grad": 0.5}


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [(1, {}), (4, {"tensor": 2, "pipeline": 2}), (2, {})],
    ids=["one", "tp2-pp2", "dp2"],
)
@pytest.mark.parametrize(
    ("objective", "loss_of"),
    [
        ({}, oracles.scope()),
        ({"name": "opd"}, oracles.opd),
        ({"preset": "official"}, oracles.official),
        ({"name": "grpo", "kl_coefficient": 0.5, "ratio_clip": 0.05}, oracles.grpo(0.05, 0.5)),
    ],
    ids=["scope", "opd", "official", "grpo"],
)
def test_two_updates_equal_two_rolled_by_hand(
    pool, models, settings, tmp_path, objective, loss_of, num_ranks, parallel
):
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
    losses, norms, ratios = [], [], [np.ones(1)]
    for prompts in (("p0", "p1", "p2"), ("p3", "p4", "p5")):
        rows = [row for row in ROWS if row["prompt_id"] in prompts]
        adam.zero_grad()
        batch = batch_of(objective, rows, student, teacher, old=start)
        loss = loss_of(batch)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)))
        ratios += [batch.ratio(i).detach().numpy() for i in range(len(rows))]
        adam.step()
    assert max(abs(np.concatenate(ratios) - 1)) > 0.1  # the second update is no longer on the old policy
    moved = {name: value.detach() for name, value in student.named_parameters()}
    begun = {name: value.detach() for name, value in start.named_parameters()}
    found = read_weights(tmp_path / "run" / "hf")
    assert (
        oracles.relative_l2(
            {name: found[name].double() - begun[name] for name in begun},
            {name: moved[name] - begun[name] for name in begun},
        )
        < 1e-4
    )
    assert row["updates"] == 2
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)
    assert row["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert row["ratio_max"] == pytest.approx(np.concatenate(ratios).max(), rel=1e-4)
    if "ratio_clip" in objective:
        clipped = abs(np.concatenate(ratios[1:]) - 1) > 0.05
        assert row["ratio_clipped"] == pytest.approx(clipped.mean())
        assert row["kl_reference"] > 0


def test_one_update_has_a_ratio_of_one_and_needs_no_extra_pass(pool, settings):
    (row,) = pool(1).run(TRAIN, settings)[0]
    assert (row["updates"], row["ratio_max"], row["ratio_clipped"]) == (1, 1.0, 0.0)


def test_more_updates_than_prompts_make_one_a_prompt(pool, settings):
    (row,) = pool(2).run(TRAIN, changed(settings, train={"updates_per_batch": 100}))[0]
    assert row["updates"] == 6


# ---- what teacher and student call the end


@pytest.mark.parametrize(
    ("num_ranks", "parallel"), [(1, {}), (4, {"tensor": 2, "pipeline": 2})], ids=["one", "tp2-pp2"]
)
def test_the_teachers_own_stop_token_stands_for_the_students(
    pool, models, settings, tmp_path, num_ranks, parallel
):
    theirs = 7
    settings = changed(settings, teacher={"stop_token_id": theirs}, parallel=parallel)
    (row,) = pool(num_ranks).run(TRAIN, settings)[0]
    student, teacher = oracles.load(models[0]), oracles.load(models[1])
    batch = batch_of({}, ROWS, student, teacher)
    log_ratios = []
    for i, given in enumerate(ROWS):
        if given["finish_reason"] != "stop":
            continue
        renamed = {**given, "output_ids": [*given["output_ids"][:-1], theirs]}
        batch.teacher[i][-1] = oracles.logprobs(teacher, renamed, VOCAB)[-1].detach()
        if not given["correct"]:
            log_ratios.append(float(batch.student[i][-1].detach() - batch.teacher[i][-1]))
    oracles.scope()(batch).backward()
    gradient = load_file(tmp_path / "gradient.safetensors")
    assert oracles.relative_l2(gradient, oracles.gradients(student)) < 1e-5
    assert row["stop_log_ratio"] == pytest.approx(np.mean(log_ratios), rel=1e-4)


def test_a_mismatch_of_stop_tokens_shows_in_its_log_ratio(pool, models, settings):
    (row,) = pool(1).run(TRAIN, settings)[0]
    student, teacher = oracles.load(models[0]), oracles.load(models[1])
    batch = batch_of({}, ROWS, student, teacher)
    log_ratios = [
        float(batch.student[i][-1].detach() - batch.teacher[i][-1])
        for i, given in enumerate(ROWS)
        if given["finish_reason"] == "stop" and not given["correct"]
    ]
    assert row["stop_log_ratio"] == pytest.approx(np.mean(log_ratios), rel=1e-4)


def test_an_objective_without_a_teacher_reports_no_teacher_numbers(pool, settings):
    (row,) = pool(1).run(TRAIN, changed(settings, objective={"name": "grpo"}, teacher={"hf": None}))[0]
    for key in ("kl_correct", "kl_incorrect", "stop_log_ratio", "teacher_ppl_incorrect"):
        assert row[key] is None
    assert row["kl_reference"] == pytest.approx(0.0, abs=1e-9)
    assert math.isfinite(row["nll_correct"])
