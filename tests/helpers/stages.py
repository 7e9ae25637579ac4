"""What the ranks of a pool are asked of models: to write one out again, and what it holds and calls in
training.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_scope.config import parse_config
from megatron_scope.config.schema import ParallelConfig, Precision, TrainConfig
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.shape import padded_vocab_size
from tests.helpers.jobs import layout, train


def save_again(
    source: str, out: str, parallel: dict[str, Any], precision: str, pipeline_layers: tuple[int, ...] | None
) -> None:
    """Reads a Hugging Face folder into this layout and writes it out as another."""
    from megatron_scope.backend.export import save_hf_folder
    from megatron_scope.backend.model import build

    folder, groups = HfFolder(source), ParallelConfig(**parallel)
    with layout(groups) as ranks:
        stage = build(
            folder,
            ranks,
            TrainConfig(precision=Precision(precision)),
            padded_vocab=padded_vocab_size(folder.shape.vocab_rows, groups.tensor),
            vocab_size=folder.shape.vocab_rows,
            sequence_parallel=groups.sequence,
            pipeline_layers=pipeline_layers,
            trainable=False,
        )
        save_hf_folder(stage, ranks, Path(out))


@dataclasses.dataclass(frozen=True)
class Held:
    """What a rank holds after training: kinds of numbers, and how far parameters lie from their masters.

    `off_rounding` is the largest distance of a parameter from its master weight rounded to the parameter's
    dtype, `off_master` from the master weight itself.
    """

    parameters: set[torch.dtype]
    masters: set[torch.dtype]
    off_rounding: float
    off_master: float


def parameters_and_masters(settings: dict[str, Any]) -> Held:
    """Trains as the config says and looks at this rank's parameters and master weights."""
    from megatron_scope.trainer import Trainer

    config = parse_config(settings, "test")
    with layout(config.parallel) as ranks:
        trainer = Trainer(config, ranks, resume=False)
        trainer.run()
        pairs = [
            (shard.detach(), master.detach())
            for part in trainer.student.optimizer.chained_optimizers
            for shards, masters in zip(
                part.shard_float16_groups, part.shard_fp32_from_float16_groups, strict=True
            )
            for shard, master in zip(shards, masters, strict=True)
        ]
        return Held(
            {parameter.dtype for parameter in trainer.student.stage.module.parameters()},
            {master.dtype for _, master in pairs},
            max(float((master.to(shard.dtype) - shard).abs().max()) for shard, master in pairs),
            max(float((master - shard.float()).abs().max()) for shard, master in pairs),
        )


def train_counting_attention(settings: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl, and how often this rank's layers ran their attention."""
    from megatron_scope.backend.layers import PackedAttention

    run, calls = PackedAttention.forward, 0

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return run(*args, **kwargs)

    with mock.patch.object(PackedAttention, "forward", counted):
        rows = train(settings)
    return rows, calls
