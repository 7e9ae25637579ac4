"""The passes of `tiles` over a shard by Triton: same arguments, same results, one read of the logits.

Tested under Triton's interpreter, and compiled for Hopper; no GPU has run them yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from megatron_scope.kernels import triton_kernels
from megatron_scope.kernels.tiles import Shard, TokenStatistics, Upstream

NUM_WARPS = 8
LANES = 32 * NUM_WARPS
LANE_COLUMNS = 8  # one vector load of 16-bit logits
TILE_COLUMNS = 2 * LANES * LANE_COLUMNS


def _launch(kernel: Any, student: Tensor, dtype: torch.dtype, *arguments: Any, **constants: Any) -> None:
    """One program for each row of the student's logits; sums are of `dtype`."""
    with torch.cuda.device_of(student):  # the launch goes to the current device; nothing on a CPU
        kernel[(student.shape[0],)](
            student,
            *arguments,
            WIDE={torch.float32: tl.float32, torch.float64: tl.float64}[dtype],
            num_warps=NUM_WARPS,
            **constants,
        )


def _strides(logits: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if logits is None else logits.stride()


def _dense(*values: Tensor | None) -> list[Tensor | None]:
    """[T] each, without gaps: fields of the joined statistics have them, some gradients are one number
    expanded.
    """
    return [None if value is None else value.contiguous() for value in values]


def local_statistics(
    student: Tensor, teacher: Tensor | None, targets: Tensor, shard: Shard, dtype: torch.dtype
) -> Tensor:
    """As `tiles.local_statistics`."""
    stats = student.new_empty((student.shape[0], 4 if teacher is None else 9), dtype=dtype)
    if not student.shape[0]:
        return stats
    _launch(
        triton_kernels.statistics,
        student,
        dtype,
        teacher,
        *_dense(targets),
        stats,
        shard.start,
        shard.num_valid,
        *_strides(student),
        *_strides(teacher),
        TEMPERATURE=shard.temperature,
        LANES=LANES,
        LANE_COLUMNS=LANE_COLUMNS,
    )
    return stats


def mixture_sums(
    student: Tensor, teacher: Tensor, token: TokenStatistics, shard: Shard, teacher_weight: float
) -> Tensor:
    """As `tiles.mixture_sums`."""
    sums = token.maximum.new_empty((student.shape[0], 2))
    if not student.shape[0]:
        return sums
    _launch(
        triton_kernels.mixture,
        student,
        sums.dtype,
        teacher,
        *_dense(token.maximum, token.lse, token.teacher_maximum, token.teacher_lse),
        sums,
        shard.num_valid,
        *_strides(student),
        *_strides(teacher),
        TEACHER_WEIGHT=teacher_weight,
        TEMPERATURE=shard.temperature,
        COLUMNS=TILE_COLUMNS,
    )
    return sums


def logits_gradient(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    token: TokenStatistics,
    upstream: Upstream,
    shard: Shard,
    *,
    teacher_weight: float = 0.5,
    out: Tensor,
) -> None:
    """As `tiles.logits_gradient`."""
    if not student.shape[0]:
        return
    if (upstream.reverse_kl, upstream.forward_kl, upstream.jsd) == (None, None, None):
        teacher = None  # not worth reading
    _launch(
        triton_kernels.gradient,
        student,
        token.maximum.dtype,
        teacher,
        *_dense(targets),
        out,
        *_dense(token.maximum, token.lse, token.teacher_maximum, token.teacher_lse),
        *_dense(token.entropy, token.reverse_kl, token.mixture_kl),
        *_dense(*upstream),
        shard.start,
        shard.num_valid,
        *_strides(student),
        *_strides(teacher),
        *_strides(out),
        TEACHER_WEIGHT=teacher_weight,
        TEMPERATURE=shard.temperature,
        COLUMNS=TILE_COLUMNS,
    )
