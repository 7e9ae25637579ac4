"""The objectives: which responses need scores, what each response's tokens count, and the token loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_scope.config.schema import Aggregation, ObjectiveConfig, ObjectiveName
from megatron_scope.errors import ConfigError
from megatron_scope.objective.losses import TokenTerms, likelihood_loss, scope_loss
from megatron_scope.objective.weighting import path_weights
from megatron_scope.records import ResponseCoefficients, ResponseTable

__all__ = ["Objective", "TokenTerms", "WeighedResponses", "build_objective"]


@dataclasses.dataclass(frozen=True)
class WeighedResponses:
    """The result of the weigh stage: `weights` float64 [N] as in Eq. 6 and the coefficients made of them."""

    weights: np.ndarray
    coefficients: ResponseCoefficients


Mask = Callable[[ResponseTable], np.ndarray]
Weigh = Callable[[ResponseTable, np.ndarray, np.ndarray], WeighedResponses]


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective as four pure functions of a step's table.

    `student_scored` and `teacher_scored` give bool [N]: the responses whose log-probs must be known before
    the update. `weigh` takes their mean log-probs (float64 [N], nats per token, NaN where not scored).
    `token_loss` is summed over micro-batches.
    """

    student_scored: Mask
    teacher_scored: Mask
    weigh: Weigh
    token_loss: Callable[[TokenTerms], Tensor]


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that the config names."""
    if config.name is ObjectiveName.SCOPE:
        return _scope(config)
    if config.name is ObjectiveName.SFT:
        return _sft()
    raise ConfigError(f"objective.name is {config.name.value}, which is not available; use scope or sft")


def _scope(config: ObjectiveConfig) -> Objective:
    def weigh(table: ResponseTable, student_mean: np.ndarray, teacher_mean: np.ndarray) -> WeighedResponses:
        weights = path_weights(
            torch.from_numpy(table.correct),
            torch.from_numpy(table.group),
            torch.from_numpy(student_mean),
            torch.from_numpy(teacher_mean),
            tau=config.tau,
            student_exponent=config.student_exponent,
            teacher_exponent=config.teacher_exponent,
        ).numpy()
        return WeighedResponses(weights, aggregate(weights, table, config.aggregation))

    return Objective(
        student_scored=lambda table: table.correct,
        teacher_scored=lambda table: ~table.correct,
        weigh=weigh,
        token_loss=scope_loss,
    )


def aggregate(weights: np.ndarray, table: ResponseTable, aggregation: Aggregation) -> ResponseCoefficients:
    """Per-response token coefficients from the weights of both paths, float64 [N].

    B is the number of prompts with a usable response. sequence_sum: w / B (Eq. 6). sequence_mean: w / (B
    |y|). token_mean: w over the correct tokens on the likelihood path, w over all tokens on the distillation
    path (the authors' code).
    """
    num_tokens = table.num_tokens.astype(np.float64)
    if aggregation is Aggregation.TOKEN_MEAN:
        correct_tokens = max(1.0, num_tokens[table.correct].sum())
        likelihood, distill = weights / correct_tokens, weights / max(1.0, num_tokens.sum())
    else:
        num_prompts = len(np.unique(table.group))
        likelihood = weights / max(1, num_prompts)
        if aggregation is Aggregation.SEQUENCE_MEAN:
            likelihood = likelihood / num_tokens
        distill = likelihood
    return ResponseCoefficients(
        likelihood=np.where(table.correct, likelihood, 0.0), distill=np.where(table.correct, 0.0, distill)
    )


def _sft() -> Objective:
    """Mean negative log-likelihood over all given response tokens; needs no score and no teacher."""

    def nobody(table: ResponseTable) -> np.ndarray:
        return np.zeros(len(table), dtype=bool)

    def weigh(table: ResponseTable, student_mean: np.ndarray, teacher_mean: np.ndarray) -> WeighedResponses:
        del student_mean, teacher_mean
        ones = np.ones(len(table))
        likelihood = ones / max(1.0, float(table.num_tokens.sum()))
        return WeighedResponses(ones, ResponseCoefficients(likelihood=likelihood, distill=0.0 * ones))

    return Objective(student_scored=nobody, teacher_scored=nobody, weigh=weigh, token_loss=likelihood_loss)
