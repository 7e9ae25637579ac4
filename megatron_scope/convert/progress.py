"""How far a conversion has come, in bytes: a bar on a terminal, else a line every tenth."""

from __future__ import annotations

import dataclasses
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY_S = 2.0  # at most: a small model needs no ten lines


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.num_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"


class ByteProgress:
    """A context manager on stderr."""

    def __init__(self, title: str, total_bytes: int) -> None:
        self.title = title
        self.total_bytes = total_bytes
        self.done = 0
        self._last_tenth = 0
        self._bar: RichProgress | None = None

    def __enter__(self) -> ByteProgress:
        self._started = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total_bytes)
        return self

    def advance(self, num_bytes: int) -> None:
        """Counts bytes that are on their way to the disk."""
        self.done += num_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
            return
        tenth, now = self.done * 10 // max(1, self.total_bytes), time.monotonic()
        if tenth > self._last_tenth and now - self._last_line >= _LINE_EVERY_S:
            self._last_tenth, self._last_line = tenth, now
            done, total, speed = self.done / 1e9, self.total_bytes / 1e9, self.done / (now - self._started)
            print(
                f"{self.title}  {done:.2f} of {total:.2f} GB  {speed / 1e6:.0f} MB/s",
                file=sys.stderr,
                flush=True,
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
