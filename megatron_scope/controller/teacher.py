"""A teacher behind servers, as the controller uses it: which responses it reads, and what is checked of it
before the run.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scope.config.keys import api_key
from megatron_scope.config.needs import draws_responses, teacher_reads
from megatron_scope.config.schema import Config, Engine
from megatron_scope.controller.arrivals import Arrive, Produce
from megatron_scope.data.tokenizer import check_same_tokens, load_tokenizer
from megatron_scope.errors import ConfigError, ScoringError
from megatron_scope.records import JudgedRollout, Rollout, SequenceLimits
from megatron_scope.task_groups import first_failure
from megatron_scope.teacher.pool import TeacherPool
from megatron_scope.teacher.server import ServerFacts, TeacherOptions, TeacherServer
from megatron_scope.teacher.wire import NoAnswer, ScoringRequest

TEXTS_AT_A_TIME = 8192  # tokens of the vocabulary whose text is asked for in one request


class ServedTeacher:
    """The teacher of `teacher.server`. Call `start` before the first score, and `close` at the end."""

    def __init__(self, config: Config, limits: SequenceLimits) -> None:
        self._config, self._limits = config, limits
        self._vocab_size = limits.vocab_size
        self._max_tokens = limits.max_positions
        teacher = config.teacher
        options = TeacherOptions(
            start_timeout_s=teacher.start_timeout_s,
            request_timeout_s=teacher.request_timeout_s,
            request_tokens=teacher.request_tokens,
            max_concurrent_requests=teacher.max_concurrent_requests,
            canary_tolerance=teacher.canary_tolerance,
        )
        self._pool = TeacherPool(
            teacher.server or (), options, api_key=api_key("teacher.api_key_env", teacher.api_key_env)
        )

    async def start(self) -> None:
        """Returns once every server is healthy and serves the same model, which has the student's tokens and
        room for its responses; ConfigError or ScoringError of one line otherwise.
        """
        facts = await self._pool.connect()
        folder = self._config.student.companions
        tokenizer = load_tokenizer(folder)
        for server, told in zip(self._pool.servers, facts, strict=True):
            self._check_size(server, told, len(tokenizer))
            await self._check_tokens(server, told, tokenizer, folder)
        self._check_lengths(facts)
        await self._pool.compare(facts, self._vocab_size)

    async def score_arriving(
        self, produce: Produce, is_usable: Callable[[JudgedRollout], bool], arrive: Arrive
    ) -> None:
        """Runs `produce` and hands its rollouts to `arrive` as they are ready: those that the objective asks
        the teacher for, if they are usable, with its log-probs; the others at once. The first error ends it.
        """

        async def score(place: int, item: JudgedRollout) -> None:
            values = await self.score(item.rollout)
            arrive(place, dataclasses.replace(item, teacher_logprobs=values))

        def take(place: int, item: JudgedRollout) -> None:
            if is_usable(item) and teacher_reads(self._config, correct=item.verdict.correct):
                group.create_task(score(place, item))
            else:
                arrive(place, item)

        try:
            async with asyncio.TaskGroup() as group:
                await produce(take)
        except ExceptionGroup as failures:
            raise first_failure(failures) from None

    async def score(self, rollout: Rollout) -> np.ndarray:
        """The teacher's log-prob of each output token, float32 [R] in nats at temperature 1.

        The stop token of a response is scored as `teacher.stop_token_id` where that is set. ScoringError
        where the teacher cannot take the response, or no server scores it.
        """
        name = f"prompt {rollout.prompt.id}, sample {rollout.sample}"
        targets, stop = rollout.output_ids, self._config.teacher.stop_token_id
        if stop is not None and rollout.finish_reason == "stop":
            targets = (*targets[:-1], stop)
        request = ScoringRequest(name, rollout.prompt.token_ids, targets)
        if request.num_tokens > self._max_tokens:
            raise ScoringError(
                f"{name} has {request.num_tokens} tokens with its prompt, but the teacher's servers take "
                f"{self._max_tokens} at most; start them with a greater --context-length"
            )
        ids = np.array(request.prompt_ids + targets, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self._vocab_size)]
        if len(outside):  # SGLang does not survive one
            raise ScoringError(
                f"{name} holds token id {outside[0]}, but the teacher is known to have {self._vocab_size} "
                "ids; sample with the student's own tokenizer and vocabulary"
            )
        return await self._pool.score(request)

    async def close(self) -> None:
        """Closes the connections; the servers live on."""
        await self._pool.close()

    # ---- checks before the run

    def _check_size(self, server: TeacherServer, told: ServerFacts, num_tokens: int) -> None:
        """The server's table must have a row for every id that is sent to it."""
        if told.vocab_rows is None:
            # A table has a row for each token of its tokenizer, which is the student's.
            self._vocab_size = min(self._vocab_size, num_tokens)
        elif told.vocab_rows < self._limits.vocab_size:
            raise ConfigError(
                f"{server.url}: the teacher's table has {told.vocab_rows} rows, but ids up to "
                f"{self._limits.vocab_size - 1} count; set teacher.hf to a folder with the teacher's "
                "config.json and tokenizer, so that only the ids that both models have count"
            )

    async def _check_tokens(
        self, server: TeacherServer, told: ServerFacts, tokenizer: Any, folder: str
    ) -> None:
        """The same tokens have the same ids: by the tokenizer's files where they can be read here, else by
        the text that the server gives for each id.
        """
        if told.tokenizer_path is not None and Path(told.tokenizer_path).is_dir():
            check_same_tokens(tokenizer, load_tokenizer(told.tokenizer_path), folder, told.tokenizer_path)
            return
        for start in range(0, len(tokenizer), TEXTS_AT_A_TIME):
            ids = range(start, min(start + TEXTS_AT_A_TIME, len(tokenizer)))
            try:
                theirs = await server.texts_of(ids)
            except (NoAnswer, ScoringError) as error:
                raise ConfigError(
                    f"{error}: the teacher's tokenizer ({told.tokenizer_path}) can neither be read here nor "
                    "asked for; serve it from a path that this machine has too"
                ) from None
            ours = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in ids]
            differing = [place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
            if differing:
                place = differing[0]
                raise ConfigError(
                    f"{server.url}: the teacher's tokenizer is not that of {folder}: token id {ids[place]} "
                    f"is {theirs[place]!r} there and {ours[place]!r} here; student and teacher must share "
                    "one vocabulary"
                )

    def _check_lengths(self, facts: Sequence[ServerFacts]) -> None:
        known = [told.max_input_tokens for told in facts if told.max_input_tokens is not None]
        self._max_tokens = min([self._max_tokens, *known])
        config = self._config
        if not draws_responses(config) or config.rollout.engine is Engine.REPLAY:
            return
        longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        if longest > self._max_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens + rollout.max_new_tokens is {longest}, but the teacher's servers "
                f"take {self._max_tokens} tokens at most (SGLang: --context-length less 7); start them with "
                "a greater one, or lower the two"
            )
