"""Forward-only passes: the log-probs of response tokens under one model, kept by response."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scope.backend.distribute import largest
from megatron_scope.backend.hidden_states import HiddenStates
from megatron_scope.backend.model import StageModel
from megatron_scope.backend.schedule import run, token_statistics
from megatron_scope.backend.setup import Ranks
from megatron_scope.backend.token_loss import TeacherStates
from megatron_scope.records import MicroBatch


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Per-token log-probs of this replica's scored responses, by index; float32 [|y|], on the last stage
    only.
    """

    by_response: dict[int, np.ndarray]

    def renumbered(self, index_of: Mapping[int, int]) -> TokenLogprobs:
        """The same under other indices: `index_of` maps those they have to new ones."""
        return TokenLogprobs({index_of[index]: values for index, values in self.by_response.items()})

    def rows(self, micro_batch: MicroBatch) -> np.ndarray:
        """The micro-batch's rows, float32 [R]; 0 where the response was not scored."""
        out = np.zeros(len(micro_batch.rows), dtype=np.float32)
        for index, rows in response_rows(micro_batch):
            if index in self.by_response:
                out[rows] = self.by_response[index]
        return out

    def has(self, micro_batch: MicroBatch) -> np.ndarray:
        """Which of the micro-batch's rows were scored, bool [R]."""
        return np.isin(micro_batch.response, list(self.by_response))


@dataclasses.dataclass(frozen=True)
class KnownLogprobs:
    """Per-token log-probs that the update reads: the teacher's, the initial student's (`reference`), and the
    student's own at the start of the step (`old`; None where they are still the current ones), for the
    correction of the engine's draws also at rollout temperature (`old_at_rollout`).
    """

    teacher: TokenLogprobs
    reference: TokenLogprobs
    old: TokenLogprobs | None
    teacher_states: TeacherStates | None = None  # for exact divergences
    old_at_rollout: TokenLogprobs | None = None


def response_rows(micro_batch: MicroBatch) -> Iterator[tuple[int, slice]]:
    """Each response of a micro-batch with the slice of its rows."""
    response = micro_batch.response
    edges = np.concatenate([[0], np.flatnonzero(np.diff(response)) + 1, [len(response)]])
    if len(response):
        for start, stop in itertools.pairwise(edges):
            yield int(response[start]), slice(int(start), int(stop))


def score(
    stage: StageModel,
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    temperatures: Sequence[float],
    *,
    stop_token_id: int | None = None,
    keep: HiddenStates | None = None,
) -> list[TokenLogprobs]:
    """Forward-only pass: the log-probs of every response token of `micro_batches` at each of the
    temperatures, in nats.

    `keep` takes the final hidden states of every response. With `stop_token_id` the stop token of a response
    is scored as that one, whichever ended it.
    """

    def logprobs(micro_batch: MicroBatch, hidden: Tensor) -> tuple[MicroBatch, dict[float, np.ndarray]]:
        targets = micro_batch.targets
        if stop_token_id is not None:
            targets = np.where(micro_batch.stop, stop_token_id, targets)
        if keep is not None:
            _keep_responses(micro_batch, hidden, keep)
        at = {
            temperature: token_statistics(stage, ranks, hidden, targets, temperature).logprob
            for temperature in dict.fromkeys(temperatures)
        }
        return micro_batch, {temperature: values.float().cpu().numpy() for temperature, values in at.items()}

    results = _forward(stage, micro_batches, ranks, logprobs)
    return [
        TokenLogprobs(
            {
                index: at[temperature][rows]
                for micro_batch, at in results
                for index, rows in response_rows(micro_batch)
            }
        )
        for temperature in temperatures
    ]


def keep_hidden_states(
    stage: StageModel, micro_batches: Sequence[MicroBatch], ranks: Ranks, keep: HiddenStates
) -> None:
    """Forward-only pass: the final hidden states of every response of `micro_batches`, without scores."""
    _forward(
        stage, micro_batches, ranks, lambda micro_batch, hidden: _keep_responses(micro_batch, hidden, keep)
    )


def _keep_responses(micro_batch: MicroBatch, hidden: Tensor, keep: HiddenStates) -> None:
    for index, rows in response_rows(micro_batch):
        keep.keep(index, hidden[rows])


def _forward(
    stage: StageModel,
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    hook: Callable[[MicroBatch, Tensor], Any],
) -> list[Any]:
    """What `hook` finds on the last stage in each micro-batch."""
    if stage.shape.mixture and ranks.expert_size > 1:
        micro_batches = _as_many_everywhere(stage, micro_batches, ranks)
    return run(stage.module, micro_batches, ranks, hook, backward=False) if micro_batches else []


def _as_many_everywhere(
    stage: StageModel, micro_batches: Sequence[MicroBatch], ranks: Ranks
) -> list[MicroBatch]:
    """With micro-batches of padding alone to the largest number that a replica has: each of them exchanges
    tokens with the experts that others hold.
    """
    missing = largest(ranks, len(micro_batches)) - len(micro_batches)
    padding = MicroBatch.of_padding(ranks.tensor_size if stage.config.sequence_parallel else 1)
    return [*micro_batches, *[padding] * missing]


def mean_logprobs(scores: TokenLogprobs, num_responses: int, ranks: Ranks) -> np.ndarray:
    """Mean log-prob of each scored response, float64 [N] on every rank; NaN where not scored or not
    finite.
    """
    total = torch.zeros(num_responses, 2, dtype=torch.float64)
    if ranks.speaks_for_scores:
        for index, values in scores.by_response.items():
            total[index, 0] = float(values.astype(np.float64).mean())
            total[index, 1] = 1.0
    dist.all_reduce(total, group=ranks.world_group)
    scored = total[:, 1] > 0
    return torch.where(scored, total[:, 0], float("nan")).numpy()
