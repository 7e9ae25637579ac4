import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from megatron_scope.evaluate import metrics
from megatron_scope.evaluate.metrics import (
    benchmark_summary,
    bootstrap_interval,
    mean_accuracy,
    paired_bootstrap_interval,
    pass_at_k,
)


def test_pass_at_k_equals_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(combinations(samples, k))
                assert pass_at_k(n, c, k) == float(Fraction(sum(map(any, subsets)), len(subsets)))


@pytest.mark.parametrize("n", [10, 64, 1000])
def test_pass_at_k_is_exact_to_the_last_bit(n):
    for c in {0, 1, n // 3, n - 2, n}:
        for k in {1, 2, n // 2, n - 1, n}:
            assert pass_at_k(n, c, k) == float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


def test_pass_at_k_of_large_n():
    assert pass_at_k(10**12, 1, 1) == 1e-12
    assert pass_at_k(10**6, 3, 500_000) == pytest.approx(1 - 0.5**3, abs=1e-5)
    assert pass_at_k(20_000, 10_000, 10_000) == 1.0
    assert pass_at_k(10**6, 10**6, 7) == 1.0
    assert pass_at_k(10**6, 0, 7) == 0.0


def test_pass_at_k_grows_with_k_and_with_correct_samples():
    assert all(np.diff([pass_at_k(16, 3, k) for k in range(1, 17)]) >= 0)
    assert all(np.diff([pass_at_k(16, c, 4) for c in range(17)]) >= 0)


def test_pass_at_1_is_the_mean_accuracy():
    assert [pass_at_k(16, c, 1) for c in range(17)] == [c / 16 for c in range(17)]


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [
        *[(4, -1, 1), (4, 5, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)],
        *[(4, 2, True), (4, False, 1), (True, 1, 1), (4, 2, np.bool_(True))],
        *[(4, 2.0, 1), (4.5, 2, 1), (4, "2", 1), (4, None, 1), (4, 2, float("nan"))],
    ],
)
def test_pass_at_k_refuses_what_is_no_count(n, c, k):
    with pytest.raises(ValueError, match=r"(num_samples|num_correct|k) is "):
        pass_at_k(n, c, k)


def test_pass_at_k_takes_numpy_integers():
    assert pass_at_k(np.int64(4), np.int32(2), np.uint8(1)) == 0.5


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    trials = 300
    covered = 0
    for trial in range(trials):
        low, high = bootstrap_interval(generator.random(100) < 0.3, 400, seed=trial)
        covered += low <= 0.3 <= high
    # 95 % with a standard deviation of 1.3 %; the percentile interval is a little short at 100 problems.
    assert 0.90 <= covered / trials <= 0.985


def test_bootstrap_interval_narrows_with_problems_and_widens_with_level():
    values = np.random.default_rng(0).random(1000)

    def width(interval):
        return interval[1] - interval[0]

    assert width(bootstrap_interval(values, 500, 0)) < width(bootstrap_interval(values[:50], 500, 0)) / 2
    assert width(bootstrap_interval(values, 500, 0, level=0.5)) < width(
        bootstrap_interval(values, 500, 0, level=0.99)
    )
    low, high = bootstrap_interval(values, 500, 0)
    assert low < values.mean() < high
    assert width((low, high)) == pytest.approx(2 * 1.96 * values.std() / math.sqrt(1000), rel=0.15)


def test_bootstrap_interval_is_repeatable_and_bounded_in_memory(monkeypatch):
    values = np.arange(10.0)
    assert bootstrap_interval(values, 100, 7) == bootstrap_interval(values, 100, 7)
    assert bootstrap_interval(values, 100, 7) != bootstrap_interval(values, 100, 8)
    monkeypatch.setattr(metrics, "MAX_CHUNK_VALUES", 4)
    low, high = bootstrap_interval(values, 100, 7)
    assert 0 <= low < high <= 9


def test_one_problem_has_an_interval_without_width():
    assert bootstrap_interval([0.25], 10, 0) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("values", "resamples", "level", "message"),
    [
        ([], 10, 0.95, "values have shape"),
        ([[1.0]], 10, 0.95, "values have shape"),
        ([1.0, float("nan")], 10, 0.95, "NaN"),
        ([1.0], 0, 0.95, "resamples is 0"),
        ([1.0], True, 0.95, "resamples is True"),
        ([1.0], 10, 1.0, r"level is 1\.0"),
        ([1.0], 10, 0.0, r"level is 0\.0"),
    ],
)
def test_bootstrap_interval_refuses_nonsense(values, resamples, level, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, resamples, 0, level)


def test_pairing_cancels_the_difficulty_of_problems():
    generator = np.random.default_rng(1)
    difficulty = generator.random(200)
    a, b = difficulty + 0.02 + 0.01 * generator.standard_normal(200), difficulty
    low, high = paired_bootstrap_interval(a, b, 500, 0)
    assert 0 < low < 0.02 < high < 0.03
    swapped = paired_bootstrap_interval(b, a, 500, 0)
    assert swapped == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="differ"):
        paired_bootstrap_interval(a, b[:-1], 500, 0)


def test_benchmark_summary():
    correct = np.zeros((3, 4), dtype=bool)
    correct[0, :] = True
    correct[1, 2] = True
    summary = benchmark_summary(correct, [1, 2, 4], resamples=200, seed=0)
    assert (summary.num_problems, summary.num_samples) == (3, 4)
    assert summary.average.value == pytest.approx(5 / 12)
    assert mean_accuracy(correct) == pytest.approx(5 / 12)
    assert {k: estimate.value for k, estimate in summary.pass_at_k.items()} == pytest.approx(
        {1: 5 / 12, 2: 0.5, 4: 2 / 3}
    )
    assert summary.pass_at_k[1] == summary.average
    for estimate in summary.pass_at_k.values():
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert benchmark_summary(correct, [1, 2, 4], resamples=200, seed=0) == summary


@pytest.mark.parametrize(
    "correct", [np.zeros((0, 4), bool), np.zeros((4, 0), bool), np.zeros(4, bool), [[0, 1]], [[0.5]]]
)
def test_benchmark_summary_takes_only_bool_problems_by_samples(correct):
    with pytest.raises(ValueError, match=r"expected bool \[problems, samples\]"):
        benchmark_summary(correct, [1], resamples=10, seed=0)


def test_benchmark_summary_refuses_k_beyond_the_samples():
    with pytest.raises(ValueError, match="k is 5"):
        benchmark_summary(np.ones((2, 4), bool), [1, 5], resamples=10, seed=0)
