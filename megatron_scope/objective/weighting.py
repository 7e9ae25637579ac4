"""SCOPE's dual-path weights (arXiv:2604.10688, Eq. 4 and 5): pure functions of verdicts and mean
log-probs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["sum_to_one", "mean_one"]


def path_weights(
    correct: Tensor,
    group: Tensor,
    student_mean_logprob: Tensor,
    teacher_mean_logprob: Tensor,
    *,
    tau: float = 1.0,
    student_exponent: float = 1.0,
    teacher_exponent: float = -1.0,
    scale: Scale = "sum_to_one",
) -> Tensor:
    """One weight per response: PPL^(exponent / tau), normalised within each prompt's correct and incorrect
    set.

    Shapes: `correct` bool [N]; `group` int64 [N], any ids in any order; the mean log-probs float [N], in nats
    per response token, so that PPL = exp(-mean). Returns float [N] in the log-probs' dtype, without gradient.

    Correct responses are weighted by the student's perplexity (Eq. 4: exponent +1, low confidence counts
    most), incorrect ones by the teacher's (Eq. 5: exponent -1, an unsure teacher counts little). An exponent
    of 0 gives uniform weights. The student's entry of an incorrect response and the teacher's of a correct
    one are ignored and may be NaN.

    `scale="sum_to_one"` makes each set sum to 1; "mean_one" multiplies by the set's size. Raises ValueError
    on mismatched shapes, on a tau that is not finite and positive, on a non-finite exponent and on a
    non-finite log-prob that is needed.
    """
    _check_inputs(correct, group, student_mean_logprob, teacher_mean_logprob)
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau is {tau}; expected a finite positive number")
    for name, exponent in (("student_exponent", student_exponent), ("teacher_exponent", teacher_exponent)):
        if not math.isfinite(exponent):
            raise ValueError(f"{name} is {exponent}; expected a finite number")
    if scale not in ("sum_to_one", "mean_one"):
        raise ValueError(f'scale is {scale!r}; expected "sum_to_one" or "mean_one"')
    mean = torch.where(correct, student_mean_logprob, teacher_mean_logprob).detach().double()
    _check_finite(mean, correct)
    # Tensors of the mean's dtype: torch.where would round Python numbers to float32.
    exponent = torch.where(correct, mean.new_tensor(student_exponent), mean.new_tensor(teacher_exponent))
    weights = _softmax_within(-mean * exponent.sign(), exponent.abs(), tau, _set_ids(correct, group), scale)
    return weights.to(torch.promote_types(student_mean_logprob.dtype, teacher_mean_logprob.dtype))


def _check_inputs(correct: Tensor, group: Tensor, student: Tensor, teacher: Tensor) -> None:
    shapes = {
        "correct": correct.shape,
        "group": group.shape,
        "student_mean_logprob": student.shape,
        "teacher_mean_logprob": teacher.shape,
    }
    if correct.dim() != 1 or len(set(shapes.values())) != 1:
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"got shapes {got}; expected one [N] for all")
    if correct.dtype != torch.bool:
        raise ValueError(f"correct has dtype {correct.dtype}; expected torch.bool")
    if group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(f"group has dtype {group.dtype}; expected integer ids")
    for name, value in (("student_mean_logprob", student), ("teacher_mean_logprob", teacher)):
        if not value.is_floating_point():
            raise ValueError(f"{name} has dtype {value.dtype}; expected a floating-point tensor")


def _check_finite(mean: Tensor, correct: Tensor) -> None:
    bad = (~mean.isfinite()).nonzero()[:, 0]
    if len(bad):
        index = int(bad[0])
        model, kind = ("student", "correct") if bool(correct[index]) else ("teacher", "incorrect")
        raise ValueError(
            f"{model}_mean_logprob[{index}] is {float(mean[index])} for a response that is {kind}; "
            "expected a finite number"
        )


def _set_ids(correct: Tensor, group: Tensor) -> Tensor:
    """Dense ids of the sets (one prompt's correct or incorrect responses), int64 [N]."""
    _, dense_group = torch.unique(group, return_inverse=True)
    return dense_group * 2 + correct.long()


def _softmax_within(order: Tensor, sharpness: Tensor, tau: float, set_id: Tensor, scale: Scale) -> Tensor:
    """softmax of order * sharpness / tau within each set; `sharpness` [N] is one number a set, 0 or more."""
    num_sets = int(set_id.max()) + 1 if len(set_id) else 0
    highest = order.new_full((num_sets,), -math.inf).scatter_reduce(0, set_id, order, "amax")
    # Centred before it is scaled, so that no tau or exponent overflows.
    raw = ((order - highest[set_id]) * sharpness / tau).exp()
    total = raw.new_zeros(num_sets).index_add(0, set_id, raw)
    weights = raw / total[set_id]
    if scale == "mean_one":
        size = raw.new_zeros(num_sets).index_add(0, set_id, torch.ones_like(raw))
        weights = weights * size[set_id]
    return weights
