"""The folder of a run: what lies where, and how a run starts, goes on or starts over in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_scope.errors import ConfigError


class RunFolder:
    """RUN/metrics.jsonl, rollouts/, checkpoints/, weights/ (published versions), hf/ (the final model),
    logs/.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts"
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights"
        self.final = self.path / "hf"
        self.resolved_config = self.path / "config.resolved.yaml"

    def weights_of(self, version: int) -> Path:
        """Where a published version of the weights lies."""
        return self.weights / f"v{version:08d}"

    def begin(self, step: int) -> None:
        """Prepares the folder to go on after `step` steps (0: from the start).

        Metrics and rollouts of later steps are dropped: they belong to work that the checkpoint does not know
        of.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        self._replace_metrics(kept)
        for partial in (*self.weights.glob(".*.partial"), *self.checkpoints.glob(".*.partial")):
            shutil.rmtree(partial)
        for file in self.rollouts.glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second trainer out of the folder; ConfigError when one is in it. Ends with the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another trainer is writing to {self.path}; wait for its end, or use another "
                    "run.output_dir"
                ) from None
            yield

    def set_aside(self) -> None:
        """Moves an earlier run in this folder to previous/N, so that a new one can start without losing
        it.
        """
        names = ("metrics.jsonl", "rollouts", "checkpoints", "hf", "config.resolved.yaml")
        present = [self.path / name for name in names if (self.path / name).exists()]
        if not present:
            return
        number = 1
        while (self.path / "previous" / str(number)).exists():
            number += 1
        target = self.path / "previous" / str(number)
        target.mkdir(parents=True)
        for item in present:
            item.rename(target / item.name)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The recorded steps; lines that a crash cut short are left out."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one step's object and flushes it to disk."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _replace_metrics(self, rows: list[dict[str, Any]]) -> None:
        partial = self.metrics.with_name(".metrics.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(self.metrics)
