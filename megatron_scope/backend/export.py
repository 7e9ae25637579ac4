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
from megatron_scope.convert.hf_writer import ShardWriter, finish_folder, sync_to_disk
from megatron_scope.convert.mapping import export_stage


def save_hf_folder(stage: StageModel, ranks: Ranks, out: Path) -> None:
    """Writes the weights as a Hugging Face folder beside the config and tokenizer of the folder they came
    from.

    Each pipeline stage of the first replica writes its own shards. The folder appears whole or not at all; an
    older one of the same name is replaced.
    """
    partial = out.with_name(f".{out.name}.partial")
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=ranks.world_group)
    if ranks.replica == 0:
        writer = ShardWriter(partial, f"model-{ranks.pipeline_rank:03d}")
        for name, tensor in _stage_tensors(stage, ranks, stage.module.get_parameter):
            writer.add(name, tensor)
        writer.close()
        written = _gather_on_first(ranks, (writer.file_of, writer.total_bytes))
        if ranks.rank == 0:
            file_of = {name: file for files, _ in written for name, file in files.items()}
            dtype = str(stage.config.params_dtype).removeprefix("torch.")
            finish_folder(partial, stage.folder.path, dtype, file_of, sum(size for _, size in written))
            shutil.rmtree(out, ignore_errors=True)
            partial.rename(out)
            sync_to_disk(out.parent)
    dist.barrier(group=ranks.world_group)


def save_gradients(student: Trainable, ranks: Ranks, path: Path) -> None:
    """Writes the full summed gradient, float32, as one safetensors file (after a backward pass with whole
    gradients).
    """
    if ranks.replica != 0:
        return
    mine = dict(_stage_tensors(student.stage, ranks, student.main_grad))
    everything = {name: grad for part in _gather_on_first(ranks, mine) for name, grad in part.items()}
    if ranks.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(everything, path)


def _stage_tensors(
    stage: StageModel, ranks: Ranks, local: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    return export_stage(
        stage.entries, local, stage.shape, ranks.tensor_group, ranks.tensor_rank, ranks.tensor_size
    )


def _gather_on_first(ranks: Ranks, value: object) -> list:
    """The replica's values in rank order on its first rank, [] elsewhere."""
    size = dist.get_world_size(ranks.replica_group)
    gathered: list = [None] * size if ranks.is_leader else []
    dist.gather_object(value, gathered or None, group=ranks.replica_group, group_dst=0)
    return gathered
