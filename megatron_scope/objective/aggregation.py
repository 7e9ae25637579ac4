"""From a weight for each response to a coefficient for each of its tokens, every denominator included. Pure
numpy.
"""

from __future__ import annotations

import numpy as np

from megatron_scope.config.schema import Aggregation
from megatron_scope.records import ResponseCoefficients, ResponseTable


def token_factors(table: ResponseTable, aggregation: Aggregation, counted: np.ndarray) -> np.ndarray:
    """What a response's weight is divided by on each of its tokens, as a factor, float64 [N].

    Denominators are those of the response's update, over all replicas. With B prompts in it: sequence_sum 1 /
    B, sequence_mean 1 / (B |y|), token_mean 1 / the response tokens among `counted` (bool [N]).
    """
    if aggregation is Aggregation.TOKEN_MEAN:
        tokens = np.bincount(table.update, table.num_tokens * counted)
        return 1.0 / np.maximum(tokens, 1.0)[table.update]
    prompt_factor = 1.0 / prompts_of_updates(table)[table.update]
    return prompt_factor / table.num_tokens if aggregation is Aggregation.SEQUENCE_MEAN else prompt_factor


def prompts_of_updates(table: ResponseTable) -> np.ndarray:
    """B: how many prompts have a usable response in each update."""
    _, first = np.unique(table.group, return_index=True)
    return np.bincount(table.update[first])


def group_sizes(table: ResponseTable) -> np.ndarray:
    """How many usable responses each response's prompt has, int64 [N]."""
    _, place, counts = np.unique(table.group, return_inverse=True, return_counts=True)
    return counts[place]


def uniform_weights(table: ResponseTable, aggregation: Aggregation) -> np.ndarray:
    """Weights under which all responses of a prompt count the same and all prompts do (sequence_*), or all
    tokens (token_mean); float64 [N].
    """
    ones = np.ones(len(table))
    return ones if aggregation is Aggregation.TOKEN_MEAN else ones / group_sizes(table)


def uniform_factors(table: ResponseTable, aggregation: Aggregation) -> np.ndarray:
    """The coefficient of a token of each response where all responses count alike, float64 [N]."""
    everybody = np.ones(len(table), dtype=bool)
    return uniform_weights(table, aggregation) * token_factors(table, aggregation, everybody)


def coefficients(
    table: ResponseTable,
    *,
    likelihood: np.ndarray | None = None,
    distill: np.ndarray | None = None,
    advantage: np.ndarray | None = None,
    reference_kl: np.ndarray | None = None,
) -> ResponseCoefficients:
    """The coefficients given, and 0 for the terms that an objective does not have."""
    none = np.zeros(len(table))
    return ResponseCoefficients(
        likelihood=none if likelihood is None else likelihood,
        distill=none if distill is None else distill,
        advantage=none if advantage is None else advantage,
        reference_kl=none if reference_kl is None else reference_kl,
    )
