"""Whole training runs in rank pools: objectives, checkpoints, precision, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_scope.errors import CheckpointError, ConfigError, DataError, RolloutError, ScoringError
from tests.helpers.models import read_weights, save_qwen2, save_tokenizer
from tests.helpers.rollouts import random_rows, write_rows
from tests.helpers.rows import without_times
from tests.helpers.settings import changed, replayed_steps

NUMBERS = [
    *("loss", "nll_correct", "kl_incorrect", "grad_norm", "accuracy", "student_ppl_correct"),
    *("teacher_ppl_incorrect", "weight_entropy_correct", "effective_sample_size_incorrect"),
    *("response_length", "one_sided_groups", "logprob_gap_mean", "tokens_per_second"),
    *("weight_version", "scoring_hidden_share"),
]
TRAIN = "tests.helpers.jobs:train"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_qwen2(root / "student", seed=1), save_qwen2(root / "teacher", seed=2, num_hidden_layers=3)


@pytest.fixture
def settings(models: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    """Two of six replayed steps."""
    return changed(replayed_steps(tmp_path, *models, num_recorded=6, vocab_size=40), run={"steps": 2})


# ---- checkpoints


SAVING = {"run": {"steps": 6}, "checkpoint": {"every": 2, "keep": 2}}


def changed_to_save(settings: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return changed(changed(settings, **SAVING), **sections)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [(1, {}), (2, {}), (4, {"tensor": 2, "pipeline": 2, "sequence": True})],
    ids=["one", "dp2", "tp2-pp2-sp"],
)
def test_a_stopped_run_goes_on_bit_for_bit(pool, settings, tmp_path, num_ranks, parallel):
    settings = changed_to_save(settings, parallel=parallel)
    whole = pool(num_ranks).run(TRAIN, settings)[0]
    stopped = changed(settings, run={"output_dir": str(tmp_path / "stopped")})
    pool(num_ranks).run(TRAIN, stopped)
    # As a run killed in step 6 leaves it: the checkpoint of step 4 is the newest whole one.
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_00000006")
    shutil.rmtree(tmp_path / "stopped" / "hf")
    assert (tmp_path / "stopped" / "checkpoints" / "step_00000004").is_dir()
    resumed = pool(num_ranks).run(TRAIN, stopped, resume=True)[0]
    assert without_times(resumed) == without_times(whole)
    expected, found = read_weights(tmp_path / "run" / "hf"), read_weights(tmp_path / "stopped" / "hf")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_goes_on_at_another_layout(pool, settings, tmp_path):
    settings = changed_to_save(settings)
    whole = pool(1).run(TRAIN, settings)[0]
    moved = changed(settings, run={"output_dir": str(tmp_path / "moved"), "steps": 4})
    pool(4).run(TRAIN, changed(moved, parallel={"tensor": 2, "pipeline": 2}))
    resumed = pool(2).run(TRAIN, changed(moved, run={"steps": 6}, parallel={"tensor": 2}), resume=True)[0]
    for got, want in zip(resumed, whole, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_named(pool, settings, tmp_path):
    settings = changed_to_save(settings)
    pool(1).run(TRAIN, settings)
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    data = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    data.write_bytes(data.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"step_00000006 is broken: .*step_00000004"):
        pool(1).run(TRAIN, settings, resume=True)


def test_starting_over_sets_the_earlier_run_aside(pool, settings, tmp_path):
    first = pool(1).run(TRAIN, settings)[0]
    again = pool(1).run(TRAIN, settings)[0]
    assert without_times(again) == without_times(first)
    kept = tmp_path / "run" / "previous" / "1" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in kept.read_text().splitlines()] == [1, 2]


# ---- objectives and precision


def test_sft_learns_its_rows_at_any_layout(pool, settings, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "response": f"{a + b}$"} for a in range(4) for b in range(4)]
    settings = changed(
        settings,
        data={"train": str(write_rows(tmp_path / "sft.jsonl", rows)), "prompt_template": "{prompt}"},
        objective={"name": "sft"},
        rollout={"prompts_per_step": 16},
        run={"steps": 30},
        optimizer={"lr": 1e-2},
    )
    one = pool(1).run(TRAIN, settings)[0]
    assert one[-1]["loss"] < 0.5 * one[0]["loss"]
    assert one[0]["loss"] == pytest.approx(one[0]["nll_correct"])
    four = pool(4).run(TRAIN, changed(settings, parallel={"tensor": 2, "pipeline": 2}, run={"steps": 3}))[0]
    assert [row["loss"] for row in four] == pytest.approx([row["loss"] for row in one[:3]], rel=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bfloat16_with_float32_master_weights_stays_near_float32(pool, settings, num_ranks):
    exact = pool(num_ranks).run(TRAIN, settings)[0]
    rounded = pool(num_ranks).run(TRAIN, changed(settings, train={"precision": "bfloat16"}))[0]
    for got, want in zip(rounded, exact, strict=True):
        assert got["nll_correct"] == pytest.approx(want["nll_correct"], rel=0.02)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.05)


def test_bfloat16_master_weights_add_up_updates_below_its_resolution(pool, settings, tmp_path):
    # Norm weights lie near 1, where bfloat16 rounds to 0.0078: no single update of at most 0.002 could show.
    settings = changed(
        settings,
        run={"steps": 6},
        train={"precision": "bfloat16"},
        optimizer={"lr": 2e-3, "weight_decay": 0.0},
    )
    pool(1).run(TRAIN, settings)
    start, end = (
        read_weights(Path(folder)) for folder in (settings["student"]["hf"], tmp_path / "run" / "hf")
    )
    assert end["model.norm.weight"].dtype == torch.bfloat16
    assert (end["model.norm.weight"] != start["model.norm.weight"].bfloat16()).any()


# ---- metrics and the record


def test_metrics_and_rollouts_hold_what_the_contract_lists(pool, settings, tmp_path):
    metrics = pool(1).run(TRAIN, settings)[0]
    assert [row["step"] for row in metrics] == [1, 2]
    first = metrics[0]
    for key in NUMBERS:
        assert isinstance(first[key], int | float), key
    assert first["staleness"] is None  # these responses were recorded, not drawn now
    assert set(first["seconds"]) >= {"rollout", "score", "weigh", "update", "total"}
    rows = [
        json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 12
    for row in rows:
        assert row["path"] == ("correct" if row["correct"] else "incorrect")
        assert (row["student_mean_logprob"] is None) == (not row["correct"])
        assert (row["teacher_mean_logprob"] is None) == row["correct"]
    for path in ("correct", "incorrect"):
        for prompt in ("p0", "p1", "p2"):
            total = sum(row["weight"] for row in rows if row["prompt_id"] == prompt and row["path"] == path)
            assert total == pytest.approx(1.0) or total == 0
    share = np.mean([row["correct"] for row in rows])
    assert first["accuracy"] == pytest.approx(share)


def test_the_written_rollouts_replay_to_the_same_numbers(pool, settings, tmp_path):
    first = pool(1).run(TRAIN, settings)[0]
    again = changed(
        settings,
        rollout={"file": str(tmp_path / "run" / "rollouts")},
        run={"output_dir": str(tmp_path / "again")},
    )
    assert without_times(pool(1).run(TRAIN, again)[0]) == without_times(first)


def test_the_exported_model_gives_the_trainers_logprobs(pool, settings, tmp_path):
    pool(4).run(TRAIN, changed(settings, parallel={"tensor": 2, "pipeline": 2}))
    final = str(tmp_path / "run" / "hf")
    rows = str(tmp_path / "rows.jsonl")
    scored = changed(settings, student={"hf": final}, run={"output_dir": str(tmp_path / "scored")})
    found = pool(1).run("tests.helpers.jobs:token_logprobs", scored)[0]["student"]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    for index, line in enumerate(Path(rows).read_text().splitlines()[:12]):
        row = json.loads(line)
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double()
        want = torch.log_softmax(logits, -1).gather(1, torch.tensor(row["output_ids"])[:, None])[:, 0]
        np.testing.assert_allclose(found[index], want.detach().numpy(), atol=2e-5)


# ---- faults


def spoiled(source: Path, target: Path, name: str, value: float) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2}], ids=["one", "tp2", "pp2"])
def test_a_teacher_with_a_non_finite_logprob_stops_the_run_before_the_optimizer(
    pool, settings, tmp_path, parallel
):
    teacher = spoiled(Path(settings["teacher"]["hf"]), tmp_path / "nan", "model.norm.weight", float("nan"))
    settings = changed(settings, teacher={"hf": str(teacher)}, parallel=parallel)
    num_ranks = 2 if parallel else 1
    with pytest.raises(ScoringError, match=r"the teacher's log-probs are not finite .* prompt p0, sample 0"):
        pool(num_ranks).run(TRAIN, settings)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_student_with_a_non_finite_weight_is_named(pool, settings, tmp_path):
    student = spoiled(Path(settings["student"]["hf"]), tmp_path / "inf", "model.norm.weight", float("inf"))
    with pytest.raises(ScoringError, match="the student's log-probs are not finite"):
        pool(1).run(TRAIN, changed(settings, student={"hf": str(student)}))


def test_tokenizers_that_differ_are_refused(pool, settings, tmp_path):
    other = shutil.copytree(settings["teacher"]["hf"], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["a"], tokenizer["model"]["vocab"]["b"] = (
        tokenizer["model"]["vocab"]["b"],
        tokenizer["model"]["vocab"]["a"],
    )
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"differ in 2 tokens, for example 'a'.*must share one vocabulary"):
        pool(1).run(TRAIN, changed(settings, teacher={"hf": str(other)}))


def test_a_table_shorter_than_the_tokenizer_is_refused(pool, settings, tmp_path):
    short = save_qwen2(tmp_path / "short", rows=39)
    with pytest.raises(ConfigError, match="40 tokens but the smaller model table only 39 rows"):
        pool(1).run(TRAIN, changed(settings, teacher={"hf": str(short)}))


def test_a_replayed_id_outside_the_shared_vocabulary_is_refused(pool, settings, tmp_path):
    rows = random_rows(num_prompts=1, num_samples=2, vocab_size=40)
    rows[1]["output_ids"][0] = 40
    file = write_rows(tmp_path / "outside.jsonl", rows)
    with pytest.raises(RolloutError, match=r"prompt p0, sample 1 holds token id 40.*share only 40 ids"):
        pool(2).run(TRAIN, changed(settings, rollout={"file": str(file)}))


def test_a_layout_that_does_not_divide_the_model_is_refused(pool, settings):
    with pytest.raises(ConfigError, match=r"parallel.tensor is 4 but .* has 2 query groups"):
        pool(4).run(TRAIN, changed(settings, parallel={"tensor": 4}))


def test_a_group_of_one_in_replayed_rows_has_weight_one(pool, settings, tmp_path):
    rows = random_rows(num_prompts=3, num_samples=1, vocab_size=40)
    file = write_rows(tmp_path / "ones.jsonl", rows)
    pool(1).run(TRAIN, changed(settings, rollout={"file": str(file)}, run={"steps": 1}))
    written = [
        json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").read_text().splitlines()
    ]
    assert [row["weight"] for row in written] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "parallel", [{"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=["tp2-sp", "pp2"]
)
def test_a_replica_without_a_response_takes_part_with_nothing(pool, settings, tmp_path, parallel):
    file = write_rows(tmp_path / "one.jsonl", random_rows(num_prompts=1, num_samples=1, vocab_size=40))
    settings = changed(settings, rollout={"file": str(file)}, run={"steps": 1})
    alone = pool(1).run(TRAIN, settings)[0][0]
    beside = pool(4).run(TRAIN, changed(settings, parallel=parallel))[0][0]
    assert beside["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert beside["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


def test_more_steps_than_recorded_are_refused(pool, settings):
    with pytest.raises(DataError, match=r"holds 6 recorded steps; step 7 has none"):
        pool(1).run(TRAIN, changed(settings, run={"steps": 7}))


def test_dropped_truncated_and_aborted_responses_stay_in_the_record(pool, settings, tmp_path):
    rows = random_rows(num_prompts=2, num_samples=4, vocab_size=40)
    rows[0]["finish_reason"], rows[1]["finish_reason"] = "length", "abort"
    rows[2].update(output_ids=[], engine_logprobs=[])
    file = write_rows(tmp_path / "mixed.jsonl", rows)
    settings = changed(settings, rollout={"file": str(file), "truncated": "drop"}, run={"steps": 1})
    metrics = pool(1).run(TRAIN, settings)[0][0]
    assert (metrics["rollouts_sampled"], metrics["rollouts_aborted"], metrics["rollouts_empty"]) == (8, 1, 1)
    assert (metrics["rollouts_truncated"], metrics["rollouts_dropped_truncated"]) == (1, 1)
    written = [
        json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").read_text().splitlines()
    ]
    assert [row["weight"] is None for row in written] == [True, True, True, False, False, False, False, False]


def test_an_unreadable_weight_file_is_named_on_every_layout(pool, settings, tmp_path):
    broken = shutil.copytree(settings["teacher"]["hf"], tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"model.safetensors cannot be read as safetensors"):
        pool(2).run(TRAIN, changed(settings, teacher={"hf": str(broken)}, parallel={"pipeline": 2}))


def test_the_tokenizer_helper_is_what_the_tests_think(tmp_path):
    save_tokenizer(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("12+3=$").input_ids == [1, 2, 11, 3, 10, 12]
