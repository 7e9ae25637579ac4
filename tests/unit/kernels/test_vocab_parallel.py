"""`distill_stats` on one rank, against the float64 reference.

Letters: T tokens, V vocabulary, z student and teacher logits, y targets.
"""

import math

import pytest
import torch

from megatron_scope.kernels import reference, tiles
from megatron_scope.kernels.vocab_parallel import distill_stats
from tests.unit.kernels.logits import DIFFERENTIABLE, FIELDS, INF, check_stats, gradient, make, mixed_factors

# ---- the reference itself


def test_the_reference_is_what_the_formulas_say():
    student, teacher, targets = make(2, 4)
    stats = reference.distill_stats(student, teacher, targets, temperature=0.6)
    for t in range(2):
        p, q = (
            [math.exp(z / 0.6) / math.fsum(math.exp(other / 0.6) for other in row) for z in row]
            for row in (student[t].tolist(), teacher[t].tolist())
        )
        expected = {
            "logprob": math.log(p[targets[t]]),
            "teacher_logprob": math.log(q[targets[t]]),
            "reverse_kl": math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
            "forward_kl": math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
            "entropy": -math.fsum(a * math.log(a) for a in p),
        }
        assert {name: getattr(stats, name)[t].item() for name in FIELDS} == pytest.approx(expected, rel=1e-12)


# ---- values and gradients


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck_with_a_teacher(name, temperature):
    student, teacher, targets = make(3, 5, scale=1.0)
    names = DIFFERENTIABLE if name == "all" else (name,)
    factors = mixed_factors(3, names)

    def total(logits):
        # Columns 4.. are padding, so their numerical gradient must be zero as well.
        stats = distill_stats(logits, teacher, targets % 4, vocab_size=4, temperature=temperature)
        return sum((getattr(stats, n) * factors[n]).sum() for n in names)

    assert torch.autograd.gradcheck(total, student.requires_grad_(True))


@pytest.mark.parametrize("name", ["logprob", "entropy"])
def test_gradcheck_without_a_teacher(name):
    student, _, targets = make(3, 5, scale=1.0)

    def total(logits):
        return getattr(distill_stats(logits, None, targets, temperature=0.6), name)

    assert torch.autograd.gradcheck(total, student.requires_grad_(True))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"),
    [(torch.float64, 1e-13, 1e-14), (torch.float32, 2e-6, 2e-6), (torch.bfloat16, 2e-6, 2**-8)],
)
def test_values_and_gradients_equal_the_reference(dtype, temperature, value_error, gradient_error):
    """Of the logits as they are rounded: bfloat16 costs nothing but the rounding of its own gradient."""
    student, teacher, targets = make(16, 300, dtype=dtype, scale=1.5)
    stats = distill_stats(student, teacher, targets, temperature=temperature)
    exact = reference.distill_stats(student, teacher, targets, temperature=temperature)
    check_stats(stats, exact, rtol=value_error, atol=value_error)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(value.dtype == wanted and value.shape == (16,) for value in stats)
    factors = mixed_factors(16)
    ours = gradient(lambda z: distill_stats(z, teacher, targets, temperature=temperature), student, factors)
    of_reference = gradient(
        lambda z: reference.distill_stats(z, teacher, targets, temperature=temperature),
        student.double(),
        factors,
    )
    assert ours.dtype == dtype
    scale = of_reference.abs().max().item()
    torch.testing.assert_close(
        ours.double(), of_reference, rtol=gradient_error, atol=gradient_error * scale + 1e-15
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_of_each_output_alone_equals_the_references(name):
    student, teacher, targets = make(8, 50)
    factors = mixed_factors(8, (name,))
    ours = gradient(lambda z: distill_stats(z, teacher, targets), student, factors)
    exact = gradient(lambda z: reference.distill_stats(z, teacher, targets), student, factors)
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-14)


def test_without_a_teacher_only_the_students_numbers_are_given():
    student, teacher, targets = make()
    alone, both = distill_stats(student, None, targets), distill_stats(student, teacher, targets)
    assert (alone.teacher_logprob, alone.reverse_kl, alone.forward_kl) == (None, None, None)
    assert torch.equal(alone.logprob, both.logprob) and torch.equal(alone.entropy, both.entropy)
    names = ("logprob", "entropy")
    factors = mixed_factors(6, names)
    torch.testing.assert_close(
        gradient(lambda z: distill_stats(z, None, targets), student, factors),
        gradient(lambda z: distill_stats(z, teacher, targets), student, factors),
        rtol=1e-12,
        atol=1e-15,
    )


def test_the_teacher_gets_no_gradient():
    student, teacher, targets = make()
    student.requires_grad_(True)
    teacher.requires_grad_(True)
    stats = distill_stats(student, teacher, targets)
    assert not stats.teacher_logprob.requires_grad
    (stats.reverse_kl + stats.forward_kl + stats.logprob + stats.entropy).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_teacher_and_student_may_differ_in_dtype():
    student, teacher, targets = make(dtype=torch.float32)
    mixed = distill_stats(student, teacher.bfloat16(), targets)
    check_stats(mixed, reference.distill_stats(student, teacher.bfloat16(), targets), rtol=2e-6, atol=2e-6)


def test_a_second_derivative_is_refused_instead_of_being_wrong():
    student, teacher, targets = make()
    student.requires_grad_(True)
    stats = distill_stats(student, teacher, targets)
    (first,) = torch.autograd.grad(stats.entropy.sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.square().sum().backward()


def test_the_layout_of_the_logits_in_memory_does_not_matter():
    student, teacher, targets = make(dtype=torch.float32)
    transposed = [z.T.contiguous().T for z in (student, teacher)]
    wide = [torch.cat([z, z], dim=1)[:, : z.shape[1]] for z in (student, teacher)]
    factors = mixed_factors(6)
    for z_s, z_t in (transposed, wide):
        check_stats(
            distill_stats(z_s, z_t, targets), distill_stats(student, teacher, targets), rtol=0, atol=1e-6
        )
        leaf = z_s.detach().requires_grad_(True)
        stats = distill_stats(leaf, z_t, targets)
        total = sum((getattr(stats, name) * factor).sum() for name, factor in factors.items())
        (grad,) = torch.autograd.grad(total, leaf)
        torch.testing.assert_close(
            grad, gradient(lambda z: distill_stats(z, teacher, targets), student, factors), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_callers_tensors_are_never_modified(dtype, temperature):
    student, teacher, targets = make(dtype=dtype)
    targets = targets % 9
    before = student.clone(), teacher.clone(), targets.clone()
    leaf = student.requires_grad_(True)
    stats = distill_stats(leaf, teacher, targets, vocab_size=9, temperature=temperature)
    sum(getattr(stats, name).sum() for name in DIFFERENTIABLE).backward()
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])
    assert torch.equal(targets, before[2])


# ---- identical and shifted logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_divergences_of_equal_logits_are_exactly_zero_with_zero_gradient(dtype, temperature):
    student, _, targets = make(8, 200, dtype=dtype, scale=6.0)
    stats = distill_stats(student, student.clone(), targets, temperature=temperature)
    assert not stats.reverse_kl.any() and not stats.forward_kl.any()
    assert torch.equal(stats.logprob, stats.teacher_logprob)
    ones = {name: torch.ones(8) for name in ("reverse_kl", "forward_kl")}
    grad = gradient(
        lambda z: distill_stats(z, student.clone(), targets, temperature=temperature), student, ones
    )
    assert grad.abs().max() <= (1e-7 if dtype != torch.float64 else 1e-15)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.5])
@pytest.mark.parametrize("offset", [300.0, -300.0])
def test_a_large_common_offset_costs_no_precision(offset, temperature):
    """Multiples of 2^-12 carry the offset without rounding, so any change would be the kernel's own."""
    student, teacher, targets = (
        (z * 4096).round() / 4096 if z.is_floating_point() else z for z in make(32, 400, dtype=torch.float32)
    )
    factors = mixed_factors(32)
    plain = distill_stats(student, teacher, targets, temperature=temperature)
    shifted = distill_stats(student + offset, teacher - offset, targets, temperature=temperature)
    check_stats(shifted, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        gradient(
            lambda z: distill_stats(z, teacher - offset, targets, temperature=temperature),
            student + offset,
            factors,
        ),
        gradient(lambda z: distill_stats(z, teacher, targets, temperature=temperature), student, factors),
        rtol=0,
        atol=1e-6,
    )


# ---- padding


@pytest.mark.parametrize("filling", [0.0, 1e30, INF, -INF, math.nan])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_what_padding_columns_hold_does_not_matter(filling, with_teacher):
    student, teacher, targets = make()
    padding = torch.full((6, 5), filling, dtype=student.dtype)
    padded_student, padded_teacher = (torch.cat([z, padding], dim=1) for z in (student, teacher))
    plain = distill_stats(student, teacher if with_teacher else None, targets)
    padded = distill_stats(padded_student, padded_teacher if with_teacher else None, targets, vocab_size=11)
    check_stats(padded, plain, rtol=0, atol=0)
    factors = mixed_factors(6, DIFFERENTIABLE if with_teacher else ("logprob", "entropy"))
    grad = gradient(
        lambda z: distill_stats(z, padded_teacher if with_teacher else None, targets, vocab_size=11),
        padded_student,
        factors,
    )
    exact = gradient(lambda z: distill_stats(z, teacher if with_teacher else None, targets), student, factors)
    assert torch.equal(grad[:, :11], exact)
    assert torch.equal(grad[:, 11:], torch.zeros(6, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("vocab_start", "vocab_size", "num_valid"),
    [(0, None, 8), (0, 8, 8), (0, 100, 8), (0, 5, 5), (16, 20, 4), (16, 24, 8), (16, None, 8)],
)
def test_vocab_size_cuts_the_shard_at_a_global_id(vocab_start, vocab_size, num_valid):
    student, teacher, _ = make(4, 8)
    local = torch.tensor([0, num_valid - 1, 1, 2])
    stats = distill_stats(
        student, teacher, local + vocab_start, vocab_start=vocab_start, vocab_size=vocab_size
    )
    check_stats(
        stats,
        reference.distill_stats(student[:, :num_valid], teacher[:, :num_valid], local),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("vocab_size", [10, 16])
def test_a_shard_that_is_all_padding_gets_a_zero_gradient(vocab_size):
    student, teacher, targets = make(4, 8)
    grad = gradient(
        lambda z: distill_stats(z, teacher, targets, vocab_start=16, vocab_size=vocab_size),
        student,
        mixed_factors(4),
    )
    assert torch.equal(grad, torch.zeros(4, 8, dtype=torch.float64))


# ---- infinite logits


def test_a_column_without_probability_on_either_side_contributes_nothing():
    student, teacher, targets = make(6, 11)
    student[:, 3], teacher[:, 3] = -INF, -INF
    targets = torch.where(targets == 3, 4, targets)
    kept = [c for c in range(11) if c != 3]
    narrow = torch.tensor([kept.index(y) for y in targets.tolist()])
    stats = distill_stats(student, teacher, targets)
    check_stats(
        stats, reference.distill_stats(student[:, kept], teacher[:, kept], narrow), rtol=1e-12, atol=1e-14
    )
    factors = mixed_factors(6)
    grad = gradient(lambda z: distill_stats(z, teacher, targets), student, factors)
    exact = gradient(
        lambda z: reference.distill_stats(z, teacher[:, kept], narrow), student[:, kept], factors
    )
    torch.testing.assert_close(grad[:, kept], exact, rtol=1e-11, atol=1e-14)
    assert not grad[:, 3].any()


def test_a_column_that_only_the_student_excludes_leaves_reverse_kl_finite():
    student, teacher, _ = make(6, 11)
    student[:, 3] = -INF
    targets = torch.tensor([3, 0, 1, 2, 4, 5])
    stats = distill_stats(student, teacher, targets)
    p, q = torch.log_softmax(student, dim=1), torch.log_softmax(teacher, dim=1)
    finite = p.exp() * torch.where(p == -INF, 0.0, p - q)
    torch.testing.assert_close(stats.reverse_kl, finite.sum(dim=1), rtol=1e-12, atol=1e-14)
    assert (stats.forward_kl == INF).all()
    assert stats.logprob[0] == -INF and stats.logprob[1:].isfinite().all()
    assert stats.entropy.isfinite().all()
    factors = mixed_factors(6, ("reverse_kl", "entropy"))
    grad = gradient(lambda z: distill_stats(z, teacher, targets), student, factors)
    kept = [c for c in range(11) if c != 3]
    # The reference cannot take the -inf itself: the same distribution with a logit far below all others.
    low = student.clone()
    low[:, 3] = -600.0
    exact = gradient(lambda z: reference.distill_stats(z, teacher, targets), low, factors)
    torch.testing.assert_close(grad[:, kept], exact[:, kept], rtol=1e-10, atol=1e-13)
    assert not grad[:, 3].any()


@pytest.mark.parametrize(
    "names", [("forward_kl",), ("logprob",), ("entropy",), ("logprob", "forward_kl", "entropy")]
)
def test_a_column_that_only_the_teacher_excludes_spoils_reverse_kl_alone(names):
    """As after top-k on the teacher's side: KL(q||p) and its gradient stay what they are."""
    student, teacher, _ = make(6, 11)
    teacher[:, 3] = -INF
    targets = torch.tensor([3, 0, 1, 2, 4, 5])
    stats = distill_stats(student, teacher, targets)
    assert (stats.reverse_kl == INF).all()
    q, p = torch.log_softmax(teacher, dim=1), torch.log_softmax(student, dim=1)
    finite = q.exp() * torch.where(q == -INF, 0.0, q - p)
    torch.testing.assert_close(stats.forward_kl, finite.sum(dim=1), rtol=1e-12, atol=1e-14)
    assert stats.teacher_logprob[0] == -INF
    factors = mixed_factors(6, names)
    low = teacher.clone()
    low[:, 3] = -600.0
    torch.testing.assert_close(
        gradient(lambda z: distill_stats(z, teacher, targets), student, factors),
        gradient(lambda z: reference.distill_stats(z, low, targets), student, factors),
        rtol=1e-10,
        atol=1e-13,
    )


# ---- tiles and sizes


@pytest.mark.parametrize("tile_elements", [1, 11, 12, 25, 65, 66, 1 << 20])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_size_of_the_tiles_does_not_change_the_result(monkeypatch, tile_elements, with_teacher):
    student, teacher, targets = make(6, 11, dtype=torch.float32)
    teacher, targets = teacher if with_teacher else None, targets % 10
    factors = mixed_factors(6, DIFFERENTIABLE if with_teacher else ("logprob", "entropy"))

    def everything():
        stats = distill_stats(student, teacher, targets, vocab_size=10)
        grad = gradient(lambda z: distill_stats(z, teacher, targets, vocab_size=10), student, factors)
        return [value for value in stats if value is not None] + [grad]

    whole = everything()
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", tile_elements)
    for tiled, expected in zip(everything(), whole, strict=True):
        torch.testing.assert_close(tiled, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_tokens_give_empty_statistics_and_an_empty_gradient(with_teacher):
    student, teacher, targets = make(0, 11, dtype=torch.float32)
    student.requires_grad_(True)
    stats = distill_stats(student, teacher if with_teacher else None, targets)
    assert all(value is None or value.shape == (0,) for value in stats)
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert student.grad.shape == (0, 11)


def test_one_column_is_certain():
    student, teacher, targets = make(3, 1)
    stats = distill_stats(student, teacher, targets)
    assert all(torch.equal(value, torch.zeros(3, dtype=torch.float64)) for value in stats)


# ---- errors


def test_shapes_that_do_not_fit_are_refused():
    student, teacher, targets = make(6, 11)
    with pytest.raises(ValueError, match=r"student_logits has shape \(11,\); expected \[T, V_local\]"):
        distill_stats(student[0], None, targets)
    with pytest.raises(
        ValueError, match="teacher_logits covers 10 token ids but student_logits 11; build both models"
    ):
        distill_stats(student, teacher[:, :10], targets)
    with pytest.raises(ValueError, match=r"targets has shape \(5,\); expected \[6\]"):
        distill_stats(student, teacher, targets[:5])
    with pytest.raises(ValueError, match=r"targets has shape \(6, 1\); expected \[6\]"):
        distill_stats(student, teacher, targets[:, None])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    student, teacher, targets = make()
    with pytest.raises(ValueError, match=f"temperature is {temperature}; expected a positive number"):
        distill_stats(student, teacher, targets, temperature=temperature)


def test_targets_outside_the_vocabulary_are_refused():
    student, teacher, targets = make(6, 11)
    with pytest.raises(ValueError, match=r"targets has ids from .* to 11; .* in \[0, vocab_size=11\)"):
        distill_stats(student, teacher, targets.clone().fill_(11), vocab_size=11)
    with pytest.raises(ValueError, match="targets has ids from -1 to -1; expected global ids of 0 or more"):
        distill_stats(student, teacher, targets.clone().fill_(-1))
    with pytest.raises(ValueError, match=r"targets has dtype torch\.int32; expected torch\.int64"):
        distill_stats(student, teacher, targets.int())


def test_a_target_that_no_shard_holds_has_no_probability():
    student, teacher, targets = make(6, 11)
    stats = distill_stats(student, teacher, targets, vocab_start=11)
    assert (stats.logprob == -INF).all() and (stats.teacher_logprob == -INF).all()


# ---- tables of different length


@pytest.mark.parametrize("columns", [(11, 14), (14, 11), (12, 14)])
def test_on_one_rank_logits_of_different_length_share_the_smaller_vocabulary(columns):
    student, teacher, targets = make(6, 14)
    wide = student[:, : columns[0]], teacher[:, : columns[1]]
    stats = distill_stats(*wide, targets % 11, vocab_size=11)
    check_stats(stats, distill_stats(student[:, :11], teacher[:, :11], targets % 11), rtol=0, atol=0)
