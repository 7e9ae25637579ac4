"""What runs on the trainer's ranks in `rollout.py`: weights from their shards to one server.

The ranks are real ones, with the model's shards and the publisher of a run; only the optimizer is left out.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import process_memory  # noqa: E402  (needs the path)
import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from rollout_sync import Publish, RankResult  # noqa: E402

from megatron_scope.backend import setup  # noqa: E402
from megatron_scope.backend.model import StageModel, build  # noqa: E402
from megatron_scope.backend.setup import Ranks  # noqa: E402
from megatron_scope.config import Config, parse_config  # noqa: E402
from megatron_scope.controller.process import ControllerProcess  # noqa: E402
from megatron_scope.convert.sources import open_model  # noqa: E402
from megatron_scope.preflight import max_positions, vocabulary  # noqa: E402
from megatron_scope.publishing import build_publisher  # noqa: E402
from megatron_scope.records import SequenceLimits  # noqa: E402
from megatron_scope.run_folder import RunFolder  # noqa: E402


class Watched:
    """The peaks of other processes, by their kind."""

    def __init__(self, **pids: int) -> None:
        self._trees = {
            kind: [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            for kind, pid in pids.items()
        }
        self._before: dict[int, int] = {}

    def begin(self) -> None:
        for tree in self._trees.values():
            for process in tree:
                process_memory.reset_peak(process.pid)
                self._before[process.pid] = process_memory.resident_bytes(pid=process.pid)

    def peaks(self) -> dict[str, int]:
        """The largest process's growth of each kind."""
        return {
            f"{kind}_peak_bytes": max(
                process_memory.resident_bytes("VmHWM", one.pid) - self._before[one.pid] for one in tree
            )
            for kind, tree in self._trees.items()
        }


def publish_on_rank(settings: dict[str, Any], server_pid: int, num_publishes: int) -> RankResult:
    """Runs on every rank: publishes that many versions one after another."""
    config = parse_config(settings, "benchmark")
    ranks = setup.initialize(config.parallel)
    stage = _stage(config, ranks)
    folder = RunFolder(str(config.run.output_dir))
    controller = watched = None
    if ranks.rank == 0:
        limits = SequenceLimits(vocabulary(config).size, max_positions(config))
        controller = ControllerProcess(config, limits, str(folder.path))
        (child,) = multiprocessing.active_children()
        assert child.pid is not None
        watched = Watched(controller=child.pid, server=server_pid)
    publisher = build_publisher(config, stage, ranks, folder, controller)
    publishes = []
    try:
        for version in range(1, num_publishes + 1):
            before = process_memory.begin()
            if watched is not None:
                watched.begin()
            dist.barrier(group=ranks.world_group)
            started = time.perf_counter()
            publisher.publish(version)
            seconds = time.perf_counter() - started
            peak = process_memory.resident_bytes("VmHWM") - before
            others = {} if watched is None else watched.peaks()
            written = _num_bytes(folder.weights_of(version)) if ranks.rank == 0 else 0
            publishes.append(Publish(seconds, peak, written, **others))
    finally:
        publisher.close()
        if controller is not None:
            controller.close()
        setup.shutdown()
    sizes = [_sizes(value, ranks) for value in stage.module.parameters()]
    return RankResult(sum(mine for mine, _ in sizes), max(whole for _, whole in sizes), tuple(publishes))


def _sizes(parameter: torch.nn.Parameter, ranks: Ranks) -> tuple[int, int]:
    """Bytes of this rank's shard and of the parameter in all its shards."""
    mine = parameter.numel() * parameter.itemsize
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return mine, mine * (ranks.tensor_size if is_split else 1)


def _stage(config: Config, ranks: Ranks) -> StageModel:
    table = vocabulary(config)
    return build(
        open_model(config.student),
        ranks,
        config.train,
        padded_vocab=table.padded_rows,
        vocab_size=table.size,
        sequence_parallel=False,
        pipeline_layers=None,
        trainable=False,
    )


def _num_bytes(folder: Path) -> int:
    """Of all files in a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*"))
