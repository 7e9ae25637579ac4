"""Whole logits of a model, for comparing it with another implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scope.backend.model import StageModel, build
from megatron_scope.backend.schedule import run
from megatron_scope.backend.setup import Ranks
from megatron_scope.config.schema import Precision, TrainConfig
from megatron_scope.convert.mapping import ModelSource
from megatron_scope.convert.shape import padded_vocab_size
from megatron_scope.errors import DataError
from megatron_scope.records import MicroBatch


def write_logits(source: ModelSource, ranks: Ranks, tokens: np.ndarray, out: Path) -> None:
    """Writes float32 logits [S, T, vocab_rows] of token ids int64 [S, T], computed in float32, as a NumPy
    file.

    A collective. Raises DataError for ids outside of the vocabulary or sequences that are too long.
    """
    shape = source.shape
    if tokens.shape[1] > shape.max_positions:
        raise DataError(
            f"a sequence has {tokens.shape[1]} token ids, but {source.path} has {shape.max_positions} "
            "positions"
        )
    if tokens.min() < 0 or tokens.max() >= shape.vocab_rows:
        raise DataError(f"token ids lie in 0..{shape.vocab_rows - 1}; got {tokens.min()}..{tokens.max()}")
    stage = build(
        source,
        ranks,
        TrainConfig(precision=Precision.FLOAT32),
        padded_vocab=padded_vocab_size(shape.vocab_rows, ranks.tensor_size),
        vocab_size=shape.vocab_rows,
        sequence_parallel=False,
        pipeline_layers=None,
        trainable=False,
    )

    def hook(micro_batch: MicroBatch, hidden: Tensor) -> Tensor | None:
        del micro_batch
        return _whole(hidden @ stage.output_weight().T, stage, ranks)

    found = run(stage.module, [_sequence(row) for row in tokens], ranks, hook, backward=False)
    if ranks.speaks_for_scores and ranks.replica == 0:
        with open(out, "wb") as file:
            np.save(file, torch.stack(found).numpy())


def _whole(shard: Tensor, stage: StageModel, ranks: Ranks) -> Tensor | None:
    """Logits [T, vocab_rows] on tensor rank 0, on the CPU."""
    shard = shard.float().contiguous()
    parts = [torch.empty_like(shard) for _ in range(ranks.tensor_size)]
    dist.all_gather(parts, shard, group=ranks.tensor_group)
    return torch.cat(parts, dim=1)[:, : stage.vocab_size].cpu() if ranks.tensor_rank == 0 else None


def _sequence(tokens: np.ndarray) -> MicroBatch:
    """One sequence of which every position counts."""
    length = len(tokens)
    return MicroBatch(
        tokens=tokens.astype(np.int64),
        positions=np.arange(length),
        cu_seqlens=np.array([0, length], dtype=np.int32),
        rows=np.arange(length),
        targets=np.zeros(length, dtype=np.int64),
        response=np.zeros(length, dtype=np.int64),
        stop=np.zeros(length, dtype=bool),
        engine_logprobs=np.zeros(length, dtype=np.float32),
    )
