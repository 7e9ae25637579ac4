"""The controller's work, free of processes: from judged rollouts to the responses that the ranks train on,
and to the record.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scope.config.needs import needs_engine_logprobs, teacher_is_served
from megatron_scope.config.schema import Config, Truncated
from megatron_scope.controller.arrivals import Arrivals
from megatron_scope.controller.rows import ResponseRecord, write_step
from megatron_scope.controller.sources import SampledRollouts, Source, open_source
from megatron_scope.controller.teacher import ServedTeacher
from megatron_scope.data.batching import response_table
from megatron_scope.errors import DataError, RolloutError
from megatron_scope.records import (
    JudgedRollout,
    Response,
    Rollout,
    RolloutCounts,
    SequenceLimits,
    ServedModel,
    ServerProbe,
    StepPart,
    StepSummary,
    Verdict,
    WeightTransfer,
)


class Controller:
    """Holds a source, the rollouts of the current step, and the teacher where it is served."""

    def __init__(self, config: Config, limits: SequenceLimits, run_folder: str) -> None:
        self._config = config
        self._limits = limits
        self._folder = Path(run_folder)
        self._source: Source = open_source(config, limits.vocab_size, self._folder / "logs")
        self._teacher = ServedTeacher(config, limits) if teacher_is_served(config) else None
        self._arrivals: Arrivals | None = None

    async def start(self) -> None:
        """Checks what must be right before the first step."""
        if self._teacher is not None:
            await self._teacher.start()

    async def begin_step(self, step: int, version: int) -> None:
        """Begins to sample (or read) and judge the responses of a step, and to have a served teacher score
        them; they go on arriving between calls.
        """
        if self._arrivals is not None:
            await self._arrivals.stop()
        produce = functools.partial(self._source.produce, step, version)
        if self._teacher is not None:
            produce = functools.partial(self._teacher.score_arriving, produce, self._is_usable)
        self._arrivals = Arrivals(produce)

    async def next_part(self, least_tokens: int | None) -> StepPart:
        """The usable responses that have arrived since the last call, once they have `least_tokens` response
        tokens (None: all that the step will have) or nothing more comes.

        RolloutError when one is longer or has another id than the models can take, DataError when one has no
        log-probs of its engine though they are needed.
        """
        arrived, is_last = await self._current.take(least_tokens)
        usable = [(place, item) for place, item in arrived if self._is_usable(item)]
        if needs_engine_logprobs(self._config):
            for _, item in usable:
                check_engine_logprobs(item.rollout)
        responses = tuple(make_response(place, item, self._limits) for place, item in usable)
        return StepPart(responses, is_last)

    async def summarise(self) -> StepSummary:
        """The whole step after its last part; RolloutError when none of its responses is usable."""
        skipped = int(self._source.state()["skipped"])
        return summarise(self._current.judged(), self._config, skipped, self._current.last_arrival_s)

    async def publish(self, folder: str, version: int) -> None:
        """Hands new weights to the rollout servers."""
        await self._sampled.service.publish(Path(folder), version)

    async def meet_servers(self, version: int) -> list[ServedModel]:
        """Begins to hand new weights to the servers without disk: those that shall take them."""
        return await self._sampled.service.meet_servers(version)

    async def broadcast(self, transfer: WeightTransfer) -> None:
        """Has the servers take the weights that the ranks now send."""
        await self._sampled.service.broadcast(transfer)

    async def probe(self, num_prompts: int, num_tokens: int) -> list[ServerProbe]:
        """A few tokens of every rollout server, in the order of their URLs."""
        answers = await self._sampled.probe(num_prompts, num_tokens)
        numbers = itertools.count()
        return [
            ServerProbe(
                url,
                tuple(
                    make_response(next(numbers), JudgedRollout(rollout, Verdict(False)), self._limits)
                    for rollout in answers[url]
                    if rollout.output_ids
                ),
            )
            for url in sorted(answers)
        ]

    async def record(self, step: int, records: dict[int, ResponseRecord]) -> None:
        """Writes the rollouts of the current step; `records` by place of the usable responses."""
        write_step(self._folder / "rollouts", step, self._current.judged(), records)

    async def state(self) -> dict[str, Any]:
        """The data cursor for a checkpoint."""
        return self._source.state()

    async def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's cursor."""
        self._source.restore(state)

    async def close(self) -> None:
        """Ends servers and verifiers."""
        if self._arrivals is not None:
            await self._arrivals.stop()
        await self._source.close()
        if self._teacher is not None:
            await self._teacher.close()

    def _is_usable(self, item: JudgedRollout) -> bool:
        return is_usable(item, self._config.rollout.truncated)

    @property
    def _sampled(self) -> SampledRollouts:
        assert isinstance(self._source, SampledRollouts), "only sampling has servers"
        return self._source

    @property
    def _current(self) -> Arrivals:
        if self._arrivals is None:
            raise RuntimeError("no step has begun")
        return self._arrivals


def is_usable(item: JudgedRollout, truncated: Truncated) -> bool:
    """Whether a rollout is learnt from: not aborted, not empty, and not truncated where those are dropped."""
    rollout = item.rollout
    dropped = truncated is Truncated.DROP and rollout.finish_reason == "length"
    return rollout.finish_reason != "abort" and bool(rollout.output_ids) and not dropped


def make_response(place: int, item: JudgedRollout, limits: SequenceLimits) -> Response:
    """A usable rollout as arrays; RolloutError when it is longer or has another id than the models can
    take.
    """
    rollout, name = item.rollout, _name(item.rollout)
    _check_length(rollout, limits, name)
    return Response(
        index=place,
        correct=item.verdict.correct,
        stopped=rollout.finish_reason == "stop",
        prompt_ids=_ids(rollout.prompt.token_ids, limits.vocab_size, name),
        output_ids=_ids(rollout.output_ids, limits.vocab_size, name),
        engine_logprobs=np.array(rollout.engine_logprobs, dtype=np.float32),
        teacher_logprobs=item.teacher_logprobs,
    )


def summarise(
    judged: Sequence[JudgedRollout], config: Config, skipped: int, last_arrival_s: float
) -> StepSummary:
    """The table of a step's usable responses, numbered by place, with counts of the rest.

    RolloutError when none is usable.
    """
    truncated = config.rollout.truncated
    counts = _counts(judged, truncated, skipped)
    places = [place for place, item in enumerate(judged) if is_usable(item, truncated)]
    if not places:
        raise RolloutError(
            f"none of the step's {counts.sampled} responses is usable: {counts.aborted} aborted, "
            f"{counts.empty} empty, "
            f"{counts.dropped_truncated} truncated and dropped; raise rollout.max_new_tokens or set "
            "rollout.truncated=keep"
        )
    usable = [judged[place] for place in places]
    group_of: dict[str, int] = {}
    for item in usable:
        group_of.setdefault(item.rollout.prompt.id, len(group_of))
    return StepSummary(
        table=response_table(
            group=[group_of[item.rollout.prompt.id] for item in usable],
            correct=[item.verdict.correct for item in usable],
            num_prompt_tokens=[len(item.rollout.prompt.token_ids) for item in usable],
            num_tokens=[len(item.rollout.output_ids) for item in usable],
            num_updates=config.train.updates_per_batch,
        ),
        places=np.array(places, dtype=np.int64),
        names=tuple(_name(item.rollout) for item in usable),
        counts=counts,
        oldest_version=min(item.rollout.weight_version for item in usable),
        last_arrival_s=last_arrival_s,
    )


def check_engine_logprobs(rollout: Rollout) -> None:
    """DataError for a response without a finite engine log-prob for each of its tokens."""
    missing = sum(not math.isfinite(logprob) for logprob in rollout.engine_logprobs)
    if missing:
        raise DataError(
            f"{_name(rollout)} has no finite engine log-prob for {missing} of its {len(rollout.output_ids)} "
            "tokens, but rollout.correction and rollout.logprob_gap_limit compare every one with the "
            "trainer's; give rows with their engine_logprobs, or set rollout.correction=none and "
            "rollout.logprob_gap_limit=null"
        )


def _name(rollout: Rollout) -> str:
    return f"prompt {rollout.prompt.id}, sample {rollout.sample}"


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


def _counts(judged: Sequence[JudgedRollout], truncated: Truncated, skipped: int) -> RolloutCounts:
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
