"""The controller's work, free of processes: from judged rollouts to the batch that the ranks train on, and to
the record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scope.config.needs import teacher_is_served
from megatron_scope.config.schema import Config, Truncated
from megatron_scope.controller.rows import ResponseRecord, write_step
from megatron_scope.controller.sources import Source, open_source
from megatron_scope.controller.teacher import ServedTeacher
from megatron_scope.errors import RolloutError
from megatron_scope.records import JudgedRollout, Response, Rollout, RolloutCounts, SequenceLimits, StepBatch


class Controller:
    """Holds a source, the rollouts of the current step, and the teacher where it is served."""

    def __init__(self, config: Config, limits: SequenceLimits, run_folder: str) -> None:
        self._config = config
        self._limits = limits
        self._folder = Path(run_folder)
        self._source: Source = open_source(config, limits.vocab_size, self._folder / "logs")
        self._teacher = ServedTeacher(config, limits) if teacher_is_served(config) else None
        self._judged: list[JudgedRollout] = []

    async def start(self) -> None:
        """Checks what must be right before the first step."""
        if self._teacher is not None:
            await self._teacher.start()

    async def produce(self, step: int, version: int) -> StepBatch:
        """Samples (or reads) and judges the responses of a step; a served teacher scores those it must."""
        self._judged = await self._source.produce(step, version)
        skipped = int(self._source.state()["skipped"])
        scores = await self._teacher_logprobs()
        return make_batch(self._judged, self._config.rollout.truncated, self._limits, skipped, scores)

    async def _teacher_logprobs(self) -> dict[int, np.ndarray]:
        """What a served teacher says of the responses that it must score, by place."""
        teacher = self._teacher
        if teacher is None:
            return {}
        usable = usable_places(self._judged, self._config.rollout.truncated)
        places = [place for place in usable if teacher.reads(self._judged[place])]
        scores = await asyncio.gather(*(teacher.score(self._judged[place].rollout) for place in places))
        return dict(zip(places, scores, strict=True))

    async def publish(self, folder: str, version: int) -> None:
        """Hands new weights to the rollout servers."""
        await self._source.publish(Path(folder), version)

    async def record(self, step: int, records: dict[int, ResponseRecord]) -> None:
        """Writes the rollouts of the current step; `records` by canonical index of the usable responses."""
        places = usable_places(self._judged, self._config.rollout.truncated)
        by_place = {places[index]: record for index, record in records.items()}
        write_step(self._folder / "rollouts", step, self._judged, by_place)

    async def state(self) -> dict[str, Any]:
        """The data cursor for a checkpoint."""
        return self._source.state()

    async def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's cursor."""
        self._source.restore(state)

    async def close(self) -> None:
        """Ends servers and verifiers."""
        await self._source.close()
        if self._teacher is not None:
            await self._teacher.close()


def usable_places(judged: list[JudgedRollout], truncated: Truncated) -> list[int]:
    """The places of the rollouts to learn from: not aborted, not empty, and not truncated where those are
    dropped.
    """
    return [
        place
        for place, item in enumerate(judged)
        if item.rollout.finish_reason != "abort"
        and item.rollout.output_ids
        and not (truncated is Truncated.DROP and item.rollout.finish_reason == "length")
    ]


def make_batch(
    judged: list[JudgedRollout],
    truncated: Truncated,
    limits: SequenceLimits,
    skipped: int,
    teacher_logprobs: Mapping[int, np.ndarray] | None = None,
) -> StepBatch:
    """The step's usable responses as arrays, with counts of the rest; `teacher_logprobs` by place in
    `judged`.

    RolloutError when none is usable, or one is longer or has another id than the models can take.
    """
    places = usable_places(judged, truncated)
    counts = _counts(judged, truncated, skipped)
    if not places:
        raise RolloutError(
            f"none of the step's {counts.sampled} responses is usable: {counts.aborted} aborted, "
            f"{counts.empty} empty, "
            f"{counts.dropped_truncated} truncated and dropped; raise rollout.max_new_tokens or set "
            "rollout.truncated=keep"
        )
    group_of: dict[str, int] = {}
    responses, names = [], []
    for index, place in enumerate(places):
        rollout, verdict = judged[place].rollout, judged[place].verdict
        name = f"prompt {rollout.prompt.id}, sample {rollout.sample}"
        _check_length(rollout, limits, name)
        group = group_of.setdefault(rollout.prompt.id, len(group_of))
        responses.append(
            Response(
                index=index,
                group=group,
                correct=verdict.correct,
                stopped=rollout.finish_reason == "stop",
                prompt_ids=_ids(rollout.prompt.token_ids, limits.vocab_size, name),
                output_ids=_ids(rollout.output_ids, limits.vocab_size, name),
                engine_logprobs=np.array(rollout.engine_logprobs, dtype=np.float32),
                teacher_logprobs=None if teacher_logprobs is None else teacher_logprobs.get(place),
            )
        )
        names.append(name)
    oldest = min(judged[place].rollout.weight_version for place in places)
    return StepBatch(tuple(responses), tuple(names), counts, oldest)


def _check_length(rollout: Rollout, limits: SequenceLimits, name: str) -> None:
    length = len(rollout.prompt.token_ids) + len(rollout.output_ids)
    if length > limits.max_positions:
        raise RolloutError(
            f"{name} has {length} tokens with its prompt, but the models have "
            f"{limits.max_positions} positions at most; give shorter rows"
        )


def _ids(token_ids: tuple[int, ...], vocab_size: int, name: str) -> np.ndarray:
    ids = np.array(token_ids, dtype=np.int64)
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise RolloutError(
            f"{name} holds token id {ids[outside][0]}, but student and teacher share only {vocab_size} ids; "
            "sample with the student's own tokenizer and vocabulary"
        )
    return ids


def _counts(judged: list[JudgedRollout], truncated: Truncated, skipped: int) -> RolloutCounts:
    rollouts = [item.rollout for item in judged]
    truncated_ones = [rollout for rollout in rollouts if rollout.finish_reason == "length"]
    dropped = (
        [rollout for rollout in truncated_ones if rollout.output_ids] if truncated is Truncated.DROP else []
    )
    return RolloutCounts(
        prompts=len({rollout.prompt.id for rollout in rollouts}),
        sampled=len(rollouts),
        aborted=sum(rollout.finish_reason == "abort" for rollout in rollouts),
        empty=sum(not rollout.output_ids and rollout.finish_reason != "abort" for rollout in rollouts),
        truncated=len(truncated_ones),
        dropped_truncated=len(dropped),
        verify_errors=sum(item.verdict.error is not None for item in judged),
        skipped_prompts=skipped,
    )
