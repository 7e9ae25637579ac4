"""A step's judged responses on their way from the controller to the replicas, while others are still being
generated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_scope.backend.distribute import on_rank_zero, scatter_to_replicas
from megatron_scope.backend.setup import Ranks
from megatron_scope.controller.process import ControllerProcess
from megatron_scope.data.batching import assign_replicas
from megatron_scope.records import Response, ResponseTable, RolloutCounts, StepPart, StepSummary


@dataclasses.dataclass(frozen=True)
class LocalBatch:
    """What one rank knows of a complete step: its replica's responses by canonical index, and the table of
    all. `index_of` maps the places under which they arrived to those indices.
    """

    responses: list[Response]
    index_of: dict[int, int]
    table: ResponseTable
    places: np.ndarray
    counts: RolloutCounts
    oldest_version: int
    last_arrival_s: float
    names: tuple[str, ...] | None  # on rank 0


class ArrivingStep:
    """The responses of one step, part by part; collectives: every rank calls them.

    A part comes once it has `least_tokens` response tokens; with None the step is one part. `controller` is
    rank 0's.
    """

    def __init__(
        self,
        ranks: Ranks,
        controller: ControllerProcess | None,
        *,
        step: int,
        version: int,
        least_tokens: int | None,
    ) -> None:
        self._ranks, self._controller = ranks, controller
        self._least_tokens = least_tokens
        self._mine: list[Response] = []
        self._loads = np.zeros(ranks.num_replicas, dtype=np.int64)
        self.is_complete = False
        on_rank_zero(ranks, lambda: self._call("begin_step", step, version))

    def next_part(self) -> list[Response]:
        """This replica's share of what has arrived, numbered by place; it keeps it for the step."""
        part: list[StepPart] = []

        def take() -> bool:
            part.append(self._call("next_part", self._least_tokens))
            return part[0].is_last

        self.is_complete = on_rank_zero(self._ranks, take)
        mine = scatter_to_replicas(self._ranks, self._shares(part[0].responses) if part else None)
        self._mine += mine
        return mine

    def finish(self) -> LocalBatch:
        """The complete step; RolloutError, on rank 0, when none of its responses is usable."""
        names: list[tuple[str, ...]] = []

        def summarise() -> StepSummary:
            summary: StepSummary = self._call("summarise")
            names.append(summary.names)
            return dataclasses.replace(summary, names=())

        summary = on_rank_zero(self._ranks, summarise)
        index_of = {int(place): index for index, place in enumerate(summary.places)}
        mine = [dataclasses.replace(response, index=index_of[response.index]) for response in self._mine]
        return LocalBatch(
            responses=sorted(mine, key=lambda response: response.index),
            index_of=index_of,
            table=summary.table,
            places=summary.places,
            counts=summary.counts,
            oldest_version=summary.oldest_version,
            last_arrival_s=summary.last_arrival_s,
            names=names[0] if names else None,
        )

    def _shares(self, responses: tuple[Response, ...]) -> list[list[Response]]:
        """On rank 0: the part of each replica, so that each has about as many tokens of the step."""
        sizes = np.array([response.num_input_tokens for response in responses], dtype=np.int64)
        replica = assign_replicas(sizes, self._loads.tolist())
        self._loads += np.bincount(replica, weights=sizes, minlength=len(self._loads)).astype(np.int64)
        return [
            [response for response, home in zip(responses, replica, strict=True) if home == number]
            for number in range(len(self._loads))
        ]

    def _call(self, method: str, *arguments: object) -> Any:
        assert self._controller is not None
        return self._controller.call(method, *arguments)
