"""The gate on the gap between the log-probs of the trainer and of the engine that drew the responses."""

from __future__ import annotations

import dataclasses

from megatron_scope.errors import ParityError


@dataclasses.dataclass(frozen=True)
class LogprobGap:
    """Trainer minus engine over the same tokens at rollout temperature, in nats: mean and maximum of its
    absolute value, and the k3 estimate of KL(engine || trainer).
    """

    mean: float
    max: float
    kl: float

    def check(self, limit: float | None) -> None:
        """Raises ParityError for a mean over `limit`, or one that is not a number; None never raises."""
        if limit is None or self.mean <= limit:
            return
        raise ParityError(
            f"the trainer's log-probs are {self.mean:.3g} nats a token off the rollout engine's on average "
            f"(at most {self.max:.3g}, KL(engine || trainer) {self.kl:.3g}), over "
            f"rollout.logprob_gap_limit={limit:g}; the optimizer was not touched. Likely the engine serves "
            "other weights (stale, or of another model), computes in another precision, draws at another "
            "rollout.temperature or has another tokenizer: mend that, or raise the limit"
        )
