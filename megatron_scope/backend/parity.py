"""The gap between the log-probs of the trainer and of the engine that drew the responses, and its limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_scope.backend.scoring import TokenLogprobs
from megatron_scope.backend.setup import Ranks
from megatron_scope.errors import ParityError
from megatron_scope.records import Response


@dataclasses.dataclass(frozen=True)
class LogprobGap:
    """Trainer minus engine over the same tokens at rollout temperature, in nats: mean and maximum of its
    absolute value, and the k3 estimate of KL(engine || trainer). NaN over no token.
    """

    mean: float
    max: float
    kl: float
    num_tokens: int

    @classmethod
    def of_nothing(cls) -> LogprobGap:
        return cls(math.nan, math.nan, math.nan, 0)

    def check(self, limit: float | None, engine: str = "the rollout engine") -> None:
        """Raises ParityError for a mean over `limit`, or over no token at all; never where that is None."""
        if limit is None or self.mean <= limit:
            return
        if not self.num_tokens:
            raise ParityError(
                f"{engine} drew no token to compare with the trainer's log-probs; look at its log, or set "
                "rollout.logprob_gap_limit=null"
            )
        raise ParityError(
            f"the trainer's log-probs are {self.mean:.3g} nats a token off those of {engine} on average "
            f"(at most {self.max:.3g}, KL(engine || trainer) {self.kl:.3g}), over "
            f"rollout.logprob_gap_limit={limit:g}; nothing is learnt from its responses. Likely the engine "
            "serves other weights (stale, or of another model), computes in another precision, draws at "
            "another rollout.temperature or has another tokenizer: mend that, or raise the limit"
        )


def engine_gaps(
    tokens: TokenLogprobs,
    responses: Sequence[Response],
    engine: Sequence[int],
    num_engines: int,
    ranks: Ranks,
) -> list[LogprobGap]:
    """The gap of each of `num_engines` engines; `engine` tells which drew the response of an index.

    `responses` are this replica's and `tokens` the trainer's log-probs of them at rollout temperature. A
    collective: the result is over all replicas, on every rank.
    """
    sums = torch.zeros(num_engines, 3, dtype=torch.float64)
    largest = torch.zeros(num_engines, dtype=torch.float64)
    if ranks.speaks_for_scores:
        for response in responses:
            number = engine[response.index]
            ours = tokens.by_response[response.index].astype(np.float64)
            gap = torch.from_numpy(ours - response.engine_logprobs)
            sums[number] += torch.stack(
                [gap.abs().sum(), (gap.exp() - 1 - gap).sum(), gap.new_tensor(len(gap))]
            )
            largest[number] = torch.maximum(largest[number], gap.abs().max())
    dist.all_reduce(sums, group=ranks.world_group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks.world_group)
    return [
        LogprobGap(total / count, highest, kl / count, int(count)) if count else LogprobGap.of_nothing()
        for (total, kl, count), highest in zip(sums.tolist(), largest.tolist(), strict=True)
    ]


def overall(gaps: Sequence[LogprobGap]) -> LogprobGap:
    """The gap over the tokens of all."""
    present = [gap for gap in gaps if gap.num_tokens]
    count = sum(gap.num_tokens for gap in present)
    if not count:
        return LogprobGap.of_nothing()
    return LogprobGap(
        sum(gap.mean * gap.num_tokens for gap in present) / count,
        max(gap.max for gap in present),
        sum(gap.kl * gap.num_tokens for gap in present) / count,
        count,
    )
