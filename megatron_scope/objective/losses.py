"""Token losses: each a short function of per-token log-probs and coefficients that returns a plain sum.

R response tokens of a micro-batch. A coefficient carries the response's weight and every denominator, so sums
over micro-batches, replicas and updates add up to the loss of Eq. 6 whatever the packing.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenTerms(NamedTuple):
    """What a token loss may use, each float32 [R], log-probs in nats.

    `logprob` (differentiable) is the student's of the response token, `old_logprob` the behaviour policy's
    (None: the current one, whose ratio is 1 with the gradient of the log-prob), `teacher_logprob` the
    teacher's (0 where it was not scored). `likelihood` and `distill` are the token's coefficients on the two
    paths; at most one of them is not zero.
    """

    logprob: Tensor
    old_logprob: Tensor | None
    teacher_logprob: Tensor
    likelihood: Tensor
    distill: Tensor


def scope_loss(terms: TokenTerms) -> Tensor:
    """SCOPE with the sampled divergence (arXiv:2604.10688, Eq. 1-3 under the weights of Eq. 6).

    Correct path: -c rho. Incorrect path: c rho sg(log pi_theta - log pi_T), with rho = pi_theta / pi_old (Eq.
    1).
    """
    current = terms.logprob.detach()
    old = current if terms.old_logprob is None else terms.old_logprob
    ratio = (terms.logprob - old).exp()
    log_ratio_to_teacher = current - terms.teacher_logprob
    return (ratio * (terms.distill * log_ratio_to_teacher - terms.likelihood)).sum()


def likelihood_loss(terms: TokenTerms) -> Tensor:
    """Weighted negative log-likelihood: -c log pi_theta."""
    return -(terms.likelihood * terms.logprob).sum()
