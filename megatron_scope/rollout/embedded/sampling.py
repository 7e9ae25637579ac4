"""Drawing the next token of many rows at once, in float64.

B rows, V vocabulary entries. Each row's result is a function of that row alone, to the last bit: every
operation is elementwise or reduces along V, and the uniforms come from the request's own generator.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Drawn(NamedTuple):
    """`ids` int64 [B], `logprobs` float64 [B] in nats; `finite` bool [B]: the row is a distribution."""

    ids: np.ndarray
    logprobs: np.ndarray
    finite: np.ndarray


def uniforms(seed: int | None, sample: int, count: int) -> np.ndarray:
    """`count` float64 in [0, 1) for sample number `sample`; `seed=None`: from the system's entropy."""
    sequence = np.random.SeedSequence(None if seed is None else (seed, sample))
    return np.random.Generator(np.random.Philox(sequence)).random(count)


def draw(
    logits_BV: np.ndarray,
    *,
    temperature: np.ndarray,
    top_p: np.ndarray,
    top_k: np.ndarray,
    uniform: np.ndarray,
) -> Drawn:
    """One token per row by inverse CDF; the largest logit where `temperature` is 0.

    `logits_BV` float32 [B, V]; `temperature`, `top_p`, `uniform` float64 [B]; `top_k` int64 [B], < 1: off.
    Log-probs are of the temperature-scaled distribution (T = 1 for greedy rows), not renormalised by top-p or
    top-k, as SGLang reports them.
    """
    greedy = temperature == 0.0
    scaled_BV = logits_BV.astype(np.float64) / np.where(greedy, 1.0, temperature)[:, None]
    with np.errstate(invalid="ignore"):
        scaled_BV -= scaled_BV.max(axis=1, keepdims=True)
    weight_BV = np.exp(scaled_BV)
    total_B = weight_BV.sum(axis=1)
    finite = np.isfinite(total_B)
    if not finite.all():
        weight_BV[~finite] = 1.0
    best_B = scaled_BV.argmax(axis=1)
    restricted = ~greedy & finite & ((top_p < 1.0) | ((top_k > 0) & (top_k < logits_BV.shape[1])))
    if restricted.any():
        rows = np.flatnonzero(restricted)
        keep = _kept(weight_BV[rows], total_B[rows], top_p[rows], top_k[rows])
        weight_BV[rows] = np.where(keep, weight_BV[rows], 0.0)
    ids = np.where(greedy, best_B, _inverse_cdf(weight_BV, uniform))
    with np.errstate(invalid="ignore"):
        logprobs = np.take_along_axis(scaled_BV, ids[:, None], axis=1)[:, 0] - np.log(total_B)
    return Drawn(ids, logprobs, finite)


def _inverse_cdf(weight_BV: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The first index whose cumulative weight exceeds `uniform` times the total; never one of weight 0."""
    cumulative_BV = weight_BV.cumsum(axis=1)
    total_B = cumulative_BV[:, -1]
    target_B = np.minimum(uniform * total_B, np.nextafter(total_B, 0.0))
    return (cumulative_BV <= target_B[:, None]).sum(axis=1)


def _kept(weight_BV: np.ndarray, total_B: np.ndarray, top_p: np.ndarray, top_k: np.ndarray) -> np.ndarray:
    """bool [B, V]: the `top_k` largest entries that are also in the smallest set of mass `top_p`."""
    order_BV = np.argsort(-weight_BV, axis=1, kind="stable")
    sorted_BV = np.take_along_axis(weight_BV, order_BV, axis=1) / total_B[:, None]
    mass_before_BV = sorted_BV.cumsum(axis=1) - sorted_BV
    limit_B = np.where(top_k > 0, top_k, weight_BV.shape[1])
    keep_sorted_BV = (mass_before_BV <= top_p[:, None]) & (np.arange(weight_BV.shape[1]) < limit_B[:, None])
    keep_BV = np.zeros(weight_BV.shape, dtype=bool)
    np.put_along_axis(keep_BV, order_BV, keep_sorted_BV, axis=1)
    return keep_BV
