"""Where a step's judged responses come from: sampled now, recorded earlier, or given."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Protocol

from megatron_scope.config.needs import draws_responses
from megatron_scope.config.schema import Config, Engine
from megatron_scope.controller.arrivals import Arrive
from megatron_scope.controller.rows import read_steps
from megatron_scope.controller.service import RolloutService
from megatron_scope.data.prompts import Cursor, Drawer, Example, example_drawer, prompt_drawer
from megatron_scope.data.tokenizer import load_tokenizer, stop_token_ids
from megatron_scope.errors import DataError
from megatron_scope.records import JudgedRollout, Prompt, Rollout, SamplingParams, Verdict
from megatron_scope.rollout.client import RolloutRequest, sample_seed
from megatron_scope.verify.pool import KNOWN_TASKS


class Source(Protocol):
    """Gives one step's judged rollouts after another."""

    async def produce(self, step: int, version: int, arrive: Arrive) -> None:
        """Gives `arrive` each rollout of `step` as soon as it is there, with its place in the canonical
        order: by prompt, then by sample.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Where the data stand, for a checkpoint; `skipped` counts prompts left out so far."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state."""
        ...

    async def close(self) -> None:
        """Gives back what it holds."""
        ...


def open_source(config: Config, vocab_size: int, log_folder: Path) -> Source:
    """The source that the config asks for; DataError when its files cannot serve."""
    folder = config.student.companions
    if not draws_responses(config):
        tokenizer = load_tokenizer(folder)
        stops = stop_token_ids(config.data, folder, tokenizer)
        drawer = example_drawer(config.data, tokenizer, stops, config.run.seed)
        return GivenResponses(drawer, config.rollout.prompts_per_step)
    if config.rollout.engine is Engine.REPLAY:
        return ReplayedRollouts(str(config.rollout.file))
    tokenizer = load_tokenizer(folder)
    service = RolloutService(config, vocab_size, log_folder / "embedded_server.log")
    stops = stop_token_ids(config.data, folder, tokenizer)
    return SampledRollouts(
        config, prompt_drawer(config.data, tokenizer, KNOWN_TASKS, config.run.seed), stops, service
    )


class _Drawn:
    """The cursor of a drawer as a source's state."""

    def __init__(self, drawer: Drawer[Any]) -> None:
        self._drawer = drawer

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self._drawer.cursor)

    def restore(self, state: dict[str, Any]) -> None:
        self._drawer.go_to(Cursor(**state))


class SampledRollouts(_Drawn):
    """N responses to each of the next prompts, drawn by the servers of `service` once those have weights."""

    def __init__(
        self, config: Config, drawer: Drawer[Prompt], stops: tuple[int, ...], service: RolloutService
    ) -> None:
        super().__init__(drawer)
        self._config = config
        self.service = service
        rollout = config.rollout
        self._params = SamplingParams(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, stops
        )

    async def produce(self, step: int, version: int, arrive: Arrive) -> None:
        rollout = self._config.rollout
        requests = [
            RolloutRequest(
                prompt,
                sample,
                sample_seed(self._config.run.seed, step, prompt.id, sample),
                f"{step}/{prompt.id}/{sample}",
            )
            for prompt in self._drawer.draw(rollout.prompts_per_step)
            for sample in range(rollout.samples_per_prompt)
        ]
        await self.service.produce(requests, self._params, version, arrive)

    async def probe(self, num_prompts: int, num_tokens: int) -> dict[str, list[Rollout]]:
        """By the URL of each server in service: up to `num_tokens` tokens for each of the next prompts, which
        stay the next ones.
        """
        requests = [
            RolloutRequest(
                prompt, 0, sample_seed(self._config.run.seed, 0, prompt.id, 0), f"probe/{prompt.id}"
            )
            for prompt in self._drawer.peek(min(num_prompts, self._config.rollout.prompts_per_step))
        ]
        tokens = min(num_tokens, self._params.max_new_tokens)
        return await self.service.probe(requests, dataclasses.replace(self._params, max_new_tokens=tokens))

    async def close(self) -> None:
        await self.service.close()


class ReplayedRollouts:
    """Recorded rollouts: the k-th step of training takes the k-th recorded step, verdicts included."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._steps = read_steps(path)

    async def produce(self, step: int, version: int, arrive: Arrive) -> None:
        del version
        if step > len(self._steps):
            raise DataError(
                f"{self._path} holds {len(self._steps)} recorded steps; step {step} has none. Set "
                "run.steps to "
                f"{len(self._steps)} or less"
            )
        for place, item in enumerate(self._steps[step - 1]):
            arrive(place, item)

    def state(self) -> dict[str, Any]:
        return {"skipped": 0}

    def restore(self, state: dict[str, Any]) -> None:
        del state

    async def close(self) -> None:
        pass


class GivenResponses(_Drawn):
    """Rows of prompts with responses to learn (sft, kd), all taken as correct."""

    def __init__(self, drawer: Drawer[Example], rows_per_step: int) -> None:
        super().__init__(drawer)
        self._rows_per_step = rows_per_step

    async def produce(self, step: int, version: int, arrive: Arrive) -> None:
        del step
        for place, example in enumerate(self._drawer.draw(self._rows_per_step)):
            rollout = Rollout(
                prompt=example.prompt,
                sample=0,
                output_ids=example.output_ids,
                text="",
                engine_logprobs=(math.nan,) * len(example.output_ids),
                finish_reason="stop",
                weight_version=version,
            )
            arrive(place, JudgedRollout(rollout, Verdict(True)))

    async def close(self) -> None:
        pass
