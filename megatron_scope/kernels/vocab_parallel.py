"""Distillation statistics of logits whose vocabulary is sharded over a process group: one pass, one
all-gather.

The forward pass keeps nine numbers per token and rank (four for the student alone), joined after one
all-gather; the backward pass recomputes p and q and needs no communication. The mathematics is in `tiles`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_scope.kernels import dispatch
from megatron_scope.kernels.tiles import Shard, TokenStatistics, Upstream


class DistillStats(NamedTuple):
    """Per-token statistics, each [T]; those that need a teacher are None without one."""

    logprob: Tensor
    teacher_logprob: Tensor | None
    reverse_kl: Tensor | None
    forward_kl: Tensor | None
    entropy: Tensor


def distill_stats(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> DistillStats:
    """Log-probs of the targets, KL both ways and entropy of vocabulary-sharded logits.

    Shapes: `student_logits` and `teacher_logits` [T, L] of any float dtype, `targets` int64 [T] with global
    ids. Returns float32 [T] in nats (float64 for float64 logits): log p(y), log q(y), KL(p||q), KL(q||p),
    H(p). `vocab_start` is the global id of this rank's first column; columns at or beyond `vocab_size`
    (padding) do not count. `temperature` divides both logits. Differentiable in `student_logits` through all
    but `teacher_logprob`; the caller's logits are never modified. With `teacher_logits=None` only `logprob`
    and `entropy` are computed. A target that no rank holds has log-prob -inf.

    Raises ValueError on mismatched shapes, targets outside the vocabulary (looked for on a CPU), a group
    without this rank or a temperature that is not positive. Every rank of `group` must call it, also with
    T = 0 or a shard that is all padding.
    """
    _check_logits(student_logits, teacher_logits)
    shard = checked_shard(
        widths={"student_logits": student_logits.shape[1]}
        | ({} if teacher_logits is None else {"teacher_logits": teacher_logits.shape[1]}),
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        temperature=temperature,
    )
    check_targets(targets, student_logits.shape[0], vocab_size)
    teacher = None if teacher_logits is None else teacher_logits.detach()
    outputs = _DistillStats.apply(student_logits, teacher, targets, shard)
    if teacher is None:
        logprob, entropy = outputs
        return DistillStats(logprob, None, None, None, entropy)
    return DistillStats(*outputs)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    teacher_weight: float = 0.5,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The Jensen-Shannon divergence (1 - b) KL(p||m) + b KL(q||m) with m = (1 - b) p + b q, float32 [T] in
    nats, b = `teacher_weight` in (0, 1).

    Arguments and errors are those of `distill_stats`. Differentiable in `student_logits`. The logarithm of
    the mixture needs both normalizers first, so this takes two passes and two all-gathers.
    """
    _check_logits(student_logits, teacher_logits)
    check_teacher_weight(teacher_weight)
    shard = checked_shard(
        widths={"student_logits": student_logits.shape[1], "teacher_logits": teacher_logits.shape[1]},
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        temperature=temperature,
    )
    return _JensenShannon.apply(student_logits, teacher_logits.detach(), shard, teacher_weight)


# ---- checks that both kernels make


def checked_shard(
    *,
    widths: dict[str, int],
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int | None,
    temperature: float,
) -> Shard:
    """The part of the vocabulary that shards of these sizes, by name, hold; ValueError where they cannot.

    Sizes may differ where one rank holds all ids and `vocab_size` says how many of them count.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if vocab_start < 0:
        raise ValueError(f"vocab_start is {vocab_start}; expected the global id of this rank's first column")
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError(
            f"rank {dist.get_rank()} is not in group {dist.get_process_group_ranks(group)}; "
            "pass this rank's own tensor-parallel group"
        )
    narrow, wide = min(widths.values()), max(widths.values())
    if narrow != wide:
        alone = (group is None or dist.get_world_size(group) == 1) and vocab_start == 0
        if not alone or vocab_size is None or vocab_size > narrow:
            (student, mine), (teacher, theirs) = widths.items()
            raise ValueError(
                f"{teacher} covers {theirs} token ids but {student} {mine}; build both models at one "
                "padded vocabulary size, or on one rank pass the smaller true size as vocab_size"
            )
    num_valid = narrow if vocab_size is None else max(0, min(vocab_size - vocab_start, narrow))
    return Shard(vocab_start, num_valid, temperature, group)


def check_targets(targets: Tensor, num_tokens: int, vocab_size: int | None) -> None:
    if targets.shape != (num_tokens,):
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected [{num_tokens}]")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}; expected torch.int64 token ids")
    if targets.is_cuda or not num_tokens:  # a look would wait for the GPU
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        expected = "of 0 or more" if vocab_size is None else f"in [0, vocab_size={vocab_size})"
        raise ValueError(f"targets has ids from {low} to {high}; expected global ids {expected}")


def check_teacher_weight(teacher_weight: float) -> None:
    if not 0 < teacher_weight < 1:
        raise ValueError(
            f"the teacher's weight in the mixture is {teacher_weight}; expected a number between 0 and 1"
        )


def _check_logits(student_logits: Tensor, teacher_logits: Tensor | None) -> None:
    if student_logits.dim() != 2:
        raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}; expected [T, V_local]")
    if teacher_logits is not None and (
        teacher_logits.dim() != 2 or teacher_logits.shape[0] != student_logits.shape[0]
    ):
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher_logits.shape)} but student_logits "
            f"{tuple(student_logits.shape)}; expected the same tokens in both"
        )


# ---- autograd


class _DistillStats(torch.autograd.Function):
    """Forward: local pass, one all-gather, join. Backward: one pass, no collective."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, targets: Tensor, shard: Shard
    ) -> tuple[Tensor | None, ...]:
        token = dispatch.gathered_statistics(student, teacher, targets, shard)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, targets, *token)
        if teacher is None:
            return token.logprob, token.entropy
        ctx.mark_non_differentiable(token.teacher_logprob)
        return token.logprob, token.teacher_logprob, token.reverse_kl, token.forward_kl, token.entropy

    @staticmethod
    @once_differentiable  # the statistics are constants here, so a second derivative would be wrong
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        student, teacher, targets, *token = ctx.saved_tensors
        if teacher is None:
            upstream = Upstream(logprob=grad_outputs[0], entropy=grad_outputs[1])
        else:
            logprob, _, reverse_kl, forward_kl, entropy = grad_outputs
            upstream = Upstream(logprob, reverse_kl, forward_kl, entropy)
        grad = _gradient(student, teacher, targets, TokenStatistics(*token), upstream, ctx.shard)
        return grad, None, None, None


class _JensenShannon(torch.autograd.Function):
    """Forward: two passes, each with one all-gather. Backward: one pass, no collective."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, shard: Shard, teacher_weight: float) -> Tensor:
        targets = torch.full(student.shape[:1], -1, device=student.device)  # none is asked for
        token = dispatch.gathered_statistics(student, teacher, targets, shard)
        token, jsd = dispatch.with_mixture(student, teacher, token, shard, teacher_weight)
        ctx.shard, ctx.teacher_weight = shard, teacher_weight
        ctx.save_for_backward(student, teacher, targets, *token)
        return jsd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        student, teacher, targets, *token = ctx.saved_tensors
        upstream = Upstream(jsd=grad_outputs[0])
        grad = _gradient(
            student, teacher, targets, TokenStatistics(*token), upstream, ctx.shard, ctx.teacher_weight
        )
        return grad, None, None, None


def _gradient(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    token: TokenStatistics,
    upstream: Upstream,
    shard: Shard,
    teacher_weight: float = 0.5,
) -> Tensor:
    """The whole gradient [T, L] in the dtype of the logits; padding columns get 0."""
    grad = student.new_empty(student.shape)
    grad[:, shard.num_valid :] = 0
    dispatch.logits_gradient(
        student, teacher, targets, token, upstream, shard, teacher_weight=teacher_weight, out=grad
    )
    return grad
