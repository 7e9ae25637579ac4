"""Training checkpoints: Megatron's `torch_dist` format for weights and optimizer, one JSON file for
everything else.

A checkpoint is a folder `step_00000050` that appears whole or not at all. It loads at any tensor, pipeline
and data-parallel size; bitwise so at the one it was written at.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_scope.backend.optimizer import Trainable
from megatron_scope.backend.setup import Ranks
from megatron_scope.config.schema import COMPANIONS
from megatron_scope.convert.files import copy_companions, sync_to_disk
from megatron_scope.errors import CheckpointError

STATE_FILE = "state.json"
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return root / f"step_{step:08d}"


def find_latest(root: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = sorted(path for path in root.glob("step_*") if (path / STATE_FILE).exists())
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, after checking that its files are there in full; CheckpointError
    otherwise.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        sizes = state["files"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise _broken(folder, f"{STATE_FILE} cannot be read ({error})") from None
    for name, size in sizes.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            got = f"{path.stat().st_size} bytes" if path.exists() else "no file"
            raise _broken(folder, f"{name} should have {size} bytes, found {got}")
    return state["run"]


def check_same_run(folder: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """CheckpointError when a checkpoint is of a run with another model, seed or objective."""
    for key, value in expected.items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{folder} belongs to another run: its {key} is {saved.get(key)}, this run's {value}; use "
                "another run.output_dir, or --resume never"
            )


def save(
    root: Path, step: int, student: Trainable, ranks: Ranks, run_state: dict[str, Any], keep: int
) -> None:
    """Writes the checkpoint after `step` updates and removes all but the newest `keep`. A collective."""
    final = folder_of(root, step)
    partial = final.with_name(f".{final.name}.partial")
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=ranks.world_group)
    dist_checkpointing.save(_sharded_state(student, is_loading=False), str(partial))
    dist.barrier(group=ranks.world_group)
    if ranks.rank == 0:
        copy_companions(student.stage.source.companions, partial / COMPANIONS)
        files = {
            str(path.relative_to(partial)): path.stat().st_size
            for path in partial.rglob("*")
            if path.is_file()
        }
        state = {"step": step, "files": files, "run": run_state}
        (partial / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            sync_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_to_disk(root)
        for old in sorted(root.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier(group=ranks.world_group)


def load(folder: Path, student: Trainable) -> None:
    """Restores weights, master weights and optimizer in place. A collective; CheckpointError when the files
    are broken.
    """
    for part in student.optimizer.chained_optimizers:
        _prepare_to_load(part)
    try:
        state: Any = dist_checkpointing.load(_sharded_state(student, is_loading=True), str(folder))
    except Exception as error:  # torch and Megatron raise many kinds on a damaged file
        raise CheckpointError(
            f"{folder} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); its "
            "files have the sizes they were written with, so look at memory and versions before removing it"
        ) from error
    student.stage.module.load_state_dict(state["model"])
    student.optimizer.load_state_dict(state["optimizer"])
    for part in student.optimizer.chained_optimizers:
        _separate_steps(part.optimizer)


def _sharded_state(student: Trainable, *, is_loading: bool) -> dict[str, Any]:
    metadata = dict(_METADATA)  # Megatron adds the current groups to what it is given
    model = student.stage.module.sharded_state_dict(metadata=metadata)
    optimizer = student.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def _prepare_to_load(part: Any) -> None:
    """Megatron 0.16 loads into torch's AdamW only where the state exists, and expects no `step` among its
    tensors.
    """
    if not isinstance(part.optimizer, torch.optim.AdamW):
        return
    for group in part.optimizer.param_groups:
        for param in group["params"]:
            part.optimizer.state[param] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
    part._set_main_param_and_optimizer_states = functools.partial(_set_present_states, part)


def _set_present_states(part: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    group, order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][order]
    targets = {"param": main_param, **part.optimizer.state[main_param]}
    with torch.no_grad():
        for name, value in tensors.items():
            targets[name].copy_(value)


def _separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Megatron hands one `step` tensor to all parameters, which the next update would then count once for
    each.
    """
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def _broken(folder: Path, reason: str) -> CheckpointError:
    others = sorted(
        path.name for path in folder.parent.glob("step_*") if path != folder and (path / STATE_FILE).exists()
    )
    last_good = f"the one before it is {folder.parent / others[-1]}" if others else "there is no other"
    return CheckpointError(
        f"{folder} is broken: {reason}; remove it to go on from the last good one ({last_good})"
    )
