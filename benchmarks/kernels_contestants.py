"""What `benchmarks/kernels.py` compares with: the usual ways to a reverse KL over a sharded vocabulary,
written here from their descriptions, so that all have the same inputs, outputs and dtypes.

Each takes bfloat16 logits [T, L] of this rank's columns and returns float32 (reverse KL, log-prob of the
target or None where it has none), [T], differentiable in the student's logits. T tokens, L columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_scope.kernels.vocab_parallel import distill_stats

Outputs = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Where this rank's columns lie."""

    group: Any
    start: int
    width: int

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def owned(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(column [T, 1], whether it is this rank's [T])."""
        column = targets - self.start
        mine = (column >= 0) & (column < self.width)
        return column.masked_fill(~mine, 0).unsqueeze(1), mine

    def reduce(self, value: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(value, op=operation, group=self.group)
        return value


def ours(student: Tensor, teacher: Tensor, targets: Tensor, shard: Shard) -> Outputs:
    """The package's own kernel, which also gives KL(q||p), the entropy and the teacher's log-prob."""
    stats = distill_stats(student, teacher, targets, group=shard.group, vocab_start=shard.start)
    assert stats.reverse_kl is not None
    return stats.reverse_kl, stats.logprob


# ---- (i) all logits on every rank


class _Gather(torch.autograd.Function):
    """[T, L] of every rank to [T, V]; the gradient of a rank's own columns comes back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: Shard) -> Tensor:
        ctx.columns = slice(shard.start, shard.start + shard.width)
        if shard.world_size == 1:
            return logits.view_as(logits)
        parts = [torch.empty_like(logits) for _ in range(shard.world_size)]
        dist.all_gather(parts, logits.contiguous(), group=shard.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0][:, ctx.columns], None


def gathered(student: Tensor, teacher: Tensor, targets: Tensor, shard: Shard) -> Outputs:
    """Gather, then torch's own log_softmax and kl_div in float32."""
    p = F.log_softmax(_Gather.apply(student, shard).float(), dim=1)
    q = F.log_softmax(_Gather.apply(teacher, shard).float(), dim=1)
    reverse_kl = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)
    return reverse_kl, p.gather(1, targets.unsqueeze(1))[:, 0]


# ---- (ii) sharded, operation by operation


class _SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' values. Where it is a result, which all ranks hold, its gradient is that of each;
    where every rank goes on with its own columns, their gradients add up (`goes_on`).
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: Shard, goes_on: bool) -> Tensor:
        ctx.shard, ctx.goes_on = shard, goes_on
        return shard.reduce(value.clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad = ctx.shard.reduce(grad_outputs[0].clone()) if ctx.goes_on else grad_outputs[0]
        return grad, None, None


def _sharded_log_softmax(logits: Tensor, shard: Shard) -> Tensor:
    maximum = shard.reduce(logits.detach().amax(dim=1, keepdim=True), dist.ReduceOp.MAX)
    centred = logits - maximum
    return centred - _SumOverRanks.apply(centred.exp().sum(dim=1, keepdim=True), shard, True).log()


def per_operation(student: Tensor, teacher: Tensor, targets: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Vocabulary-parallel by autograd through each operation, float32 throughout."""
    p = _sharded_log_softmax(student.float(), shard)
    q = _sharded_log_softmax(teacher.float(), shard)
    reverse_kl = _SumOverRanks.apply((p.exp() * (p - q)).sum(dim=1), shard, False)
    column, mine = shard.owned(targets)
    picked = p.gather(1, column)[:, 0].masked_fill(~mine, 0.0)
    return reverse_kl, _SumOverRanks.apply(picked, shard, False)


# ---- (iii) a custom function over chunks of tokens


class _Chunked(torch.autograd.Function):
    """Log-probs by all-reduces of each chunk, recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, targets: Tensor, shard: Shard, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        column, mine = shard.owned(targets)
        reverse_kl, logprob = [], []
        for start in range(0, student.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            p = _sharded_log_softmax(student[rows].float(), shard)
            q = _sharded_log_softmax(teacher[rows].float(), shard)
            reverse_kl.append(shard.reduce((p.exp() * (p - q)).sum(dim=1)))
            logprob.append(p.gather(1, column[rows])[:, 0].masked_fill(~mine[rows], 0.0))
        ctx.save_for_backward(student, teacher, targets)
        ctx.shard, ctx.chunk_tokens = shard, chunk_tokens
        return torch.cat(reverse_kl), shard.reduce(torch.cat(logprob))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        student, teacher, targets = ctx.saved_tensors
        column, mine = ctx.shard.owned(targets)
        grad = torch.empty_like(student)
        for start in range(0, student.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            g_kl, g_logprob = (g[rows].unsqueeze(1) for g in grad_outputs)
            p = _sharded_log_softmax(student[rows].float(), ctx.shard)
            ratio = p - _sharded_log_softmax(teacher[rows].float(), ctx.shard)
            probability = p.exp_()
            reverse_kl = ctx.shard.reduce((probability * ratio).sum(dim=1, keepdim=True))
            dz = probability * (g_kl * (ratio - reverse_kl) - g_logprob)
            dz.scatter_add_(1, column[rows], g_logprob.masked_fill(~mine[rows].unsqueeze(1), 0.0))
            grad[rows] = dz
        return grad, None, None, None, None


def chunked(chunk_tokens: int) -> Callable[..., Outputs]:
    def run(student: Tensor, teacher: Tensor, targets: Tensor, shard: Shard) -> Outputs:
        return _Chunked.apply(student, teacher, targets, shard, chunk_tokens)

    return run


# ---- (iv) checkpointed chunks


def checkpointed(chunk_tokens: int) -> Callable[..., Outputs]:
    """`per_operation` on chunks of tokens, each recomputed in the backward pass by torch's checkpoint."""

    def run(student: Tensor, teacher: Tensor, targets: Tensor, shard: Shard) -> Outputs:
        parts = [
            checkpoint(per_operation, s, t, y, shard, use_reentrant=False)
            for s, t, y in zip(
                student.split(chunk_tokens),
                teacher.split(chunk_tokens),
                targets.split(chunk_tokens),
                strict=True,
            )
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    return run


# ---- TRL's own function


def trl(student: Tensor, teacher: Tensor, targets: Tensor, shard: Shard) -> Outputs:
    """`GKDTrainer.generalized_jsd_loss` at beta 1, where trl is installed: whole vocabulary, KL alone, on
    float32 logits as the others compute.
    """
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]

    elements = GKDTrainer.generalized_jsd_loss(student.float(), teacher.float(), beta=1, reduction="none")
    return elements.sum(dim=-1), None


TRL = "TRL generalized_jsd_loss (KL alone)"
CHUNKS = (4, 8, 16, 64)
LOGITS: dict[str, Callable[..., Outputs]] = {
    "ours": ours,
    "gather + log_softmax + kl_div": gathered,
    "per-operation autograd": per_operation,
    **{f"custom function, chunks of {size}": chunked(size) for size in CHUNKS},
    **{f"checkpointed chunks of {size}": checkpointed(size) for size in CHUNKS},
    TRL: trl,
}
