"""The obvious float64 version of each kernel, on the whole vocabulary and one rank; tests compare with it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_scope.kernels.vocab_parallel import DistillStats


def distill_stats(
    student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, *, temperature: float = 1.0
) -> DistillStats:
    """As `vocab_parallel.distill_stats`, from logits [T, V] of the whole vocabulary; float64 [T] in nats."""
    p_TV = torch.log_softmax(student_logits.double() / temperature, dim=-1)
    logprob = p_TV.gather(1, targets.unsqueeze(1)).squeeze(1)
    entropy = -torch.special.xlogy(p_TV.exp(), p_TV.exp()).sum(dim=-1)
    if teacher_logits is None:
        return DistillStats(logprob, None, None, None, entropy)
    q_TV = torch.log_softmax(teacher_logits.double() / temperature, dim=-1)
    teacher_logprob = q_TV.gather(1, targets.unsqueeze(1)).squeeze(1)
    reverse_kl = (p_TV.exp() * (p_TV - q_TV)).sum(dim=-1)
    forward_kl = (q_TV.exp() * (q_TV - p_TV)).sum(dim=-1)
    return DistillStats(logprob, teacher_logprob, reverse_kl, forward_kl, entropy)
