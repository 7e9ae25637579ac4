"""The comparison as Markdown tables, padded so that they read well in a terminal too."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from scores import BASE, LABELS, TEMPERATURES, Comparison, K, Result

from megatron_scope.evaluate.metrics import Estimate

Measure = Callable[[Result], float]
TEXT_WIDTH = 110


def markdown(comparison: Comparison) -> str:
    """One table of scores a temperature, the gains with their intervals, and each path's gradient."""
    several = len(comparison.seeds) > 1
    parts = [_heading(comparison)]
    for temperature in TEMPERATURES:
        results = {method: of[temperature] for method, of in comparison.results.items()}
        parts += [f"Temperature {temperature}:", _scores(results)]
        if several:
            for name, gain in _GAINS.items():
                parts += [
                    f"Temperature {temperature}, gain in {name} of each seed:",
                    _gains(comparison, results, gain),
                ]
    parts += [_legend(comparison), *_gradients(comparison)]
    return "\n\n".join(parts)


_GAINS: dict[str, Callable[[Result], Estimate | None]] = {
    f"Avg@{K}": lambda result: result.average_gain,
    f"Pass@{K}": lambda result: result.passed_gain,
}


def _heading(comparison: Comparison) -> str:
    seeds = ", ".join(map(str, comparison.seeds))
    each = "; the mean of the seeds, and each seed's value in brackets" if len(comparison.seeds) > 1 else ""
    return (
        f"{comparison.num_problems} held-out problems x {comparison.num_samples} samples after "
        f"{comparison.steps} steps of training, seed {seeds}{each}."
    )


def _scores(results: dict[str, list[Result]]) -> str:
    several = len(results[BASE]) > 1
    gain_columns = [] if several else ["gain"]
    header = ["method", f"Avg@{K} %", *gain_columns, f"Pass@{K} %", *gain_columns]
    rows = []
    for method, of_seeds in results.items():
        row = [LABELS[method]]
        for measure, gain in (
            (lambda result: result.average.value, _GAINS[f"Avg@{K}"]),
            (lambda result: result.passed.value, _GAINS[f"Pass@{K}"]),
        ):
            row.append(_values(of_seeds, measure, 1))
            if not several:
                row.append(_signed(gain(of_seeds[0])))
        row += [
            _values(of_seeds, lambda result: result.solutions.value, 1),
            _values(of_seeds, lambda result: result.diversity.distinct_n[2], 2),
            _values(of_seeds, lambda result: result.diversity.self_bleu, 2),
        ]
        rows.append(row)
    return table([*header, "solutions", "distinct-2", "self-BLEU"], rows)


def _gains(
    comparison: Comparison, results: dict[str, list[Result]], gain: Callable[[Result], Estimate | None]
) -> str:
    rows = [
        [LABELS[method], *(_signed(gain(result)) for result in of_seeds)]
        for method, of_seeds in results.items()
        if method != BASE
    ]
    return table(["method", *(f"seed {seed}" for seed in comparison.seeds)], rows)


def _legend(comparison: Comparison) -> str:
    compared = [
        result.diversity.num_problems
        for of_temperature in comparison.results.values()
        for of_seeds in of_temperature.values()
        for result in of_seeds
    ]
    responses = comparison.results[BASE][TEMPERATURES[0]][0].diversity.num_responses
    return textwrap.fill(
        "gain: points over the student before training, problem by problem, with its 95 % paired-bootstrap "
        "interval over problems. solutions: different responses to a problem, among its "
        f"{comparison.num_samples} samples, that are right in every step (at most 24). distinct-2 (high "
        f"where responses differ) and self-BLEU (low) compare {responses} correct responses to each of the "
        f"problems, {min(compared)} or more, that every method solved {responses} times or more.",
        width=TEXT_WIDTH,
    )


def _gradients(comparison: Comparison) -> list[str]:
    if not comparison.gradients:
        return []
    rows = [
        [
            LABELS[method],
            each([path.correct for path in of_seeds], 2),
            each([path.incorrect for path in of_seeds], 2),
            each([path.incorrect_noise for path in of_seeds], 2),
            each([path.incorrect_noise_share for path in of_seeds], 2),
        ]
        for method, of_seeds in comparison.gradients.items()
    ]
    return [
        textwrap.fill(
            "Norm of the gradient that correct and incorrect responses give alone, mean over the measured "
            "steps. noise: the square root of the sum of that gradient's variances over draws of prompts and "
            "responses, from the difference between halves of the step's prompts (-: not measured).",
            width=TEXT_WIDTH,
        ),
        table(["method", "correct", "incorrect", "noise of incorrect", "noise / norm"], rows),
    ]


def _values(results: Sequence[Result], measure: Measure, digits: int) -> str:
    return each([measure(result) for result in results], digits)


def each(values: Sequence[float | None], digits: int) -> str:
    """The mean, and in brackets what it is the mean of; `-` where a value is missing."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    if len(known) < len(values):
        return "-"
    mean = f"{np.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({', '.join(f'{value:.{digits}f}' for value in known)})"


def _signed(gain: Estimate | None) -> str:
    return "" if gain is None else f"{gain.value:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of equal width, numbers to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])
