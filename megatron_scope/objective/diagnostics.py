"""Numbers that tell how the weights of a step are spread. Pure numpy."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scope.records import ResponseTable


@dataclasses.dataclass(frozen=True)
class PathSpread:
    """Means over a path's sets (one prompt's responses of one kind); NaN where the path is empty, and for
    weights that are no distribution, as GRPO's signed advantages.

    `entropy` is that of the normalised weights, in nats; `effective_sample_size` is 1 / sum of their squares.
    """

    entropy: float
    effective_sample_size: float


def path_spread(table: ResponseTable, weights: np.ndarray, *, correct: bool) -> PathSpread:
    """How evenly the weights [N] of one path are spread within its sets."""
    if (weights < 0).any():
        return PathSpread(float("nan"), float("nan"))
    entropies, sizes = [], []
    on_path = table.correct == correct
    for group in np.unique(table.group[on_path]):
        members = weights[on_path & (table.group == group)]
        if not members.any():
            continue
        p = members / members.sum()
        entropies.append(-np.sum(p * np.log(np.where(p > 0, p, 1.0))))
        sizes.append(1.0 / np.sum(p**2))
    if not sizes:
        return PathSpread(float("nan"), float("nan"))
    return PathSpread(float(np.mean(entropies)), float(np.mean(sizes)))


def mean_perplexity(mean_logprob: np.ndarray) -> float:
    """Mean over scored responses of exp(-mean log-prob); NaN entries were not scored; NaN when none was."""
    scored = mean_logprob[~np.isnan(mean_logprob)]
    return float(np.exp(-scored).mean()) if len(scored) else float("nan")


def one_sided_share(table: ResponseTable) -> float:
    """The share of prompts whose responses are all correct or all incorrect."""
    groups = np.unique(table.group)
    mixed = sum(len(np.unique(table.correct[table.group == group])) == 2 for group in groups)
    return 1.0 - mixed / len(groups)
