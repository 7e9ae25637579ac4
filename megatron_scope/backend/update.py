"""The update: forward and backward over packed micro-batches with the objective's token loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scope.backend.optimizer import Trainable
from megatron_scope.backend.parity import LogprobGap
from megatron_scope.backend.schedule import run, token_statistics
from megatron_scope.backend.scoring import KnownLogprobs, TokenLogprobs
from megatron_scope.backend.setup import Ranks
from megatron_scope.backend.token_loss import TokenLoss
from megatron_scope.errors import TrainingError
from megatron_scope.objective.losses import TokenTerms
from megatron_scope.records import MicroBatch, ResponseCoefficients, ResponseTable


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """What stays the same over a run: the loss, the temperatures, how far a ratio may go unclipped, the
    largest factor of the correction (None: there is none), and how far the log-probs of trainer and engine
    may lie apart (None: as they like).
    """

    token_loss: Callable[[TokenTerms], Tensor]
    student_temperature: float
    rollout_temperature: float
    ratio_clip: float
    correction_cap: float | None
    logprob_gap_limit: float | None


@dataclasses.dataclass(frozen=True)
class UpdateStats:
    """Means over the response tokens of a step's updates, the same on every rank (nats; NaN over nothing).

    `loss` is the mean of the updates'. `nll_correct` is over the correct path. `kl_correct` and
    `kl_incorrect` are the k1 estimate log pi_theta - log pi_T over a path's tokens that the teacher scored,
    and `stop_log_ratio` the same over their stop tokens; `divergence_incorrect` is the exact one where the
    objective asks for it. `kl_reference` is the k3 estimate of KL(student || initial student). The ratio is
    pi_theta / pi_old: its largest value and the share beyond the clip. The log-prob gap is trainer minus
    engine at rollout temperature, in the first update, whose weights made the responses: mean and maximum of
    its absolute value, and the k3 estimate of KL(engine || trainer). Where the engine's draws are corrected:
    the share of tokens whose pi_old / pi_engine was over the cap, and the mean of the factor.
    """

    loss: float
    nll_correct: float
    kl_correct: float
    kl_incorrect: float
    divergence_incorrect: float
    stop_log_ratio: float
    kl_reference: float
    entropy: float
    ratio_max: float
    ratio_clipped: float
    logprob_gap_mean: float
    logprob_gap_max: float
    logprob_gap_kl: float
    correction_clip_rate: float
    correction_mean: float


@dataclasses.dataclass(frozen=True)
class PathGradients:
    """What the correct and the incorrect responses of an update give alone; NaN where not measured.

    The norms of their gradients before clipping, and of the incorrect ones' the noise: the square root of the
    sum of its coordinates' variances over draws of prompts and responses.
    """

    norm_correct: float = math.nan
    norm_incorrect: float = math.nan
    noise_incorrect: float = math.nan


@dataclasses.dataclass(frozen=True)
class StepUpdate:
    """What a step's updates did.

    `grad_norm` is the mean of their norms before clipping, `path_gradients` those of the first update.
    """

    stats: UpdateStats
    num_updates: int
    grad_norm: float
    path_gradients: PathGradients
    lr: float


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums and maxima over tokens, float64, by name; a mean `x` is a sum `x` over a sum `x_count`."""

    sums: dict[str, float]
    maxima: dict[str, float]


MEANS = (
    *("nll_correct", "kl_correct", "kl_incorrect", "divergence_incorrect", "stop_log_ratio"),
    *("kl_reference", "entropy"),
    *("ratio_clipped", "logprob_gap_mean", "logprob_gap_kl"),
    *("correction_clip_rate", "correction_mean"),
)
MAXIMA = ("ratio_max", "logprob_gap_max")
SUMS = ("loss", *MEANS, *(f"{name}_count" for name in MEANS))


def forward_backward(
    student: Trainable,
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    settings: UpdateSettings,
    *,
    correct: np.ndarray,
    coefficients: ResponseCoefficients,
    known: KnownLogprobs,
    is_first: bool = True,
    whole_gradients: bool = False,
) -> Totals:
    """Accumulates the gradient of the summed token loss in main_grad, reduced over replicas.

    `is_first` tells that no update has been made since the responses were drawn. `whole_gradients` leaves the
    full sum on every replica. Raises, on every rank, TrainingError when the loss is not finite, and
    ParityError when the first update finds the log-prob gap over its limit.
    """

    loss_of = TokenLoss(
        student.stage, known.teacher_states, ranks, settings.token_loss, settings.student_temperature
    )

    def hook(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = _terms(micro_batch, hidden, coefficients, known)
        at_rollout = _at_rollout(student, micro_batch, hidden, ranks, settings) if is_first else None
        if terms.rollout_logprob is None:
            terms = terms._replace(rollout_logprob=at_rollout)
        outcome = loss_of(micro_batch, hidden, terms)
        terms = terms._replace(logprob=outcome.logprob, divergence=outcome.divergence)
        with torch.no_grad():
            data = {
                "loss": outcome.value.double(),
                **_path_means(micro_batch, terms, correct[micro_batch.response], known),
                **_policy_means(micro_batch, terms, outcome.entropy, known, settings.ratio_clip),
                **_engine_gap(terms, outcome.logprob if at_rollout is None else at_rollout, is_first),
                **_correction_means(terms, settings.correction_cap),
            }
            together = torch.stack([data[name].double().to(hidden.device) for name in (*SUMS, *MAXIMA)])
            data = dict(zip((*SUMS, *MAXIMA), together.cpu(), strict=True))  # one transfer
        return outcome.loss, data

    student.zero_grad()
    student.wrapped.train()
    states, results, todo = known.teacher_states, [], len(micro_batches)
    for window in states.windows(micro_batches) if states else [micro_batches]:
        todo -= len(window)
        results += run(
            student.wrapped,
            window,
            ranks,
            hook,
            backward=True,
            reduce=todo == 0,
            force_all_reduce=whole_gradients,
        )
    totals = _reduce(results, ranks)
    if is_first:
        _logprob_gap(totals).check(settings.logprob_gap_limit)
    return totals


def path_gradients(
    student: Trainable,
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    settings: UpdateSettings,
    *,
    correct: np.ndarray,
    coefficients: ResponseCoefficients,
    known: KnownLogprobs,
    contrast: np.ndarray,
) -> PathGradients:
    """Norms and noise of the paths' gradients in a step's first update, where the loss is linear in its
    coefficients; one pass for each. `contrast` is prompt_contrast's.
    """

    def norm(part: ResponseCoefficients) -> float:
        forward_backward(
            student, micro_batches, ranks, settings, correct=correct, coefficients=part, known=known
        )
        return student.gradient_norm()

    incorrect = coefficients.only(~correct)
    return PathGradients(
        norm_correct=norm(coefficients.only(correct)),
        norm_incorrect=norm(incorrect),
        noise_incorrect=norm(incorrect.times(contrast)) if contrast.any() else math.nan,
    )


def prompt_contrast(table: ResponseTable, *, seed: int, step: int) -> np.ndarray:
    """The factor of each response, float64 [N], under which the first update's gradient becomes its noise.

    Its n prompts fall at random into two halves, of a and b prompts, with the factors s = sqrt(b / a) and
    -sqrt(a / b): 1 and -1 where n is even. Over the prompts they add up to 0 and their squares to n. So, the
    gradient being the sum of the prompts' own g_i, independent and of one distribution, its expectation drops
    out of sum s_i g_i, and E |sum s_i g_i|^2 = n tr Cov(g_i) = tr Cov(sum g_i). All 0 for a single prompt.
    """
    learnt = table.update == 0
    prompts = np.unique(table.group[learnt])
    a = len(prompts) // 2
    b = len(prompts) - a
    factors = np.zeros(len(table))
    if a:
        half = np.random.default_rng([seed, step]).permutation(prompts)[:a]
        in_half = np.isin(table.group, half)
        factors[learnt & in_half] = math.sqrt(b / a)
        factors[learnt & ~in_half] = -math.sqrt(a / b)
    return factors


def _terms(
    micro_batch: MicroBatch, hidden: Tensor, coefficients: ResponseCoefficients, known: KnownLogprobs
) -> TokenTerms:
    """All but log-probs and divergences, which are zeros."""

    def rows(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device=hidden.device, dtype=torch.float32)

    def of_response(values: np.ndarray) -> Tensor:
        return rows(values[micro_batch.response])

    def if_kept(logprobs: TokenLogprobs | None) -> Tensor | None:
        return None if logprobs is None else rows(logprobs.rows(micro_batch))

    return TokenTerms(
        logprob=hidden.new_zeros(len(micro_batch.rows), dtype=torch.float32),
        divergence=hidden.new_zeros(len(micro_batch.rows), dtype=torch.float32),
        old_logprob=if_kept(known.old),
        teacher_logprob=rows(known.teacher.rows(micro_batch)),
        reference_logprob=rows(known.reference.rows(micro_batch)),
        likelihood=of_response(coefficients.likelihood),
        distill=of_response(coefficients.distill),
        advantage=of_response(coefficients.advantage),
        reference_kl=of_response(coefficients.reference_kl),
        engine_logprob=rows(micro_batch.engine_logprobs),
        rollout_logprob=if_kept(known.old_at_rollout),
    )


def _at_rollout(
    student: Trainable, micro_batch: MicroBatch, hidden: Tensor, ranks: Ranks, settings: UpdateSettings
) -> Tensor | None:
    """The student's log-probs [R] at rollout temperature; None where that is the loss's own."""
    if settings.rollout_temperature == settings.student_temperature:
        return None
    return token_statistics(
        student.stage, ranks, hidden, micro_batch.targets, settings.rollout_temperature
    ).logprob


def _mean(name: str, values: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """The two sums of a mean of `values` [R] over the `chosen` rows, bool [R]."""
    return {name: torch.where(chosen, values, 0.0).sum(), f"{name}_count": chosen.sum()}


def _path_means(
    micro_batch: MicroBatch, terms: TokenTerms, correct_R: np.ndarray, known: KnownLogprobs
) -> dict[str, Tensor]:
    logprob = terms.logprob.detach().double()
    exact = known.teacher_states is not None
    correct, stop, scored = (
        torch.from_numpy(rows).to(logprob.device)
        for rows in (correct_R, micro_batch.stop, known.teacher.has(micro_batch))
    )
    log_ratio = logprob - terms.teacher_logprob
    return {
        **_mean("nll_correct", -logprob, correct),
        **_mean("kl_correct", log_ratio, scored & correct),
        **_mean("kl_incorrect", log_ratio, scored & ~correct),
        **_mean("divergence_incorrect", terms.divergence.double(), scored & ~correct & exact),
        **_mean("stop_log_ratio", log_ratio, scored & stop),
    }


def _policy_means(
    micro_batch: MicroBatch, terms: TokenTerms, entropy: Tensor, known: KnownLogprobs, clip: float
) -> dict[str, Tensor]:
    logprob = terms.logprob.detach().double()
    every = torch.ones_like(logprob, dtype=torch.bool)
    referred = torch.from_numpy(known.reference.has(micro_batch)).to(logprob.device)
    to_reference = terms.reference_logprob - logprob
    ratio = (logprob - (logprob if terms.old_logprob is None else terms.old_logprob)).exp()
    return {
        **_mean("kl_reference", to_reference.exp() - 1 - to_reference, referred),
        **_mean("entropy", entropy.double(), every),
        **_mean("ratio_clipped", ((ratio - 1).abs() > clip).double(), every),
        "ratio_max": ratio.max() if len(ratio) else ratio.sum(),
    }


def _engine_gap(terms: TokenTerms, at_rollout: Tensor, is_first: bool) -> dict[str, Tensor]:
    engine = terms.engine_logprob.double()
    compared = engine.isfinite() & is_first
    gap = torch.where(compared, at_rollout.double() - engine, 0.0)
    return {
        **_mean("logprob_gap_mean", gap.abs(), compared),
        **_mean("logprob_gap_kl", gap.exp() - 1 - gap, compared),
        "logprob_gap_max": gap.abs().max() if len(gap) else gap.sum(),
    }


def _correction_means(terms: TokenTerms, cap: float | None) -> dict[str, Tensor]:
    ratio = terms.engine_ratio().double()
    corrected = torch.full_like(ratio, cap is not None, dtype=torch.bool)
    limit = math.inf if cap is None else cap
    return {
        **_mean("correction_clip_rate", (ratio > limit).double(), corrected),
        **_mean("correction_mean", ratio.clamp(max=limit), corrected),
    }


def _reduce(results: list[dict[str, Tensor]], ranks: Ranks) -> Totals:
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    maxima = torch.zeros(len(MAXIMA), dtype=torch.float64)
    if ranks.speaks_for_scores:
        for data in results:
            sums += torch.stack([data[name] for name in SUMS])
            maxima = torch.maximum(maxima, torch.stack([data[name] for name in MAXIMA]))
    dist.all_reduce(sums, group=ranks.world_group)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=ranks.world_group)
    totals = Totals(
        dict(zip(SUMS, sums.tolist(), strict=True)), dict(zip(MAXIMA, maxima.tolist(), strict=True))
    )
    if not np.isfinite(totals.sums["loss"]):
        raise TrainingError(
            f"the loss is {totals.sums['loss']}; the optimizer was not touched. Look at the step's rollouts"
        )
    return totals


def _mean_of(name: str, sums: dict[str, float]) -> float:
    count = sums[f"{name}_count"]
    return sums[name] / count if count else math.nan


def _logprob_gap(totals: Totals) -> LogprobGap:
    mean, kl = (_mean_of(f"logprob_gap_{name}", totals.sums) for name in ("mean", "kl"))
    count = int(totals.sums["logprob_gap_mean_count"])
    return LogprobGap(mean, totals.maxima["logprob_gap_max"], kl, count)


def statistics(updates: Sequence[Totals]) -> UpdateStats:
    """The statistics of a step from the totals of its updates."""
    sums = {name: sum(update.sums[name] for update in updates) for name in SUMS}
    highest = {name: max(update.maxima[name] for update in updates) for name in MAXIMA}
    means = {name: _mean_of(name, sums) for name in MEANS}
    if not sums["logprob_gap_mean_count"]:
        highest["logprob_gap_max"] = math.nan
    return UpdateStats(loss=sums["loss"] / len(updates), **means, **highest)
