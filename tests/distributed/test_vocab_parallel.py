"""distill_stats over real gloo shards equals the whole vocabulary on one rank."""

from __future__ import annotations

import pytest
import torch

from megatron_scope.kernels import reference

SHARDS = {
    "one": [13],
    "two": [7, 6],
    "three, the last all padding": [6, 5, 2],
    "four, two of them all padding": [10, 1, 1, 1],
}


@pytest.mark.parametrize("columns", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize("with_teacher", [True, False])
def test_shards_equal_the_whole(pool, columns, with_teacher):
    vocab_size = 11 if len(columns) > 1 else 13
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(6, 13, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(6, 13, generator=generator, dtype=torch.float64) if with_teacher else None
    student[:, vocab_size:] = float("-inf")  # what padding columns hold must not matter
    targets = torch.randint(0, vocab_size, (6,), generator=generator)
    num_outputs = 4 if with_teacher else 2
    upstream = list(torch.randn(num_outputs, 6, generator=generator, dtype=torch.float64))

    arguments = (student, teacher, targets, columns, vocab_size, upstream, 0.7)
    results = pool(len(columns)).run("tests.helpers.jobs:vocab_parallel_stats", *arguments)

    whole = student[:, :vocab_size].clone().requires_grad_()
    cut = None if teacher is None else teacher[:, :vocab_size]
    expected = reference.distill_stats(whole, cut, targets, temperature=0.7)
    torch.autograd.backward(
        [value for value in expected if value is not None and value.requires_grad], upstream
    )
    for stats, _ in results:
        for got, want in zip(stats, expected, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want.detach(), atol=1e-12, rtol=1e-12)
    gradient = torch.cat([grad for _, grad in results], dim=1)
    torch.testing.assert_close(gradient[:, :vocab_size], whole.grad, atol=1e-12, rtol=1e-12)
    assert torch.equal(gradient[:, vocab_size:], torch.zeros(6, 13 - vocab_size, dtype=torch.float64))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_hold_the_same_bits(pool, num_ranks):
    generator = torch.Generator().manual_seed(1)
    student, teacher = 5 * torch.randn(2, 9, 8 * num_ranks, generator=generator)
    targets = torch.randint(0, 8 * num_ranks, (9,), generator=generator)
    upstream = [torch.ones(9)] * 4
    arguments = (student, teacher, targets, [8] * num_ranks, 8 * num_ranks, upstream, 1.0)
    results = pool(num_ranks).run("tests.helpers.jobs:vocab_parallel_stats", *arguments)
    for stats, _ in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(stats, results[0][0], strict=True))


@pytest.mark.parametrize("columns", SHARDS.values(), ids=SHARDS.keys())
def test_the_jensen_shannon_divergence_of_shards_equals_the_wholes(pool, columns):
    vocab_size = 11 if len(columns) > 1 else 13
    student, teacher = 3 * torch.randn(2, 6, 13, generator=torch.Generator().manual_seed(0)).double()
    teacher[:, vocab_size:] = float("-inf")
    settings = {"teacher_weight": 0.3, "temperature": 0.7}
    results = pool(len(columns)).run(
        "tests.helpers.jobs:jensen_shannon", student, teacher, columns, vocab_size, settings
    )
    whole = student[:, :vocab_size].clone().requires_grad_()
    expected = reference.jensen_shannon(whole, teacher[:, :vocab_size], **settings)
    expected.sum().backward()
    for jsd, _ in results:
        torch.testing.assert_close(jsd, expected.detach(), atol=1e-13, rtol=1e-12)
        assert torch.equal(jsd, results[0][0])
    gradient = torch.cat([grad for _, grad in results], dim=1)
    torch.testing.assert_close(gradient[:, :vocab_size], whole.grad, atol=1e-13, rtol=1e-12)
    assert not gradient[:, vocab_size:].any()


def test_the_forward_pass_makes_one_all_gather_and_the_backward_pass_none(pool):
    for forward, backward in pool(2).run("tests.helpers.jobs:vocab_parallel_collectives", [5, 3]):
        assert forward == {"all_gather": 1} and backward == {}


def test_a_group_without_this_rank_is_refused(pool):
    _, message = pool(2).run("tests.helpers.jobs:error_of_a_group_without_this_rank")
    assert message == "rank 1 is not in group [0]; pass this rank's own tensor-parallel group"
