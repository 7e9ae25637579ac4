"""Written folders: shards of bounded size, their index, and the rest of the model carried along."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_scope.convert.hf_folder import INDEX, SINGLE, HfFolder
from megatron_scope.convert.hf_writer import ShardWriter, finish_folder
from tests.unit.convert.folders import CONFIG, tensors, write_folder


def write(folder, weights, max_bytes, prefix="model-rank0"):
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, prefix, max_bytes)
    for name, tensor in weights.items():
        writer.add(name, tensor)
    writer.close()
    return writer


def floats(**counts):
    return {name: torch.full((count,), float(number)) for number, (name, count) in enumerate(counts.items())}


@pytest.mark.parametrize(
    ("counts", "max_bytes", "files"),
    [
        ({"a": 2, "b": 2, "c": 2}, 16, [["a", "b"], ["c"]]),
        ({"a": 2, "b": 2, "c": 2}, 15, [["a"], ["b"], ["c"]]),
        ({"a": 2, "b": 2, "c": 2}, 24, [["a", "b", "c"]]),
        (
            {"a": 1, "b": 100, "c": 1, "d": 1},
            16,
            [["a"], ["b"], ["c", "d"]],
        ),  # one larger tensor stands alone
        ({"a": 100}, 1, [["a"]]),
        ({}, 16, []),
    ],
)
def test_shards_hold_at_most_the_limit_or_one_tensor(tmp_path, counts, max_bytes, files):
    weights = floats(**counts)
    writer = write(tmp_path, weights, max_bytes, prefix="part")
    found = [sorted(load_file(file)) for file in sorted(tmp_path.iterdir())]
    assert found == files
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"part-{number:05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert writer.total_bytes == 4 * sum(counts.values())
    assert set(writer.file_of) == set(weights)
    for name, file in writer.file_of.items():
        assert torch.equal(load_file(tmp_path / file)[name], weights[name])


def test_a_tensors_bytes_are_counted_by_its_dtype(tmp_path):
    weights = {"a": torch.ones(4, dtype=torch.bfloat16), "b": torch.ones(4, dtype=torch.bfloat16)}
    writer = write(tmp_path, weights, 16)
    assert writer.total_bytes == 16 and len(set(writer.file_of.values())) == 1


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


def test_several_shards_get_an_index_and_are_read_back(tmp_path, like):
    out, weights = tmp_path / "out", tensors(seed=1)
    first = write(out, dict(list(weights.items())[:10]), 500, "model-rank0")
    second = write(out, dict(list(weights.items())[10:]), 500, "model-rank1")
    file_of = {**first.file_of, **second.file_of}
    finish_folder(out, like, "float32", file_of, first.total_bytes + second.total_bytes)
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == file_of and index["metadata"] == {
        "total_size": sum(tensor.numel() * 4 for tensor in weights.values())
    }
    folder = HfFolder(out)
    assert set(folder.file_of) == set(weights)
    assert all(torch.equal(folder.slice(name)[:], tensor) for name, tensor in weights.items())
    assert not (out / SINGLE).exists()


def test_a_single_shard_becomes_the_one_file_without_an_index(tmp_path, like):
    out, weights = tmp_path / "out", tensors(seed=1)
    writer = write(out, weights, 1_000_000)
    finish_folder(out, like, "float32", writer.file_of, writer.total_bytes)
    assert not (out / INDEX).exists()
    assert [file.name for file in out.glob("*.safetensors")] == [SINGLE]
    folder = HfFolder(out)
    assert all(torch.equal(folder.slice(name)[:], tensor) for name, tensor in weights.items())


def test_everything_but_weights_is_carried_along(tmp_path, like):
    out = tmp_path / "out"
    writer = write(out, tensors(), 1_000_000)
    finish_folder(out, like, "bfloat16", writer.file_of, writer.total_bytes)
    carried = {"tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"}
    assert {file.name for file in out.iterdir()} == {*carried, "config.json", SINGLE}
    assert all((out / name).read_text() == f"content of {name}" for name in carried)


def test_the_config_says_the_new_dtype_and_is_otherwise_the_old_one(tmp_path, like):
    out = tmp_path / "out"
    writer = write(out, tensors(), 1_000_000)
    before = (like / "config.json").read_text()
    finish_folder(out, like, "bfloat16", writer.file_of, writer.total_bytes)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("dtype") == config.pop("torch_dtype") == "bfloat16"
    assert config == {**CONFIG, "extra": {"nested": [1]}}
    assert (like / "config.json").read_text() == before


def test_the_file_format_is_named_in_each_shard(tmp_path):
    """transformers refuses files that do not say which framework wrote them."""
    from safetensors import safe_open

    write(tmp_path, floats(a=1), 16, "part")
    with safe_open(tmp_path / "part-00001.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
