"""What a publish takes, as `rollout.py` tells it: the settings of one, and the row of several."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEGABYTE = 1_000_000
LAYOUTS = {"1 rank": (1, 1), "TP 2 x PP 2": (2, 2)}
TRANSPORTS = ("disk", "broadcast")


@dataclasses.dataclass(frozen=True)
class Publish:
    """One publish as one rank saw it. Peaks are above what was resident before; what was written to the disk
    and the peaks of the controller and of the server (its largest process) are rank 0's to tell.
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
    largest_bytes: int  # of a parameter of the stage, all its shards
    publishes: tuple[Publish, ...]


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


@dataclasses.dataclass(frozen=True)
class SyncRow:
    """One way to one server; medians over the publishes after the first, peaks over them all."""

    engine: str
    layout: str
    transport: str
    first_seconds: float
    seconds: tuple[float, ...]
    model_bytes: int  # all shards
    shard_bytes: int  # of the rank with the most
    rank_peak_bytes: int  # of the rank with the highest
    bucket_bytes: int
    largest_bytes: int  # of a parameter, all its shards
    controller_peak_bytes: int
    server_peak_bytes: int
    written_bytes: int  # in a publish

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
    return SyncRow(
        engine=engine,
        layout=layout,
        transport=transport,
        first_seconds=seconds[0],
        seconds=tuple(seconds[1:]),
        model_bytes=sum(result.shard_bytes for result in results),
        shard_bytes=max(result.shard_bytes for result in results),
        rank_peak_bytes=max(publish.peak_bytes for publish in everything),
        bucket_bytes=bucket_mb * MEGABYTE,
        largest_bytes=max(result.largest_bytes for result in results),
        controller_peak_bytes=max(publish.controller_peak_bytes for publish in everything),
        server_peak_bytes=max(publish.server_peak_bytes for publish in everything),
        written_bytes=max(publish.written_bytes for publish in everything),
    )
