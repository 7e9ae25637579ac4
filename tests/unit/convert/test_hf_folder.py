"""Hugging Face folders: read slice by slice, and refused in one line where they are broken."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_scope.convert.hf_folder import INDEX, SINGLE, HfFolder
from megatron_scope.errors import DataError
from tests.unit.convert.folders import tensors, write_folder


@pytest.fixture
def sharded(tmp_path):
    """A folder whose tensors lie in two files with an index."""
    write_folder(tmp_path)
    (tmp_path / SINGLE).unlink()
    weights = tensors()
    names = sorted(weights)
    file_of = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(file_of.values()):
        save_file({name: weights[name] for name in names if file_of[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return tmp_path


def test_tensors_of_a_single_file_are_read_by_name_and_rows(tmp_path):
    folder, weights = HfFolder(write_folder(tmp_path)), tensors()
    assert folder.file_of == dict.fromkeys(weights, SINGLE)
    assert folder.family.architecture == "LlamaForCausalLM" and folder.shape.vocab_rows == 130
    for name, tensor in weights.items():
        assert torch.equal(folder.slice(name)[:], tensor)
    table = folder.slice("model.embed_tokens.weight")
    assert table.get_shape() == [130, 12]
    assert torch.equal(table[3:7], weights["model.embed_tokens.weight"][3:7])


def test_tensors_of_several_files_are_found_by_the_index(sharded):
    folder, weights = HfFolder(sharded), tensors()
    assert set(folder.file_of) == set(weights) and len(set(folder.file_of.values())) == 2
    for name, tensor in weights.items():
        assert torch.equal(folder.slice(name)[:], tensor)


def test_the_index_comes_before_a_single_file(sharded):
    save_file({"lm_head.weight": torch.zeros(1)}, sharded / SINGLE)
    assert torch.equal(HfFolder(sharded).slice("lm_head.weight")[:], tensors()["lm_head.weight"])


def test_a_closed_folder_can_be_read_again(tmp_path):
    folder = HfFolder(write_folder(tmp_path))
    first = folder.slice("model.norm.weight")[:]
    folder.close()
    assert torch.equal(folder.slice("model.norm.weight")[:], first)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    write_folder(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HfFolder("~/model").path == tmp_path / "model"


# ---- refusals


def problem(action):
    with pytest.raises(DataError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "missing"
    assert problem(lambda: HfFolder(path)) == (
        f"{path / 'config.json'} is missing; expected a Hugging Face model folder"
    )


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    path = write_folder(tmp_path) / SINGLE
    assert problem(lambda: HfFolder(path)) == (
        f"{path / 'config.json'} is missing; expected a Hugging Face model folder"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "config.json is not valid JSON ("),
        (b"", "config.json is not valid JSON ("),
        (b"\xff\xfe{}", "config.json is not valid JSON ("),
        (b"[1]", "config.json is not a JSON object"),
        (b"null", "config.json is not a JSON object"),
    ],
)
def test_a_broken_config_is_refused(tmp_path, content, expected):
    (write_folder(tmp_path) / "config.json").write_bytes(content)
    message = problem(lambda: HfFolder(tmp_path))
    assert f"{tmp_path}/{expected}" in message and message.endswith("copy the file again")


def test_a_folder_in_place_of_the_config_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    assert problem(lambda: HfFolder(tmp_path)) == f"{tmp_path / 'config.json'} cannot be read: Is a directory"


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (write_folder(tmp_path) / SINGLE).rename(tmp_path / "pytorch_model.bin")
    assert problem(lambda: HfFolder(tmp_path).file_of) == (
        f"{tmp_path} holds neither {SINGLE} nor {INDEX}; only safetensors weights are read"
    )


def test_a_tensor_that_the_model_needs_but_the_folder_lacks_is_named(tmp_path):
    folder = HfFolder(write_folder(tmp_path))
    expected = f"{tmp_path} has no tensor model.layers.9.x, which LlamaForCausalLM needs"
    assert problem(lambda: folder.slice("model.layers.9.x")) == expected


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_weight_file_is_refused(tmp_path, keep):
    path = write_folder(tmp_path) / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    message = problem(lambda: HfFolder(tmp_path).slice("model.norm.weight"))
    assert message.startswith(f"{path} cannot be read as safetensors (") and message.endswith(
        "copy the file again"
    )


def test_a_weight_file_that_the_index_names_but_is_not_there_is_refused(sharded):
    (sharded / "part-1.safetensors").unlink()
    folder = HfFolder(sharded)
    name = next(name for name, file in folder.file_of.items() if file == "part-1.safetensors")
    assert problem(lambda: folder.slice(name)).startswith(f"{sharded / 'part-1.safetensors'} cannot be read")


def test_a_tensor_that_the_index_promises_but_its_file_lacks_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra"] = "part-0.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    message = problem(lambda: HfFolder(sharded).slice("model.extra"))
    assert message.startswith(
        f"{sharded / 'part-0.safetensors'} has no tensor model.extra, which {INDEX} promises"
    )


def test_a_tensor_that_the_index_leaves_out_is_missing(sharded):
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    assert "has no tensor lm_head.weight" in problem(lambda: HfFolder(sharded).slice("lm_head.weight"))


@pytest.mark.parametrize("content", ['{"metadata": {}}', '{"weight_map": []}'])
def test_an_index_without_its_map_is_refused(sharded, content):
    (sharded / INDEX).write_text(content)
    assert (
        problem(lambda: HfFolder(sharded).file_of)
        == f"{sharded / INDEX} has no weight_map; copy the file again"
    )
