"""The statistics of simulated shards, joined, against the float64 reference of the whole vocabulary."""

import math

import pytest
import torch

from megatron_scope.kernels import reference, tiles
from megatron_scope.kernels.tiles import Shard
from megatron_scope.kernels.vocab_parallel import DistillStats, distill_stats
from tests.unit.kernels.logits import INF, check_stats, make


def parts_of(student, teacher, targets, widths, *, vocab_size=None, temperature=1.0):
    """The local statistics [G, T, 4 or 9] of consecutive shards."""
    total = sum(widths)
    assert total == student.shape[1]
    parts, start = [], 0
    for width in widths:
        valid = max(0, min((total if vocab_size is None else vocab_size) - start, width))
        columns = slice(start, start + width)
        part = tiles.local_statistics(
            student[:, columns],
            None if teacher is None else teacher[:, columns],
            targets,
            Shard(start, valid, temperature, group=None),
            student.dtype,
        )
        parts.append(part)
        start += width
    return torch.stack(parts)


def sharded(student, teacher, targets, widths, *, vocab_size=None, temperature=1.0):
    """Joined statistics [T, 4 or 9] of consecutive shards, as every rank would have them."""
    parts = parts_of(student, teacher, targets, widths, vocab_size=vocab_size, temperature=temperature)
    return tiles.join(parts, temperature)


def as_stats(joined, temperature=1.0):
    """The definitions of KERNEL's fields, spelt out once more."""
    m_s, total_s, moment, y_s = joined[:, :4].unbind(1)
    logprob, entropy = (y_s - m_s) / temperature - total_s.log(), total_s.log() - moment / total_s
    if joined.shape[1] == 4:
        return DistillStats(logprob, None, None, None, entropy)
    cross, m_t, total_t, cross_t, y_t = joined[:, 4:].unbind(1)
    return DistillStats(
        logprob,
        (y_t - m_t) / temperature - total_t.log(),
        cross / total_s - total_s.log() + total_t.log(),
        cross_t / total_t - total_t.log() + total_s.log(),
        entropy,
    )


WIDTHS = [
    (12,),
    (6, 6),
    (1, 11),
    (11, 1),
    (4, 4, 4),
    (3, 3, 3, 3),
    (0, 12),
    (12, 0),
    (5, 0, 7),
    (0, 0, 6, 6),
    (1, 1, 9, 1),
]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_shards_join_to_the_statistics_of_the_whole(widths, with_teacher, temperature):
    student, teacher, targets = make(9, 12, scale=5.0)
    teacher = teacher if with_teacher else None
    joined = sharded(student, teacher, targets, widths, temperature=temperature)
    exact = reference.distill_stats(student, teacher, targets, temperature=temperature)
    check_stats(as_stats(joined, temperature), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 7, 8, 9, 12])
@pytest.mark.parametrize("filling", [0.0, -INF, math.nan])
def test_shards_that_are_partly_or_wholly_padding_join_to_the_valid_vocabulary(vocab_size, filling):
    student, teacher, targets = make(9, 12)
    targets = targets % vocab_size
    student[:, vocab_size:], teacher[:, vocab_size:] = filling, filling
    joined = sharded(student, teacher, targets, (4, 4, 4), vocab_size=vocab_size)
    exact = reference.distill_stats(student[:, :vocab_size], teacher[:, :vocab_size], targets)
    check_stats(as_stats(joined), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_order_of_magnitude_between_shards_joins_in_float32(widths):
    """Shards whose maxima lie far apart: the smaller one underflows and must vanish without a trace."""
    student, teacher, targets = make(9, 12, dtype=torch.float32)
    student[:, :6] += 200
    teacher[:, 6:] += 200
    student[4:, 6:] -= 300
    exact = reference.distill_stats(student, teacher, targets)
    check_stats(as_stats(sharded(student, teacher, targets, widths)), exact, rtol=2e-6, atol=5e-5)


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("widths", [(12,), (4, 4, 4), (3, 3, 3, 3), (6, 0, 6)], ids=str)
def test_a_shard_without_any_probability_joins_like_any_other(side, widths):
    """All valid logits of columns 0-3 are -inf, which for (4, 4, 4) and (3, 3, 3, 3) is a whole shard."""
    student, teacher, targets = make(9, 12)
    targets = targets % 8 + 4
    if side in ("student", "both"):
        student[:, :4] = -INF
    if side in ("teacher", "both"):
        teacher[:, :4] = -INF
    stats = as_stats(sharded(student, teacher, targets, widths))
    low_student, low_teacher = (torch.where(z == -INF, -600.0, z) for z in (student, teacher))
    exact = reference.distill_stats(low_student, low_teacher, targets)
    infinite = torch.full((9,), INF, dtype=torch.float64)
    check_stats(
        stats,
        exact._replace(
            reverse_kl=infinite if side == "teacher" else exact.reverse_kl,
            forward_kl=infinite if side == "student" else exact.forward_kl,
        ),
        rtol=1e-11,
        atol=1e-13,
    )


def test_an_infinite_ratio_where_no_probability_is_left_contributes_nothing_in_shards_either():
    """Columns 0-3 hold no student probability in float32; what the teacher excludes there costs nothing."""
    student, teacher, targets = make(9, 12, dtype=torch.float32)
    targets = targets % 8 + 4
    student[:, :4] -= 500
    teacher[:, 2] = -INF
    whole = distill_stats(student, teacher, targets)
    assert whole.reverse_kl.isfinite().all()
    check_stats(as_stats(sharded(student, teacher, targets, (4, 4, 4))), whole, rtol=2e-6, atol=5e-5)
    swapped = distill_stats(teacher, student, targets)
    assert swapped.forward_kl.isfinite().all()
    check_stats(as_stats(sharded(teacher, student, targets, (4, 4, 4))), swapped, rtol=2e-6, atol=5e-5)


def test_joining_does_not_change_its_input():
    student, teacher, targets = make(9, 12)
    parts = parts_of(student, teacher, targets, (6, 6))
    before = parts.clone()
    tiles.join(parts, 1.0)
    assert torch.equal(parts, before)


def test_a_target_counts_once_whichever_shard_owns_it():
    student, teacher, _ = make(12, 12)
    targets = torch.arange(12)
    whole = sharded(student, teacher, targets, (12,))
    joined = sharded(student, teacher, targets, (5, 0, 3, 4))
    assert torch.equal(joined[:, 3], student.diagonal()) and torch.equal(joined[:, 8], teacher.diagonal())
    assert torch.equal(whole[:, 3], joined[:, 3])


def test_no_tokens_join_to_no_tokens():
    student, teacher, targets = make(0, 12)
    assert sharded(student, teacher, targets, (4, 4, 4)).shape == (0, 9)
    assert sharded(student, None, targets, (4, 4, 4)).shape == (0, 4)
