"""`jensen_shannon` against the float64 reference."""

import math

import pytest
import torch

from megatron_scope.kernels import reference
from megatron_scope.kernels.vocab_parallel import distill_stats, jensen_shannon
from tests.unit.kernels.logits import INF, make, mixed_factors


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("teacher_weight", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"),
    [(torch.float64, 1e-13, 1e-13), (torch.float32, 1e-6, 2e-6), (torch.bfloat16, 1e-6, 2**-8)],
)
def test_the_jensen_shannon_divergence_equals_the_reference(
    dtype, value_error, gradient_error, teacher_weight, temperature
):
    student, teacher, _ = make(16, 300, dtype=dtype)
    settings = {"teacher_weight": teacher_weight, "temperature": temperature}
    factors = mixed_factors(16, ("jsd",))["jsd"]
    leaf, exact_leaf = student.requires_grad_(True), student.detach().double().requires_grad_(True)
    jsd = jensen_shannon(leaf, teacher, **settings)
    exact = reference.jensen_shannon(exact_leaf, teacher, **settings)
    torch.testing.assert_close(jsd.double(), exact, rtol=value_error, atol=value_error)
    assert jsd.min() > 0 and jsd.max() < math.log(2)
    (jsd * factors.to(jsd)).sum().backward()
    (exact * factors).sum().backward()
    scale = exact_leaf.grad.abs().max().item()
    torch.testing.assert_close(
        leaf.grad.double(), exact_leaf.grad, rtol=gradient_error, atol=gradient_error * scale
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_jensen_shannon_divergence_of_equal_logits_is_exactly_zero(dtype):
    student, _, _ = make(8, 200, dtype=dtype, scale=6.0)
    leaf = student.clone().requires_grad_(True)
    jsd = jensen_shannon(leaf, student)
    jsd.sum().backward()
    assert not jsd.any() and not leaf.grad.any()


def test_the_jensen_shannon_divergence_goes_from_forward_to_reverse_kl_with_the_teachers_weight():
    """JSD_b / b tends to KL(q||p) as b -> 0 and JSD_b / (1 - b) to KL(p||q) as b -> 1."""
    student, teacher, targets = make(scale=1.0)
    stats = distill_stats(student, teacher, targets)
    little, much = (jensen_shannon(student, teacher, teacher_weight=b) for b in (1e-6, 1 - 1e-6))
    torch.testing.assert_close(little / 1e-6, stats.forward_kl, rtol=1e-3, atol=0)
    torch.testing.assert_close(much / 1e-6, stats.reverse_kl, rtol=1e-3, atol=0)


@pytest.mark.parametrize("excluded_by", ["student", "teacher", "both"])
def test_the_jensen_shannon_divergence_stays_finite_where_a_model_excludes_a_column(excluded_by):
    student, teacher, _ = make(6, 11)
    low_student, low_teacher = student.clone(), teacher.clone()
    if excluded_by != "teacher":
        student[:, 3], low_student[:, 3] = -INF, -600.0
    if excluded_by != "student":
        teacher[:, 3], low_teacher[:, 3] = -INF, -600.0
    leaf, low_leaf = student.requires_grad_(True), low_student.requires_grad_(True)
    jsd, exact = jensen_shannon(leaf, teacher), reference.jensen_shannon(low_leaf, low_teacher)
    torch.testing.assert_close(jsd, exact, rtol=1e-12, atol=1e-14)
    jsd.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(leaf.grad, low_leaf.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("filling", [0.0, 1e30, INF, -INF, math.nan])
def test_padding_does_not_reach_the_jensen_shannon_divergence(filling):
    student, teacher, _ = make(6, 11)
    padding = torch.full((6, 3), filling, dtype=student.dtype)
    leaf = torch.cat([student, padding], dim=1).requires_grad_(True)
    jsd = jensen_shannon(leaf, torch.cat([teacher, padding], dim=1), vocab_size=11)
    assert torch.equal(jsd, jensen_shannon(student, teacher))
    jsd.sum().backward()
    assert leaf.grad[:, :11].any() and not leaf.grad[:, 11:].any()


@pytest.mark.parametrize("teacher_weight", [0.0, 1.0, -0.5, math.nan])
def test_a_mixture_of_one_model_alone_is_refused(teacher_weight):
    student, teacher, _ = make()
    with pytest.raises(ValueError, match=f"mixture is {teacher_weight}; expected a number between 0 and 1"):
        jensen_shannon(student, teacher, teacher_weight=teacher_weight)
