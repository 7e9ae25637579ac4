"""A model's weights or gradients out of its shards, in Hugging Face names. Collectives: every rank calls
them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_scope.backend.model import StageModel
from megatron_scope.backend.optimizer import Trainable
from megatron_scope.backend.setup import Ranks
from megatron_scope.convert.files import sync_to_disk
from megatron_scope.convert.hf_writer import MAX_SHARD_BYTES, finish_folder
from megatron_scope.convert.mapping import Peers, export_stage, exported_tensors
from megatron_scope.convert.safetensors_writer import SafetensorsWriter, TensorPlan, plan_shards


def save_hf_folder(stage: StageModel, ranks: Ranks, out: Path) -> None:
    """Writes the weights as a Hugging Face folder beside the config and tokenizer of the folder they came
    from.

    The first rank of each pipeline stage writes the stage's shards. The folder appears whole or not at all;
    an older one of the same name is replaced.
    """
    partial = out.with_name(f".{out.name}.partial")
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=ranks.world_group)
    files = _plan_files(stage, ranks)
    with SafetensorsWriter(partial, files) as writer:
        for name, tensor in stage_tensors(stage, ranks, stage.module.get_parameter):
            writer.write(name, 0, tensor.cpu().contiguous())
    if ranks.replica == 0:
        planned = gather_on_first(ranks, files)
        if ranks.rank == 0:
            everything = {name: plans for files in planned for name, plans in files.items()}
            finish_folder(partial, stage.source.companions, everything)
            shutil.rmtree(out, ignore_errors=True)
            partial.rename(out)
            sync_to_disk(out.parent)
    dist.barrier(group=ranks.world_group)


def _plan_files(stage: StageModel, ranks: Ranks) -> dict[str, list[TensorPlan]]:
    """The weight files of a stage and what its first rank writes into each."""
    if ranks.place_in_stage != 0:
        return {}
    plans = [
        TensorPlan(name, size, stage.config.params_dtype) for name, size in exported_tensors(stage.entries)
    ]
    return {
        f"model-{ranks.pipeline_rank:03d}-{number:05d}.safetensors": shard
        for number, shard in enumerate(plan_shards(plans, MAX_SHARD_BYTES), start=1)
    }


def save_gradients(student: Trainable, ranks: Ranks, path: Path) -> None:
    """Writes the full summed gradient, float32, as one safetensors file (after a backward pass with whole
    gradients).
    """
    mine = {
        name: grad.cpu().clone().contiguous()  # gradients change with the next backward pass
        for name, grad in stage_tensors(student.stage, ranks, student.main_grad)
    }
    if ranks.replica != 0:
        return
    everything = {name: grad for part in gather_on_first(ranks, mine) for name, grad in part.items()}
    if ranks.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(everything, path)


def stage_tensors(
    stage: StageModel, ranks: Ranks, local: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The stage's tensors on its first rank, nothing elsewhere; see `export_stage`."""
    tensor = Peers(ranks.tensor_group, ranks.tensor_rank, ranks.tensor_size)
    expert = Peers(ranks.expert_group, ranks.expert_rank, ranks.expert_size)
    holds_first = ranks.place_in_stage < ranks.expert_size
    return export_stage(
        stage.entries,
        local,
        stage.shape,
        tensor if ranks.replica == 0 else None,
        expert if stage.shape.mixture and holds_first else None,
    )


def gather_on_first(ranks: Ranks, value: object) -> list:
    """The replica's values in rank order on its first rank, [] elsewhere."""
    size = dist.get_world_size(ranks.replica_group)
    gathered: list = [None] * size if ranks.is_leader else []
    dist.gather_object(value, gathered or None, group=ranks.replica_group, group_dst=0)
    return gathered
