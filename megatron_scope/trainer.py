"""The main job. `Trainer.step` is the method in one screen: roll out, score, weigh, update, publish,
record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scope.arriving import ArrivingStep, LocalBatch
from megatron_scope.backend import checkpoint, setup
from megatron_scope.backend.distribute import largest, on_rank_zero
from megatron_scope.backend.export import save_gradients, save_hf_folder
from megatron_scope.backend.learning_rate import learning_rate
from megatron_scope.backend.model import StageModel, build
from megatron_scope.backend.optimizer import Trainable, make_trainable
from megatron_scope.backend.parity import LogprobGap
from megatron_scope.backend.setup import Ranks
from megatron_scope.backend.update import (
    PathGradients,
    StepUpdate,
    UpdateSettings,
    forward_backward,
    path_gradients,
    prompt_contrast,
    statistics,
)
from megatron_scope.config import Config, write_config
from megatron_scope.config.needs import (
    corrects_engine,
    draws_responses,
    needs_reference,
    needs_teacher,
    overlaps_scoring,
    probes_servers,
)
from megatron_scope.config.schema import Engine, ModelConfig
from megatron_scope.controller.process import ControllerProcess
from megatron_scope.controller.rows import ResponseRecord
from megatron_scope.convert.sources import open_model
from megatron_scope.data.batching import pack
from megatron_scope.metrics import StageClock, step_metrics
from megatron_scope.objective import build_objective
from megatron_scope.objective.losses import corrected
from megatron_scope.objective.objectives import WeighedResponses
from megatron_scope.parity import check_servers
from megatron_scope.preflight import check_files, max_positions, vocabulary, warnings_of
from megatron_scope.progress import Progress
from megatron_scope.publishing import Publisher, build_publisher
from megatron_scope.records import MicroBatch, SequenceLimits, ServerProbe
from megatron_scope.run_folder import RunFolder
from megatron_scope.scoring import Scorer, Scores, StepScoring

PROBE_PROMPTS, PROBE_TOKENS = 4, 16  # what each rollout server draws for the parity gate


class Trainer:
    """Everything that lives as long as a run, on one rank."""

    def __init__(self, config: Config, ranks: Ranks, *, resume: bool) -> None:
        self.config = config
        self.ranks = ranks
        self.folder = RunFolder(str(config.run.output_dir))
        self.objective = build_objective(config.objective)
        on_rank_zero(ranks, lambda: _check_and_warn(config))
        self.resume = resume
        self.vocabulary = vocabulary(config)
        self.student: Trainable = make_trainable(
            self._build(config.student, trainable=True), config.train, config.optimizer
        )
        self.row_multiple = config.parallel.tensor if config.parallel.sequence else 1
        self.pack = functools.partial(
            pack, micro_batch_tokens=config.train.micro_batch_tokens, multiple_of=self.row_multiple
        )
        self.scorer = Scorer(
            config,
            ranks,
            self.objective,
            self.pack,
            self.student.stage,
            teacher=self._build(config.teacher, trainable=False) if needs_teacher(config) else None,
            reference=self._build(config.student, trainable=False) if needs_reference(config) else None,
        )
        token_loss, cap = self.objective.token_loss, config.rollout.correction_cap
        self.update_settings = UpdateSettings(
            corrected(token_loss, cap) if corrects_engine(config) else token_loss,
            student_temperature=config.objective.student_temperature,
            rollout_temperature=config.rollout.temperature,
            ratio_clip=math.inf if config.objective.ratio_clip is None else config.objective.ratio_clip,
            correction_cap=cap if corrects_engine(config) else None,
            logprob_gap_limit=config.rollout.logprob_gap_limit,
        )
        self.controller: ControllerProcess | None = None
        self.publisher: Publisher | None = None
        self.parity = LogprobGap.of_nothing()  # of the published weights

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
            open_model(model),
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
            stack.callback(self.student.release)
            on_rank_zero(self.ranks, lambda: self._start_controller(stack))
            if self._publishes:
                self.publisher = build_publisher(
                    self.config, self.student.stage, self.ranks, self.folder, self.controller
                )
                stack.callback(self.publisher.close)
            first = self._restore(on_rank_zero(self.ranks, self._prepare_folder)) + 1
            progress = stack.enter_context(Progress(self.config, self.ranks.rank, first))
            if first <= self.config.run.steps:
                self.publish(version=first - 1)
                self.check_parity()
            for step in range(first, self.config.run.steps + 1):
                progress.show(self.step(step))
                if self._checkpoint_is_due(step):
                    self._save(step)
            save_hf_folder(self.student.stage, self.ranks, self.folder.final)

    def step(self, step: int) -> dict[str, Any]:
        """One training step; returns its row of metrics.jsonl."""
        clock = StageClock()
        parity = self.parity
        batch, scores = self.roll_out_and_score(step, clock)
        with clock.stage("weigh"):
            weighed = self.objective.weigh(batch.table, scores.student_mean, scores.teacher_mean)
        with clock.stage("update"):
            update = self.update(step, batch, scores, weighed)
        with clock.stage("publish"):
            self.publish(version=step)
            self.check_parity()
        with clock.stage("record"):
            self.record(step, batch, scores, weighed)
        row = step_metrics(
            step=step,
            update=update,
            table=batch.table,
            weights=weighed.weights,
            student_mean=scores.student_mean,
            teacher_mean=scores.teacher_mean,
            counts=batch.counts,
            oldest_version=batch.oldest_version,
            parity=parity,
            sampled_now=self._publishes,
            seconds=clock.seconds,
            scoring_hidden_share=clock.share_before("score", batch.last_arrival_s),
        )
        on_rank_zero(self.ranks, lambda: self.folder.append_metrics(row))
        return row

    # ---- stages

    def roll_out(self, step: int) -> ArrivingStep:
        """Judged responses from the controller, each with the replica that keeps it for the step."""
        # As many as fill a micro-batch of every replica, when scoring need not wait for the last one.
        share = self.config.train.micro_batch_tokens * self.ranks.num_replicas
        return ArrivingStep(
            self.ranks,
            self.controller,
            step=step,
            version=step - 1,
            least_tokens=share if overlaps_scoring(self.config) else None,
        )

    def roll_out_and_score(self, step: int, clock: StageClock) -> tuple[LocalBatch, Scores]:
        """The step's responses, scored while others are still being generated: student log-probs of the
        correct ones and teacher log-probs of the incorrect ones only (Eq. 4, 5); other objectives ask for
        others.
        """
        arriving, scoring = self.roll_out(step), StepScoring(self.scorer)
        while not arriving.is_complete:
            with clock.stage("rollout"):
                part = arriving.next_part()
            with clock.stage("score"):
                scoring.add(part)
        with clock.stage("score"):
            batch = arriving.finish()
            return batch, scoring.finish(batch)

    def update(self, step: int, batch: LocalBatch, scores: Scores, weighed: WeighedResponses) -> StepUpdate:
        """The step's optimizer updates (Eq. 6), one unless train.updates_per_batch says more."""
        config, table = self.config, batch.table
        dump = config.run.dump_gradients if step == 1 else None
        every = config.train.path_gradients_every
        lr = learning_rate(config.optimizer, step - 1, config.run.steps)
        inputs: dict[str, Any] = {
            "correct": table.correct,
            "coefficients": weighed.coefficients,
            "known": scores.known,
        }
        totals, norms, paths = [], [], PathGradients()
        for number in range(int(table.update.max()) + 1):
            chosen = [response for response in batch.responses if table.update[response.index] == number]
            work = (self.student, self._padded(self.pack(chosen)), self.ranks, self.update_settings)
            is_first = number == 0
            if is_first and every and step % every == 0:
                contrast = prompt_contrast(table, seed=config.run.seed, step=step)
                paths = path_gradients(*work, **inputs, contrast=contrast)
            dumps = is_first and dump is not None
            totals.append(forward_backward(*work, **inputs, is_first=is_first, whole_gradients=dumps))
            if is_first and dump is not None:
                save_gradients(self.student, self.ranks, Path(dump).expanduser())
            norms.append(self.student.step(lr))
        return StepUpdate(statistics(totals), len(norms), float(np.mean(norms)), paths, lr)

    def publish(self, version: int) -> None:
        """Hands the current weights to the rollout servers, under the number of updates that made them."""
        if self.publisher is not None:
            self.publisher.publish(version)

    def check_parity(self) -> None:
        """Compares what every server draws with the trainer's own log-probs; ParityError names the server
        that is too far off.
        """
        if not probes_servers(self.config):
            return

        def probe() -> list[ServerProbe]:
            assert self.controller is not None
            return self.controller.call("probe", PROBE_PROMPTS, PROBE_TOKENS)

        self.parity = check_servers(on_rank_zero(self.ranks, probe), self.scorer)

    def record(self, step: int, batch: LocalBatch, scores: Scores, weighed: WeighedResponses) -> None:
        """Writes the step's rollouts with what was learnt about them."""
        if not self._records:
            return

        def write() -> None:
            assert self.controller is not None
            records = {
                place: ResponseRecord(_or_none(student), _or_none(teacher), weight)
                for place, student, teacher, weight in zip(
                    batch.places.tolist(),
                    scores.student_mean.tolist(),
                    scores.teacher_mean.tolist(),
                    weighed.weights.tolist(),
                    strict=True,
                )
            }
            self.controller.call("record", step, records)

        on_rank_zero(self.ranks, write)

    # ---- helpers

    def _padded(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The same number on every replica, as Megatron's schedules and collectives expect."""
        missing = largest(self.ranks, len(micro_batches)) - len(micro_batches)
        return micro_batches + [MicroBatch.of_padding(self.row_multiple)] * missing

    @property
    def _publishes(self) -> bool:
        """Only sampling needs new weights; given and replayed responses do not."""
        return self._records and self.config.rollout.engine is not Engine.REPLAY

    @property
    def _records(self) -> bool:
        """Given responses stand in the user's own file already."""
        return draws_responses(self.config)

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


def _check_and_warn(config: Config) -> None:
    check_files(config)
    for warning in warnings_of(config):
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def train(config: Config, *, resume: bool) -> None:
    """Runs the main job on this rank."""
    ranks = setup.initialize(config.parallel)
    Trainer(config, ranks, resume=resume).run()
    setup.shutdown()  # not after an error: a peer may still be in a collective
