"""The update: forward and backward over packed micro-batches with the objective's token loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scope.backend.optimizer import Trainable
from megatron_scope.backend.schedule import TokenLogprobs, run, token_statistics
from megatron_scope.backend.setup import Ranks
from megatron_scope.errors import TrainingError
from megatron_scope.objective.losses import TokenTerms
from megatron_scope.records import MicroBatch, ResponseCoefficients


@dataclasses.dataclass(frozen=True)
class UpdateStats:
    """Sums over all response tokens of an update, the same on every rank (nats).

    `nll_correct` and `kl_incorrect` (the k1 estimate log pi_theta - log pi_T) are means per token of their
    path, NaN without one. The log-prob gap is trainer minus engine at rollout temperature: mean and maximum
    of its absolute value, and the k3 estimate of KL(engine || trainer); NaN where the rollouts carry no
    engine log-probs.
    """

    loss: float
    nll_correct: float
    kl_incorrect: float
    entropy: float
    logprob_gap_mean: float
    logprob_gap_max: float
    logprob_gap_kl: float


_SUMS: tuple[str, ...] = (
    "loss",
    "nll",
    "correct",
    "kl",
    "incorrect",
    "entropy",
    "tokens",
    "gap",
    "gap_kl",
    "compared",
)


def forward_backward(
    student: Trainable,
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    *,
    correct: np.ndarray,
    coefficients: ResponseCoefficients,
    teacher: TokenLogprobs,
    token_loss: Callable[[TokenTerms], Tensor],
    student_temperature: float,
    rollout_temperature: float,
    whole_gradients: bool = False,
) -> UpdateStats:
    """Accumulates the gradient of the summed token loss in main_grad, reduced over replicas.

    Raises TrainingError, on every rank, when the loss is not finite. `whole_gradients` leaves the full sum on
    every replica.
    """

    def hook(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        stats = token_statistics(student.stage, ranks, hidden, micro_batch.targets, student_temperature)
        terms = _terms(micro_batch, stats.logprob, coefficients, teacher)
        loss = token_loss(terms)
        with torch.no_grad():
            at_rollout = stats.logprob
            if rollout_temperature != student_temperature:
                at_rollout = token_statistics(
                    student.stage, ranks, hidden, micro_batch.targets, rollout_temperature
                ).logprob
            data = _token_data(
                micro_batch, correct[micro_batch.response], loss, terms, stats.entropy, at_rollout
            )
        return loss, data

    student.zero_grad()
    student.wrapped.train()
    results = run(
        student.wrapped, micro_batches, ranks, hook, backward=True, force_all_reduce=whole_gradients
    )
    return _reduce(results, ranks)


def _terms(
    micro_batch: MicroBatch, logprob: Tensor, coefficients: ResponseCoefficients, teacher: TokenLogprobs
) -> TokenTerms:
    def rows(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device=logprob.device, dtype=logprob.dtype)

    return TokenTerms(
        logprob=logprob,
        old_logprob=None,
        teacher_logprob=rows(teacher.rows(micro_batch)),
        likelihood=rows(coefficients.likelihood[micro_batch.response]),
        distill=rows(coefficients.distill[micro_batch.response]),
    )


def _token_data(
    micro_batch: MicroBatch,
    correct_R: np.ndarray,
    loss: Tensor,
    terms: TokenTerms,
    entropy: Tensor,
    at_rollout: Tensor,
) -> dict[str, Tensor]:
    """Float64 sums of one micro-batch and the largest gap, as scalars on the CPU."""
    logprob = terms.logprob.detach().double()
    correct = torch.from_numpy(correct_R).to(logprob.device)
    incorrect = ~correct
    engine = torch.from_numpy(micro_batch.engine_logprobs).to(logprob)
    compared = engine.isfinite()
    gap = torch.where(compared, at_rollout.double() - engine, 0.0)
    values = {
        "loss": loss.detach().double(),
        "nll": -logprob[correct].sum(),
        "correct": correct.sum(),
        "kl": (logprob - terms.teacher_logprob)[incorrect].sum(),
        "incorrect": incorrect.sum(),
        "entropy": entropy.double().sum(),
        "tokens": torch.tensor(len(logprob)),
        "gap": gap.abs().sum(),
        "gap_kl": (gap.exp() - 1 - gap).sum(),
        "compared": compared.sum(),
        "gap_max": gap.abs().max() if len(gap) else gap.sum(),
    }
    together = torch.stack(
        [value.double().to(logprob.device) for value in values.values()]
    ).cpu()  # one transfer
    return dict(zip(values, together, strict=True))


def _reduce(results: list[dict[str, Tensor]], ranks: Ranks) -> UpdateStats:
    sums = torch.zeros(len(_SUMS), dtype=torch.float64)
    highest = torch.zeros(1, dtype=torch.float64)
    if ranks.speaks_for_scores:
        for data in results:
            sums += torch.stack([data[name] for name in _SUMS])
            highest = torch.maximum(highest, data["gap_max"])
    dist.all_reduce(sums, group=ranks.world_group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=ranks.world_group)
    total = dict(zip(_SUMS, sums.tolist(), strict=True))
    if not np.isfinite(total["loss"]):
        raise TrainingError(
            f"the loss is {total['loss']}; the optimizer was not touched. Look at the step's rollouts"
        )

    def mean(name: str, count: str) -> float:
        return total[name] / total[count] if total[count] else float("nan")

    return UpdateStats(
        loss=total["loss"],
        nll_correct=mean("nll", "correct"),
        kl_incorrect=mean("kl", "incorrect"),
        entropy=mean("entropy", "tokens"),
        logprob_gap_mean=mean("gap", "compared"),
        logprob_gap_max=highest.item() if total["compared"] else float("nan"),
        logprob_gap_kl=mean("gap_kl", "compared"),
    )
