"""Weights from the trainer's ranks to one server: what a publish takes, as `rollout.py` measures it.

The ranks are real ones, with the model's shards and the publisher of a run; only the optimizer is left out.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import process_memory  # noqa: E402  (needs the path)
import psutil  # noqa: E402
import torch.distributed as dist  # noqa: E402

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

MEGABYTE = 1_000_000
LAYOUTS = {"1 rank": (1, 1), "TP 2 x PP 2": (2, 2)}
TRANSPORTS = ("disk", "broadcast")


@dataclasses.dataclass(frozen=True)
class Publish:
    """One publish as one rank saw it. Peaks are above what was resident before; the controller's and the
    server's (the largest of its processes) are rank 0's to tell.
    """

    seconds: float
    peak_bytes: int
    written_bytes: int
    controller_peak_bytes: int = 0
    server_peak_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class RankResult:
    """A rank's publishes; the first one also makes the process groups."""

    shard_bytes: int
    publishes: tuple[Publish, ...]


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


def settings_of(
    model: Path, out: Path, url: str, *, transport: str, layout: tuple[int, int], bucket_mb: int
) -> dict[str, Any]:
    """The config of a run that would publish so."""
    data = out.with_suffix(".jsonl")
    data.write_text(json.dumps({"id": "0", "prompt": "aaa", "answer": "0", "task": "math"}) + "\n")
    return {
        "run": {"output_dir": str(out), "steps": 1},
        "student": {"hf": str(model)},
        "teacher": {"hf": str(model)},
        "parallel": {"tensor": layout[0], "pipeline": layout[1]},
        "data": {"train": str(data), "prompt_template": "{prompt}", "max_prompt_tokens": 8},
        "rollout": {"servers": [url], "max_new_tokens": 8},
        "train": {"precision": "float32"},
        "sync": {"transport": transport, "bucket_mb": bucket_mb},
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
            before, written = process_memory.begin(), _written_bytes()
            if watched is not None:
                watched.begin()
            dist.barrier(group=ranks.world_group)
            started = time.perf_counter()
            publisher.publish(version)
            seconds = time.perf_counter() - started
            peak = process_memory.resident_bytes("VmHWM") - before
            others = {} if watched is None else watched.peaks()
            publishes.append(Publish(seconds, peak, _written_bytes() - written, **others))
    finally:
        publisher.close()
        if controller is not None:
            controller.close()
        setup.shutdown()
    shard_bytes = sum(value.numel() * value.itemsize for value in stage.module.parameters())
    return RankResult(shard_bytes, tuple(publishes))


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


def _written_bytes() -> int:
    """What this process has had written to a disk since its start."""
    return psutil.Process().io_counters().write_bytes


@dataclasses.dataclass(frozen=True)
class SyncRow:
    """One way to one server; medians over the publishes after the first, peaks over them all."""

    engine: str
    layout: str
    transport: str
    first_seconds: float
    seconds: tuple[float, ...]
    shard_bytes: int  # of the rank with the most
    rank_peak_bytes: int  # of the rank with the highest
    bucket_bytes: int
    controller_peak_bytes: int
    server_peak_bytes: int
    written_bytes: int  # a publish, all ranks together

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak_in_buckets(self) -> float:
        return self.rank_peak_bytes / self.bucket_bytes


def summarise(
    results: Sequence[RankResult], *, engine: str, layout: str, transport: str, bucket_mb: int
) -> SyncRow:
    """The row of one way from what its ranks saw; the slowest rank's seconds count."""
    seconds = [
        max(one.seconds for one in publishes)
        for publishes in zip(*(result.publishes for result in results), strict=True)
    ]
    everything = [publish for result in results for publish in result.publishes]
    num_publishes = len(seconds)
    return SyncRow(
        engine=engine,
        layout=layout,
        transport=transport,
        first_seconds=seconds[0],
        seconds=tuple(seconds[1:]),
        shard_bytes=max(result.shard_bytes for result in results),
        rank_peak_bytes=max(publish.peak_bytes for publish in everything),
        bucket_bytes=bucket_mb * MEGABYTE,
        controller_peak_bytes=max(publish.controller_peak_bytes for publish in everything),
        server_peak_bytes=max(publish.server_peak_bytes for publish in everything),
        written_bytes=sum(publish.written_bytes for publish in everything) // num_publishes,
    )
