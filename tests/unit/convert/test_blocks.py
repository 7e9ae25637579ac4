"""Parameters in small blocks: every number once, at its place, in memory of its own."""

import numpy as np
import pytest
import torch

from megatron_scope.convert import blocks
from megatron_scope.convert.blocks import hf_blocks, is_finite, megatron_blocks
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.mapping import model_entries
from megatron_scope.convert.shape import padded_vocab_size
from tests.unit.convert.folders import BY_FAMILY, tensors, write_folder

DIVISIBLE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 5}  # by four
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=BY_FAMILY)
def folder(request, tmp_path):
    return HfFolder(write_folder(tmp_path, {**BY_FAMILY[request.param], **DIVISIBLE}))


@pytest.fixture(params=[100, 16 * 2**20], ids=["tiny", "whole"])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", request.param)
    return request.param


def check_memory(block, limit):
    """A block of bounded size that a writer may keep: contiguous, and no view of anything larger."""
    assert block.is_contiguous() and block.storage_offset() == 0
    assert block.untyped_storage().nbytes() == block.nbytes
    assert block.nbytes <= limit or block.shape[0] == 1


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_blocks_of_a_parameter_cover_it_once_and_none_holds_numbers_of_two_ranks(
    folder, block_bytes, tensor_size
):
    padded = padded_vocab_size(folder.shape.vocab_rows, tensor_size)
    for entry in model_entries(folder.family, folder.shape, padded):
        whole = entry.whole_size(folder.shape)
        expected = folder.shard(entry, 0, 1)
        split = entry.layout.split_dim is not None and entry.expert is None
        ranks = torch.full(whole, -1)
        for rank in range(tensor_size if split else 1):
            for region in entry.layout.regions(whole, rank, tensor_size if split else 1):
                ranks[region] = rank
        found, times = torch.full(whole, float("nan")), torch.zeros(whole)
        for place, block in megatron_blocks(entry, folder, whole, tensor_size):
            check_memory(block, block_bytes)
            at = tuple(slice(first, first + n) for first, n in zip(place, block.shape, strict=True))
            assert found[at].shape == block.shape, entry.key
            found[at] = block
            times[at] += 1
            assert ranks[at].unique().numel() == 1, entry.key
        assert torch.equal(found, expected) and (times == 1).all(), entry.key


def test_rows_of_a_parameters_tensors_come_once_and_in_order(folder, block_bytes):
    rows = {name: [] for name in folder.file_of}
    for entry in model_entries(folder.family, folder.shape, folder.shape.vocab_rows):
        for index, first, block in hf_blocks(entry, folder, entry.whole_size(folder.shape)):
            check_memory(block, block_bytes)
            assert first == sum(map(len, rows[entry.hf[index]]))
            rows[entry.hf[index]].append(block)
    for name, tensor in folder_tensors(folder).items():
        assert torch.equal(torch.cat(rows[name]), tensor), name


def folder_tensors(folder):
    return {name: folder.slice(name)[:] for name in folder.file_of}


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_keep_dtype_and_bits(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    weights = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    folder = HfFolder(write_folder(tmp_path, weights=weights))
    for entry in model_entries(folder.family, folder.shape, 256):
        for _, block in megatron_blocks(entry, folder, entry.whole_size(folder.shape), 2):
            assert block.dtype == dtype


# ---- numbers that are none


def of_bits(patterns, dtype):
    """A tensor whose numbers have these bits."""
    kind = np.uint32 if dtype == torch.float32 else np.uint16
    return torch.from_numpy(
        np.asarray(patterns, dtype=kind).view(np.int32 if kind == np.uint32 else np.int16)
    ).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes_is_judged_as_torch_judges_it(dtype):
    every = of_bits(np.arange(2**16), dtype)
    finite = every.isfinite()
    assert 0 < (~finite).sum() < finite.sum()
    assert is_finite(every[finite])
    for number in every[~finite]:
        assert not is_finite(torch.stack([torch.ones((), dtype=dtype), number]))


@pytest.mark.parametrize("sign", [0, 0x8000_0000])
def test_numbers_of_four_bytes_are_judged_by_their_exponent(sign):
    finite = [0, 1, 0x007F_FFFF, 0x0080_0000, 0x3F80_0000, 0x7F7F_FFFF]
    infinite = [
        0x7F80_0000,
        0x7F80_0001,
        0x7FBF_FFFF,
        0x7FC0_0000,
        0x7FFF_FFFF,
    ]  # infinity, NaNs of all kinds
    numbers = of_bits([sign | bits for bits in finite], torch.float32)
    assert numbers.isfinite().all() and is_finite(numbers)
    for bits in infinite:
        number = of_bits([sign | bits], torch.float32)
        assert not number.isfinite().any() and not is_finite(torch.cat([numbers, number]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 65])
def test_one_nan_is_found_wherever_it_is(monkeypatch, dtype, size):
    monkeypatch.setattr(blocks, "_SCAN_BYTES", 32)
    for place in range(size):
        block = torch.ones(size, dtype=dtype)
        assert is_finite(block)
        block[place] = -torch.nan
        assert not is_finite(block) and not is_finite(block[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(0,), (0, 3), (3, 0)])
def test_nothing_is_finite(dtype, size):
    assert is_finite(torch.empty(size, dtype=dtype))
