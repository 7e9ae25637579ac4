"""What each method scored: read from its evaluations, and compared with the student before training.

RUNS/seedN holds eval/METHOD-tTEMPERATURE.json as `megatron-scope evaluate` writes it, the responses beside it
and METHOD/metrics.jsonl; study.py makes them. All intervals are 95 % bootstrap intervals over the problems of
one seed: they say nothing about other seeds, whose values stand beside each other instead.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from task import END, is_valid_solution

from megatron_scope.config.schema import EvaluateConfig
from megatron_scope.data.jsonl import read_rows
from megatron_scope.errors import ScopeError
from megatron_scope.evaluate.diversity import Diversity, diversity
from megatron_scope.evaluate.metrics import (
    Estimate,
    bootstrap_interval,
    paired_bootstrap_interval,
    pass_at_k,
)

BASE = "base"
SERVED = "scope_sglang"  # SCOPE with the responses of a real SGLang server; served.py trains it
TEMPERATURES = ("1.0", "0.6")
K = 8
RESAMPLES = 2000
PATH_GRADIENTS = ("grad_norm_correct", "grad_norm_incorrect", "grad_noise_incorrect")
LABELS = {
    BASE: "before training",
    "opd": "OPD",
    "grpo": "GRPO",
    "scope": "SCOPE",
    SERVED: "SCOPE, SGLang's responses",
    "reverse_kl": "SCOPE, exact reverse KL",
    "student_0": "SCOPE, student exponent 0",
    "student_reversed": "SCOPE, student exponent -1",
    "teacher_0": "SCOPE, teacher exponent 0",
    "teacher_reversed": "SCOPE, teacher exponent +1",
    "both_0": "SCOPE, both exponents 0",
}


class CompareError(ScopeError):
    """The evaluations are not there or do not compare; the message is all that a user sees."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model's responses at one temperature. `problems` [P] are the ids in order, `num_correct` int [P];
    `correct[p]` are the texts of problem p's correct responses in the order sampled.
    """

    num_samples: int
    problems: tuple[str, ...]
    num_correct: np.ndarray
    correct: tuple[tuple[str, ...], ...]

    def accuracy(self) -> np.ndarray:
        """avg@N of each problem in percent, float [P]."""
        return 100 * self.num_correct / self.num_samples

    def passed(self) -> np.ndarray:
        """Unbiased pass@8 of each problem in percent, float [P]."""
        return np.array([100 * pass_at_k(self.num_samples, int(count), K) for count in self.num_correct])

    def num_solutions(self) -> np.ndarray:
        """Different responses of each problem that are right in every step, float [P]."""
        found = [
            {text.removesuffix(END) for text in texts if is_valid_solution(problem, text)}
            for problem, texts in zip(self.problems, self.correct, strict=True)
        ]
        return np.array([len(solutions) for solutions in found], dtype=float)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one method of one seed scored at one temperature.

    `average` (avg@8: mean accuracy) and `passed` (unbiased pass@8) are percentages, their gains points over
    the student before training (None for itself), problem by problem. `solutions` counts the different
    responses of a problem, among all samples, that are right in every step. `diversity` compares equally many
    correct responses to the problems that every method of the seed answered that often.
    """

    average: Estimate
    passed: Estimate
    average_gain: Estimate | None
    passed_gain: Estimate | None
    solutions: Estimate
    diversity: Diversity


@dataclasses.dataclass(frozen=True)
class PathGradients:
    """Means over the steps that measured the gradients that correct and incorrect responses give alone.

    `correct` and `incorrect` are of their norms, `incorrect_noise` of the incorrect ones' noise (the square
    root of the gradient's summed variances) and `incorrect_noise_share` of noise / norm. None: no such step.
    """

    correct: float | None
    incorrect: float | None
    incorrect_noise: float | None
    incorrect_noise_share: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`results[method][temperature]` has one Result a seed, `gradients[method]` one entry a seed."""

    seeds: tuple[int, ...]
    num_problems: int
    num_samples: int
    steps: int
    results: dict[str, dict[str, list[Result]]]
    gradients: dict[str, list[PathGradients]]


def evaluation_file(folder: Path, method: str, temperature: str) -> Path:
    return folder / "eval" / f"{method}-t{temperature}.json"


def responses_file(folder: Path, method: str, temperature: str) -> Path:
    return folder / "eval" / f"{method}-t{temperature}.responses.jsonl"


# ---- what is read


def read(runs: Path, seeds: Sequence[int], methods: Sequence[str]) -> Comparison:
    """The comparison of `methods`, BASE among them; CompareError for what is not there or unlike."""
    results: dict[str, dict[str, list[Result]]] = {
        method: {t: [] for t in TEMPERATURES} for method in methods
    }
    gradients: dict[str, list[PathGradients]] = {method: [] for method in methods if method != BASE}
    sizes, steps = set(), set()
    for seed in seeds:
        folder = runs / f"seed{seed}"
        for temperature in TEMPERATURES:
            evaluations = {method: read_evaluation(folder, method, temperature) for method in methods}
            for method, result in _results(folder, evaluations).items():
                results[method][temperature].append(result)
            sizes |= {(len(one.problems), one.num_samples) for one in evaluations.values()}
        for method, of_seeds in gradients.items():
            run = folder / method
            rows = _rows(run / "metrics.jsonl", ("step", *PATH_GRADIENTS), made_by=run)
            steps.add(rows[-1]["step"])
            of_seeds.append(_path_gradients(rows))
    if len(sizes) > 1:
        raise CompareError(f"{runs}: evaluations have {_list(sizes)} problems x samples; do them alike, anew")
    if len(steps) > 1:
        raise CompareError(
            f"{runs}: methods took {_list(steps)} steps; remove the runs that differ and train anew"
        )
    ((num_problems, num_samples),) = sizes
    return Comparison(tuple(seeds), num_problems, num_samples, max(steps, default=0), results, gradients)


def read_evaluation(folder: Path, method: str, temperature: str) -> Evaluation:
    """An evaluation with its responses; CompareError if they are missing, or not of one evaluation."""
    path = evaluation_file(folder, method, temperature)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        (benchmark,) = report["benchmarks"].values()
        counts: dict[str, int] = benchmark["num_correct"]
        samples: int = report["num_samples"]
        drawn_at: float = report["sampling"]["temperature"]
    except OSError as error:
        raise CompareError(f"{path}: cannot be read ({error.strerror}); study.py makes it") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CompareError(f"{path}: not a report of one benchmark by `megatron-scope evaluate`") from None
    if drawn_at != float(temperature):
        raise CompareError(f"{path}: temperature is {drawn_at}, expected {temperature}; evaluate anew")
    if samples < K:
        raise CompareError(
            f"{path}: {samples} samples a problem, but pass@{K} needs {K} or more; evaluate anew"
        )
    correct: dict[str, list[str]] = {problem: [] for problem in counts}
    responses = responses_file(folder, method, temperature)
    for row in _rows(responses, ("id", "correct", "response"), made_by=responses):
        if row["correct"] and row["id"] in correct:
            correct[row["id"]].append(row["response"])
    if {problem: len(texts) for problem, texts in correct.items()} != counts:
        raise CompareError(f"{responses}: not the responses of {path.name}; remove both and evaluate anew")
    return Evaluation(
        samples, tuple(counts), np.array(list(counts.values())), tuple(map(tuple, correct.values()))
    )


def _rows(path: Path, keys: Sequence[str], *, made_by: Path) -> list[dict[str, Any]]:
    """Rows that have all keys; without `made_by`, study.py makes the file anew."""
    rows = []
    for line, row in read_rows(path):
        if missing := [key for key in keys if key not in row]:
            raise CompareError(
                f"{path}:{line}: no {missing[0]} in it; remove {made_by} and start study.py again"
            )
        rows.append(row)
    if not rows:
        raise CompareError(f"{path}: empty; remove {made_by} and start study.py again")
    return rows


def _path_gradients(rows: Sequence[Mapping[str, Any]]) -> PathGradients:
    """A step without incorrect responses has no share of noise."""
    measured = [[row[key] for row in rows if row[key] is not None] for key in PATH_GRADIENTS]
    _, norm, noise = PATH_GRADIENTS
    shares = [row[noise] / row[norm] for row in rows if row[noise] is not None and row[norm] > 0]
    return PathGradients(*(float(np.mean(values)) if values else None for values in (*measured, shares)))


def _list(values: set[Any]) -> str:
    return " and ".join(map(str, sorted(values)))


# ---- what it comes to


def _results(folder: Path, evaluations: Mapping[str, Evaluation]) -> dict[str, Result]:
    base = evaluations[BASE]
    for method, evaluation in evaluations.items():
        if evaluation.problems != base.problems:
            raise CompareError(f"{folder}: {method} and {BASE} answered other problems; evaluate both anew")
    differences = _diversities(evaluations)
    return {
        method: Result(
            average=_mean(evaluation.accuracy()),
            passed=_mean(evaluation.passed()),
            average_gain=None if method == BASE else _gain(evaluation.accuracy(), base.accuracy()),
            passed_gain=None if method == BASE else _gain(evaluation.passed(), base.passed()),
            solutions=_mean(evaluation.num_solutions()),
            diversity=differences[method],
        )
        for method, evaluation in evaluations.items()
    }


def _diversities(evaluations: Mapping[str, Evaluation]) -> dict[str, Diversity]:
    """Of the problems to which every method has enough correct responses, so that all compare on the same."""
    settings = EvaluateConfig()
    fewest = np.min([evaluation.num_correct for evaluation in evaluations.values()], axis=0)
    shared = np.flatnonzero(fewest >= settings.diversity_responses)
    return {
        method: diversity(
            [evaluation.correct[problem] for problem in shared],
            num_responses=settings.diversity_responses,
            max_tokens=settings.diversity_tokens,
        )
        for method, evaluation in evaluations.items()
    }


def _mean(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), *bootstrap_interval(values, resamples=RESAMPLES, seed=0))


def _gain(after: np.ndarray, before: np.ndarray) -> Estimate:
    interval = paired_bootstrap_interval(after, before, resamples=RESAMPLES, seed=0)
    return Estimate(float((after - before).mean()), *interval)
