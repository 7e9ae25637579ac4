"""From responses to packed micro-batches: which replica takes a response, and which row it lies in. Pure
numpy, deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from megatron_scope.records import MicroBatch, Response, ResponseTable


def response_table(
    *,
    group: Sequence[int],
    correct: Sequence[bool],
    num_prompt_tokens: Sequence[int],
    num_tokens: Sequence[int],
    num_updates: int = 1,
) -> ResponseTable:
    """The arrays that every rank knows of a step's responses, in canonical order; `group` numbers their
    prompts.
    """
    groups, tokens = np.array(group, dtype=np.int64), np.array(num_tokens, dtype=np.int64)
    return ResponseTable(
        group=groups,
        update=split_prompts(groups, num_updates),
        correct=np.array(correct, dtype=bool),
        num_tokens=tokens,
        # All but the last output token, which is only a target.
        num_input_tokens=np.array(num_prompt_tokens, dtype=np.int64) + tokens - 1,
    )


def split_prompts(group: np.ndarray, num_updates: int) -> np.ndarray:
    """The update of each response, int64 [N], 0 up: prompts in order, as evenly as can be.

    With fewer prompts than updates each prompt has one of its own, and there are fewer updates.
    """
    prompts, place = np.unique(group, return_inverse=True)
    return place * min(num_updates, len(prompts)) // max(1, len(prompts))


def assign_replicas(num_input_tokens: np.ndarray, loads: Sequence[int]) -> np.ndarray:
    """The replica of each response, int64 [N]: longest first to the replica with the fewest tokens, ties by
    number. `loads` are the tokens that each replica has already.

    A response keeps its replica for the whole step, since its teacher scores stay there.
    """
    replica = np.zeros(len(num_input_tokens), dtype=np.int64)
    heap = [(load, r) for r, load in enumerate(loads)]
    heapq.heapify(heap)
    for index in _longest_first(num_input_tokens):
        load, r = heapq.heappop(heap)
        replica[index] = r
        heapq.heappush(heap, (load + int(num_input_tokens[index]), r))
    return replica


def pack(responses: Sequence[Response], micro_batch_tokens: int, multiple_of: int = 1) -> list[MicroBatch]:
    """Packs responses into micro-batches of at most `micro_batch_tokens` tokens; one longer response stands
    alone.

    First fit, longest first, so neighbours in a row tend to be of equal length (attention batches those). Row
    lengths are padded to `multiple_of` (the tensor-parallel size under sequence parallelism) by a segment of
    its own.
    """
    bins: list[list[Response]] = []
    free: list[int] = []
    for index in _longest_first(np.array([r.num_input_tokens for r in responses])):
        response = responses[index]
        size = response.num_input_tokens
        place = next((b for b, room in enumerate(free) if size <= room), None)
        if place is None:
            bins.append([])
            free.append(micro_batch_tokens)
            place = len(bins) - 1
        bins[place].append(response)
        free[place] -= size
    return [_micro_batch(members, multiple_of) for members in bins]


def _longest_first(lengths: np.ndarray) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-int(lengths[index]), index))


def _micro_batch(responses: Sequence[Response], multiple_of: int) -> MicroBatch:
    lengths = [r.num_input_tokens for r in responses]
    used = sum(lengths)
    padding = -used % multiple_of
    if padding:
        lengths.append(padding)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    inputs = [np.concatenate([r.prompt_ids, r.output_ids[:-1]]) for r in responses]
    # The token at place j of a response is predicted from position P - 1 + j of its sequence.
    rows = [
        start + len(r.prompt_ids) - 1 + np.arange(len(r.output_ids))
        for start, r in zip(starts, responses, strict=False)
    ]
    return MicroBatch(
        tokens=np.concatenate([*inputs, np.zeros(padding, dtype=np.int64)]),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        cu_seqlens=starts.astype(np.int32),
        rows=np.concatenate(rows),
        targets=np.concatenate([r.output_ids for r in responses]),
        response=np.repeat([r.index for r in responses], [len(r.output_ids) for r in responses]).astype(
            np.int64
        ),
        stop=np.concatenate([_is_stop(r) for r in responses]),
        engine_logprobs=np.concatenate([r.engine_logprobs for r in responses]).astype(np.float32),
    )


def _is_stop(response: Response) -> np.ndarray:
    """bool [R], true at a last token that is a stop token."""
    places = np.arange(len(response.output_ids))
    return (places == len(places) - 1) & response.stopped
