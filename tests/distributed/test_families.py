"""Every family, tied and untied, at every layout: log-probs and the full gradient equal transformers', and
weights come back with the same bits (float32).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import oracles
from tests.helpers.models import (
    as_written,
    read_weights,
    save_llama,
    save_mistral,
    save_mixtral,
    save_qwen2,
    save_qwen3,
    save_qwen3_moe,
)
from tests.helpers.rollouts import random_rows
from tests.helpers.settings import replayed

VOCAB = 40  # ids that student and teacher share
ROWS = random_rows(num_prompts=3, num_samples=4, vocab_size=VOCAB, seed=7)
# Tables are padded to 128 rows a tensor rank; head_dim is unlike hidden / heads but in Qwen2.
STUDENTS: dict[str, Callable[[Path], Path]] = {
    "qwen3": lambda folder: save_qwen3(folder, seed=1, rows=43),
    "qwen3-tied": lambda folder: save_qwen3(folder, seed=2, rows=131, tie_word_embeddings=True),
    "qwen2": lambda folder: save_qwen2(folder, seed=3, tie_word_embeddings=False),
    "llama-tied": lambda folder: save_llama(folder, seed=4, tie_word_embeddings=True),
    "mistral": lambda folder: save_mistral(folder, seed=5, rows=43),  # its window is shorter than most rows
    "qwen3-moe": lambda folder: save_qwen3_moe(folder, seed=6, rows=43),
    "mixtral-tied": lambda folder: save_mixtral(folder, seed=8, rows=131, tie_word_embeddings=True),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2-sp-pp2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "ep2": (2, {"expert": 2}),  # over two replicas
    "tp2-sp-ep2": (2, {"tensor": 2, "sequence": True, "expert": 2}),  # over two tensor ranks
    "tp2-sp-dp2-ep2": (4, {"tensor": 2, "sequence": True, "expert": 2}),
    "tp2-sp-dp2-ep4": (4, {"tensor": 2, "sequence": True, "expert": 4}),  # one expert a rank
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}),
}
NUM_EXPERTS = {"qwen3-moe": 6, "mixtral-tied": 4}


def fits(student: str, parallel: dict[str, Any]) -> bool:
    """Whether a layout is one for this model."""
    if student not in NUM_EXPERTS:
        return "expert" not in parallel
    # Experts train with tensor parallelism only under sequence parallelism.
    return NUM_EXPERTS[student] % parallel.get("expert", 1) == 0 and ("tensor" in parallel) == (
        "sequence" in parallel
    )


PAIRS = [
    (student, layout)
    for student in STUDENTS
    for layout, (_, parallel) in LAYOUTS.items()
    if fits(student, parallel)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of each kind, and the teacher of all: a Qwen3 of another depth, width and table length."""
    root = tmp_path_factory.mktemp("models")
    students = {name: save(root / name) for name, save in STUDENTS.items()}
    sizes = {"hidden_size": 28, "num_hidden_layers": 2, "head_dim": 8, "num_attention_heads": 6}
    return {**students, "teacher": save_qwen3(root / "teacher", seed=9, rows=VOCAB, **sizes)}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Log-probs and the gradient of Eq. 6 by transformers in float64."""
    teacher = oracles.load(folders["teacher"])
    with torch.no_grad():
        theirs = [oracles.logprobs(teacher, row, VOCAB) for row in ROWS]
    found = {}
    for name in STUDENTS:
        student = oracles.load(folders[name])
        student.set_experts_implementation("eager")  # the default does not take float64
        ours = [oracles.logprobs(student, row, VOCAB) for row in ROWS]
        before = [logprob.detach() for logprob in ours]
        oracles.scope()(oracles.Batch(ROWS, ours, before, theirs, [])).backward()
        written = tmp_path_factory.mktemp("gradient")
        gradient = as_written(student, oracles.gradients(student), written)
        found[name] = {"student": before, "teacher": theirs, "gradient": gradient}
    return found


@pytest.mark.parametrize(("student", "layout"), PAIRS)
def test_the_full_gradient_equals_transformers(pool, folders, expected, tmp_path, student, layout):
    num_ranks, parallel = LAYOUTS[layout]
    settings = replayed(tmp_path, folders[student], folders["teacher"], ROWS) | {"parallel": parallel}
    (row,) = pool(num_ranks).run("tests.helpers.jobs:train", settings)[0]
    gradient = expected[student]["gradient"]
    found = load_file(tmp_path / "gradient.safetensors")
    assert oracles.relative_l2(found, gradient) < 1e-4
    # Each on its own, since a small one could be wrong within the whole; all zero where no token came by.
    for name, value in gradient.items():
        difference = oracles.norm({name: found[name].double() - value})
        assert difference <= 1e-4 * oracles.norm({name: value}), name
    assert row["grad_norm"] == pytest.approx(oracles.norm(gradient), rel=1e-4)


@pytest.mark.parametrize(("student", "layout"), PAIRS)
def test_token_logprobs_equal_transformers(pool, folders, expected, tmp_path, student, layout):
    num_ranks, parallel = LAYOUTS[layout]
    settings = replayed(tmp_path, folders[student], folders["teacher"], ROWS) | {"parallel": parallel}
    results = pool(num_ranks).run("tests.helpers.jobs:token_logprobs", settings)
    for model in ("student", "teacher"):
        found = {index: value for result in results for index, value in result[model].items()}
        assert found.keys() == set(range(len(ROWS)))
        for index, logprobs in enumerate(expected[student][model]):
            np.testing.assert_allclose(found[index], logprobs.numpy(), atol=2e-5)


# ---- weights there and back


@pytest.mark.parametrize(
    ("student", "layout", "pipeline_layers"),
    [
        *(
            (student, layout, pipeline_layers)
            for student in ("qwen3", "qwen3-tied", "llama-tied", "qwen3-moe")
            for layout, pipeline_layers in (
                ("one", None),
                ("tp2-sp", None),
                ("pp2", (3, 0)),  # the last stage holds a table and no layer
                ("tp2-pp2", (1, 2)),
            )
        ),
        ("mistral", "tp2-pp2", None),
        *(("qwen3-moe", layout, None) for layout in ("ep2", "tp2-sp-dp2-ep2")),
        *(("mixtral-tied", layout, None) for layout in ("tp2-sp-ep2", "tp2-sp-dp2-ep4", "pp2-ep2")),
    ],
)
def test_weights_come_back_with_the_same_names_and_bits(
    pool, folders, tmp_path, student, layout, pipeline_layers
):
    num_ranks, parallel = LAYOUTS[layout]
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        source, out = tmp_path / precision, tmp_path / f"{precision} again"
        source.mkdir()
        weights = {name: value.to(dtype) for name, value in read_weights(folders[student]).items()}
        save_file(weights, source / "model.safetensors")
        (source / "config.json").write_bytes((folders[student] / "config.json").read_bytes())
        arguments = (str(source), str(out), parallel, precision, pipeline_layers)
        pool(num_ranks).run("tests.helpers.stages:save_again", *arguments)
        found = read_weights(out)
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            assert found[name].dtype == dtype and torch.equal(found[name], value), name
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == precision
