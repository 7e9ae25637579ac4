"""The token losses against Eq. 1-3 and 6 of arXiv:2604.10688, gradients worked out by hand in float64."""

import math

import numpy as np
import pytest
import torch

from megatron_scope.objective.losses import TokenTerms, likelihood_loss, scope_loss

VOCAB = 7
LENGTHS = (4, 1, 3, 2, 5)
CORRECT = (True, False, False, True, False)
WEIGHTS = (0.3, 0.9, 0.1, 0.7, 1.0)  # of two prompts: responses 0-3 and response 4
NUM_PROMPTS = 2


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
        self.correct = np.array(CORRECT)[self.response]
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

    def run(self, loss, *, old=None, dtype=torch.float64, rows=slice(None)):
        """Value, gradient [T, V] and terms of a loss on some rows."""
        logits = torch.tensor(self.logits[rows], dtype=dtype, requires_grad=True)
        tokens = torch.tensor(self.tokens[rows])
        terms = TokenTerms(
            logprob=torch.log_softmax(logits, dim=1).gather(1, tokens[:, None])[:, 0],
            old_logprob=None if old is None else torch.tensor(old[rows], dtype=dtype),
            teacher_logprob=torch.tensor(np.where(self.correct, 0.0, self.teacher)[rows], dtype=dtype),
            likelihood=torch.tensor(np.where(self.correct, self.coefficient, 0.0)[rows], dtype=dtype),
            distill=torch.tensor(np.where(self.correct, 0.0, self.coefficient)[rows], dtype=dtype),
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
    terms = TokenTerms(logprobs, None, teacher, likelihood=zeros, distill=logprobs.exp().detach())
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


@pytest.mark.parametrize("loss", [scope_loss, likelihood_loss])
@pytest.mark.parametrize("old_given", [False, True])
def test_losses_of_parts_add_up_to_the_loss_of_the_whole(loss, old_given):
    batch = Batch()
    old = batch.old if old_given else None
    value, gradient = batch.run(loss, old=old)
    parts = [batch.run(loss, old=old, rows=batch.response == i) for i in range(len(LENGTHS))]
    assert math.fsum(part.item() for part, _ in parts) == pytest.approx(value.item(), rel=1e-13)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [scope_loss, likelihood_loss])
def test_a_micro_batch_without_rows_has_loss_zero_and_can_go_backward(loss):
    value, gradient = Batch().run(loss, rows=slice(0, 0))
    assert value.item() == 0.0 and gradient.shape == (0, VOCAB)


def test_a_token_on_no_path_has_no_gradient():
    batch = Batch()
    batch.coefficient = np.where(batch.response == 2, 0.0, batch.coefficient)
    _, gradient = batch.run(scope_loss)
    assert not gradient[batch.response == 2].any()
    assert gradient[batch.response != 2].any()


@pytest.mark.parametrize("loss", [scope_loss, likelihood_loss])
def test_float32_terms_give_the_float64_result_to_float32_precision(loss):
    batch = Batch()
    value, gradient = batch.run(loss, dtype=torch.float32)
    exact, exact_gradient = batch.run(loss)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=2e-6)
    np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-4, atol=1e-6)
