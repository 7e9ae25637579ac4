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
from tests.helpers.models import read_weights, save_llama, save_qwen2, save_qwen3
from tests.helpers.rollouts import random_rows, write_rows

VOCAB = 40  # ids that student and teacher share
ROWS = random_rows(num_prompts=3, num_samples=4, vocab_size=VOCAB, seed=7)
# Tables are padded to 128 rows a tensor rank; head_dim is unlike hidden / heads but in Qwen2.
STUDENTS: dict[str, Callable[[Path], Path]] = {
    "qwen3": lambda folder: save_qwen3(folder, seed=1, rows=43),
    "qwen3-tied": lambda folder: save_qwen3(folder, seed=2, rows=131, tie_word_embeddings=True),
    "qwen2": lambda folder: save_qwen2(folder, seed=3, tie_word_embeddings=False),
    "llama-tied": lambda folder: save_llama(folder, seed=4, tie_word_embeddings=True),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of each kind, and the teacher of all: a Qwen3 of another depth, width and table length."""
    root = tmp_path_factory.mktemp("models")
    students = {name: save(root / name) for name, save in STUDENTS.items()}
    sizes = {"hidden_size": 28, "num_hidden_layers": 2, "head_dim": 8, "num_attention_heads": 6}
    return {**students, "teacher": save_qwen3(root / "teacher", seed=9, rows=VOCAB, **sizes)}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, Any]:
    """Log-probs and the gradient of Eq. 6 by transformers in float64."""
    teacher = oracles.load(folders["teacher"])
    with torch.no_grad():
        theirs = [oracles.logprobs(teacher, row, VOCAB) for row in ROWS]
    found = {}
    for name in STUDENTS:
        student = oracles.load(folders[name])
        ours = [oracles.logprobs(student, row, VOCAB) for row in ROWS]
        before = [logprob.detach() for logprob in ours]
        oracles.scope()(oracles.Batch(ROWS, ours, before, theirs, [])).backward()
        found[name] = {"student": before, "teacher": theirs, "gradient": oracles.gradients(student)}
    return found


@pytest.fixture
def settings(folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "run": {
            "output_dir": str(tmp_path / "run"),
            "steps": 1,
            "dump_gradients": str(tmp_path / "gradient.safetensors"),
        },
        "teacher": {"hf": str(folders["teacher"])},
        "rollout": {
            "engine": "replay",
            "file": str(write_rows(tmp_path / "rows.jsonl", ROWS)),
            "temperature": 1.0,
        },
        "train": {"precision": "float32", "micro_batch_tokens": 64},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("student", STUDENTS)
def test_the_full_gradient_equals_transformers(pool, folders, settings, expected, tmp_path, student, layout):
    num_ranks, parallel = LAYOUTS[layout]
    settings |= {"student": {"hf": str(folders[student])}, "parallel": parallel}
    (row,) = pool(num_ranks).run("tests.helpers.jobs:train", settings)[0]
    gradient = expected[student]["gradient"]
    found = load_file(tmp_path / "gradient.safetensors")
    assert oracles.relative_l2(found, gradient) < 1e-4
    # Each on its own, since a small one could be wrong within the whole.
    for name, value in gradient.items():
        assert oracles.relative_l2({name: found[name]}, {name: value}) < 1e-4, name
    assert row["grad_norm"] == pytest.approx(oracles.norm(gradient), rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("student", STUDENTS)
def test_token_logprobs_equal_transformers(pool, folders, settings, expected, student, layout):
    num_ranks, parallel = LAYOUTS[layout]
    settings |= {"student": {"hf": str(folders[student])}, "parallel": parallel}
    results = pool(num_ranks).run("tests.helpers.jobs:token_logprobs", settings)
    for model in ("student", "teacher"):
        found = {index: value for result in results for index, value in result[model].items()}
        assert found.keys() == set(range(len(ROWS)))
        for index, logprobs in enumerate(expected[student][model]):
            np.testing.assert_allclose(found[index], logprobs.numpy(), atol=2e-5)


# ---- weights there and back


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "pipeline_layers"),
    [
        (1, {}, None),
        (2, {"tensor": 2, "sequence": True}, None),
        (2, {"pipeline": 2}, (3, 0)),  # the last stage holds a table and no layer
        (4, {"tensor": 2, "pipeline": 2}, (1, 2)),
    ],
    ids=["one", "tp2-sp", "pp2-empty-stage", "tp2-pp2"],
)
@pytest.mark.parametrize("student", ["qwen3", "qwen3-tied", "llama-tied"])
def test_weights_come_back_with_the_same_names_and_bits(
    pool, folders, tmp_path, student, num_ranks, parallel, pipeline_layers
):
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
