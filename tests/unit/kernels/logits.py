"""Random logits, and comparisons of statistics and gradients, for the tests of the kernels.

Letters: T tokens, V vocabulary, z student and teacher logits, y targets.
"""

import math

import torch

from megatron_scope.kernels.vocab_parallel import DistillStats

INF = math.inf
DIFFERENTIABLE = ("logprob", "reverse_kl", "forward_kl", "entropy")
FIELDS = DistillStats._fields


def make(num_tokens=6, vocab=11, *, dtype=torch.float64, scale=3.0, seed=0):
    """Random student and teacher logits [T, V] and targets [T]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (torch.randn(num_tokens, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for _ in range(2)
    )
    return student, teacher, torch.randint(0, vocab, (num_tokens,), generator=generator)


def gradient(stats_of, student, factors):
    """d sum_f sum_t factor_f,t * f_t / d student; `factors` by field name."""
    student = student.detach().clone().requires_grad_(True)
    stats = stats_of(student)
    total = sum(
        (getattr(stats, name) * factor.to(getattr(stats, name))).sum() for name, factor in factors.items()
    )
    (grad,) = torch.autograd.grad(total, student)
    return grad


def mixed_factors(num_tokens, names=DIFFERENTIABLE, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num_tokens, generator=generator, dtype=torch.float64) for name in names}


def check_stats(actual, expected, **tolerance):
    for name in FIELDS:
        ours, exact = getattr(actual, name), getattr(expected, name)
        assert (ours is None) == (exact is None), name
        if exact is not None:
            torch.testing.assert_close(
                ours.double(), exact.double(), msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )
