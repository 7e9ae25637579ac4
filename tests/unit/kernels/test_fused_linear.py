"""`distill_loss` on one rank against the float64 reference: values, gradients, what may be left out."""

import math

import pytest
import torch

from megatron_scope.kernels import gemm, tiles
from megatron_scope.kernels.fused_linear import Coefficients, distill_loss
from megatron_scope.kernels.vocab_parallel import distill_stats
from tests.unit.kernels.hidden import (
    NAMES,
    STUDENT_NAMES,
    Inputs,
    check_stats,
    coefficients,
    differentiate,
    exactly,
    make,
    relative_error,
    without_teacher,
)

INF = math.inf


# ---- values and gradients


@pytest.mark.parametrize("name", [*NAMES, "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_float64_equals_the_reference_in_every_statistic_alone_and_mixed(name, temperature):
    inputs = make(rows=(13, 13))
    factors = coefficients(names=NAMES if name == "all" else (name,))
    settings = {"vocab_size": 11, "temperature": temperature, "jsd_weight": 0.3, "upstream": -1.7}
    loss, stats, hidden_grad, weight_grad = differentiate(
        distill_loss, inputs, factors, chunk_tokens=3, **settings
    )
    if name == "teacher_logprob":  # a constant
        assert not hidden_grad.any() and not weight_grad.any()
        assert loss.item() == pytest.approx((factors.teacher_logprob * stats.teacher_logprob).sum().item())
        return
    exact_loss, exact_stats, exact_hidden, exact_weight = exactly(inputs, factors, **settings)
    check_stats(stats, exact_stats, rtol=1e-12, atol=1e-13)
    assert (stats.jsd is None) == (name not in ("jsd", "all"))
    torch.testing.assert_close(loss, exact_loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(hidden_grad, exact_hidden, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weight_grad, exact_weight, rtol=1e-11, atol=1e-13)
    assert torch.equal(weight_grad[11:], torch.zeros(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["logprob", "reverse_kl", "forward_kl", "entropy", "jsd", "all"])
def test_gradcheck(name):
    inputs = make(4, 5, widths=(3, 2))
    factors = coefficients(4, NAMES if name == "all" else (name,))

    def loss(hidden, weight):
        leaves = inputs._replace(student_hidden=hidden, student_weight=weight)
        return distill_loss(*leaves, factors, temperature=0.7, chunk_tokens=3)[0]

    leaves = inputs.student_hidden.requires_grad_(True), inputs.student_weight.requires_grad_(True)
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"),
    [(torch.float32, 5e-6, 2e-6), (torch.bfloat16, 5e-6, 4e-3), (torch.float16, 5e-6, 1e-3)],
)
def test_values_and_gradients_equal_the_reference(dtype, value_error, gradient_error, temperature):
    """16-bit inputs cost the statistics nothing, as the logits stay float32; the gradient in the logits is
    rounded once, like an ordinary output layer's.
    """
    inputs = make(64, 500, widths=(32, 48), dtype=dtype)
    factors = coefficients(64)
    settings = {"temperature": temperature, "jsd_weight": 0.5}
    loss, stats, hidden_grad, weight_grad = differentiate(
        distill_loss, inputs, factors, chunk_tokens=16, **settings
    )
    exact_loss, exact_stats, exact_hidden, exact_weight = exactly(inputs, factors, **settings)
    check_stats(stats, exact_stats, rtol=value_error, atol=value_error)
    assert loss.dtype == torch.float32 and all(getattr(stats, name).dtype == torch.float32 for name in NAMES)
    assert loss.item() == pytest.approx(exact_loss.item(), abs=1e-4)
    assert (hidden_grad.dtype, weight_grad.dtype) == (dtype, dtype)
    assert relative_error(hidden_grad, exact_hidden) < gradient_error
    assert relative_error(weight_grad, exact_weight) < gradient_error


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 6, 7, 8, 1000, None])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_size_of_chunks_and_tiles_does_not_change_the_result(monkeypatch, chunk_tokens, with_teacher):
    inputs = make() if with_teacher else without_teacher(make())
    factors = coefficients(names=NAMES if with_teacher else STUDENT_NAMES)
    whole = differentiate(distill_loss, inputs, factors, chunk_tokens=7)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(gemm, "TILE_ELEMENTS", 16)
    tiled = differentiate(distill_loss, inputs, factors, chunk_tokens=chunk_tokens)
    check_stats(tiled[1], whole[1], rtol=1e-13, atol=1e-14)
    for mine, expected in zip((tiled[0], *tiled[2:]), (whole[0], *whole[2:]), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_size_of_tiles_does_not_change_a_16_bit_result(monkeypatch, dtype):
    inputs = make(9, 40, widths=(16, 24), dtype=dtype)
    factors = coefficients(9)
    whole = differentiate(distill_loss, inputs, factors)
    monkeypatch.setattr(gemm, "TILE_ELEMENTS", 70)
    tiled = differentiate(distill_loss, inputs, factors)
    check_stats(tiled[1], whole[1], rtol=0, atol=2e-6)
    assert relative_error(tiled[3], whole[3].double()) < 2**-9


def test_the_weights_gradient_of_many_chunks_is_summed_in_float32():
    """In bfloat16, a sum of many small terms would stop growing; the mean of equal tokens shows it."""
    inputs = make(1, 30, widths=(16, 16), dtype=torch.bfloat16)
    many = Inputs(
        inputs.student_hidden.repeat(3000, 1),
        inputs.student_weight,
        inputs.teacher_hidden.repeat(3000, 1),
        inputs.teacher_weight,
        inputs.targets.repeat(3000),
    )
    one = differentiate(distill_loss, inputs, Coefficients(logprob=torch.ones(1)))[3]
    mean = differentiate(
        distill_loss, many, Coefficients(logprob=torch.full((3000,), 1 / 3000)), chunk_tokens=1
    )[3]
    assert relative_error(mean, one.double()) < 1e-2


def test_a_coefficient_of_zero_everywhere_is_like_none():
    inputs = make()
    zero = torch.zeros(7, dtype=torch.float64)
    sparse = differentiate(distill_loss, inputs, Coefficients(reverse_kl=torch.ones(7)))
    full = differentiate(distill_loss, inputs, Coefficients(zero, zero, torch.ones(7), zero, zero, zero))
    for mine, expected in zip(full[2:], sparse[2:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-15)


def test_a_model_has_no_divergence_from_itself_and_no_gradient():
    inputs = make(20, 300, widths=(32, 32), dtype=torch.bfloat16)
    inputs = inputs._replace(teacher_hidden=inputs.student_hidden, teacher_weight=inputs.student_weight)
    ones = torch.ones(20)
    factors = Coefficients(reverse_kl=ones, forward_kl=ones, jsd=ones)
    loss, stats, hidden_grad, weight_grad = differentiate(distill_loss, inputs, factors)
    assert loss == 0 and not stats.reverse_kl.any() and not stats.forward_kl.any() and not stats.jsd.any()
    assert torch.equal(stats.logprob, stats.teacher_logprob)
    assert hidden_grad.abs().max() < 1e-6 and weight_grad.abs().max() < 1e-6


def test_statistics_equal_those_of_the_logits_kernel():
    inputs = make()
    logits = inputs.student_hidden @ inputs.student_weight.T, inputs.teacher_hidden @ inputs.teacher_weight.T
    _, stats = distill_loss(*inputs, Coefficients(logprob=torch.ones(7)))
    expected = distill_stats(*logits, inputs.targets)
    for mine, theirs in zip(stats[:5], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    assert stats.tokens == slice(0, 7)


# ---- what may be left out


def test_without_a_teacher_there_are_log_prob_and_entropy():
    inputs = without_teacher(make())
    factors = coefficients(names=STUDENT_NAMES)
    loss, stats, hidden_grad, weight_grad = differentiate(distill_loss, inputs, factors, chunk_tokens=4)
    exact = exactly(inputs, factors)
    torch.testing.assert_close(loss, exact[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden_grad, exact[2], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(weight_grad, exact[3], rtol=1e-11, atol=1e-14)
    assert (stats.teacher_logprob, stats.reverse_kl, stats.forward_kl, stats.jsd) == (None,) * 4


@pytest.mark.parametrize("frozen", ["student_hidden", "student_weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs, factors = make(), coefficients()
    other = "student_weight" if frozen == "student_hidden" else "student_hidden"
    both = differentiate(distill_loss, inputs, factors)
    leaf = getattr(inputs, other).clone().requires_grad_(True)
    loss, _ = distill_loss(*inputs._replace(**{other: leaf}), factors)
    loss.backward()
    assert getattr(inputs, frozen).grad is None
    assert torch.equal(leaf.grad, both[2] if other == "student_hidden" else both[3])


def test_without_gradients_the_numbers_are_the_same():
    inputs, factors = make(), coefficients()
    loss, stats, _, _ = differentiate(distill_loss, inputs, factors)
    inputs.student_weight.requires_grad_(True)
    with torch.no_grad():
        plain_loss, plain_stats = distill_loss(*inputs, factors)
    assert torch.equal(plain_loss, loss) and not plain_loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(plain_stats[:6], stats[:6], strict=True))


@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_tokens_give_zero_and_empty_statistics(with_teacher):
    inputs = make(0, dtype=torch.float32)
    inputs = inputs if with_teacher else without_teacher(inputs)
    factors = coefficients(0, NAMES[:5] if with_teacher else STUDENT_NAMES)
    loss, stats, hidden_grad, weight_grad = differentiate(distill_loss, inputs, factors)
    assert loss == 0 and stats.logprob.shape == (0,) and stats.entropy.dtype == torch.float32
    assert (stats.reverse_kl is None) == (not with_teacher)
    assert hidden_grad.shape == (0, 5) and torch.equal(weight_grad, torch.zeros(11, 5))


def test_a_shard_that_is_all_padding_gets_a_zero_gradient():
    inputs = make(4, 8)
    loss, _, hidden_grad, weight_grad = differentiate(
        distill_loss, inputs, Coefficients(entropy=torch.zeros(4)), vocab_start=8, vocab_size=8
    )
    assert loss == 0 and not hidden_grad.any() and not weight_grad.any()


# ---- padding, tables of different length


@pytest.mark.parametrize("filling", [0.0, 1e30, INF, -INF, math.nan])
def test_what_padding_rows_hold_does_not_matter(filling):
    inputs, factors = make(), coefficients()
    padded = inputs._replace(
        student_weight=torch.cat([inputs.student_weight, torch.full((3, 5), filling).double()]),
        teacher_weight=torch.cat([inputs.teacher_weight, torch.full((3, 8), filling).double()]),
    )
    plain = differentiate(distill_loss, inputs, factors)
    loss, stats, hidden_grad, weight_grad = differentiate(distill_loss, padded, factors, vocab_size=11)
    assert torch.equal(loss, plain[0]) and torch.equal(hidden_grad, plain[2])
    assert all(torch.equal(a, b) for a, b in zip(stats[:6], plain[1][:6], strict=True))
    assert torch.equal(weight_grad[:11], plain[3]) and not weight_grad[11:].any()


@pytest.mark.parametrize("rows", [(11, 14), (14, 11), (12, 14)])
def test_tables_of_different_length_share_the_smaller_vocabulary(rows):
    inputs, factors = make(rows=rows), coefficients()
    loss, stats, hidden_grad, weight_grad = differentiate(distill_loss, inputs, factors, vocab_size=11)
    exact = exactly(inputs, factors, vocab_size=11)
    check_stats(stats, exact[1], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss, exact[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(hidden_grad, exact[2], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weight_grad, exact[3], rtol=1e-11, atol=1e-13)


# ---- repeated and second derivatives


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_retained_graph_gives_its_gradient_again(dtype):
    inputs, factors = make(dtype=dtype), coefficients()
    leaves = inputs.student_hidden.requires_grad_(True), inputs.student_weight.requires_grad_(True)
    loss, _ = distill_loss(*inputs, factors)
    first = [grad.clone() for grad in torch.autograd.grad(2 * loss, leaves, retain_graph=True)]
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(2 * loss, leaves), first, strict=True))


def test_a_second_derivative_is_refused_instead_of_being_wrong():
    inputs = make()
    leaf = inputs.student_hidden.requires_grad_(True)
    loss, _ = distill_loss(*inputs, coefficients())
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.square().sum().backward()
