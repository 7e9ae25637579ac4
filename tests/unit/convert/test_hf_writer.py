"""Finished folders: weight files, their index, and the rest of the model carried along."""

import json

import pytest
import torch

from megatron_scope.convert.hf_folder import INDEX, SINGLE, HfFolder
from megatron_scope.convert.hf_writer import finish_folder, shard_names
from megatron_scope.convert.safetensors_writer import SafetensorsWriter, TensorPlan, plan_shards
from tests.unit.convert.folders import CONFIG, read_weights, same_bits, tensors, write_folder


def write(folder, weights, max_bytes=10**9, prefix="part"):
    """Weight files of bounded size; returns what each holds."""
    folder.mkdir(exist_ok=True)
    plans = [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()]
    files = {f"{prefix}-{number}": shard for number, shard in enumerate(plan_shards(plans, max_bytes))}
    with SafetensorsWriter(folder, {f"{name}.safetensors": shard for name, shard in files.items()}) as writer:
        for name, tensor in weights.items():
            writer.write(name, 0, tensor)
    return {f"{name}.safetensors": shard for name, shard in files.items()}


@pytest.fixture
def like(tmp_path):
    """A model folder with all that may lie in one."""
    folder = write_folder(tmp_path / "like", torch_dtype="float16", extra={"nested": [1]})
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text(f"content of {name}")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", INDEX, "old.pt", "m.gguf"):
        (folder / name).write_text("weights of the old model")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


def test_several_files_get_an_index_and_are_read_back(tmp_path, like):
    out, weights = tmp_path / "out", tensors(seed=1)
    first = write(out, dict(list(weights.items())[:10]), 500, "stage0")
    second = write(out, dict(list(weights.items())[10:]), 500, "stage1")
    files = {**first, **second}
    finish_folder(out, like, files)
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {plan.name: file for file, plans in files.items() for plan in plans}
    assert list(index["weight_map"]) == sorted(weights)
    assert index["metadata"] == {"total_size": sum(tensor.numel() * 4 for tensor in weights.values())}
    folder = HfFolder(out)
    folder.check()
    assert same_bits({name: folder.slice(name)[:] for name in folder.file_of}, weights)
    assert not (out / SINGLE).exists()


def test_a_single_file_gets_its_name_and_no_index(tmp_path, like):
    out, weights = tmp_path / "out", tensors(seed=1)
    finish_folder(out, like, write(out, weights))
    assert not (out / INDEX).exists()
    assert [file.name for file in out.glob("*.safetensors")] == [SINGLE]
    assert same_bits(read_weights(out), weights)


def test_everything_but_weights_is_carried_along(tmp_path, like):
    out = tmp_path / "out"
    finish_folder(out, like, write(out, tensors()))
    carried = {"tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"}
    assert {file.name for file in out.iterdir()} == {*carried, "config.json", SINGLE}
    assert all((out / name).read_text() == f"content of {name}" for name in carried)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_config_says_the_weights_dtype_and_is_otherwise_the_old_one(tmp_path, like, dtype):
    out = tmp_path / "out"
    before = (like / "config.json").read_text()
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors().items()}
    finish_folder(out, like, write(out, weights))
    config = json.loads((out / "config.json").read_text())
    assert config.pop("dtype") == config.pop("torch_dtype") == dtype
    assert config == {**CONFIG, "extra": {"nested": [1]}}
    assert (like / "config.json").read_text() == before


def test_files_are_named_as_transformers_names_them():
    assert shard_names(1) == [SINGLE]
    assert shard_names(3) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert len(set(shard_names(12))) == 12 and sorted(shard_names(12)) == shard_names(12)
