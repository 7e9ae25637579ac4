"""The obvious float64 version of each kernel, on the whole vocabulary and one rank; tests compare with it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_scope.kernels.fused_linear import Coefficients, LossStats
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


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, *, teacher_weight: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """As `vocab_parallel.jensen_shannon`, from logits [T, V] of the whole vocabulary; float64 [T] in nats."""
    p_TV = torch.log_softmax(student_logits.double() / temperature, dim=-1)
    q_TV = torch.log_softmax(teacher_logits.double() / temperature, dim=-1)
    mixture_TV = ((1 - teacher_weight) * p_TV.exp() + teacher_weight * q_TV.exp()).log()
    to_student = (p_TV.exp() * (p_TV - mixture_TV)).sum(dim=-1)
    to_teacher = (q_TV.exp() * (q_TV - mixture_TV)).sum(dim=-1)
    return (1 - teacher_weight) * to_student + teacher_weight * to_teacher


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor,
    coefficients: Coefficients,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    jsd_weight: float = 0.5,
) -> tuple[Tensor, LossStats]:
    """As `fused_linear.distill_loss`, from whole tables [rows >= V, d]; float64, by autograd."""
    student_logits = student_hidden.double() @ student_weight[:vocab_size].double().T
    teacher_logits, jsd = None, None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher_logits = teacher_hidden.double() @ teacher_weight[:vocab_size].double().T
        jsd = jensen_shannon(
            student_logits, teacher_logits, teacher_weight=jsd_weight, temperature=temperature
        )
    stats = distill_stats(student_logits, teacher_logits, targets, temperature=temperature)
    whole = LossStats(*stats, jsd=jsd, tokens=slice(0, len(targets)))
    loss = torch.zeros((), dtype=torch.float64)
    for name, factor in coefficients._asdict().items():
        if factor is not None:
            loss = loss + (factor.double() * getattr(whole, name)).sum()
    return loss, whole
