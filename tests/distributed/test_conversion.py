"""Converted checkpoints at every layout: the same logits as transformers, and read by Megatron itself;
training checkpoints as Hugging Face folders; training that starts from a checkpoint.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from megatron_scope.convert.shape import FileLayout
from megatron_scope.convert.to_hf import to_hf
from megatron_scope.convert.to_megatron import to_megatron
from tests.helpers.models import (
    read_weights,
    save_llama,
    save_mistral,
    save_mixtral,
    save_qwen2,
    save_qwen3,
    save_qwen3_moe,
)
from tests.helpers.rollouts import random_rows, write_rows
from tests.helpers.settings import changed

ROWS = 131  # a tensor rank's shard of the table holds padding only
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: save_llama(folder, seed=1, rows=ROWS),
    "llama-tied": lambda folder: save_llama(folder, seed=2, rows=43, tie_word_embeddings=True),
    "mistral": lambda folder: save_mistral(folder, seed=3, rows=ROWS),
    "mixtral-tied": lambda folder: save_mixtral(folder, seed=4, rows=ROWS, tie_word_embeddings=True),
    "qwen2": lambda folder: save_qwen2(folder, seed=5, rows=ROWS, tie_word_embeddings=False),
    "qwen2-tied": lambda folder: save_qwen2(folder, seed=6, rows=43),
    "qwen3": lambda folder: save_qwen3(folder, seed=7, rows=ROWS),
    "qwen3-tied": lambda folder: save_qwen3(folder, seed=8, rows=43, tie_word_embeddings=True),
    "qwen3-moe": lambda folder: save_qwen3_moe(folder, seed=9, rows=ROWS),
}
MIXTURES = ("mixtral-tied", "qwen3-moe")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2-ep2": (2, {"tensor": 2, "expert": 2}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}),
}
CASES = [
    (model, layout)
    for layout, (_, parallel) in LAYOUTS.items()
    for model in MODELS
    if model in MIXTURES or "expert" not in parallel
]
TOKENS = np.random.default_rng(0).integers(43, size=(2, 24))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model as Hugging Face and as Megatron folder, the latter cut for TP 2 x PP 2."""
    root = tmp_path_factory.mktemp("models")
    for name, save in MODELS.items():
        save(root / name)
        to_megatron(root / name, root / f"{name}-megatron", FileLayout(tensor=2, pipeline=2))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    """Float32 logits by transformers."""
    return {name: transformers_logits(folders[name], TOKENS) for name in MODELS}


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_of_a_converted_checkpoint_equal_transformers(
    pool, folders, expected, tmp_path, model, layout
):
    size, parallel = LAYOUTS[layout]
    out = tmp_path / "logits.npy"
    pool(size).run(
        "tests.helpers.jobs:checkpoint_logits", str(folders[f"{model}-megatron"]), parallel, TOKENS, str(out)
    )
    np.testing.assert_allclose(np.load(out), expected[model], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_megatron_itself_loads_a_converted_checkpoint(pool, folders, model, layout):
    size, parallel = LAYOUTS[layout]
    differing = pool(size).run(
        "tests.helpers.jobs:load_with_megatron",
        str(folders[model]),
        str(folders[f"{model}-megatron"]),
        parallel,
    )
    assert differing == [[]] * size


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_keeps_names_and_bits(folders, tmp_path, model):
    to_hf(folders[f"{model}-megatron"], tmp_path / "back", max_shard_bytes=40_000)
    before, after = read_weights(folders[model]), read_weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


@pytest.mark.skipif(importlib.util.find_spec("mbridge") is None, reason="mbridge is not installed")
@pytest.mark.parametrize(
    "model", [name for name in MODELS if name != "mistral"]
)  # which mbridge does not have
def test_the_mapping_is_mbridges(pool, folders, model):
    ((count, differing),) = pool(1).run("tests.helpers.jobs:differences_from_mbridge", str(folders[model]))
    assert count > 15 and differing == []


# ---- training


@pytest.fixture
def settings(folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """One replayed step of a tied and an untied model, checkpointed."""
    rows = random_rows(num_prompts=3, num_samples=4, vocab_size=40, seed=7)
    return {
        "run": {"output_dir": str(tmp_path / "run"), "steps": 1},
        "student": {"hf": str(folders["qwen3"])},
        "teacher": {"hf": str(folders["qwen2-tied"])},
        "rollout": {
            "engine": "replay",
            "file": str(write_rows(tmp_path / "rows.jsonl", rows)),
            "max_new_tokens": 16,
        },
        "data": {"max_prompt_tokens": 16},
        "optimizer": {"lr": 0.01},
        "train": {"precision": "float32"},
        "checkpoint": {"every": 1},
    }


@pytest.mark.parametrize("student", ["qwen3", "llama-tied", "qwen2-tied"])
def test_a_training_checkpoint_of_tp2_pp2_exports_to_what_was_trained(
    pool, folders, settings, tmp_path, student
):
    parallel = {"tensor": 2, "pipeline": 2}
    trained = changed(settings, student={"hf": str(folders[student])}, parallel=parallel)
    pool(4).run("tests.helpers.jobs:train", trained)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    to_hf(checkpoint, tmp_path / "exported")
    published, exported = read_weights(tmp_path / "run" / "hf"), read_weights(tmp_path / "exported")
    assert published.keys() == exported.keys()
    assert [name for name in published if not torch.equal(published[name], exported[name])] == []
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (
        folders[student] / "tokenizer.json"
    ).read_bytes()
    ours = tmp_path / "logits.npy"
    pool(4).run("tests.helpers.jobs:checkpoint_logits", str(checkpoint), parallel, TOKENS, str(ours))
    theirs = transformers_logits(tmp_path / "exported", TOKENS)
    both = [torch.from_numpy(logits).log_softmax(-1).numpy() for logits in (np.load(ours), theirs)]
    np.testing.assert_allclose(*both, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["one", "tp2-pp2"])
def test_training_from_a_checkpoint_equals_training_from_the_hugging_face_folder(
    pool, folders, settings, tmp_path, layout
):
    size, parallel = LAYOUTS[layout]
    found = []
    for name, models in {
        "hf": {},
        "megatron": {
            "student": {"hf": None, "megatron": str(folders["qwen3-megatron"])},
            "teacher": {"hf": str(folders["qwen2-tied"]), "megatron": str(folders["qwen2-tied-megatron"])},
        },
    }.items():
        run = changed(settings, run={"output_dir": str(tmp_path / name)}, parallel=parallel, **models)
        row = pool(size).run("tests.helpers.jobs:train", run)[0][-1]
        found.append(
            {key: value for key, value in row.items() if not key.startswith(("seconds", "tokens_per"))}
        )
        found[-1]["weights"] = {
            key: value.tolist() for key, value in read_weights(tmp_path / name / "hf").items()
        }
    assert found[0] == found[1]


@pytest.mark.parametrize("model", ["qwen3", "qwen2-tied", "qwen3-moe"])
def test_a_converted_checkpoint_has_the_keys_sizes_and_dtypes_of_a_training_checkpoint(
    pool, folders, settings, tmp_path, model
):
    pool(1).run("tests.helpers.jobs:train", changed(settings, student={"hf": str(folders[model])}))
    to_megatron(folders[model], tmp_path / "converted")
    written, converted = (
        FileSystemReader(folder).read_metadata().state_dict_metadata
        for folder in (tmp_path / "run" / "checkpoints" / "step_00000001", tmp_path / "converted")
    )

    def described(value: Any) -> Any:
        is_tensor = isinstance(value, TensorStorageMetadata)
        return (value.size, value.properties.dtype) if is_tensor else type(value)

    model_keys = {key for key in written if not key.startswith("optimizer.")}
    alias = {"decoder.layers.pre_mlp_layernorm.weight"} if model in MIXTURES else set()
    assert set(converted) == model_keys | alias
    assert {key: described(converted[key]) for key in model_keys} == {
        key: described(written[key]) for key in model_keys
    }
