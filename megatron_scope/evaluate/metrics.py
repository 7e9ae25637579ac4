"""Scores of sampled answers: avg@k, unbiased pass@k and bootstrap intervals over problems.

Letters: P problems, S samples of each, R bootstrap resamples.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

# Resampled values held at once, so that memory does not grow with R x P (8 MiB of indices).
MAX_CHUNK_VALUES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over problems with the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class BenchmarkSummary:
    """What a benchmark scored: `average` is avg@S (mean accuracy), `pass_at_k` maps k to its estimate."""

    num_problems: int
    num_samples: int
    average: Estimate
    pass_at_k: Mapping[int, Estimate]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased chance that at least one of k samples drawn without replacement is correct.

    1 - C(n-c, k) / C(n, k) for n = num_samples and c = num_correct (arXiv:2107.03374 Eq. 1), in integers and
    therefore correctly rounded for any n. Raises ValueError unless 0 <= c <= n and 1 <= k <= n, all integers.
    """
    n = _integer("num_samples", num_samples)
    c = _integer("num_correct", num_correct)
    k = _integer("k", k)
    if not 0 <= c <= n:
        raise ValueError(f"num_correct is {c}, expected between 0 and num_samples = {n}")
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, expected between 1 and num_samples = {n}")
    # C(n-c, k) / C(n, k) = C(n-k, c) / C(n, c): the smaller of k and c makes the smaller integers.
    drawn, avoided = min(c, k), max(c, k)
    num_draws = math.comb(n, drawn)
    return (num_draws - math.comb(n - avoided, drawn)) / num_draws


def mean_accuracy(correct_PS: ArrayLike) -> float:
    """avg@S: the share of correct samples of a bool array [P, S]; ValueError for another or an empty one."""
    return float(_correctness(correct_PS).mean())


def bootstrap_interval(
    values: ArrayLike, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval (low, high) of the mean of `values`, float [P], one a problem.

    Problems are drawn with replacement `resamples` times; the same seed gives the same interval. Raises
    ValueError for no or non-finite values, resamples < 1 or a level outside (0, 1).
    """
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.ndim != 1 or len(values_P) == 0:
        raise ValueError(f"values have shape {values_P.shape}, expected one value a problem and at least one")
    if not np.isfinite(values_P).all():
        raise ValueError("values hold NaN or infinity, expected finite numbers")
    if _integer("resamples", resamples) < 1:
        raise ValueError(f"resamples is {resamples}, expected 1 or more")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected between 0 and 1")
    num_problems = len(values_P)
    chunk = max(1, MAX_CHUNK_VALUES // num_problems)
    generator = np.random.default_rng(seed)
    means_R = np.empty(resamples)
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        drawn_RP = generator.integers(0, num_problems, size=(stop - start, num_problems))
        means_R[start:stop] = values_P[drawn_RP].mean(axis=1)
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap_interval(
    a: ArrayLike, b: ArrayLike, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """The interval of mean(a - b) where `a` and `b`, float [P], score the same problems in the same order.

    Drawing problems, not scores, keeps each pair together, so that the difficulty of a problem cancels.
    Raises ValueError for unequal lengths and as `bootstrap_interval` does.
    """
    a_P, b_P = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_P.shape != b_P.shape:
        raise ValueError(f"shapes {a_P.shape} and {b_P.shape} differ; both must score the same problems")
    return bootstrap_interval(a_P - b_P, resamples, seed, level)


def benchmark_summary(
    correct: ArrayLike, ks: Sequence[int], *, resamples: int, seed: int, level: float = 0.95
) -> BenchmarkSummary:
    """avg@S and pass@k for each k in `ks` with intervals over problems, of a bool array [P, S].

    All intervals use the same resampled problems. Raises ValueError for an array that is not bool [P, S] or
    is empty, and for a k outside 1..S.
    """
    correct_PS = _correctness(correct)
    num_problems, num_samples = correct_PS.shape
    num_correct_P = correct_PS.sum(axis=1)

    def estimate(values_P: np.ndarray) -> Estimate:
        low, high = bootstrap_interval(values_P, resamples, seed, level)
        return Estimate(float(values_P.mean()), low, high)

    counts, problem_to_count_P = np.unique(num_correct_P, return_inverse=True)
    passes = {}
    for k in ks:
        # Many problems share a count, and exact binomials cost more than a look-up.
        per_count = np.array([pass_at_k(num_samples, int(c), k) for c in counts])
        passes[k] = estimate(per_count[problem_to_count_P])
    return BenchmarkSummary(num_problems, num_samples, estimate(num_correct_P / num_samples), passes)


def _correctness(correct: ArrayLike) -> np.ndarray:
    correct_PS = np.asarray(correct)
    if correct_PS.dtype != np.bool_ or correct_PS.ndim != 2 or correct_PS.size == 0:
        raise ValueError(
            f"correct has shape {correct_PS.shape} and type {correct_PS.dtype}, "
            "expected bool [problems, samples], at least one of each"
        )
    return correct_PS


def _integer(name: str, value: int) -> int:
    """`value` as an int, numpy's included; a bool or a float is a mistake here, even 1.0."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer") from None
