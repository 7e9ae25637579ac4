"""One step's numbers: RUN/metrics.jsonl's row, with the stages' times."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_scope.backend.parity import LogprobGap
from megatron_scope.backend.update import StepUpdate
from megatron_scope.data.jsonl import without_nan
from megatron_scope.objective.diagnostics import mean_perplexity, one_sided_share, path_spread
from megatron_scope.records import ResponseTable, RolloutCounts


class StageClock:
    """Wall-clock seconds of each named stage of a step, which may come in several spans."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[float, float]]] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._spans.setdefault(name, []).append((started, time.monotonic()))

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each stage so far."""
        return {name: sum(end - start for start, end in spans) for name, spans in self._spans.items()}

    def share_before(self, name: str, moment_s: float) -> float:
        """The share of a stage's seconds that lies before a moment of the monotonic clock."""
        spans = self._spans[name]
        before = sum(max(0.0, min(end, moment_s) - start) for start, end in spans)
        return before / max(self.seconds[name], 1e-9)


def step_metrics(
    *,
    step: int,
    update: StepUpdate,
    table: ResponseTable,
    weights: np.ndarray,
    student_mean: np.ndarray,
    teacher_mean: np.ndarray,
    counts: RolloutCounts,
    oldest_version: int,
    parity: LogprobGap,
    sampled_now: bool,
    seconds: dict[str, float],
    scoring_hidden_share: float,
) -> dict[str, Any]:
    """A step's row of metrics.jsonl; null stands for a mean over nothing and for what was not measured.

    Log-probs and KL in nats, lengths in tokens, times in seconds. `grad_noise_incorrect` is the root of the
    summed variance of the gradient whose norm is `grad_norm_incorrect`. The `parity_gap` is that of the gate
    before the step, over a few tokens of every server; the `logprob_gap` is over the step's own.
    `scoring_hidden_share` is the share of scoring time that fell before the last response was there. Only
    times and what follows from them vary by run, and last digits where rollout.overlap_scoring sums scores in
    the order of arrival.
    """
    stats = update.stats
    paths = update.path_gradients
    correct, incorrect = (path_spread(table, weights, correct=kind) for kind in (True, False))
    total_s = sum(seconds.values())
    row = {
        "step": step,
        "loss": stats.loss,
        "nll_correct": stats.nll_correct,
        "kl_incorrect": stats.kl_incorrect,
        "divergence_incorrect": stats.divergence_incorrect,
        "kl_correct": stats.kl_correct,
        "kl_reference": stats.kl_reference,
        "stop_log_ratio": stats.stop_log_ratio,
        "grad_norm": update.grad_norm,
        "grad_norm_correct": paths.norm_correct,
        "grad_norm_incorrect": paths.norm_incorrect,
        "grad_noise_incorrect": paths.noise_incorrect,
        "updates": update.num_updates,
        "ratio_max": stats.ratio_max,
        "ratio_clipped": stats.ratio_clipped,
        "lr": update.lr,
        "accuracy": float(table.correct.mean()),
        "student_ppl_correct": mean_perplexity(student_mean),
        "teacher_ppl_incorrect": mean_perplexity(teacher_mean),
        "weight_entropy_correct": correct.entropy,
        "weight_entropy_incorrect": incorrect.entropy,
        "effective_sample_size_correct": correct.effective_sample_size,
        "effective_sample_size_incorrect": incorrect.effective_sample_size,
        "entropy": stats.entropy,
        "response_length": float(table.num_tokens.mean()),
        "one_sided_groups": one_sided_share(table),
        "logprob_gap_mean": stats.logprob_gap_mean,
        "logprob_gap_max": stats.logprob_gap_max,
        "logprob_gap_kl": stats.logprob_gap_kl,
        "parity_gap_mean": parity.mean,
        "parity_gap_max": parity.max,
        "parity_gap_kl": parity.kl,
        "correction_clip_rate": stats.correction_clip_rate,
        "correction_mean": stats.correction_mean,
        **{f"rollouts_{name}": value for name, value in dataclasses.asdict(counts).items()},
        "weight_version": oldest_version,
        "staleness": step - 1 - oldest_version if sampled_now else None,
        "response_tokens": int(table.num_tokens.sum()),
        "tokens_per_second": float(table.num_tokens.sum() / total_s),
        "seconds": {**seconds, "total": total_s},
        "scoring_hidden_share": scoring_hidden_share,
    }
    return without_nan(row)
