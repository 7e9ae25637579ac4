"""The main job. `Trainer.step` is the method in one screen: roll out, score, weigh, update, publish,
record.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scope.backend import checkpoint, setup
from megatron_scope.backend.distribute import largest, on_rank_zero, scatter_to_replicas
from megatron_scope.backend.export import save_gradients, save_hf_folder
from megatron_scope.backend.learning_rate import learning_rate
from megatron_scope.backend.model import StageModel, build
from megatron_scope.backend.optimizer import Trainable, make_trainable
from megatron_scope.backend.schedule import TokenLogprobs, mean_logprobs, score
from megatron_scope.backend.setup import Ranks
from megatron_scope.backend.update import UpdateStats, forward_backward
from megatron_scope.config import Config, write_config
from megatron_scope.config.schema import Engine, ModelConfig, ObjectiveName
from megatron_scope.controller.process import ControllerProcess
from megatron_scope.controller.rows import ResponseRecord
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.data.batching import assign_replicas, empty_micro_batch, pack, response_table
from megatron_scope.errors import ScoringError
from megatron_scope.metrics import StageClock, step_metrics
from megatron_scope.objective import build_objective
from megatron_scope.objective.objectives import WeighedResponses
from megatron_scope.preflight import check_files, max_positions, needs_teacher, vocabulary
from megatron_scope.progress import Progress
from megatron_scope.records import (
    MicroBatch,
    Response,
    ResponseTable,
    RolloutCounts,
    SequenceLimits,
    StepBatch,
)
from megatron_scope.run_folder import RunFolder
from megatron_scope.sync.disk import remove_old_versions


@dataclasses.dataclass(frozen=True)
class LocalBatch:
    """What one rank knows of a step: its replica's responses, and the table of all."""

    responses: list[Response]
    table: ResponseTable
    counts: RolloutCounts
    oldest_version: int
    names: tuple[str, ...] | None  # on rank 0


@dataclasses.dataclass(frozen=True)
class Scores:
    """Mean log-probs of all responses (float64 [N], NaN where not scored) and this replica's teacher
    log-probs per token.
    """

    student_mean: np.ndarray
    teacher_mean: np.ndarray
    teacher: TokenLogprobs


class Trainer:
    """Everything that lives as long as a run, on one rank."""

    def __init__(self, config: Config, ranks: Ranks, *, resume: bool) -> None:
        self.config = config
        self.ranks = ranks
        self.folder = RunFolder(str(config.run.output_dir))
        self.objective = build_objective(config.objective)
        on_rank_zero(ranks, lambda: check_files(config))
        self.resume = resume
        self.vocabulary = vocabulary(config)
        self.student: Trainable = make_trainable(
            self._build(config.student, trainable=True), config.train, config.optimizer
        )
        self.teacher: StageModel | None = (
            self._build(config.teacher, trainable=False) if needs_teacher(config) else None
        )
        self.controller: ControllerProcess | None = None

    def _prepare_folder(self) -> Path | None:
        """Finds the checkpoint to go on from; without one, or when told to, starts over beside the earlier
        run.
        """
        latest = checkpoint.find_latest(self.folder.checkpoints) if self.resume else None
        if latest is None:
            self.folder.set_aside()
            self.folder.begin(0)
        else:
            state = checkpoint.read_state(latest)
            checkpoint.check_same_run(latest, state["run"], self._identity())
            self.folder.begin(state["step"])
        write_config(self.config, self.folder.resolved_config)
        return latest

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it must share."""
        return {
            "student": dataclasses.asdict(self.student.stage.shape),
            "run.seed": self.config.run.seed,
            "objective.name": self.config.objective.name.value,
        }

    def _build(self, model: ModelConfig, *, trainable: bool) -> StageModel:
        return build(
            HfFolder(str(model.hf)),
            self.ranks,
            self.config.train,
            padded_vocab=self.vocabulary.padded_rows,
            vocab_size=self.vocabulary.size,
            sequence_parallel=self.config.parallel.sequence,
            pipeline_layers=model.pipeline_layers,
            trainable=trainable,
        )

    def run(self) -> None:
        """Trains until run.steps and leaves the model in RUN/hf."""
        with contextlib.ExitStack() as stack:
            on_rank_zero(self.ranks, lambda: self._start_controller(stack))
            first = self._restore(on_rank_zero(self.ranks, self._prepare_folder)) + 1
            progress = stack.enter_context(Progress(self.config, self.ranks.rank, first))
            if first <= self.config.run.steps:
                self.publish(version=first - 1)
            for step in range(first, self.config.run.steps + 1):
                progress.show(self.step(step))
                if self._checkpoint_is_due(step):
                    self._save(step)
            save_hf_folder(self.student.stage, self.ranks, self.folder.final)

    def step(self, step: int) -> dict[str, Any]:
        """One training step; returns its row of metrics.jsonl."""
        clock = StageClock()
        with clock.stage("rollout"):
            batch = self.roll_out(step)
        with clock.stage("score"):
            scores = self.score(batch)
        with clock.stage("weigh"):
            weighed = self.objective.weigh(batch.table, scores.student_mean, scores.teacher_mean)
        with clock.stage("update"):
            stats, grad_norm, lr = self.update(step, batch, scores, weighed)
        with clock.stage("publish"):
            self.publish(version=step)
        with clock.stage("record"):
            self.record(step, batch, scores, weighed)
        row = step_metrics(
            step=step,
            stats=stats,
            grad_norm=grad_norm,
            lr=lr,
            table=batch.table,
            weights=weighed.weights,
            student_mean=scores.student_mean,
            teacher_mean=scores.teacher_mean,
            counts=batch.counts,
            oldest_version=batch.oldest_version,
            sampled_now=self._publishes,
            seconds=clock.seconds,
        )
        on_rank_zero(self.ranks, lambda: self.folder.append_metrics(row))
        return row

    # ---- stages

    def roll_out(self, step: int) -> LocalBatch:
        """Judged responses from the controller, each with the replica that keeps it for the step."""

        def produce() -> tuple[ResponseTable, RolloutCounts, int]:
            assert self.controller is not None
            batches.append(self.controller.call("produce", step, step - 1))
            return response_table(batches[0].responses), batches[0].counts, batches[0].oldest_version

        batches: list[StepBatch] = []
        table, counts, oldest_version = on_rank_zero(self.ranks, produce)
        parts = names = None
        if batches:
            replica = assign_replicas(table.num_input_tokens, self.ranks.num_replicas)
            parts = [
                [response for response in batches[0].responses if replica[response.index] == number]
                for number in range(self.ranks.num_replicas)
            ]
            names = batches[0].names
        mine = scatter_to_replicas(self.ranks, parts)
        return LocalBatch(mine, table, counts, oldest_version, names)

    def score(self, batch: LocalBatch) -> Scores:
        """Student log-probs of the correct responses and teacher log-probs of the incorrect ones only (Eq. 4,
        5).
        """
        settings = self.config.objective
        student_mask = self.objective.student_scored(batch.table)
        student = self._score(self.student.stage, batch, student_mask, settings.student_temperature)
        student_mean = mean_logprobs(student, len(batch.table), self.ranks)
        _check_scores("student", student_mean, student_mask, batch)
        teacher, teacher_mask = TokenLogprobs({}), self.objective.teacher_scored(batch.table)
        if self.teacher is not None:
            teacher = self._score(self.teacher, batch, teacher_mask, settings.teacher_temperature)
        teacher_mean = mean_logprobs(teacher, len(batch.table), self.ranks)
        _check_scores("teacher", teacher_mean, teacher_mask, batch)
        return Scores(student_mean, teacher_mean, teacher)

    def _score(
        self, stage: StageModel, batch: LocalBatch, mask: np.ndarray, temperature: float
    ) -> TokenLogprobs:
        chosen = [response for response in batch.responses if mask[response.index]]
        return score(stage, self._pack(chosen), self.ranks, temperature)

    def update(
        self, step: int, batch: LocalBatch, scores: Scores, weighed: WeighedResponses
    ) -> tuple[UpdateStats, float, float]:
        """One optimizer step on all responses (Eq. 6); returns its statistics, gradient norm and learning
        rate.
        """
        config = self.config
        dump = config.run.dump_gradients if step == 1 else None
        stats = forward_backward(
            self.student,
            self._padded(self._pack(batch.responses)),
            self.ranks,
            correct=batch.table.correct,
            coefficients=weighed.coefficients,
            teacher=scores.teacher,
            token_loss=self.objective.token_loss,
            student_temperature=config.objective.student_temperature,
            rollout_temperature=config.rollout.temperature,
            whole_gradients=dump is not None,
        )
        if dump is not None:
            save_gradients(self.student, self.ranks, Path(dump).expanduser())
        lr = learning_rate(config.optimizer, step - 1, config.run.steps)
        return stats, self.student.step(lr), lr

    def publish(self, version: int) -> None:
        """Hands the current weights to the rollout servers, under the number of updates that made them."""
        if not self._publishes:
            return
        out = self.folder.weights_of(version)
        save_hf_folder(self.student.stage, self.ranks, out)

        def hand_over() -> None:
            assert self.controller is not None
            self.controller.call("publish", str(out), version)
            remove_old_versions(self.folder.weights, keep=out)

        on_rank_zero(self.ranks, hand_over)

    def record(self, step: int, batch: LocalBatch, scores: Scores, weighed: WeighedResponses) -> None:
        """Writes the step's rollouts with what was learnt about them."""
        if not self._records:
            return

        def write() -> None:
            assert self.controller is not None
            records = {
                index: ResponseRecord(_or_none(student), _or_none(teacher), float(weight))
                for index, (student, teacher, weight) in enumerate(
                    zip(scores.student_mean, scores.teacher_mean, weighed.weights, strict=True)
                )
            }
            self.controller.call("record", step, records)

        on_rank_zero(self.ranks, write)

    # ---- helpers

    def _pack(self, responses: Sequence[Response]) -> list[MicroBatch]:
        return pack(responses, self.config.train.micro_batch_tokens, self._row_multiple)

    def _padded(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The same number on every replica, as Megatron's schedules and collectives expect."""
        missing = largest(self.ranks, len(micro_batches)) - len(micro_batches)
        return micro_batches + [empty_micro_batch(self._row_multiple)] * missing

    @property
    def _row_multiple(self) -> int:
        return self.ranks.tensor_size if self.config.parallel.sequence else 1

    @property
    def _publishes(self) -> bool:
        """Only sampling needs new weights; given and replayed responses do not."""
        return self._records and self.config.rollout.engine is not Engine.REPLAY

    @property
    def _records(self) -> bool:
        """Given responses stand in the user's own file already."""
        return self.config.objective.name is not ObjectiveName.SFT

    def _start_controller(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(self.folder.locked())
        limits = SequenceLimits(self.vocabulary.size, max_positions(self.config))
        self.controller = ControllerProcess(self.config, limits, str(self.folder.path))
        stack.callback(self.controller.close)

    def _checkpoint_is_due(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return every > 0 and (step % every == 0 or step == self.config.run.steps)

    def _save(self, step: int) -> None:
        def run_state() -> dict[str, Any]:
            assert self.controller is not None
            return {"step": step, "run": self._identity(), "data": self.controller.call("state")}

        checkpoint.save(
            self.folder.checkpoints,
            step,
            self.student,
            self.ranks,
            on_rank_zero(self.ranks, run_state),
            self.config.checkpoint.keep,
        )

    def _restore(self, folder: Path | None) -> int:
        """Loads the checkpoint, if any, and returns the number of steps it has behind it."""
        if folder is None:
            return 0
        state = checkpoint.read_state(folder)
        checkpoint.load(folder, self.student)

        def restore_data() -> None:
            assert self.controller is not None
            self.controller.call("restore", state["data"])

        on_rank_zero(self.ranks, restore_data)
        return state["step"]


def _check_scores(model: str, mean: np.ndarray, mask: np.ndarray, batch: LocalBatch) -> None:
    """ScoringError, on every rank, for a response whose scores are not finite."""
    bad = np.flatnonzero(mask & ~np.isfinite(mean))
    if len(bad):
        name = batch.names[bad[0]] if batch.names else f"response {bad[0]}"
        raise ScoringError(
            f"the {model}'s log-probs are not finite for {len(bad)} responses, the first of them {name}; "
            "no score is made up for "
            f"them. Check the {model}'s weights (inf or NaN?) and train.precision"
        )


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def train(config: Config, *, resume: bool) -> None:
    """Runs the main job on this rank."""
    ranks = setup.initialize(config.parallel)
    Trainer(config, ranks, resume=resume).run()
    setup.shutdown()  # not after an error: a peer may still be in a collective
