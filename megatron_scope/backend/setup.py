"""Process groups and this rank's place in them."""

from __future__ import annotations

import dataclasses
import datetime
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from megatron_scope.backend import cpu
from megatron_scope.config.schema import ParallelConfig
from megatron_scope.environment import place
from megatron_scope.errors import ConfigError

_TIMEOUT = datetime.timedelta(minutes=30)
# Host groups wait for a whole rollout, however long; a dead peer shows by its closed connection.
_HOST_TIMEOUT = datetime.timedelta(days=7)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where this process stands. A *replica* is one copy of the model: tensor x pipeline ranks.

    Experts are whole on a rank and spread over the `expert_size` ranks of `expert_group`, neighbours in
    `place_in_stage`.

    `tensor_group` and `expert_group` carry model tensors (NCCL on CUDA). `world_group`, `replica_group` and
    `leader_group` carry host objects over gloo; `leader_group` holds the first rank of every replica, rank 0
    among them.
    """

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    expert_rank: int
    expert_size: int
    replica: int
    num_replicas: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    world_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    leader_group: dist.ProcessGroup | None

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def place_in_stage(self) -> int:
        """This rank's number among the tensor x data-parallel ranks of its pipeline stage."""
        return self.replica * self.tensor_size + self.tensor_rank

    @property
    def is_leader(self) -> bool:
        """The first rank of its replica."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def speaks_for_scores(self) -> bool:
        """One rank per replica holds its results once: tensor rank 0 of the last stage."""
        return self.tensor_rank == 0 and self.is_last_stage


def prepare() -> None:
    """Makes the process ready for Megatron-core; call it before anything imports it. Idempotent."""
    # They repeat that optional extensions are absent and that parts of their own code are deprecated.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    cpu.host()


def initialize(parallel: ParallelConfig) -> Ranks:
    """Joins the world and builds Megatron's groups; the layout must already have been checked against the
    world size.
    """
    prepare()
    from megatron.core import parallel_state

    rank, world_size = place().rank, place().world_size
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"there are {world_size} ranks but MASTER_ADDR is not set; export it and MASTER_PORT: the first "
            "host of the job and a free port on it"
        )
    device = _device()
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
            **_store(world_size),
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
    )
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(0)  # no layer draws random numbers; the tracker must exist all the same
    return _ranks(parallel_state, rank, world_size, device)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        return torch.device("cpu")
    # A launcher may show each rank one device only.
    torch.cuda.set_device(place().local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def _store(world_size: int) -> dict[str, Any]:
    """One process alone needs no port that another could hold."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    return {"store": store} if world_size == 1 else {}


def _ranks(parallel_state: Any, rank: int, world_size: int, device: torch.device) -> Ranks:
    replica_ranks = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, tuple(replica_ranks))
    replicas = sorted(set(everyone))
    # Every rank takes part in making every group, in one order.
    replica_groups = [_gloo_group(list(members)) for members in replicas]
    leaders = [members[0] for members in replicas]
    leader_group = _gloo_group(leaders)
    replica = replicas.index(tuple(replica_ranks))
    return Ranks(
        rank=rank,
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        replica=replica,
        num_replicas=len(replicas),
        device=device,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
        world_group=_gloo_group(list(range(world_size))),
        replica_group=replica_groups[replica],
        leader_group=leader_group if rank in leaders else None,
    )


def _gloo_group(members: list[int]) -> Any:
    return dist.new_group(members, backend="gloo", timeout=_HOST_TIMEOUT)


def shutdown() -> None:
    """Leaves Megatron's groups and the world."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
