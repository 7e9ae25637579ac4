"""Token losses: each a short function of per-token log-probs and coefficients that returns a plain sum.

R response tokens of a micro-batch. A coefficient carries the response's weight and every denominator, so sums
over micro-batches and replicas add up to the loss of the update whatever the packing. A term whose
coefficients are 0 contributes nothing, so terms of one loss may be added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TokenTerms(NamedTuple):
    """What a token loss may use, each float32 [R], log-probs in nats.

    `logprob` (differentiable) is the student's of the response token; `old_logprob` the student's at the
    start of the step (None: it is still the same, so that the ratio is 1 with the gradient of the log-prob);
    `teacher_logprob` and `reference_logprob` (the initial student's) are 0 where not scored. `divergence`
    (differentiable) is the exact one between student and teacher, 0 where not asked for. The coefficients
    are those of ResponseCoefficients, token by token. `engine_logprob` is that of the engine which drew the
    token (NaN where none did) and `rollout_logprob` the student's at the start of the step, both at rollout
    temperature (None: it is still `logprob`). `correction` multiplies what is an expectation over the
    engine's draws (None: 1).
    """

    logprob: Tensor
    divergence: Tensor
    old_logprob: Tensor | None
    teacher_logprob: Tensor
    reference_logprob: Tensor
    likelihood: Tensor
    distill: Tensor
    advantage: Tensor
    reference_kl: Tensor
    engine_logprob: Tensor
    rollout_logprob: Tensor | None = None
    correction: Tensor | None = None

    def engine_ratio(self) -> Tensor:
        """pi_old / pi_engine of the tokens at rollout temperature, [R], without gradient."""
        old = self.logprob if self.rollout_logprob is None else self.rollout_logprob
        return (old.detach() - self.engine_logprob).exp()


def corrected(token_loss: Callable[[TokenTerms], Tensor], cap: float) -> Callable[[TokenTerms], Tensor]:
    """`token_loss` of responses that another engine drew: truncated importance sampling, token by token
    (Ionides 2008, doi:10.1198/106186008X320456; Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training").

    The engine draws from its own pi_engine, which other kernels and another precision keep off the trainer's
    pi_old. With the constant factor min(pi_old / pi_engine, cap), both at rollout temperature, a sum over its
    draws has again the expectation that it has over pi_old's, but for what the cap holds back: that much bias
    for a bounded variance. The prefix stays the engine's.

    The factor multiplies every term that is such an expectation: the two surrogates of Eq. 2 and 3, the
    likelihood that may stand for the former, and GRPO's clipped surrogate. It does not multiply an exact
    divergence, which is the same whichever token was drawn after its prefix, nor the KL to the initial
    student, a penalty on the tokens at hand that GRPO leaves without any ratio.

    pi_engine is that of the whole vocabulary. Under top_p < 1 or top_k a token is drawn with pi_engine / Z, Z
    the mass that was kept: the factor still closes the gap between engine and trainer, while the draws stay
    those of the cut distribution, as they are without a correction.
    """

    def loss(terms: TokenTerms) -> Tensor:
        return token_loss(terms._replace(correction=terms.engine_ratio().clamp(max=cap)))

    return loss


def _over_draws(terms: TokenTerms, coefficient: Tensor) -> Tensor:
    """The coefficient of a term that is an expectation over the engine's draws."""
    return coefficient if terms.correction is None else coefficient * terms.correction


def importance_ratio(terms: TokenTerms) -> Tensor:
    """rho = pi_theta / pi_old, [R] (arXiv:2604.10688 Eq. 1)."""
    old = terms.logprob.detach() if terms.old_logprob is None else terms.old_logprob
    return (terms.logprob - old).exp()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float = math.inf) -> Tensor:
    """min(rho A, clip(rho, 1 - clip, 1 + clip) A), [R] (arXiv:1707.06347 Eq. 7)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def likelihood_surrogate(terms: TokenTerms, clip: float = math.inf) -> Tensor:
    """SCOPE's correct path: the sum of -c rho (arXiv:2604.10688 Eq. 2)."""
    return -clipped_surrogate(importance_ratio(terms), _over_draws(terms, terms.likelihood), clip).sum()


def likelihood_loss(terms: TokenTerms) -> Tensor:
    """Weighted negative log-likelihood: the sum of -c log pi_theta."""
    return -(_over_draws(terms, terms.likelihood) * terms.logprob).sum()


def distillation_surrogate(terms: TokenTerms, clip: float = math.inf) -> Tensor:
    """The sampled reverse KL to the teacher: the sum of c rho sg(log pi_theta - log pi_T) (arXiv:2604.10688
    Eq. 3).
    """
    advantage = _over_draws(terms, terms.distill) * (terms.teacher_logprob - terms.logprob.detach())
    return -clipped_surrogate(importance_ratio(terms), advantage, clip).sum()


def divergence_loss(terms: TokenTerms) -> Tensor:
    """The divergence over the whole vocabulary in the place of its sampled estimate: the sum of c D, without
    a ratio.
    """
    return (terms.distill * terms.divergence).sum()


def policy_gradient_loss(terms: TokenTerms, clip: float = math.inf) -> Tensor:
    """GRPO: the clipped surrogate of the advantages and the k3 estimate of KL(pi_theta || pi_ref)
    (arXiv:2402.03300 Eq. 3 and 4).
    """
    surrogate = clipped_surrogate(importance_ratio(terms), _over_draws(terms, terms.advantage), clip)
    return (terms.reference_kl * reference_kl(terms) - surrogate).sum()


def reference_kl(terms: TokenTerms) -> Tensor:
    """k3 = exp(d) - d - 1 with d = log pi_ref - log pi_theta, [R], never negative."""
    difference = terms.reference_logprob - terms.logprob
    return difference.exp() - difference - 1
