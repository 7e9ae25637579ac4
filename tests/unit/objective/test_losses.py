"""The token losses against Eq. 1-3 and 6 of arXiv:2604.10688 and against GRPO's, gradients by hand in
float64.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_scope.config.schema import CorrectPath, Divergence, ObjectiveConfig, ObjectiveName
from megatron_scope.objective import build_objective
from megatron_scope.objective.losses import (
    TokenTerms,
    clipped_surrogate,
    corrected,
    distillation_surrogate,
    divergence_loss,
    likelihood_loss,
    policy_gradient_loss,
    reference_kl,
)

VOCAB = 7
LENGTHS = (4, 1, 3, 2, 5)
CORRECT = (True, False, False, True, False)
WEIGHTS = (0.3, 0.9, 0.1, 0.7, 1.0)  # of two prompts: responses 0-3 and response 4
NUM_PROMPTS = 2
ADVANTAGES = (0.8, -1.1, 0.4, 0.9, -0.6)
KL_COEFFICIENT = 0.3

scope_loss = build_objective(ObjectiveConfig()).token_loss
official_loss = build_objective(ObjectiveConfig(correct_path=CorrectPath.LOG_LIKELIHOOD)).token_loss
exact_scope_loss = build_objective(ObjectiveConfig(divergence=Divergence.REVERSE_KL)).token_loss
clipped_policy_gradient = build_objective(ObjectiveConfig(name=ObjectiveName.GRPO, ratio_clip=0.2)).token_loss
LOSSES = [scope_loss, official_loss, likelihood_loss, distillation_surrogate, policy_gradient_loss]


class Batch:
    """Random logits of every response token, the sampled tokens, and what the other two policies gave."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.response = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
        total = len(self.response)
        self.logits = random.normal(size=(total, VOCAB)) * 2
        self.tokens = random.integers(0, VOCAB, total)
        self.teacher = np.log(random.uniform(0.01, 0.9, total))
        self.old = self.current() + random.normal(size=total) * 0.4
        self.reference = self.current() + random.normal(size=total) * 0.7
        self.engine = self.current() + random.normal(size=total) * 0.6
        self.at_rollout = self.current() + random.normal(size=total) * 0.3
        self.correct = np.array(CORRECT)[self.response]
        self.advantage = np.array(ADVANTAGES)[self.response] / total
        self.coefficient = np.array(WEIGHTS)[self.response] / NUM_PROMPTS

    def probabilities(self):
        exponentials = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def current(self):
        return np.log(self.probabilities()[np.arange(len(self.tokens)), self.tokens])

    def score(self):
        """d log pi(token) / d logits, [T, V]."""
        score = -self.probabilities()
        score[np.arange(len(self.tokens)), self.tokens] += 1.0
        return score

    def run(self, loss, *, old=None, at_rollout=None, dtype=torch.float64, rows=slice(None)):
        """Value, gradient [T, V] and terms of a loss on some rows."""
        logits = torch.tensor(self.logits[rows], dtype=dtype, requires_grad=True)
        tokens = torch.tensor(self.tokens[rows])

        def chosen(values):
            return torch.tensor(values[rows], dtype=dtype)

        terms = TokenTerms(
            logprob=torch.log_softmax(logits, dim=1).gather(1, tokens[:, None])[:, 0],
            divergence=(torch.softmax(logits, dim=1) ** 2).sum(dim=1),  # no matter which token was drawn
            old_logprob=None if old is None else chosen(old),
            teacher_logprob=chosen(np.where(self.correct, 0.0, self.teacher)),
            reference_logprob=chosen(self.reference),
            likelihood=chosen(np.where(self.correct, self.coefficient, 0.0)),
            distill=chosen(np.where(self.correct, 0.0, self.coefficient)),
            advantage=chosen(self.advantage),
            reference_kl=chosen(np.full(len(self.tokens), KL_COEFFICIENT / len(self.tokens))),
            engine_logprob=chosen(self.engine),
            rollout_logprob=None if at_rollout is None else chosen(at_rollout),
        )
        value = loss(terms)
        (gradient,) = torch.autograd.grad(value, logits)
        return value, gradient.numpy()


def equation_six(batch, old):
    """The objective and its gradient, prompt by prompt and token by token."""
    current, score = batch.current(), batch.score()
    value, gradient = 0.0, np.zeros_like(batch.logits)
    for prompt in ((0, 1, 2, 3), (4,)):
        for i in prompt:
            for t in np.flatnonzero(batch.response == i):
                ratio = math.exp(current[t] - old[t])  # Eq. 1
                # Eq. 2 and Eq. 3.
                factor = -ratio if CORRECT[i] else ratio * (current[t] - batch.teacher[t])
                value += WEIGHTS[i] * factor / NUM_PROMPTS
                # The bracket of Eq. 3 is detached, so only the ratio has a gradient: rho times the score.
                gradient[t] += WEIGHTS[i] * factor * score[t] / NUM_PROMPTS
    return value, gradient


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("old_given", [False, True])
def test_scope_loss_and_gradient_are_those_of_equation_six(seed, old_given):
    batch = Batch(seed)
    old = batch.old if old_given else batch.current()
    value, gradient = batch.run(scope_loss, old=batch.old if old_given else None)
    expected, expected_gradient = equation_six(batch, old)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_without_old_logprobs_the_ratio_is_one_and_its_gradient_that_of_the_current_policy(seed):
    batch = Batch(seed)
    value, gradient = batch.run(scope_loss)
    same_value, same_gradient = batch.run(scope_loss, old=batch.current())
    assert value.item() == pytest.approx(same_value.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, same_gradient, rtol=1e-12, atol=1e-15)


def test_at_the_old_policy_the_correct_paths_gradient_is_that_of_weighted_likelihood():
    batch = Batch()
    _, gradient = batch.run(scope_loss)
    _, of_likelihood = batch.run(likelihood_loss)
    np.testing.assert_allclose(gradient[batch.correct], of_likelihood[batch.correct], rtol=1e-12, atol=1e-15)
    assert np.abs(gradient[batch.correct]).max() > 0.01


def test_at_the_old_policy_the_correct_paths_value_only_counts_tokens():
    """Eq. 2 is -sum rho, so its value is -c |y| whatever the log-probs: metrics must not lean on it."""
    batch = Batch()
    value, _ = batch.run(scope_loss, rows=batch.correct)
    assert value.item() == pytest.approx(-batch.coefficient[batch.correct].sum(), rel=1e-14)


def test_at_the_old_policy_the_incorrect_paths_gradient_is_a_policy_gradient():
    """grad = -sum c A grad log pi with the advantage A = log pi_T - log pi."""
    batch = Batch()
    _, gradient = batch.run(scope_loss)
    advantage = batch.teacher - batch.current()
    expected = -(batch.coefficient * advantage)[:, None] * batch.score()
    np.testing.assert_allclose(gradient[~batch.correct], expected[~batch.correct], rtol=1e-11, atol=1e-15)


def test_the_incorrect_path_is_a_one_sample_estimator_of_reverse_kl():
    """Averaged over the student's own samples, the gradient is that of KL(pi || pi_T)."""
    torch.manual_seed(0)
    logits = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.randn(VOCAB, dtype=torch.float64), dim=0)
    logprobs = torch.log_softmax(logits, dim=0)
    zeros = torch.zeros(VOCAB, dtype=torch.float64)
    chance = logprobs.exp().detach()
    terms = TokenTerms(logprobs, zeros, None, teacher, zeros, zeros, chance, zeros, zeros, zeros)
    (estimated,) = torch.autograd.grad(scope_loss(terms), logits, retain_graph=True)
    kl = (logprobs.exp() * (logprobs - teacher)).sum()
    (exact,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(estimated, exact, rtol=1e-12, atol=1e-14)
    assert scope_loss(terms).item() == pytest.approx(kl.item(), rel=1e-12)


def test_likelihood_loss_is_weighted_nll_of_correct_tokens_only():
    batch = Batch()
    value, gradient = batch.run(likelihood_loss)
    coefficient = np.where(batch.correct, batch.coefficient, 0.0)
    assert value.item() == pytest.approx(-(coefficient * batch.current()).sum(), rel=1e-13)
    np.testing.assert_allclose(gradient, -coefficient[:, None] * batch.score(), rtol=1e-12, atol=1e-15)
    assert not gradient[~batch.correct].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [math.inf, 0.2])
def test_the_policy_gradient_is_grpos_clipped_surrogate_with_the_k3_kl(seed, clip):
    batch = Batch(seed)
    value, gradient = batch.run(lambda terms: policy_gradient_loss(terms, clip), old=batch.old)
    current, score, clipped = batch.current(), batch.score(), 0
    expected, expected_gradient = 0.0, np.zeros_like(batch.logits)
    for t, advantage in enumerate(batch.advantage):
        ratio, c = math.exp(current[t] - batch.old[t]), KL_COEFFICIENT / len(batch.tokens)
        held = min(max(ratio, 1 - clip), 1 + clip)
        difference = batch.reference[t] - current[t]
        expected += -min(ratio * advantage, held * advantage) + c * (math.exp(difference) - difference - 1)
        # A clipped token has no gradient but the KL's, whose derivative is 1 - exp(difference).
        moves = ratio * advantage <= held * advantage
        clipped += not moves
        expected_gradient[t] = (-ratio * advantage * moves + c * (1 - math.exp(difference))) * score[t]
    assert (clipped > 0) == (clip < 1)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def test_clipping_holds_a_ratio_only_where_going_on_would_raise_the_surrogate():
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    surrogate = clipped_surrogate(ratio, advantage, 0.2)
    assert surrogate.tolist() == [0.5, -0.8, 1.0, 1.2, -1.5]
    surrogate.sum().backward()
    assert ratio.grad.tolist() == [1.0, 0.0, 1.0, 0.0, -1.0]
    assert torch.equal(clipped_surrogate(ratio, advantage), ratio * advantage)


def test_scope_may_clip_both_of_its_ratios():
    batch = Batch()
    clip = 0.1
    value, _ = batch.run(build_objective(ObjectiveConfig(ratio_clip=clip)).token_loss, old=batch.old)
    current, expected = batch.current(), 0.0
    for t, coefficient in enumerate(batch.coefficient):
        ratio = math.exp(current[t] - batch.old[t])
        advantage = 1.0 if batch.correct[t] else batch.teacher[t] - current[t]
        held = min(max(ratio, 1 - clip), 1 + clip)
        expected -= coefficient * min(ratio * advantage, held * advantage)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_the_official_correct_path_is_plain_log_likelihood_whatever_the_ratio():
    batch = Batch()
    value, gradient = batch.run(official_loss, old=batch.old)
    correct = batch.correct
    _, of_scope = batch.run(scope_loss, old=batch.old)
    np.testing.assert_allclose(
        gradient[correct], -batch.coefficient[correct][:, None] * batch.score()[correct], rtol=1e-12
    )
    np.testing.assert_allclose(gradient[~correct], of_scope[~correct], rtol=1e-12, atol=1e-15)
    incorrect, _ = batch.run(scope_loss, old=batch.old, rows=~correct)
    nll = -(batch.coefficient * batch.current())[correct].sum()
    assert value.item() == pytest.approx(nll + incorrect.item(), rel=1e-12)


@pytest.mark.parametrize("name", list(ObjectiveName))
def test_at_the_old_policy_clipping_changes_no_gradient(name):
    batch = Batch()
    batch.old = batch.current()
    _, free = batch.run(build_objective(ObjectiveConfig(name=name)).token_loss, old=batch.old)
    _, held = batch.run(build_objective(ObjectiveConfig(name=name, ratio_clip=0.2)).token_loss, old=batch.old)
    np.testing.assert_allclose(held, free, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("old_given", [False, True])
def test_losses_of_parts_add_up_to_the_loss_of_the_whole(loss, old_given):
    batch = Batch()
    old = batch.old if old_given else None
    value, gradient = batch.run(loss, old=old)
    parts = [batch.run(loss, old=old, rows=batch.response == i) for i in range(len(LENGTHS))]
    assert math.fsum(part.item() for part, _ in parts) == pytest.approx(value.item(), rel=1e-13)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_micro_batch_without_rows_has_loss_zero_and_can_go_backward(loss):
    value, gradient = Batch().run(loss, rows=slice(0, 0))
    assert value.item() == 0.0 and gradient.shape == (0, VOCAB)


def test_a_token_on_no_path_has_no_gradient():
    batch = Batch()
    batch.coefficient = np.where(batch.response == 2, 0.0, batch.coefficient)
    _, gradient = batch.run(scope_loss)
    assert not gradient[batch.response == 2].any()
    assert gradient[batch.response != 2].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_terms_give_the_float64_result_to_float32_precision(loss):
    batch = Batch()
    value, gradient = batch.run(loss, dtype=torch.float32)
    exact, exact_gradient = batch.run(loss)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=2e-6)
    np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-4, atol=1e-6)


# ---- the correction of the engine's draws


CAP = 1.3


def kl_to_the_initial_student(terms):
    return (terms.reference_kl * reference_kl(terms)).sum()


# Each loss with what of it is no expectation over the draws.
PARTS = {
    scope_loss: None,
    official_loss: None,
    likelihood_loss: None,
    distillation_surrogate: None,
    divergence_loss: divergence_loss,
    exact_scope_loss: divergence_loss,
    policy_gradient_loss: kl_to_the_initial_student,
    clipped_policy_gradient: kl_to_the_initial_student,
}


@pytest.mark.parametrize(("loss", "rest_of"), PARTS.items())
@pytest.mark.parametrize("at_rollout_given", [False, True])
@pytest.mark.parametrize("old_given", [False, True])
def test_each_drawn_token_counts_by_its_truncated_ratio_and_nothing_else_does(
    loss, rest_of, old_given, at_rollout_given
):
    batch = Batch()
    options = {
        "old": batch.old if old_given else None,
        "at_rollout": batch.at_rollout if at_rollout_given else None,
    }
    value, gradient = batch.run(corrected(loss, CAP), **options)
    ratio = np.exp((batch.at_rollout if at_rollout_given else batch.current()) - batch.engine)
    assert 0.2 < (ratio > CAP).mean() < 0.8
    expected, expected_gradient = 0.0, []
    for t, factor in enumerate(np.minimum(ratio, CAP)):
        whole, of_whole = batch.run(loss, **options, rows=slice(t, t + 1))
        rest, of_rest = torch.zeros(()), np.zeros_like(of_whole)
        if rest_of:
            rest, of_rest = batch.run(rest_of, **options, rows=slice(t, t + 1))
        expected += factor * (whole - rest).item() + rest.item()
        expected_gradient.append(factor * (of_whole - of_rest) + of_rest)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, np.concatenate(expected_gradient), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", PARTS)
def test_an_engine_that_agrees_with_the_trainer_is_not_corrected(loss):
    batch = Batch()
    batch.engine = batch.current()
    value, gradient = batch.run(loss)
    same_value, same_gradient = batch.run(corrected(loss, 1.0))
    assert value.item() == pytest.approx(same_value.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, same_gradient, rtol=1e-12, atol=1e-15)


def over_the_engines_draws(cap):
    """The gradient that the sampled reverse KL has on average over an engine's draws, and the exact one."""
    torch.manual_seed(0)
    logits = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    teacher, engine = torch.log_softmax(torch.randn(2, VOCAB, dtype=torch.float64), dim=1)
    logprobs = torch.log_softmax(logits, dim=0)
    zeros = torch.zeros(VOCAB, dtype=torch.float64)
    terms = TokenTerms(logprobs, zeros, None, teacher, zeros, zeros, engine.exp(), zeros, zeros, engine)
    loss = distillation_surrogate if cap is None else corrected(distillation_surrogate, cap)
    (average,) = torch.autograd.grad(loss(terms), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits)
    return average, exact


def test_corrected_draws_of_another_engine_estimate_the_students_reverse_kl():
    average, exact = over_the_engines_draws(cap=1e9)
    torch.testing.assert_close(average, exact, rtol=1e-12, atol=1e-14)


def test_a_lower_cap_leaves_more_of_the_bias():
    biases = [
        float((average - exact).norm())
        for average, exact in map(over_the_engines_draws, (8.0, 2.0, 1.2, None))
    ]
    assert all(lower < higher for lower, higher in itertools.pairwise(biases))


def test_a_token_that_the_engine_deemed_impossible_counts_by_the_cap():
    batch = Batch()
    batch.engine = batch.current() - 1000.0
    value, gradient = batch.run(corrected(scope_loss, 2.0))
    plain, plain_gradient = batch.run(scope_loss)
    assert value.item() == pytest.approx(2 * plain.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, 2 * plain_gradient, rtol=1e-12)
