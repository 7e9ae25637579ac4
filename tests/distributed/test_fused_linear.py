"""distill_loss over real gloo shards equals the whole vocabulary on one rank."""

from __future__ import annotations

import pytest
import torch

from megatron_scope.kernels import reference
from megatron_scope.kernels.fused_linear import Coefficients

NUM_TOKENS, VOCAB_SIZE = 7, 11
SHARDS = {
    "one": [13],
    "two": [7, 6],
    "three, the last all padding": [6, 5, 2],
    "four, two of them all padding": [10, 1, 1, 1],
}


def make(num_tokens=NUM_TOKENS, dtype=torch.float64):
    """Inputs with tables of 13 rows, 11 of which count, targets on every shard, and mixed coefficients."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (
        torch.randn(num_tokens, d, generator=generator, dtype=torch.float64).to(dtype) for d in (5, 8)
    )
    weight, teacher_weight = (
        torch.randn(13, d, generator=generator, dtype=torch.float64).to(dtype) for d in (5, 8)
    )
    weight[VOCAB_SIZE:], teacher_weight[VOCAB_SIZE:] = float("-inf"), float("nan")
    targets = torch.arange(num_tokens) * 3 % VOCAB_SIZE
    factors = torch.randn(6, num_tokens, generator=generator, dtype=torch.float64)
    return (hidden, weight, teacher_hidden, teacher_weight, targets), Coefficients(*factors)


def expected(inputs, coefficients, **settings):
    """(loss, statistics, gradient of the hidden states, gradient of the table) by the reference."""
    hidden, weight = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    loss, stats = reference.distill_loss(hidden, weight, *inputs[2:], coefficients, **settings)
    loss.backward()
    return loss.detach(), [None if value is None else value.detach() for value in stats[:6]], hidden, weight


def check(results, whole, *, hidden_grads):
    """Every rank has the whole's loss, statistics and bits; the ranks' gradients make up the whole's."""
    loss, stats, hidden, weight = whole
    for result in results:
        torch.testing.assert_close(result["loss"], loss, atol=1e-12, rtol=1e-12)
        for mine, first, want in zip(result["stats"], results[0]["stats"], stats, strict=True):
            assert (mine is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(mine, want, atol=1e-12, rtol=1e-12)
                assert torch.equal(mine, first)
        assert torch.equal(result["loss"], results[0]["loss"])
    for grad in hidden_grads:
        torch.testing.assert_close(grad, hidden.grad, atol=1e-12, rtol=1e-11)
    table = torch.cat([result["weight_grad"] for result in results])
    torch.testing.assert_close(table[:VOCAB_SIZE], weight.grad[:VOCAB_SIZE], atol=1e-12, rtol=1e-11)
    assert not table[VOCAB_SIZE:].any()


@pytest.mark.parametrize("rows", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize("with_teacher", [True, False])
def test_shards_equal_the_whole(pool, rows, with_teacher):
    inputs, coefficients = make()
    if not with_teacher:
        inputs = (*inputs[:2], None, None, inputs[4])
        coefficients = Coefficients(logprob=coefficients.logprob, entropy=coefficients.entropy)
    settings = {"vocab_size": VOCAB_SIZE, "temperature": 0.7, "jsd_weight": 0.3}
    results = pool(len(rows)).run(
        "tests.helpers.jobs:fused_loss", inputs, coefficients, rows, settings | {"chunk_tokens": 3}
    )
    check(
        results,
        expected(inputs, coefficients, **settings),
        hidden_grads=[result["hidden_grad"] for result in results],
    )


SEQUENCES = {
    "even": {"student": [4, 4]},
    "even, the teacher's too": {"student": [4, 4], "teacher": [4, 4]},
    "uneven": {"student": [5, 3], "teacher": [2, 6]},
    "none on one rank": {"student": [0, 8], "teacher": [8, 0]},
}


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_a_sequence_spread_over_the_ranks_equals_the_whole(pool, sequence):
    inputs, coefficients = make(8)
    results = pool(2).run(
        "tests.helpers.jobs:fused_loss",
        inputs,
        coefficients,
        [7, 6],
        {"vocab_size": VOCAB_SIZE, "chunk_tokens": 3},
        sequence,
    )
    assert [len(result["hidden_grad"]) for result in results] == sequence["student"]
    check(
        results,
        expected(inputs, coefficients, vocab_size=VOCAB_SIZE),
        hidden_grads=[torch.cat([result["hidden_grad"] for result in results])],
    )


@pytest.mark.parametrize("sequence", [None, {"student": [0, 0], "teacher": [0, 0]}])
def test_no_tokens_on_any_rank(pool, sequence):
    inputs, coefficients = make(0)
    results = pool(2).run(
        "tests.helpers.jobs:fused_loss",
        inputs,
        coefficients,
        [7, 6],
        {"vocab_size": VOCAB_SIZE},
        sequence,
    )
    for result in results:
        assert result["loss"] == 0 and result["hidden_grad"].shape == (0, 5)
        assert not result["weight_grad"].any()


def test_rows_that_do_not_add_up_to_the_targets_are_refused(pool):
    inputs, coefficients = make(8)
    with pytest.raises(ValueError, match="student_hidden of all ranks has 7 rows but targets 8"):
        pool(2).run("tests.helpers.jobs:fused_loss", inputs, coefficients, [7, 6], {}, {"student": [4, 3]})


def test_each_chunk_makes_one_all_gather_and_the_backward_pass_no_collective(pool):
    inputs, coefficients = make(8)
    without_jsd = coefficients._replace(jsd=None)
    settings = {"vocab_size": VOCAB_SIZE, "chunk_tokens": 3}
    run = pool(2).run
    for result in run("tests.helpers.jobs:fused_loss", inputs, without_jsd, [7, 6], settings):
        assert result["forward"] == {"all_gather": 3, "all_reduce": 1} and result["backward"] == {}
    for result in run("tests.helpers.jobs:fused_loss", inputs, coefficients, [7, 6], settings):
        assert result["forward"] == {"all_gather": 6, "all_reduce": 1} and result["backward"] == {}


def test_two_ranks_equal_one_in_bfloat16(pool):
    """Statistics to float32's rounding; the hidden states' gradient to one more rounding to bfloat16."""
    inputs, coefficients = make(dtype=torch.bfloat16)
    settings = {"vocab_size": VOCAB_SIZE}
    (one,) = pool(1).run("tests.helpers.jobs:fused_loss", inputs, coefficients, [13], settings)
    two = pool(2).run("tests.helpers.jobs:fused_loss", inputs, coefficients, [7, 6], settings)
    for result in two:
        for mine, want in zip(result["stats"], one["stats"], strict=True):
            torch.testing.assert_close(mine, want, atol=5e-6, rtol=2e-6)
        scale = one["hidden_grad"].abs().max().item()
        torch.testing.assert_close(result["hidden_grad"], one["hidden_grad"], atol=2**-7 * scale, rtol=0)
    table = torch.cat([result["weight_grad"] for result in two])
    torch.testing.assert_close(
        table, one["weight_grad"], atol=2**-8 * one["weight_grad"].abs().max().item(), rtol=0
    )
