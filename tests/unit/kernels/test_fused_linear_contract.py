"""`distill_loss`: the coefficients it takes, the buffers it writes to, the calls it refuses."""

import math
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from megatron_scope.kernels import fused_linear, reference
from megatron_scope.kernels.fused_linear import Coefficients, distill_loss
from megatron_scope.kernels.vocab_parallel import DistillStats
from tests.unit.kernels.hidden import (
    coefficients,
    differentiate,
    exactly,
    make,
    relative_error,
    without_teacher,
)

INF = math.inf


# ---- coefficients


def test_a_callable_sees_each_chunks_statistics_and_knows_its_tokens():
    inputs, old_logprob = make(), torch.linspace(-3, -1, 7, dtype=torch.float64)
    seen = []

    def clipped_ratio(stats):
        seen.append(stats.tokens)
        assert not stats.logprob.requires_grad
        ratio = (stats.logprob - old_logprob[stats.tokens]).exp()
        return Coefficients(logprob=-ratio.clamp(max=1.2), jsd=ratio)

    loss, stats, hidden_grad, weight_grad = differentiate(distill_loss, inputs, clipped_ratio, chunk_tokens=3)
    assert seen == [slice(0, 3), slice(3, 6), slice(6, 7)]
    ratio = (stats.logprob - old_logprob).exp()
    exact = exactly(inputs, Coefficients(logprob=-ratio.clamp(max=1.2), jsd=ratio))
    torch.testing.assert_close(loss, exact[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden_grad, exact[2], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(weight_grad, exact[3], rtol=1e-11, atol=1e-14)


def test_coefficients_may_be_any_tuple_or_object_with_some_of_the_fields():
    inputs, ones = make(), torch.ones(7)
    expected = distill_loss(*inputs, Coefficients(reverse_kl=ones, entropy=ones))[0]
    pair = namedtuple("pair", ["reverse_kl", "entropy"])(ones, ones)
    for given in (
        pair,
        SimpleNamespace(reverse_kl=ones, entropy=ones),
        DistillStats(torch.zeros(7), None, ones, None, ones),
    ):
        assert torch.equal(distill_loss(*inputs, given)[0], expected)


def test_a_coefficient_of_zero_keeps_an_infinite_divergence_out():
    inputs = make(4, 11)
    inputs.teacher_hidden[:, 0] = 1e-300
    inputs.teacher_weight[3, 0] = -INF  # this row's logit is -inf
    stats = distill_loss(*inputs, Coefficients(logprob=torch.ones(4)))[1]
    assert (stats.reverse_kl == INF).all() and stats.forward_kl.isfinite().all()
    factors = Coefficients(reverse_kl=torch.zeros(4), forward_kl=torch.ones(4))
    loss, stats, hidden_grad, weight_grad = differentiate(distill_loss, inputs, factors)
    assert loss == stats.forward_kl.sum()
    assert hidden_grad.isfinite().all() and weight_grad.isfinite().all()


# ---- the inputs and Megatron's buffers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_callers_tensors_are_never_modified(dtype):
    inputs, factors = make(dtype=dtype), coefficients()
    before = [value.clone() for value in (*inputs, *factors)]
    leaves = inputs._replace(
        student_hidden=inputs.student_hidden.requires_grad_(True),
        student_weight=inputs.student_weight.requires_grad_(True),
    )
    distill_loss(*leaves, factors, vocab_size=11, temperature=0.6)[0].backward()
    for value, earlier in zip((*inputs, *factors), before, strict=True):
        assert torch.equal(value.detach(), earlier)


def test_the_precision_of_other_float32_products_is_left_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    differentiate(distill_loss, make(dtype=torch.bfloat16), coefficients())
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_receives_the_scaled_gradient_in_float32(dtype):
    inputs, factors = make(9, 40, widths=(16, 24), dtype=dtype), coefficients(9)
    weight = inputs.student_weight.requires_grad_(True)
    weight.main_grad = torch.ones(40, 16)
    loss, _ = distill_loss(*inputs, factors)
    (2.5 * loss).backward()
    exact = exactly(inputs, factors, upstream=2.5)[3]
    assert weight.grad is None
    assert relative_error(weight.main_grad - 1, exact) < (3e-6 if dtype == torch.float32 else 4e-3)


def test_megatrons_flag_is_set_and_a_tied_embeddings_gradient_still_arrives():
    """As Megatron's hook would find it: the table's gradient in main_grad, the embedding's in grad."""
    inputs, factors = make(dtype=torch.float32), coefficients()
    weight = torch.nn.Parameter(inputs.student_weight)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(11, 5), False
    embedded = torch.nn.functional.embedding(inputs.targets, weight)
    loss, _ = distill_loss(*inputs._replace(student_weight=weight), factors)
    (loss + embedded.sum()).backward()
    assert weight.grad_added_to_main_grad
    plain = differentiate(distill_loss, inputs, factors)[3]
    torch.testing.assert_close(weight.main_grad, plain, rtol=0, atol=1e-6)
    counts = torch.bincount(inputs.targets, minlength=11).float()
    assert torch.equal(weight.grad, counts.unsqueeze(1).expand(11, 5))


def test_a_tied_table_gets_both_its_gradients():
    inputs, factors = make(widths=(5, 8)), coefficients()

    def tied(function, weight):
        hidden = torch.nn.functional.embedding(inputs.targets, weight).tanh()
        leaves = inputs._replace(student_hidden=hidden, student_weight=weight)
        return function(*leaves, factors)[0]

    mine, exact = (inputs.student_weight.clone().requires_grad_(True) for _ in range(2))
    tied(distill_loss, mine).backward()
    tied(reference.distill_loss, exact).backward()
    torch.testing.assert_close(mine.grad, exact.grad, rtol=1e-11, atol=1e-14)


def test_no_chunk_is_ever_as_large_as_all_logits(monkeypatch):
    """The kernel's own memory is that of one chunk and its tiles, however many tokens there are."""
    largest, make_empty = [0], torch.empty

    def watching(*args, **kwargs):
        made = make_empty(*args, **kwargs)
        largest[0] = max(largest[0], made.numel())
        return made

    monkeypatch.setattr(fused_linear.torch, "empty", watching)
    differentiate(distill_loss, make(64, 50), coefficients(64), chunk_tokens=4)
    assert largest[0] == 2 * 4 * 50


# ---- errors


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            {"student_hidden": torch.zeros(7, 6)},
            {},
            r"student_hidden has shape \(7, 6\) but student_weight \(11, 5\)",
        ),
        (
            {"teacher_weight": torch.zeros(11, 9)},
            {},
            r"teacher_hidden has shape \(7, 8\) but teacher_weight \(11, 9\)",
        ),
        ({"teacher_hidden": None}, {}, "teacher_hidden is None but teacher_weight is given"),
        ({"teacher_weight": None}, {}, "teacher_weight is None but teacher_hidden is given"),
        (
            {"teacher_weight": torch.zeros(12, 8)},
            {},
            "teacher_weight covers 12 token ids but student_weight 11; build both",
        ),
        (
            {"teacher_weight": torch.zeros(12, 8)},
            {"vocab_size": 11, "vocab_start": 11},
            "teacher_weight covers 12 token ids but student_weight 11; build both",
        ),
        ({"student_hidden": torch.zeros(6, 5)}, {}, "student_hidden has 6 rows but targets 7"),
        ({"teacher_hidden": torch.zeros(8, 8)}, {}, "teacher_hidden has 8 rows but targets 7"),
        ({"targets": torch.zeros(7)}, {}, "targets has dtype torch.float32; expected torch.int64"),
        (
            {"targets": torch.full((7,), 11)},
            {"vocab_size": 11},
            r"ids from 11 to 11; .* \[0, vocab_size=11\)",
        ),
        ({}, {"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
        ({}, {"vocab_start": -1}, "vocab_start is -1; expected the global id"),
        ({}, {"chunk_tokens": 0}, "chunk_tokens is 0; expected 1 or more"),
        ({}, {"jsd_weight": 1.0}, "weight in the mixture is 1.0; expected a number between 0 and 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_naming_both_sides(change, settings, message):
    inputs = make(dtype=torch.float32)._replace(**change)
    with pytest.raises(ValueError, match=message):
        distill_loss(*inputs, Coefficients(logprob=torch.ones(7)), **settings)


@pytest.mark.parametrize("through_callable", [True, False])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            Coefficients(logprob=torch.ones(6)),
            r"coefficients.logprob has shape \(6,\) but there are 7 tokens; expected \[7\]",
        ),
        (
            Coefficients(reverse_kl=torch.ones(7)),
            "coefficients.reverse_kl is given but teacher_hidden is None",
        ),
        (namedtuple("wrong", ["kl"])(torch.ones(7)), "coefficients are wrong with kl; expected some of"),
        (torch.ones(7), "coefficients are Tensor with .*; expected some of logprob, teacher_logprob"),
    ],
    ids=["length", "teacher", "field", "type"],
)
def test_coefficients_that_do_not_fit_are_refused(given, message, through_callable):
    inputs = without_teacher(make())
    with pytest.raises(ValueError, match=message):
        distill_loss(*inputs, (lambda stats: given) if through_callable else given)
