"""Proof that a Megatron checkpoint holds the numbers of a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from megatron_scope.convert.blocks import dtype_name, hf_blocks
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.mapping import Entry, model_entries, reading_order
from megatron_scope.convert.megatron_folder import MegatronFolder
from megatron_scope.convert.progress import ByteProgress
from megatron_scope.errors import DataError


@dataclasses.dataclass(frozen=True)
class TensorProof:
    """What was compared of one Hugging Face tensor.

    The sums are SHA-256 of the numbers, row by row, in the checkpoint's dtype: where the folder has another,
    its numbers are cast first, as a conversion to that dtype does. The largest difference is infinite where
    a number that is not finite differs.
    """

    name: str
    shape: list[int]
    hf_dtype: str
    megatron_dtype: str
    hf_sha256: str
    megatron_sha256: str
    largest_difference: float

    @property
    def equal(self) -> bool:
        """Bit for bit."""
        return self.hf_sha256 == self.megatron_sha256


def compare_tensors(hf: HfFolder, megatron: MegatronFolder) -> list[TensorProof]:
    """Every tensor of the model on both sides, streamed.

    Raises DataError when a tensor is missing, unknown or of another size on either side: then nothing is to
    be compared.
    """
    hf.check()
    if hf.shape != megatron.shape:
        ours, theirs = dataclasses.asdict(hf.shape), dataclasses.asdict(megatron.shape)
        key = next(key for key in ours if ours[key] != theirs[key])
        raise DataError(
            f"{hf.path} and {megatron.path} are of different models: {key} is {ours[key]} and {theirs[key]}"
        )
    megatron.check()
    entries = sorted(model_entries(hf.family, hf.shape, hf.shape.vocab_rows), key=reading_order)
    total = sum(
        size.numel() * megatron.dtype(entry).itemsize
        for entry in entries
        for size in map(torch.Size, entry.hf_sizes)
    )
    with ByteProgress("comparing", total) as progress:
        return [proof for entry in entries for proof in _compare(entry, hf, megatron, progress)]


def _compare(
    entry: Entry, hf: HfFolder, megatron: MegatronFolder, progress: ByteProgress
) -> list[TensorProof]:
    """Proofs of a parameter's Hugging Face tensors."""
    dtype = megatron.dtype(entry)
    sums = [(hashlib.sha256(), hashlib.sha256()) for _ in entry.hf]
    largest = [0.0] * len(entry.hf)
    for index, first, theirs in hf_blocks(entry, megatron, entry.whole_size(megatron.shape)):
        ours = hf.slice(entry.hf[index])[first : first + theirs.shape[0]].to(dtype).contiguous()
        for own_sum, value in zip(sums[index], (ours, theirs), strict=True):
            own_sum.update(_bytes_of(value))
        if not torch.equal(ours, theirs):
            differences = (ours.double() - theirs.double()).abs()
            found = differences.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
            largest[index] = max(largest[index], found)
        progress.advance(theirs.nbytes)
    proofs = [
        TensorProof(
            name=name,
            shape=list(size),
            hf_dtype=dtype_name(hf.dtype(name)),
            megatron_dtype=dtype_name(dtype),
            hf_sha256=sums[index][0].hexdigest(),
            megatron_sha256=sums[index][1].hexdigest(),
            largest_difference=largest[index],
        )
        for index, (name, size) in enumerate(zip(entry.hf, entry.hf_sizes, strict=True))
    ]
    hf.close()
    return proofs


def summary(proofs: list[TensorProof]) -> dict[str, Any]:
    """The tensors' part of a certificate."""
    return {
        "compared": len(proofs),
        "equal": sum(proof.equal for proof in proofs),
        "largest_difference": max(proof.largest_difference for proof in proofs),
        "each": [{**dataclasses.asdict(proof), "equal": proof.equal} for proof in proofs],
    }


def _bytes_of(value: Tensor) -> memoryview:
    return value.view(-1).view(torch.uint8).numpy().data
