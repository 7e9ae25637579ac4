"""The place that torchrun or srun gave this process; alone where neither did."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among the ranks; `launched` tells whether a launcher started it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launched: bool = False


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Reads torchrun's variables, else those of an srun step (an allocation or batch script alone starts no
    ranks).
    """
    if "WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif "SLURM_STEP_NUM_TASKS" in environment:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    else:
        return Place()
    rank, local_rank, world_size = (int(environment[name]) for name in names)
    return Place(rank, local_rank, world_size, launched=True)
