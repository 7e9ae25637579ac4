"""bfloat16 parameters with float32 master weights train on a CPU; recomputed activations change no bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.models import read_weights, save_qwen2, save_qwen3
from tests.helpers.rollouts import write_rows
from tests.helpers.rows import without_times
from tests.helpers.settings import changed, replayed_steps

TRAIN = "tests.helpers.jobs:train"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
}
SUMS = [{"prompt": f"{a}+{b}=", "response": f"{a + b}$"} for a in range(4) for b in range(4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied student, whose last pipeline stage trains a copy of the table, and a teacher."""
    root = tmp_path_factory.mktemp("models")
    student = save_qwen3(root / "student", seed=1, tie_word_embeddings=True)
    return {"student": student, "teacher": save_qwen2(root / "teacher", seed=2)}


@pytest.fixture
def scope_settings(models: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """SCOPE on six replayed steps in bfloat16."""
    settings = replayed_steps(tmp_path, models["student"], models["teacher"], num_recorded=6, vocab_size=40)
    return changed(settings, run={"steps": 6}, train={"precision": "bfloat16"})


def sft_settings(student: Path, folder: Path, precision: str) -> dict[str, Any]:
    """Likelihood on sixteen sums, all of them in each of twelve steps, so that losses compare."""
    return {
        "run": {"output_dir": str(folder / "run"), "steps": 12},
        "student": {"hf": str(student)},
        "objective": {"name": "sft"},
        "data": {"train": str(write_rows(folder / "sums.jsonl", SUMS)), "prompt_template": "{prompt}"},
        "rollout": {"prompts_per_step": len(SUMS)},
        "train": {"precision": precision, "micro_batch_tokens": 40},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 0},
    }


# ---- bfloat16 with float32 master weights


def sft_run(
    pool, student: Path, folder: Path, precision: str, layout: str
) -> tuple[list[float], torch.Tensor]:
    """The losses, and the gradient of the first step, float64, parameters in the order of names."""
    num_ranks, parallel = LAYOUTS[layout]
    dump = folder / "gradient.safetensors"
    settings = sft_settings(student, folder, precision) | {"parallel": parallel}
    settings["run"]["dump_gradients"] = str(dump)
    losses = [row["loss"] for row in pool(num_ranks).run(TRAIN, settings)[0]]
    return losses, torch.cat([value.double().flatten() for _, value in sorted(load_file(dump).items())])


@pytest.fixture(scope="module")
def in_float32(pool, models, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], torch.Tensor]:
    return sft_run(pool, models["student"], tmp_path_factory.mktemp("float32"), "float32", "one")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_learns_along_the_path_of_float32(pool, models, in_float32, tmp_path, layout):
    losses, gradient = sft_run(pool, models["student"], tmp_path, "bfloat16", layout)
    float32_losses, float32_gradient = in_float32
    assert (gradient - float32_gradient).norm() < 0.02 * float32_gradient.norm()
    # Adam at this learning rate soon doubles differences: later losses compare rounding errors.
    assert losses[:6] == pytest.approx(float32_losses[:6], rel=0.01)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_float32_masters_rounded_to_bfloat16(pool, scope_settings, layout):
    num_ranks, parallel = LAYOUTS[layout]
    settings = scope_settings | {"parallel": parallel}
    for held in pool(num_ranks).run("tests.helpers.stages:parameters_and_masters", settings):
        assert held.parameters == {torch.bfloat16} and held.masters == {torch.float32}
        assert held.off_rounding == 0.0 and held.off_master > 0.0  # masters keep what rounding loses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stopped_bfloat16_run_goes_on_bit_for_bit(pool, scope_settings, tmp_path, layout):
    # Steps of 0.001 are below bfloat16's resolution of norms: masters made from parameters would lose them.
    num_ranks, parallel = LAYOUTS[layout]
    settings = scope_settings | {"parallel": parallel, "checkpoint": {"every": 2, "keep": 2}}
    whole = pool(num_ranks).run(TRAIN, settings)[0]
    stopped = settings | {"run": {"output_dir": str(tmp_path / "stopped"), "steps": 6}}
    pool(num_ranks).run(TRAIN, stopped)
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_00000006")
    shutil.rmtree(tmp_path / "stopped" / "hf")
    resumed = pool(num_ranks).run(TRAIN, stopped, resume=True)[0]
    assert without_times(resumed) == without_times(whole)
    expected, found = read_weights(tmp_path / "run" / "hf"), read_weights(tmp_path / "stopped" / "hf")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.dtype == torch.bfloat16 and torch.equal(found[name], value), name


# ---- recomputed activations


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [(1, {}), (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2})],
    ids=["one", "tp2-sp", "pp2"],
)
def test_recomputed_activations_give_the_same_bits(
    pool, scope_settings, tmp_path, num_ranks, parallel, precision
):
    found = {}
    for recompute in ("none", "selective", "full"):
        out = tmp_path / recompute
        settings = scope_settings | {
            "run": {"output_dir": str(out), "steps": 2, "dump_gradients": str(out / "gradient.safetensors")},
            "train": {"precision": precision, "micro_batch_tokens": 40, "recompute": recompute},
            "parallel": parallel,
        }
        results = pool(num_ranks).run("tests.helpers.stages:train_counting_attention", settings)
        found[recompute] = (
            without_times(results[0][0]),
            {**load_file(out / "gradient.safetensors"), **read_weights(out / "hf")},
            [calls for _, calls in results],
        )
    rows, tensors, calls = found["none"]
    for recompute in ("selective", "full"):
        again_rows, again_tensors, again_calls = found[recompute]
        assert again_rows == rows
        assert again_tensors.keys() == tensors.keys()
        assert all(torch.equal(again_tensors[name], value) for name, value in tensors.items())
        # Every stage ran its attention once more for each micro-batch that it learnt from.
        assert all(more > once for more, once in zip(again_calls, calls, strict=True))
