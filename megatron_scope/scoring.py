"""The score stage: which model reads which responses before a step's update, and what is kept of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megatron_scope.backend.distribute import largest
from megatron_scope.backend.hidden_states import HiddenStates
from megatron_scope.backend.model import StageModel
from megatron_scope.backend.scoring import (
    KnownLogprobs,
    TokenLogprobs,
    keep_hidden_states,
    mean_logprobs,
    score,
)
from megatron_scope.backend.setup import Ranks
from megatron_scope.backend.token_loss import OnDemand, TeacherStates
from megatron_scope.config import Config
from megatron_scope.config.needs import needs_old_logprobs, teacher_is_served
from megatron_scope.config.schema import Divergence, Overflow
from megatron_scope.errors import ScoringError
from megatron_scope.objective import Objective
from megatron_scope.records import MicroBatch, Response, ResponseTable


@dataclasses.dataclass(frozen=True)
class Scores:
    """Mean log-probs that the objective asks for (float64 [N], NaN elsewhere) and this replica's log-probs
    per token.
    """

    student_mean: np.ndarray
    teacher_mean: np.ndarray
    known: KnownLogprobs


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The models of a run that score responses, on one rank; `pack` makes micro-batches.

    `teacher` is None where there is none or it is served: then its scores have come with the responses.
    """

    config: Config
    ranks: Ranks
    objective: Objective
    pack: Callable[[Sequence[Response]], list[MicroBatch]]
    student: StageModel
    teacher: StageModel | None
    reference: StageModel | None

    def score(
        self, responses: Sequence[Response], table: ResponseTable, names: Sequence[str] | None
    ) -> Scores:
        """What the objective must know before the update. SCOPE: student log-probs of the correct responses
        and teacher log-probs of the incorrect ones only (Eq. 4, 5).

        `responses` are this replica's, `table` and `names` (for messages, on rank 0) are of all. Raises
        ScoringError, on every rank, for a log-prob that is not finite.
        """
        settings, objective = self.config.objective, self.objective
        for_weights = objective.student_scored(table)
        keeps_old = needs_old_logprobs(self.config)
        everybody = np.ones(len(table), dtype=bool)

        def checked_mean(name: str, tokens: TokenLogprobs, mask: np.ndarray) -> np.ndarray:
            mean = mean_logprobs(tokens, len(table), self.ranks)
            _check_finite(name, mean, mask, names)
            return mean

        by_student = everybody if keeps_old else for_weights
        student = self.token_logprobs(self.student, responses, by_student, settings.student_temperature)
        student_mean = checked_mean("student", student, by_student)
        by_teacher = objective.teacher_scored(table)
        states = self._teacher_states(responses, by_teacher)
        teacher = self._teacher_logprobs(responses, by_teacher, states)
        teacher_mean = checked_mean("teacher", teacher, by_teacher)
        by_reference = objective.reference_scored(table)
        reference = self.token_logprobs(self.reference, responses, by_reference, settings.student_temperature)
        checked_mean("initial student", reference, by_reference)
        return Scores(
            np.where(for_weights, student_mean, np.nan),
            teacher_mean,
            KnownLogprobs(teacher, reference, student if keeps_old else None, states),
        )

    def _teacher_logprobs(
        self, responses: Sequence[Response], mask: np.ndarray, states: TeacherStates | None
    ) -> TokenLogprobs:
        if teacher_is_served(self.config):
            return served_logprobs(responses, mask)
        keep = states.hidden if states and not states.on_demand else None
        return self.token_logprobs(
            self.teacher, responses, mask, self.config.objective.teacher_temperature, keep
        )

    def _teacher_states(self, responses: Sequence[Response], mask: np.ndarray) -> TeacherStates | None:
        """Room for the teacher's hidden states of the responses in `mask`, where an exact divergence will
        read them.
        """
        settings, teacher = self.config.objective, self.teacher
        if teacher is None or settings.divergence is Divergence.SAMPLED:
            return None
        scale = settings.student_temperature / settings.teacher_temperature
        limit = int(self.config.teacher.hidden_states_gb * 1e9)
        kept = TeacherStates(teacher, HiddenStates(self.ranks, limit), settings.divergence, scale)
        if self.config.teacher.hidden_states_overflow is Overflow.FILE:
            return kept
        token_bytes = teacher.shape.hidden_size * teacher.config.params_dtype.itemsize
        needed = sum(len(response.output_ids) for response in responses if mask[response.index]) * token_bytes
        if largest(self.ranks, needed) <= limit * self.ranks.tensor_size:
            return kept

        def teacher_pass(indices: Sequence[int], hidden: HiddenStates) -> None:
            wanted = mask & np.isin(np.arange(len(mask)), indices)
            chosen = [response for response in responses if wanted[response.index]]
            keep_hidden_states(teacher, self.pack(chosen), self.ranks, hidden)

        fitting = limit * self.ranks.tensor_size // (self.config.train.micro_batch_tokens * token_bytes)
        on_demand = OnDemand(max(1, fitting), teacher_pass)
        return dataclasses.replace(
            kept, hidden=HiddenStates(self.ranks, limit_bytes=None), on_demand=on_demand
        )

    def token_logprobs(
        self,
        stage: StageModel | None,
        responses: Sequence[Response],
        mask: np.ndarray,
        temperature: float,
        keep: HiddenStates | None = None,
    ) -> TokenLogprobs:
        """A model's log-probs of the responses in `mask`, bool [N]; nothing without a model. `keep` takes its
        hidden states.
        """
        if stage is None:
            return TokenLogprobs({})
        chosen = [response for response in responses if mask[response.index]]
        stop = self.config.teacher.stop_token_id if stage is self.teacher else None
        return score(stage, self.pack(chosen), self.ranks, temperature, stop_token_id=stop, keep=keep)


def served_logprobs(responses: Sequence[Response], mask: np.ndarray) -> TokenLogprobs:
    """What a served teacher said of the responses in `mask`, bool [N]; those without stay out."""
    return TokenLogprobs(
        {
            response.index: response.teacher_logprobs
            for response in responses
            if mask[response.index] and response.teacher_logprobs is not None
        }
    )


def _check_finite(model: str, mean: np.ndarray, mask: np.ndarray, names: Sequence[str] | None) -> None:
    bad = np.flatnonzero(mask & ~np.isfinite(mean))
    if len(bad):
        name = names[bad[0]] if names else f"response {bad[0]}"
        raise ScoringError(
            f"the {model}'s log-probs are not finite for {len(bad)} responses, the first of them {name}; "
            f"no score is made up for them. Check the {model}'s weights (inf or NaN?) and train.precision"
        )
