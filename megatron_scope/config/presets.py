"""Values that `objective.name` and `objective.preset` imply; what the config states itself always wins."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from megatron_scope.config.schema import (
    Aggregation,
    Config,
    CorrectPath,
    ObjectiveName,
    Preset,
    WeightScale,
)

# GRPO's are the paper's (Table 3) under one global token mean; given responses count token by token.
_BY_NAME: dict[ObjectiveName, dict[str, Any]] = {
    ObjectiveName.GRPO: {
        "aggregation": Aggregation.TOKEN_MEAN,
        "ratio_clip": 0.2,
        "kl_coefficient": 1e-4,
    },
    ObjectiveName.SFT: {"aggregation": Aggregation.TOKEN_MEAN},
    ObjectiveName.KD: {"aggregation": Aggregation.TOKEN_MEAN},
}


def _official(config: Config) -> dict[str, Any]:
    """Where the authors' released code departs from their paper, one setting a difference."""
    return {
        "student_exponent": -1.0,  # both paths favour low perplexity
        "weight_scale": WeightScale.MEAN_ONE,
        "correct_path": CorrectPath.LOG_LIKELIHOOD,
        "aggregation": Aggregation.TOKEN_MEAN,  # correct tokens and all tokens count separately
        "student_temperature": config.rollout.temperature,
        "teacher_temperature": 1.0,
    }


def with_implied(config: Config, stated: Collection[str]) -> Config:
    """The config with the objective's implied values in every key that is not in `stated`."""
    objective = config.objective
    implied = dict(_BY_NAME.get(objective.name, {}))
    if objective.preset is Preset.OFFICIAL:
        implied |= _official(config)
    left = {key: value for key, value in implied.items() if key not in stated}
    return dataclasses.replace(config, objective=dataclasses.replace(objective, **left))
