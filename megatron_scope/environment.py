"""The place that torchrun or srun gave this process; alone where neither did."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from megatron_scope.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among the ranks; `launched` tells whether a launcher started it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launched: bool = False


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Reads torchrun's variables, else those of an srun step of several tasks.

    An allocation, a batch script or a step of one task starts no ranks. ConfigError when a variable is
    missing.
    """
    if "WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    else:
        return Place()
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(
            f"{names[-1]} is set but {missing[0]} is not; a launcher sets both: use torchrun or srun, or "
            f"unset {names[-1]}"
        )
    rank, local_rank, world_size = (int(environment[name]) for name in names)
    return Place(rank, local_rank, world_size, launched=True)
