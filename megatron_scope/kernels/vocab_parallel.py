"""Distillation statistics of logits whose vocabulary is sharded over a process group: one pass, one
all-gather.

Letters: T tokens, L columns of this rank's shard, G ranks of the group, z_s / z_t student / teacher logits,
p / q their softmax over temperature, y target token, m a maximum, S = sum e^((z - m) / temperature).
Everything in nats.

Per token and rank the forward pass keeps nine numbers (two for the student alone, plus the picked logits),
all of them *centred* on the local maximum, so that a large offset shared by the logits costs no precision.
Ranks combine them after one all-gather; the backward pass recomputes p and q and needs no communication.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 1 << 20  # temporaries of one tile hold about this many numbers


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
    and `entropy` are computed.

    Raises ValueError on mismatched shapes or a temperature that is not positive. Every rank of `group` must
    call it, also with T = 0 or a shard that is all padding.
    """
    _check(student_logits, teacher_logits, targets, temperature)
    width = student_logits.shape[1]
    num_valid = width if vocab_size is None else max(0, min(vocab_size - vocab_start, width))
    outputs = _DistillStats.apply(
        student_logits,
        None if teacher_logits is None else teacher_logits.detach(),
        targets,
        group,
        vocab_start,
        num_valid,
        temperature,
    )
    if teacher_logits is None:
        logprob, entropy = outputs
        return DistillStats(logprob, None, None, None, entropy)
    return DistillStats(*outputs)


def _check(
    student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, temperature: float
) -> None:
    if student_logits.dim() != 2:
        raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}; expected [T, V_local]")
    if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher_logits.shape)} but student_logits "
            f"{tuple(student_logits.shape)}; "
            "build both models at one padded vocabulary size"
        )
    if targets.shape != student_logits.shape[:1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected [{student_logits.shape[0]}]")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")


def _row_tiles(num_rows: int, width: int) -> list[slice]:
    rows = max(1, TILE_ELEMENTS // max(1, width))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _columns(logits: Tensor, num_valid: int, dtype: torch.dtype) -> Tensor:
    """A fresh copy of the valid columns in the compute dtype."""
    return logits[:, :num_valid].to(dtype, copy=True)


def _centred(logits: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    """(z - maximum) / temperature in place, in this order: a quotient of large logits would round first."""
    logits.sub_(_or_zero(maximum))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _local_statistics(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    vocab_start: int,
    num_valid: int,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """[T, 4] (m_s, S_s, E, y_s) or [T, 9] (+ D, m_t, S_t, D_t, y_t) of this rank's shard.

    Maxima m and picked logits y (0 where not owned) are raw, the sums those of logits over temperature.
    """
    num_fields = 4 if teacher is None else 9
    stats = student.new_zeros((student.shape[0], num_fields), dtype=dtype)
    stats[:, 0] = -math.inf
    if teacher is not None:
        stats[:, 5] = -math.inf
    if num_valid == 0:
        return stats
    local = targets - vocab_start
    owned = (local >= 0) & (local < num_valid)
    column = local.clamp(0, num_valid - 1).unsqueeze(1)
    for rows in _row_tiles(student.shape[0], num_valid):
        z_s = _columns(student[rows], num_valid, dtype)
        out = stats[rows]
        m_s = z_s.amax(dim=1, keepdim=True)
        out[:, 0] = m_s[:, 0]
        out[:, 3] = torch.where(owned[rows], z_s.gather(1, column[rows])[:, 0], 0.0)
        u = _centred(z_s, m_s, temperature)
        e_s = u.exp()
        out[:, 1] = e_s.sum(dim=1)
        out[:, 2] = _moment(e_s, u)
        if teacher is None:
            continue
        z_t = _columns(teacher[rows], num_valid, dtype)
        m_t = z_t.amax(dim=1, keepdim=True)
        out[:, 5] = m_t[:, 0]
        out[:, 8] = torch.where(owned[rows], z_t.gather(1, column[rows])[:, 0], 0.0)
        v = _centred(z_t, m_t, temperature)
        out[:, 4] = _moment(e_s, u - v)
        e_t = v.exp()
        out[:, 6] = e_t.sum(dim=1)
        out[:, 7] = _moment(e_t, v.sub_(u))
    return stats


def _or_zero(maximum: Tensor) -> Tensor:
    """The maximum to centre on; 0 where all logits are -inf, which so stay -inf with S = 0 like an empty
    shard.
    """
    return maximum.masked_fill(maximum == -math.inf, 0.0)


def _moment(weight: Tensor, value: Tensor) -> Tensor:
    """sum_j weight_j value_j with 0 * inf = 0: a column of zero probability contributes nothing."""
    product = weight * value
    return torch.where(weight == 0, product.new_zeros(()), product).sum(dim=1)


def _combine(parts_GTF: Tensor, temperature: float = 1.0) -> Tensor:
    """Joins the ranks' statistics in rank order; the same bits on every rank."""
    joined = parts_GTF[0].clone()
    with_teacher = joined.shape[1] == 9
    for part in parts_GTF[1:]:
        m_s = torch.maximum(joined[:, 0], part[:, 0])
        m_t = torch.maximum(joined[:, 5], part[:, 5]) if with_teacher else None
        joined = _rebased(joined, m_s, m_t, temperature) + _rebased(part, m_s, m_t, temperature)
        joined[:, 0] = m_s
        if m_t is not None:
            joined[:, 5] = m_t
    return joined


def _rebased(stats: Tensor, m_s: Tensor, m_t: Tensor | None, temperature: float) -> Tensor:
    """Statistics centred on new maxima; rows of an empty shard (S = 0) stay zero."""
    out = stats.clone()
    empty = stats[:, 1] == 0
    d_s = torch.where(empty, 0.0, (stats[:, 0] - m_s) / temperature)
    a_s = d_s.exp()
    out[:, 1] = a_s * stats[:, 1]
    out[:, 2] = a_s * (stats[:, 2] + stats[:, 1] * d_s)
    if m_t is not None:
        d_t = torch.where(stats[:, 6] == 0, 0.0, (stats[:, 5] - m_t) / temperature)
        a_t = d_t.exp()
        out[:, 4] = _scaled(a_s, stats[:, 4] + stats[:, 1] * (d_s - d_t))
        out[:, 6] = a_t * stats[:, 6]
        out[:, 7] = _scaled(a_t, stats[:, 7] + stats[:, 6] * (d_t - d_s))
    return out


def _scaled(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value with 0 * inf = 0, as in `_moment`."""
    return torch.where(factor == 0, 0.0, factor * value)


class _DistillStats(torch.autograd.Function):
    """Forward: local pass, one all-gather, combine. Backward: one pass, no collective."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        num_valid: int,
        temperature: float,
    ) -> tuple[Tensor, ...]:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        local = _local_statistics(student, teacher, targets, vocab_start, num_valid, temperature, dtype)
        size = 1 if group is None else dist.get_world_size(group)
        if size == 1:
            stats = local
        else:
            gathered = local.new_empty((size * local.shape[0], local.shape[1]))
            dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
            stats = _combine(gathered.view(size, *local.shape), temperature)
        m_s, total_s, moment, y_s = stats[:, 0], stats[:, 1], stats[:, 2], stats[:, 3]
        lse_s = total_s.log()
        entropy = lse_s - moment / total_s
        logprob = (y_s - m_s) / temperature - lse_s
        ctx.vocab_start, ctx.num_valid = vocab_start, num_valid
        ctx.temperature, ctx.dtype = temperature, dtype
        if teacher is None:
            ctx.save_for_backward(student, targets, m_s, lse_s, entropy)
            return logprob, entropy
        m_t, total_t = stats[:, 5], stats[:, 6]
        lse_t = total_t.log()
        reverse_kl = stats[:, 4] / total_s - lse_s + lse_t
        forward_kl = stats[:, 7] / total_t - lse_t + lse_s
        teacher_logprob = (stats[:, 8] - m_t) / temperature - lse_t
        ctx.save_for_backward(student, targets, m_s, lse_s, entropy, teacher, m_t, lse_t, reverse_kl)
        ctx.mark_non_differentiable(teacher_logprob)
        return logprob, teacher_logprob, reverse_kl, forward_kl, entropy

    @staticmethod
    @once_differentiable  # the statistics are constants here, so a second derivative would be wrong
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        student, targets, m_s, lse_s, entropy, *saved = ctx.saved_tensors
        teacher = None
        if saved:
            g_logprob, _, g_reverse, g_forward, g_entropy = grad_outputs
            logits, maximum, lse, reverse_kl = saved
            teacher = _TeacherTerms(logits, maximum, lse, reverse_kl, g_reverse, g_forward)
        else:
            g_logprob, g_entropy = grad_outputs
        grad = student.new_zeros(student.shape)
        local = targets - ctx.vocab_start
        owned = (local >= 0) & (local < ctx.num_valid)
        for rows in _row_tiles(student.shape[0], ctx.num_valid) if ctx.num_valid else ():
            z_s = _columns(student[rows], ctx.num_valid, ctx.dtype)
            u = _centred(z_s, m_s[rows].unsqueeze(1), ctx.temperature).sub_(lse_s[rows].unsqueeze(1))
            p = u.exp()
            dz = u * -g_entropy[rows].unsqueeze(1)
            dz.add_((-g_logprob[rows] - g_entropy[rows] * entropy[rows]).unsqueeze(1))
            if teacher is None:
                dz.mul_(p).masked_fill_(p == 0, 0.0)
            else:
                dz = _with_teacher(dz, u, p, teacher, rows, ctx)
            mine = owned[rows].nonzero()[:, 0]
            dz[mine, local[rows][mine]] += g_logprob[rows][mine]
            grad[rows, : ctx.num_valid] = dz.div_(ctx.temperature).to(grad.dtype)
        return grad, None, None, None, None, None, None


class _TeacherTerms(NamedTuple):
    """What the two KL gradients need: the teacher's logits [T, L], its statistics and the upstream gradients,
    [T].
    """

    logits: Tensor
    maximum: Tensor
    lse: Tensor
    reverse_kl: Tensor
    g_reverse: Tensor
    g_forward: Tensor


def _with_teacher(dz: Tensor, u: Tensor, p: Tensor, teacher: _TeacherTerms, rows: slice, ctx: Any) -> Tensor:
    """p (dz + g_R (u - v - RKL) + g_F) - g_F q, from the bracket `dz` of the student alone."""
    g_reverse, g_forward = teacher.g_reverse[rows].unsqueeze(1), teacher.g_forward[rows].unsqueeze(1)
    z_t = _columns(teacher.logits[rows], ctx.num_valid, ctx.dtype)
    v = _centred(z_t, teacher.maximum[rows].unsqueeze(1), ctx.temperature).sub_(
        teacher.lse[rows].unsqueeze(1)
    )
    reverse = (u - v).sub_(teacher.reverse_kl[rows].unsqueeze(1)).mul_(g_reverse)
    dz.add_(reverse.masked_fill_(g_reverse == 0, 0.0)).add_(g_forward)  # 0 * inf = 0
    dz.mul_(p).masked_fill_(p == 0, 0.0)
    return dz.sub_(v.exp_().mul_(g_forward))
