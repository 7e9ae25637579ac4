"""What the kernels share: statistics of a vocabulary shard's logits, their union over ranks, the gradient.

Letters: T tokens, L valid columns of this rank's shard, G shards, z_s / z_t student / teacher logits, p / q
their softmax over temperature, u = log p, v = log q, y target token, m a maximum, S = sum e^((z - m) / temp).
Everything in nats. F is 4 fields of the student (m_s, S_s, E, y_s) or 9 (and D, m_t, S_t, D_t, y_t):
E = sum e_s (z_s - m_s), D = sum e_s ((z_s - m_s) - (z_t - m_t)) with e_s = e^(z_s - m_s), D_t with the roles
exchanged.

All sums are *centred* on the shard's own maxima, so that a large offset shared by the logits costs no
precision. A shard is worked through in tiles of a few whole rows, so no temporary has the size of a shard.
`dispatch` has `local_statistics`, `mixture_sums` and `logits_gradient` done by Triton where it can.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Numbers in each temporary of a tile: on a CPU, the four of them fit a core's own cache or nearly; on a GPU,
# each operation on them is worth its launch.
TILE_ELEMENTS = 1 << 17
GPU_TILE_ELEMENTS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Shard:
    """This rank's part of the vocabulary: `num_valid` columns from global id `start`, over `group`."""

    start: int
    num_valid: int
    temperature: float
    group: dist.ProcessGroup | None

    def owned(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(column [T, 1], whether this shard holds it [T]) of each target; column 0 where it does not."""
        column = targets - self.start
        mine = (column >= 0) & (column < self.num_valid)
        return column.masked_fill(~mine, 0).unsqueeze(1), mine

    def gather(self, local: Tensor) -> Tensor:
        """The ranks' tensors stacked in rank order, [G, *local.shape], by one all-gather."""
        size = 1 if self.group is None else dist.get_world_size(self.group)
        if size == 1:
            return local.unsqueeze(0)
        gathered = local.new_empty((size, *local.shape))
        dist.all_gather(list(gathered.unbind()), local.contiguous(), group=self.group)
        return gathered


class TokenStatistics(NamedTuple):
    """Of each token over the whole vocabulary, [T]; the last six are None without a teacher."""

    maximum: Tensor
    lse: Tensor  # of logits centred on `maximum`, over temperature
    entropy: Tensor
    logprob: Tensor
    teacher_maximum: Tensor | None = None
    teacher_lse: Tensor | None = None
    teacher_logprob: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    mixture_kl: Tensor | None = None  # KL(p || m) to the mixture m of `mixture_sums`

    def at(self, rows: slice) -> TokenStatistics:
        return TokenStatistics._make(None if value is None else value[rows].unsqueeze(1) for value in self)


class Upstream(NamedTuple):
    """The gradient of the result in each statistic, [T]; None where it is zero for all tokens."""

    logprob: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    entropy: Tensor | None = None
    jsd: Tensor | None = None

    def at(self, rows: slice) -> Upstream:
        return Upstream._make(None if value is None else value[rows].unsqueeze(1) for value in self)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tiles(
    count: int, logits: Tensor, shard: Shard, dtype: torch.dtype
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """The rows of each tile with `count` temporaries [rows, L], which all tiles share."""
    num_rows, width = logits.shape[0], shard.num_valid
    if not num_rows or not width:
        return
    elements = GPU_TILE_ELEMENTS if logits.is_cuda else TILE_ELEMENTS
    step = min(num_rows, max(1, elements // width))
    space = logits.new_empty((count, step, width), dtype=dtype)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        yield rows, space[:, : rows.stop - start].unbind()


def times(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value with 0 * inf = 0: what has no weight contributes nothing."""
    return torch.where(factor == 0, 0.0, factor * value)


def _centre(wide: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    """(z - maximum) / temperature in place, in this order: a quotient of large logits would round first.
    Where all logits are -inf they stay so.
    """
    wide.sub_(maximum.masked_fill(maximum == -math.inf, 0.0))
    return wide if temperature == 1.0 else wide.div_(temperature)


def _weighted(factor: Tensor, value: Tensor, guarded: bool) -> Tensor:
    """factor * value in place, with 0 * inf = 0 if `guarded`."""
    value.mul_(factor)
    return value.masked_fill_(factor == 0, 0.0) if guarded else value


def _may_be_infinite(*logprobs: Tensor) -> bool:
    """Whether 0 * inf can come up. Asking a GPU would wait for it, so there the answer is yes."""
    return any(value.is_cuda or value.amin().item() == -math.inf for value in logprobs)


def _moment(weight: Tensor, value: Tensor, scratch: Tensor) -> Tensor:
    """sum_j weight_j value_j with 0 * inf = 0."""
    total = torch.mul(weight, value, out=scratch).sum(dim=1)
    # Infinite logits are rare; asking a GPU whether there are any would wait for it.
    if total.is_cuda or total.isnan().any():
        return scratch.masked_fill_(weight == 0, 0.0).sum(dim=1)
    return total


# ---- statistics


def local_statistics(
    student: Tensor, teacher: Tensor | None, targets: Tensor, shard: Shard, dtype: torch.dtype
) -> Tensor:
    """[T, F] of this rank's logits [T, >= L]. Maxima and picked logits are raw (-inf where a shard is empty
    or does not hold the target), the sums those of logits over temperature.
    """
    stats = student.new_zeros((student.shape[0], 4 if teacher is None else 9), dtype=dtype)
    for field in (0, 3) if teacher is None else (0, 3, 5, 8):
        stats[:, field] = -math.inf
    if shard.num_valid == 0:
        return stats
    column, mine = shard.owned(targets)
    stats[:, 3] = student.gather(1, column)[:, 0].to(dtype).masked_fill_(~mine, -math.inf)
    if teacher is not None:
        stats[:, 8] = teacher.gather(1, column)[:, 0].to(dtype).masked_fill_(~mine, -math.inf)
    for rows, (u, e_s, scratch, *more) in _tiles(3 if teacher is None else 4, student, shard, dtype):
        out = stats[rows]
        u.copy_(student[rows, : shard.num_valid])
        out[:, 0] = u.amax(dim=1)
        torch.exp(_centre(u, out[:, :1], shard.temperature), out=e_s)
        out[:, 1] = e_s.sum(dim=1)
        out[:, 2] = _moment(e_s, u, scratch)
        if teacher is None:
            continue
        v = more[0].copy_(teacher[rows, : shard.num_valid])
        out[:, 5] = v.amax(dim=1)
        difference = u.sub_(_centre(v, out[:, 5:6], shard.temperature))
        out[:, 4] = _moment(e_s, difference, scratch)
        e_t = v.exp_()
        out[:, 6] = e_t.sum(dim=1)
        out[:, 7] = -_moment(e_t, difference, scratch)
    return stats


def join(parts_GTF: Tensor, temperature: float) -> Tensor:
    """[T, F] of all shards together, summed in rank order: the same bits on every rank."""
    joined = torch.empty_like(parts_GTF[0])
    shift_s, scale_s, total_s = _rebase(parts_GTF, joined, 0, temperature)
    joined[:, 2] = times(scale_s, parts_GTF[..., 2] + total_s * shift_s).sum(dim=0)
    joined[:, 3] = parts_GTF[..., 3].amax(dim=0)
    if joined.shape[1] == 4:
        return joined
    shift_t, scale_t, total_t = _rebase(parts_GTF, joined, 5, temperature)
    joined[:, 4] = times(scale_s, parts_GTF[..., 4] + total_s * (shift_s - shift_t)).sum(dim=0)
    joined[:, 7] = times(scale_t, parts_GTF[..., 7] + total_t * (shift_t - shift_s)).sum(dim=0)
    joined[:, 8] = parts_GTF[..., 8].amax(dim=0)
    return joined


def _rebase(parts: Tensor, joined: Tensor, field: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Joins the maximum at `field` and the total behind it; returns each shard's shift to the new maximum,
    the factor e^shift and its total, [G, T].
    """
    maximum, total = parts[..., field], parts[..., field + 1]
    joined[:, field] = maximum.amax(dim=0)
    # An empty shard has no maximum to move: shift 0 instead of the -inf that would make NaN.
    shift = ((maximum - joined[:, field]) / temperature).masked_fill(total == 0, 0.0)
    scale = shift.exp()
    joined[:, field + 1] = (scale * total).sum(dim=0)
    return shift, scale, total


def token_statistics(joined: Tensor, temperature: float) -> TokenStatistics:
    """What the joined fields [T, F] mean."""
    m_s, total_s, moment, y_s, *teacher = joined.unbind(dim=1)
    lse_s = total_s.log()
    student = (m_s, lse_s, lse_s - moment / total_s, (y_s - m_s) / temperature - lse_s)
    if not teacher:
        return TokenStatistics(*student)
    cross, m_t, total_t, cross_t, y_t = teacher
    lse_t = total_t.log()
    return TokenStatistics(
        *student,
        teacher_maximum=m_t,
        teacher_lse=lse_t,
        teacher_logprob=(y_t - m_t) / temperature - lse_t,
        reverse_kl=cross / total_s - lse_s + lse_t,
        forward_kl=cross_t / total_t - lse_t + lse_s,
    )


# ---- the mixture and the gradient


def _logprobs(
    logits: Tensor, maximum: Tensor | None, lse: Tensor | None, temperature: float, out: Tensor
) -> Tensor:
    assert maximum is not None and lse is not None
    return _centre(out.copy_(logits), maximum, temperature).sub_(lse)


def _to_mixture(u: Tensor, v: Tensor, teacher_weight: float) -> tuple[Tensor, Tensor]:
    """(log p - log m, log q - log m) with m = (1 - b) p + b q, exactly 0 where p = q."""
    difference = v - u
    # The larger of p and q is factored out of m, so that nothing overflows.
    smaller = (difference > 0).to(u.dtype).mul_(1.0 - 2.0 * teacher_weight).add_(teacher_weight)
    log_ratio = difference.abs().neg_().expm1_().mul_(smaller).log1p_()
    return -(difference.clamp(min=0) + log_ratio), -((-difference).clamp_(min=0) + log_ratio)


def mixture_sums(
    student: Tensor, teacher: Tensor, token: TokenStatistics, shard: Shard, teacher_weight: float
) -> Tensor:
    """This shard's terms [T, 2] of KL(p || m) and KL(q || m) with m = (1 - b) p + b q."""
    sums = token.maximum.new_zeros((student.shape[0], 2))
    for rows, (u, v, scratch) in _tiles(3, student, shard, sums.dtype):
        at, out = token.at(rows), sums[rows]
        _logprobs(student[rows, : shard.num_valid], at.maximum, at.lse, shard.temperature, u)
        _logprobs(teacher[rows, : shard.num_valid], at.teacher_maximum, at.teacher_lse, shard.temperature, v)
        from_p, from_q = _to_mixture(u, v, teacher_weight)
        out[:, 0] = _moment(u.exp_(), from_p, scratch)
        out[:, 1] = _moment(v.exp_(), from_q, scratch)
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
    """Writes the gradient in the student's logits to `out` [T, >= L], which may lie over their memory, row on
    row.

    With upstream gradients g of log p(y) (L), KL(p||q) (R), KL(q||p) (F), H(p) (H) and JSD (J):
    dz = p [(g_R - g_H) u - g_R v - g_R RKL - g_H H + g_F - g_L + g_J (1 - b) (u - log m - KL(p||m))]
    - g_F q + g_L 1[column = y], over temperature.
    """
    column, mine = shard.owned(targets)
    for rows, (u, p, scratch, v) in _tiles(4, student, shard, token.maximum.dtype):
        at, g = token.at(rows), upstream.at(rows)
        _logprobs(student[rows, : shard.num_valid], at.maximum, at.lse, shard.temperature, u)
        if teacher is not None:
            z_t = teacher[rows, : shard.num_valid]
            _logprobs(z_t, at.teacher_maximum, at.teacher_lse, shard.temperature, v)
        guarded = _may_be_infinite(u) if teacher is None else _may_be_infinite(u, v)
        dz = _tile_gradient(u, v, torch.exp(u, out=p), scratch, at, g, teacher_weight, guarded)
        if g.logprob is not None:
            dz.scatter_add_(1, column[rows], g.logprob.masked_fill(~mine[rows].unsqueeze(1), 0.0))
        out[rows, : shard.num_valid] = dz if shard.temperature == 1.0 else dz.div_(shard.temperature)


def _tile_gradient(
    u: Tensor,
    v: Tensor,
    p: Tensor,
    scratch: Tensor,
    token: TokenStatistics,
    g: Upstream,
    teacher_weight: float,
    guarded: bool,
) -> Tensor:
    """`logits_gradient` without the target's term and the temperature; overwrites its tiles. `v` is read only
    where `g` asks for the teacher.
    """
    constant = torch.zeros_like(token.lse)
    terms: list[Tensor] = []  # those that differ from column to column
    if g.logprob is not None:
        constant = constant - g.logprob
    if g.forward_kl is not None:
        constant = constant + g.forward_kl
    if g.jsd is not None:
        assert token.mixture_kl is not None
        g_jsd = g.jsd * (1.0 - teacher_weight)
        constant = constant - g_jsd * token.mixture_kl
        terms.append(_weighted(g_jsd, _to_mixture(u, v, teacher_weight)[0], guarded))
    if g.reverse_kl is not None:
        assert token.reverse_kl is not None
        constant = constant - times(g.reverse_kl, token.reverse_kl)
        terms.append(_weighted(g.reverse_kl, torch.sub(u, v, out=scratch), guarded))
    if g.entropy is not None:
        constant = constant - times(g.entropy, token.entropy)
        terms.append(_weighted(-g.entropy, u, guarded))
    if not terms:
        dz = p.mul_(constant)
    else:
        bracket = terms[0].add_(constant)
        for term in terms[1:]:
            bracket.add_(term)
        dz = _weighted(p, bracket, guarded)
    return dz if g.forward_kl is None else dz.sub_(v.exp_().mul_(g.forward_kl))
