"""The fused linear layer's side of `benchmarks/kernels.py`: reverse KL and the targets' log-prob with the
gradients of the student's hidden states and table, from bfloat16 hidden states [T, d] and tables [V, d].

Each contestant takes a `Problem` and returns the loss, differentiable in its student's tensors. The bare
GEMMs compute no loss: they are the four products that any chunked way must make, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_scope.kernels import gemm, reference
from megatron_scope.kernels.fused_linear import Coefficients, distill_loss


@dataclasses.dataclass(frozen=True)
class Problem:
    """`factors` [2, T] weigh the tokens' reverse KL and log-prob."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    factors: Tensor

    def part(self, num_tokens: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
        """The first tokens and ids alone, the student's tensors as new leaves of a dtype."""
        return Problem(
            self.student_hidden[:num_tokens].detach().to(dtype).requires_grad_(True),
            self.student_weight[:vocab].detach().to(dtype).requires_grad_(True),
            self.teacher_hidden[:num_tokens],
            self.teacher_weight[:vocab],
            self.targets[:num_tokens] % vocab,
            self.factors[:, :num_tokens],
        )

    def gradients(self) -> tuple[Tensor, Tensor]:
        hidden, weight = self.student_hidden.grad, self.student_weight.grad
        assert hidden is not None and weight is not None
        return hidden, weight


def make_problem(num_tokens: int, vocab: int, hidden: tuple[int, int], *, uniform: bool = False) -> Problem:
    """Random hidden states and tables whose logits have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    student, teacher = (
        (normal(num_tokens, d, scale=1.0), normal(vocab, d, scale=2 / d**0.5)) for d in hidden
    )
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    factors = torch.rand(2, num_tokens, generator=generator)
    if uniform:
        factors[0] = 1.0
    return Problem(*student, *teacher, targets, factors)


def exact(problem: Problem, *, with_logprob: bool) -> Tensor:
    """The float64 loss; its gradient goes to the problem's leaves."""
    coefficients = Coefficients(
        reverse_kl=problem.factors[0], logprob=problem.factors[1] if with_logprob else None
    )
    loss, _ = reference.distill_loss(
        problem.student_hidden,
        problem.student_weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.targets,
        coefficients,
    )
    return loss


# ---- contestants


def ours(problem: Problem, chunk_tokens: int) -> Tensor:
    """The package's own kernel, which also gives KL(q||p), the entropy and the teacher's log-prob."""
    loss, _ = distill_loss(
        problem.student_hidden,
        problem.student_weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.targets,
        Coefficients(reverse_kl=problem.factors[0], logprob=problem.factors[1]),
        chunk_tokens=chunk_tokens,
    )
    return loss


def trl(problem: Problem, chunk_tokens: int) -> Tensor:
    """TRL's `ChunkedDivergenceFunction` at beta 1, at the chunk size that TRL fixes: KL alone."""
    from trl.kernels import chunked_divergence  # pyright: ignore[reportMissingImports]

    del chunk_tokens
    divergence, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
        problem.student_hidden,
        problem.student_weight,
        None,
        problem.teacher_hidden,
        problem.teacher_weight,
        None,
        1.0,
    )
    return (problem.factors[0] * divergence).sum()


def liger(problem: Problem, chunk_tokens: int) -> Tensor:
    """Liger-Kernel's `LigerFusedLinearJSDLoss` at beta 1, not compiled: KL alone, tokens weighed alike."""
    from liger_kernel import chunked_loss  # pyright: ignore[reportMissingImports]

    mean = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False, chunk_size=chunk_tokens
    )
    loss = mean(
        problem.student_hidden,
        problem.student_weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.targets,
    )
    return loss * len(problem.targets)


OURS = "ours"
TRL = "TRL ChunkedDivergenceFunction (KL alone)"
LIGER = "Liger LigerFusedLinearJSDLoss (KL alone)"
LINEAR: dict[str, Callable[[Problem, int], Tensor]] = {OURS: ours, TRL: trl, LIGER: liger}


# ---- bare GEMMs


def own_products(problem: Problem, chunk_tokens: int) -> Callable[[], Any]:
    """The very products that `ours` makes: bfloat16 operands, float32 logits and sum of the table's
    gradient.
    """
    hidden, weight = problem.student_hidden, problem.student_weight
    logits, other = torch.zeros(2, chunk_tokens, weight.shape[0])
    dz = torch.zeros(chunk_tokens, weight.shape[0], dtype=torch.bfloat16)
    hidden_grad, weight_grad = torch.zeros_like(hidden), torch.zeros(weight.shape)

    def run() -> None:
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            here = slice(0, len(hidden[rows]))
            gemm.logits(hidden[rows], weight, logits[here])
            gemm.logits(problem.teacher_hidden[rows], problem.teacher_weight, other[here])
            gemm.hidden_gradient(dz[here], weight, hidden_grad[rows])
            gemm.add_weight_gradient(dz[here], hidden[rows], weight_grad)

    return run


def plain_products(dtype: torch.dtype) -> Callable[[Problem, int], Callable[[], Any]]:
    """The same products by torch.mm, operands and results in one dtype."""

    def prepare(problem: Problem, chunk_tokens: int) -> Callable[[], Any]:
        hidden, weight, teacher_hidden, teacher_weight = (
            tensor.to(dtype)
            for tensor in (
                problem.student_hidden,
                problem.student_weight,
                problem.teacher_hidden,
                problem.teacher_weight,
            )
        )
        dz, other = torch.zeros(2, chunk_tokens, weight.shape[0], dtype=dtype)
        hidden_grad, weight_grad = torch.zeros_like(hidden), torch.zeros_like(weight)

        def run() -> None:
            for start in range(0, len(hidden), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                here = slice(0, len(hidden[rows]))
                torch.mm(hidden[rows], weight.T, out=dz[here])
                torch.mm(teacher_hidden[rows], teacher_weight.T, out=other[here])
                torch.mm(dz[here], weight, out=hidden_grad[rows])
                weight_grad.addmm_(dz[here].T, hidden[rows])

        return run

    return prepare


BARE: dict[str, Callable[[Problem, int], Callable[[], Any]]] = {
    "bare GEMMs as ours makes them": own_products,
    "bare GEMMs, all float32": plain_products(torch.float32),
    "bare GEMMs, all bfloat16": plain_products(torch.bfloat16),
}
