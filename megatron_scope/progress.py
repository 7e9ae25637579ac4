"""What a person sees while a run goes on: a line a step, and on a terminal a bar below them. Rank 0 only."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from megatron_scope.config import Config


class Progress:
    """A context manager that shows each finished step."""

    def __init__(self, config: Config, rank: int, first_step: int) -> None:
        self._rank = rank
        self._config = config
        self._first_step = first_step
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self._rank != 0:
            return self
        steps = self._config.run.steps
        if self._first_step > steps:
            print(
                f"{self._config.run.output_dir} has its {steps} steps already; raise run.steps to go on",
                flush=True,
            )
        elif self._first_step > 1:
            print(f"going on after step {self._first_step - 1} of {steps}", flush=True)
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                str(self._config.objective.name), total=steps, completed=self._first_step - 1
            )
        return self

    def show(self, row: dict[str, Any]) -> None:
        """Shows one step."""
        if self._rank != 0:
            return
        line = f"step {row['step']}/{self._config.run.steps}  {describe(row)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"])
        if self._bar is not None and sys.stdout.isatty():  # the lines scroll by above the bar
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(row: dict[str, Any]) -> str:
    """A step in one line: what it learnt and where its time went."""
    numbers = [
        ("accuracy", "accuracy"),
        ("nll_correct", "nll"),
        ("kl_incorrect", "kl"),
        ("grad_norm", "grad norm"),
    ]
    parts = [f"{label} {row[key]:.3f}" for key, label in numbers if row[key] is not None]
    stages = [
        f"{name} {value:.2f}" for name, value in row["seconds"].items() if name != "total" and value >= 0.005
    ]
    return f"{'  '.join(parts)}  | {row['seconds']['total']:.2f} s: {', '.join(stages)}"
