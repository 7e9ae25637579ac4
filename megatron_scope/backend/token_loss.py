"""The loss of a micro-batch from its final hidden states: no logits of all its tokens ever exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_scope.backend.hidden_states import HiddenStates
from megatron_scope.backend.model import StageModel
from megatron_scope.backend.setup import Ranks
from megatron_scope.config.schema import Divergence
from megatron_scope.kernels.fused_linear import Coefficients, LossStats, distill_loss
from megatron_scope.objective.losses import TokenTerms
from megatron_scope.records import MicroBatch


@dataclasses.dataclass(frozen=True)
class OnDemand:
    """Makes hidden states anew for a window of the update instead of keeping a whole step's.

    `teacher_pass(indices, hidden)`, a pass through all stages, fills `hidden` with the responses of these
    indices that are distilled.
    """

    window: int  # micro-batches
    teacher_pass: Callable[[Sequence[int], HiddenStates], None]


@dataclasses.dataclass(frozen=True)
class TeacherStates:
    """What an exact divergence reads of the teacher: its hidden states, times `scale` (the ratio of the
    student's temperature to the teacher's), under its own output table. They are there from the scoring pass
    on unless `on_demand` makes them.
    """

    stage: StageModel
    hidden: HiddenStates
    divergence: Divergence
    scale: float
    on_demand: OnDemand | None = None

    def windows(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Sequence[MicroBatch]]:
        """The micro-batches in order, as many at a time as have their hidden states: until the next are
        taken.
        """
        if self.on_demand is None:
            yield micro_batches
            return
        for start in range(0, len(micro_batches), self.on_demand.window):
            window = micro_batches[start : start + self.on_demand.window]
            self.hidden.clear()
            indices = {int(index) for micro_batch in window for index in np.unique(micro_batch.response)}
            self.on_demand.teacher_pass(sorted(indices), self.hidden)
            yield window


class TokenOutcome(NamedTuple):
    """The differentiable `loss`, its `value`, and [R] without gradient: log-probs, entropy and, of distilled
    tokens, the exact divergence (0 elsewhere).
    """

    loss: Tensor
    value: Tensor
    logprob: Tensor
    entropy: Tensor
    divergence: Tensor


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """`loss_of`, a sum over tokens, of a student's micro-batches; `teacher` for exact divergences."""

    student: StageModel
    teacher: TeacherStates | None
    ranks: Ranks
    loss_of: Callable[[TokenTerms], Tensor]
    temperature: float

    def __call__(self, micro_batch: MicroBatch, hidden: Tensor, terms: TokenTerms) -> TokenOutcome:
        """The loss over the rows with final hidden states [R, h]. `terms` hold everything but the log-probs
        and divergences, which are found here. A collective of the tensor group.
        """
        num_rows, teacher = len(micro_batch.rows), self.teacher
        distilled = teacher.hidden.has(micro_batch) if teacher else np.zeros(num_rows, dtype=bool)
        parts = [(mask, source) for mask, source in ((~distilled, None), (distilled, teacher)) if mask.any()]
        found = {name: torch.zeros_like(terms.logprob) for name in ("logprob", "entropy", "divergence")}
        loss = torch.zeros_like(terms.logprob).sum()
        for mask, source in parts or [(distilled, None)]:  # no row at all has a gradient too, of zeros
            rows = torch.from_numpy(np.flatnonzero(mask)).to(hidden.device)
            part, stats = self._part(micro_batch, mask, hidden[rows], _taken(terms, rows), source)
            loss = loss + part
            found["logprob"][rows] = stats.logprob.to(loss.dtype)
            found["entropy"][rows] = stats.entropy.to(loss.dtype)
            if source is not None:
                found["divergence"][rows] = getattr(stats, source.divergence.value).to(loss.dtype)
        with torch.no_grad():
            value = self.loss_of(terms._replace(logprob=found["logprob"], divergence=found["divergence"]))
        return TokenOutcome(loss, value, **found)

    def _part(
        self,
        micro_batch: MicroBatch,
        mask: np.ndarray,
        hidden: Tensor,
        terms: TokenTerms,
        teacher: TeacherStates | None,
    ) -> tuple[Tensor, LossStats]:
        """Loss and statistics of the rows in `mask`, whose hidden states and terms are given."""
        teacher_hidden = teacher_weight = None
        if teacher is not None:
            indices = list(dict.fromkeys(micro_batch.response[mask].tolist()))
            teacher_hidden = teacher.hidden.rows(indices) * teacher.scale
            teacher_weight = teacher.stage.output_weight()

        def coefficients(stats: LossStats) -> Coefficients:
            """The derivative of the loss in each statistic; the divergence enters it linearly."""
            with torch.enable_grad():
                logprob = stats.logprob.detach().to(terms.logprob.dtype).requires_grad_()
                divergence = torch.zeros_like(logprob).requires_grad_()
                chunk = _taken(terms, stats.tokens)._replace(logprob=logprob, divergence=divergence)
                by_logprob, by_divergence = torch.autograd.grad(
                    self.loss_of(chunk), (logprob, divergence), allow_unused=True
                )
            own: dict[str, Any] = {"logprob": by_logprob}
            if teacher is not None:
                own[teacher.divergence.value] = by_divergence
            return Coefficients(**own)

        return distill_loss(
            hidden,
            self.student.output_weight(),
            teacher_hidden,
            teacher_weight,
            torch.from_numpy(micro_batch.targets[mask]).to(hidden.device),
            coefficients,
            group=self.ranks.tensor_group if self.ranks.tensor_size > 1 else None,
            vocab_start=self.student.vocab_start,
            vocab_size=self.student.vocab_size,
            temperature=self.temperature,
        )


def _taken(terms: TokenTerms, rows: Any) -> TokenTerms:
    taken: Any = [None if value is None else value[rows] for value in terms]
    return TokenTerms(*taken)
