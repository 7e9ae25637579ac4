"""The learning rate of a step. A function of the step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from megatron_scope.config.schema import OptimizerConfig, Schedule


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of a step (counted from 0), a function of the step alone: linear warm-up, then the schedule to
    `min_lr`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule is Schedule.CONSTANT:
        return config.lr
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    left = 1 - progress if config.schedule is Schedule.LINEAR else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left
