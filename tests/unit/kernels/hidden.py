"""Random hidden states and output tables, and comparisons of losses, for the tests of `distill_loss`.

Letters: T tokens, V vocabulary, d hidden sizes of student and teacher, y targets.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_scope.kernels import reference
from megatron_scope.kernels.fused_linear import Coefficients

NAMES = Coefficients._fields
STUDENT_NAMES = ("logprob", "entropy")


class Inputs(NamedTuple):
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    targets: Tensor


def make(num_tokens=7, vocab=11, *, widths=(5, 8), rows=None, dtype=torch.float64, seed=0):
    """Random inputs whose logits have a standard deviation near 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    student_rows, teacher_rows = rows or (vocab, vocab)
    return Inputs(
        normal(num_tokens, widths[0]),
        normal(student_rows, widths[0], scale=2 / widths[0] ** 0.5),
        normal(num_tokens, widths[1]),
        normal(teacher_rows, widths[1], scale=2 / widths[1] ** 0.5),
        torch.randint(0, vocab, (num_tokens,), generator=generator),
    )


def without_teacher(inputs):
    return inputs._replace(teacher_hidden=None, teacher_weight=None)


def coefficients(num_tokens=7, names=NAMES, seed=7):
    generator = torch.Generator().manual_seed(seed)
    factors = {name: torch.randn(num_tokens, generator=generator, dtype=torch.float64) for name in names}
    return Coefficients(**factors)


def differentiate(function, inputs, factors, *, upstream=1.0, **settings):
    """(loss, stats, gradient of the hidden states, gradient of the weight)."""
    hidden = inputs.student_hidden.detach().clone().requires_grad_(True)
    weight = inputs.student_weight.detach().clone().requires_grad_(True)
    leaves = inputs._replace(student_hidden=hidden, student_weight=weight)
    loss, stats = function(*leaves, factors, **settings)
    (loss * upstream).backward()
    return loss.detach(), stats, hidden.grad, weight.grad


def exactly(inputs, factors, **settings):
    """The reference's results from the same numbers in float64."""
    wide = Inputs(*(value.double() if value is not None else None for value in inputs[:4]), inputs.targets)
    return differentiate(reference.distill_loss, wide, factors, **settings)


def check_stats(actual, expected, **tolerance):
    for name in NAMES:
        ours, exact = getattr(actual, name), getattr(expected, name)
        if ours is not None:
            torch.testing.assert_close(
                ours.double(), exact.detach().double(), msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )


def relative_error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()
