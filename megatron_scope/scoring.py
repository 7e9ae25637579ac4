"""The score stage: which model reads which responses before a step's update, and what is kept of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from megatron_scope.arriving import LocalBatch
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
from megatron_scope.config.needs import corrects_engine, needs_old_logprobs
from megatron_scope.config.schema import Divergence, Overflow
from megatron_scope.errors import ScoringError
from megatron_scope.objective import Objective
from megatron_scope.records import MicroBatch, Response


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

    `teacher` is None where there is none, or where it is served: then its scores come with the responses.
    """

    config: Config
    ranks: Ranks
    objective: Objective
    pack: Callable[[Sequence[Response]], list[MicroBatch]]
    student: StageModel
    teacher: StageModel | None
    reference: StageModel | None

    def token_logprobs(
        self,
        stage: StageModel | None,
        responses: Sequence[Response],
        temperatures: Sequence[float],
        keep: HiddenStates | None = None,
    ) -> list[TokenLogprobs]:
        """A model's log-probs of this replica's `responses` at each temperature; nothing without a model.
        `keep` takes its hidden states.
        """
        if stage is None:
            return [TokenLogprobs({}) for _ in temperatures]
        stop = self.config.teacher.stop_token_id if stage is self.teacher else None
        return score(stage, self.pack(responses), self.ranks, temperatures, stop_token_id=stop, keep=keep)


class StepScoring:
    """The scores of one step, response by response as they arrive: what the objective must know before the
    update. SCOPE: student log-probs of the correct responses and teacher log-probs of the incorrect ones only
    (Eq. 4, 5).

    Every rank adds every part, empty or not, and finishes: both are collectives.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._keeps_old = needs_old_logprobs(scorer.config)
        self._kept = self._room_for_states()
        self._makes_states_anew = False
        settings, student = scorer.config.objective, (scorer.config.objective.student_temperature,)
        if self._keeps_old and corrects_engine(scorer.config):
            student = (*student, scorer.config.rollout.temperature)
        self._temperatures = {
            "student": student,
            "teacher": (settings.teacher_temperature,),
            "reference": (settings.student_temperature,),
        }
        # Of each model, by temperature: log-probs by the places of the responses.
        self._found: dict[str, list[dict[int, np.ndarray]]] = {
            name: [{} for _ in temperatures] for name, temperatures in self._temperatures.items()
        }

    def add(self, responses: Sequence[Response]) -> None:
        """Scores this replica's share of a part of the step."""
        scorer = self._scorer
        masks = self._masks(np.array([response.correct for response in responses], dtype=bool))
        chosen = {name: list(itertools.compress(responses, mask)) for name, mask in masks.items()}
        if self._kept is not None:
            self._makes_states_anew |= self._overflows(chosen["teacher"])
        keep = None if self._makes_states_anew else self._kept
        for name, stage, states in (
            ("student", scorer.student, None),
            ("teacher", scorer.teacher, keep),
            ("reference", scorer.reference, None),
        ):
            scores = scorer.token_logprobs(stage, chosen[name], self._temperatures[name], states)
            for found, at_temperature in zip(self._found[name], scores, strict=True):
                found.update(at_temperature.by_response)
        self._found["teacher"][0].update(served_logprobs(chosen["teacher"]))

    def finish(self, batch: LocalBatch) -> Scores:
        """The scores of the complete step under its canonical indices.

        Raises ScoringError, on every rank, for a log-prob that is not finite.
        """
        masks = self._masks(batch.table.correct)
        tokens, means = {}, {}
        for name, by_temperature in self._found.items():
            tokens[name] = [TokenLogprobs(found).renumbered(batch.index_of) for found in by_temperature]
            means[name] = mean_logprobs(tokens[name][0], len(batch.table), self._scorer.ranks)
            _check_finite(_WHO[name], means[name], masks[name], batch.names)
        for_weights = self._scorer.objective.student_scored(batch.table.correct)
        return Scores(
            np.where(for_weights, means["student"], np.nan),
            means["teacher"],
            KnownLogprobs(
                tokens["teacher"][0],
                tokens["reference"][0],
                tokens["student"][0] if self._keeps_old else None,
                self._teacher_states(batch, masks["teacher"]),
                old_at_rollout=tokens["student"][1] if len(tokens["student"]) > 1 else None,
            ),
        )

    def _masks(self, correct: np.ndarray) -> dict[str, np.ndarray]:
        """Which responses each model scores, bool [N]."""
        objective = self._scorer.objective
        everybody = np.ones(len(correct), dtype=bool)
        return {
            "student": everybody if self._keeps_old else objective.student_scored(correct),
            "teacher": objective.teacher_scored(correct),
            "reference": objective.reference_scored(correct),
        }

    # ---- the teacher's hidden states, for exact divergences

    def _room_for_states(self) -> HiddenStates | None:
        """For the teacher's hidden states, where an exact divergence will read them."""
        config = self._scorer.config
        if self._scorer.teacher is None or config.objective.divergence is Divergence.SAMPLED:
            return None
        return HiddenStates(self._scorer.ranks, int(config.teacher.hidden_states_gb * 1e9))

    def _overflows(self, responses: Sequence[Response]) -> bool:
        """Whether the hidden states of a whole step's responses are to be made anew in the update, since they
        do not fit."""
        if self._scorer.config.teacher.hidden_states_overflow is Overflow.FILE:
            return False
        needed = sum(len(response.output_ids) for response in responses) * self._token_bytes
        return largest(self._scorer.ranks, needed) > self._limit_bytes

    def _teacher_states(self, batch: LocalBatch, mask: np.ndarray) -> TeacherStates | None:
        scorer = self._scorer
        settings, teacher, hidden = scorer.config.objective, scorer.teacher, self._kept
        if teacher is None or hidden is None:
            return None
        hidden.renumber(batch.index_of)
        scale = settings.student_temperature / settings.teacher_temperature
        states = TeacherStates(teacher, hidden, settings.divergence, scale)
        if not self._makes_states_anew:
            return states

        def teacher_pass(indices: Sequence[int], hidden: HiddenStates) -> None:
            wanted = mask & np.isin(np.arange(len(mask)), indices)
            chosen = [response for response in batch.responses if wanted[response.index]]
            keep_hidden_states(teacher, scorer.pack(chosen), scorer.ranks, hidden)

        fitting = self._limit_bytes // (scorer.config.train.micro_batch_tokens * self._token_bytes)
        return dataclasses.replace(
            states,
            hidden=HiddenStates(scorer.ranks, limit_bytes=None),
            on_demand=OnDemand(max(1, fitting), teacher_pass),
        )

    @property
    def _token_bytes(self) -> int:
        teacher = self._scorer.teacher
        assert teacher is not None
        return teacher.shape.hidden_size * teacher.config.params_dtype.itemsize

    @property
    def _limit_bytes(self) -> int:
        """Of a replica's last stage: its tensor ranks share the hidden states."""
        return int(self._scorer.config.teacher.hidden_states_gb * 1e9) * self._scorer.ranks.tensor_size


def served_logprobs(responses: Sequence[Response]) -> dict[int, np.ndarray]:
    """What a served teacher has said of responses, by index; those of which it has not are left out."""
    return {
        response.index: response.teacher_logprobs
        for response in responses
        if response.teacher_logprobs is not None
    }


_WHO = {"student": "student", "teacher": "teacher", "reference": "initial student"}  # in messages


def _check_finite(model: str, mean: np.ndarray, mask: np.ndarray, names: Sequence[str] | None) -> None:
    bad = np.flatnonzero(mask & ~np.isfinite(mean))
    if len(bad):
        name = names[bad[0]] if names else f"response {bad[0]}"
        raise ScoringError(
            f"the {model}'s log-probs are not finite for {len(bad)} responses, the first of them {name}; "
            f"no score is made up for them. Check the {model}'s weights (inf or NaN?) and train.precision"
        )
