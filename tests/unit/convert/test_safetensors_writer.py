"""Safetensors files written row by row: what the safetensors library reads back."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_scope.convert import safetensors_writer
from megatron_scope.convert.safetensors_writer import SafetensorsWriter, TensorPlan, plan_shards

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan(name, *size, dtype=torch.float32):
    return TensorPlan(name, size, dtype)


def rows_of(tensor, step=2):
    """(first row, rows) of a tensor, each in memory of its own."""
    return [(first, tensor[first : first + step].clone()) for first in range(0, len(tensor), step)]


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_files_hold_what_was_given_in_any_order_of_rows(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("files")
    sizes = data.draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer.{number}.weight": torch.randn(size, generator=generator).to(
            data.draw(st.sampled_from(DTYPES))
        )
        for number, size in enumerate(sizes)
    }
    plans = [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    shards = plan_shards(plans, data.draw(st.integers(1, 300)))
    files = {f"{number}.safetensors": shard for number, shard in enumerate(shards)}
    blocks = [
        (name, first, rows)
        for name, tensor in tensors.items()
        for first, rows in rows_of(tensor, data.draw(st.integers(1, 5)))
    ]
    with SafetensorsWriter(folder, files) as writer:
        for name, first, rows in data.draw(st.permutations(blocks)):
            writer.write(name, first, rows)
    assert {path.name for path in folder.iterdir()} == set(files)
    for file, shard in files.items():
        found = load_file(folder / file)
        assert list(found) == sorted(plan.name for plan in shard)
        assert all(found[name].dtype == tensors[name].dtype for name in found)
        assert all(torch.equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "expected"),
    [
        ([2, 2, 2], 16, [2, 1]),
        ([2, 2, 2], 15, [1, 1, 1]),
        ([2, 2, 2], 24, [3]),
        ([1, 100, 1, 1], 16, [1, 1, 2]),  # one larger tensor stands alone
        ([100], 1, [1]),
        ([], 16, []),
    ],
)
def test_shards_hold_at_most_the_limit_or_one_tensor_in_order(sizes, max_bytes, expected):
    plans = [plan(str(number), size) for number, size in enumerate(sizes)]
    shards = plan_shards(plans, max_bytes)
    assert [len(shard) for shard in shards] == expected
    assert [tensor for shard in shards for tensor in shard] == plans


@pytest.mark.parametrize("length", range(1, 9))
def test_a_file_is_laid_out_as_the_library_lays_it_out(tmp_path, length):
    """Numbers at a multiple of eight bytes, the framework named: transformers refuses files without it."""
    first = "a" * length
    tensors = {first: torch.arange(6.0).reshape(2, 3), "b": torch.arange(3).bfloat16()}
    plans = [plan(first, 2, 3), plan("b", 3, dtype=torch.bfloat16)]
    with SafetensorsWriter(tmp_path, {"m": plans}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor)
    with safe_open(tmp_path / "m", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (tmp_path / "m").read_bytes(), (tmp_path / "theirs").read_bytes()
    header = int.from_bytes(ours[:8], "little")
    assert header % 8 == 0 and len(ours) == len(theirs)
    assert json.loads(ours[8 : 8 + header]) == json.loads(theirs[8 : 8 + header])
    assert ours[8 + header :] == theirs[8 + header :]


def test_a_full_file_is_whole_while_others_are_still_written(tmp_path):
    first, second = torch.randn(3, 2), torch.randn(4, 2)
    with SafetensorsWriter(tmp_path, {"x": [plan("a", 3, 2)], "y": [plan("b", 4, 2)]}) as writer:
        writer.write("b", 2, second[2:].clone())
        writer.write("a", 0, first)
        assert torch.equal(load_file(tmp_path / "x")["a"], first)
        writer.write("b", 0, second[:2].clone())
    assert torch.equal(load_file(tmp_path / "y")["b"], second)


def test_writes_that_stop_short_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite

    def short(descriptor, data, position):
        return pwrite(descriptor, data[:3], position)

    monkeypatch.setattr(safetensors_writer.os, "pwrite", short)
    tensor = torch.randn(5, 7)
    with SafetensorsWriter(tmp_path, {"m": [plan("a", 5, 7)]}) as writer:
        for first, rows in rows_of(tensor):
            writer.write("a", first, rows)
    assert torch.equal(load_file(tmp_path / "m")["a"], tensor)


def test_a_full_disk_is_an_error_of_the_file(tmp_path, monkeypatch):
    def full(descriptor, data, position):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(safetensors_writer.os, "pwrite", full)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/m'"),
        SafetensorsWriter(tmp_path, {"m": [plan("a", 5, 7)]}) as writer,
    ):
        for first, rows in rows_of(torch.zeros(5, 7)):
            writer.write("a", first, rows)
