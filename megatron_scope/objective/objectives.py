"""The objectives: which responses need scores, what each response's tokens count, and the token loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_scope.config.schema import CorrectPath, Divergence, ObjectiveConfig, ObjectiveName
from megatron_scope.objective.aggregation import (
    coefficients,
    group_sizes,
    token_factors,
    uniform_factors,
    uniform_weights,
)
from megatron_scope.objective.losses import (
    TokenTerms,
    distillation_surrogate,
    divergence_loss,
    likelihood_loss,
    likelihood_surrogate,
    policy_gradient_loss,
)
from megatron_scope.objective.weighting import path_weights
from megatron_scope.records import ResponseCoefficients, ResponseTable

__all__ = ["Objective", "TokenTerms", "WeighedResponses", "build_objective"]

# Keeps the advantage of a group of nearly equal rewards finite.
STD_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class WeighedResponses:
    """The result of the weigh stage: `weights` float64 [N], what each response counts (GRPO: its advantage),
    and the coefficients made of them.
    """

    weights: np.ndarray
    coefficients: ResponseCoefficients


Mask = Callable[[np.ndarray], np.ndarray]
Weigh = Callable[[ResponseTable, np.ndarray, np.ndarray], WeighedResponses]


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective as pure functions of a step's table.

    `student_scored`, `teacher_scored` and `reference_scored` take the verdicts, bool [N], and give bool [N]:
    the responses that a model must score before the update. A verdict alone decides, so that a response can
    be scored while others are still being generated. `weigh` takes the student's and the teacher's mean
    log-probs (float64 [N], nats per token, NaN where not scored). `token_loss` is summed over micro-batches.
    """

    student_scored: Mask
    teacher_scored: Mask
    reference_scored: Mask
    weigh: Weigh
    token_loss: Callable[[TokenTerms], Tensor]


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that the config names."""
    return _BUILDERS[config.name](config)


def _nobody(correct: np.ndarray) -> np.ndarray:
    return np.zeros(len(correct), dtype=bool)


def _everybody(correct: np.ndarray) -> np.ndarray:
    return np.ones(len(correct), dtype=bool)


def _clip(config: ObjectiveConfig) -> float:
    return math.inf if config.ratio_clip is None else config.ratio_clip


def _distillation(config: ObjectiveConfig) -> Callable[[TokenTerms], Tensor]:
    """The term that draws the student to the teacher: sampled (Eq. 3), or exact over the vocabulary."""
    if config.divergence is not Divergence.SAMPLED:
        return divergence_loss
    return partial(distillation_surrogate, clip=_clip(config))


def _scope(config: ObjectiveConfig) -> Objective:
    """SCOPE (arXiv:2604.10688 Eq. 6): likelihood of correct responses weighted by the student's perplexity,
    distillation of incorrect ones by the teacher's.
    """
    clip = _clip(config)

    def weigh(table: ResponseTable, student_mean: np.ndarray, teacher_mean: np.ndarray) -> WeighedResponses:
        weights = path_weights(
            torch.from_numpy(table.correct),
            torch.from_numpy(table.group),
            torch.from_numpy(student_mean),
            torch.from_numpy(teacher_mean),
            tau=config.tau,
            student_exponent=config.student_exponent,
            teacher_exponent=config.teacher_exponent,
            scale=config.weight_scale.value,
        ).numpy()
        likelihood = weights * token_factors(table, config.aggregation, table.correct)
        distill = weights * token_factors(table, config.aggregation, _everybody(table.correct))
        return WeighedResponses(
            weights,
            coefficients(
                table,
                likelihood=np.where(table.correct, likelihood, 0.0),
                distill=np.where(table.correct, 0.0, distill),
            ),
        )

    distillation = _distillation(config)

    def with_ratio(terms: TokenTerms) -> Tensor:
        return likelihood_surrogate(terms, clip) + distillation(terms)

    def with_log_likelihood(terms: TokenTerms) -> Tensor:
        return likelihood_loss(terms) + distillation(terms)

    losses = {CorrectPath.RATIO: with_ratio, CorrectPath.LOG_LIKELIHOOD: with_log_likelihood}
    return Objective(
        student_scored=lambda correct: correct,
        teacher_scored=lambda correct: ~correct,
        reference_scored=_nobody,
        weigh=weigh,
        token_loss=losses[config.correct_path],
    )


def _opd(config: ObjectiveConfig) -> Objective:
    """On-policy distillation: Eq. 3 (or the exact divergence) on every response, all counting the same."""

    def weigh(table: ResponseTable, student_mean: np.ndarray, teacher_mean: np.ndarray) -> WeighedResponses:
        del student_mean, teacher_mean
        distill = uniform_factors(table, config.aggregation)
        return WeighedResponses(
            uniform_weights(table, config.aggregation), coefficients(table, distill=distill)
        )

    return Objective(
        student_scored=_nobody,
        teacher_scored=_everybody,
        reference_scored=_nobody,
        weigh=weigh,
        token_loss=_distillation(config),
    )


def _grpo(config: ObjectiveConfig) -> Objective:
    """GRPO (arXiv:2402.03300): rewards standardised within a prompt's group, clipped, with a KL to the
    initial student.
    """
    clip = _clip(config)

    def weigh(table: ResponseTable, student_mean: np.ndarray, teacher_mean: np.ndarray) -> WeighedResponses:
        del student_mean, teacher_mean
        advantages = group_advantages(table)
        factors = uniform_factors(table, config.aggregation)
        return WeighedResponses(
            advantages,
            coefficients(table, advantage=advantages * factors, reference_kl=config.kl_coefficient * factors),
        )

    return Objective(
        student_scored=_nobody,
        teacher_scored=_nobody,
        reference_scored=_everybody if config.kl_coefficient > 0 else _nobody,
        weigh=weigh,
        token_loss=lambda terms: policy_gradient_loss(terms, clip),
    )


def group_advantages(table: ResponseTable) -> np.ndarray:
    """(R - mean) / (std + 1e-6) of the rewards R in {0, 1} of each prompt's group, float64 [N].

    std has n - 1 in its denominator. 0 in a group of one or of equal rewards.
    """
    _, place = np.unique(table.group, return_inverse=True)
    rewards, sizes = table.correct.astype(np.float64), group_sizes(table)
    centred = rewards - np.bincount(place, rewards)[place] / sizes
    variance = np.bincount(place, centred**2)[place] / np.maximum(sizes - 1, 1)
    return centred / (np.sqrt(variance) + STD_FLOOR)


def _given(config: ObjectiveConfig) -> Objective:
    """Negative log-likelihood of given responses (sft, kd), all counting the same; needs no score."""

    def weigh(table: ResponseTable, student_mean: np.ndarray, teacher_mean: np.ndarray) -> WeighedResponses:
        del student_mean, teacher_mean
        likelihood = uniform_factors(table, config.aggregation)
        return WeighedResponses(
            uniform_weights(table, config.aggregation), coefficients(table, likelihood=likelihood)
        )

    return Objective(
        student_scored=_nobody,
        teacher_scored=_nobody,
        reference_scored=_nobody,
        weigh=weigh,
        token_loss=likelihood_loss,
    )


_BUILDERS: dict[ObjectiveName, Callable[[ObjectiveConfig], Objective]] = {
    ObjectiveName.SCOPE: _scope,
    ObjectiveName.OPD: _opd,
    ObjectiveName.GRPO: _grpo,
    ObjectiveName.SFT: _given,
    ObjectiveName.KD: _given,
}
