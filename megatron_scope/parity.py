"""The parity gate: tokens that every rollout server draws after it has taken new weights, scored by the
trainer itself. Stale or other weights, another precision or tokenizer show there, before anything is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_scope.backend.parity import LogprobGap, engine_gaps, overall
from megatron_scope.records import ServerProbe
from megatron_scope.scoring import Scorer


def check_servers(probes: Sequence[ServerProbe], scorer: Scorer) -> LogprobGap:
    """The gap over all probes at rollout temperature. A collective: every rank has all `probes`, and each
    replica scores its share.

    Raises ParityError, on every rank, for the first server over rollout.logprob_gap_limit.
    """
    ranks, rollout = scorer.ranks, scorer.config.rollout
    responses = [response for probe in probes for response in probe.responses]
    server = [number for number, probe in enumerate(probes) for _ in probe.responses]
    mine = [response for response in responses if response.index % ranks.num_replicas == ranks.replica]
    (tokens,) = scorer.token_logprobs(scorer.student, mine, [rollout.temperature])
    gaps = engine_gaps(tokens, mine, server, len(probes), ranks)
    for probe, gap in zip(probes, gaps, strict=True):
        gap.check(rollout.logprob_gap_limit, f"rollout server {probe.url}")
    return overall(gaps)
