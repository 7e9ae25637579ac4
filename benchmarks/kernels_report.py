"""The tables and the picture of `benchmarks/kernels.py`, from what its processes measured."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "ours"
COLOURS = {OURS: "#D55E00", "bare": "#56B4E9", "": "0.6"}  # Okabe and Ito's vermilion and sky blue


@dataclasses.dataclass(frozen=True)
class Case:
    """`kind` is "logits" or "linear"; `vocab` counts all columns, `hidden` the student's and teacher's
    hidden sizes; `chunk_tokens` is for the linear kind.
    """

    kind: str
    contestant: str
    num_tokens: int
    vocab: int
    hidden: tuple[int, int] = (1024, 2048)
    chunk_tokens: int = 128

    @property
    def label(self) -> str:
        if self.kind == "logits" or self.contestant == OURS:
            return self.contestant
        return f"{self.contestant}, chunks of {self.chunk_tokens}"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One case's repeats; times and memory are those of the slowest and the largest rank."""

    case: Case
    tensor_parallel: int
    seconds: list[float]
    cpu_seconds: list[float]
    extra_bytes: list[int]
    value_error: float | None
    gradient_error: float | None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_cpu_s(self) -> float:
        return statistics.median(self.cpu_seconds)

    @property
    def extra_shards(self) -> float:
        """Median extra memory in u."""
        return statistics.median(self.extra_bytes) / (2 * self.case.num_tokens * self.columns)

    @property
    def is_bare(self) -> bool:
        """Whether it computes no loss, so that its memory tells nothing."""
        return self.case.contestant.startswith("bare")

    @property
    def columns(self) -> int:
        return self.case.vocab // self.tensor_parallel


@dataclasses.dataclass(frozen=True)
class Group:
    """Measurements that took turns, ours first; `load` is the machine's load average (one minute) before and
    after.
    """

    load: tuple[float, float]
    measurements: list[Measurement]

    @staticmethod
    def of(found: dict[str, Any]) -> Group:
        """From JSON."""
        measurements = [
            Measurement(**{**m, "case": Case(**{**m["case"], "hidden": tuple(m["case"]["hidden"])})})
            for m in found["measurements"]
        ]
        return Group(tuple(found["load"]), measurements)


def best_chunks(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The fastest of each way but ours, which may stand there with several sizes of chunks."""
    ways: dict[str, Measurement] = {}
    for m in measurements:
        if m.case.contestant == OURS:
            continue
        way = re.sub(r",? chunks of \d+$", "", m.case.contestant)
        if way not in ways or m.median_s < ways[way].median_s:
            ways[way] = m
    return list(ways.values())


def table(measurements: Sequence[Measurement], *, of_chunks: bool = False) -> str:
    """Times as ratios to ours, the first row; `of_chunks` adds their size, and the extra bytes for each token
    and column of one.
    """
    own = measurements[0]
    more = [" chunk | extra bytes / (chunk x columns) |", " --- | --- |"] if of_chunks else ["", ""]
    lines = [
        "| | seconds | runs | times ours | CPU seconds | times ours | extra memory, u | error of values | "
        f"of gradients |{more[0]}",
        f"| --- | --- | --- | --- | --- | --- | --- | --- | --- |{more[1]}",
    ]
    for m in measurements:
        errors = ["" if error is None else f"{error:.0e}" for error in (m.value_error, m.gradient_error)]
        line = (
            f"| {m.case.contestant} | {m.median_s:.3f} ({min(m.seconds):.3f} to {max(m.seconds):.3f}) | "
            f"{len(m.seconds)} | {m.median_s / own.median_s:.2f} | "
            f"{m.median_cpu_s:.3f} | {m.median_cpu_s / own.median_cpu_s:.2f} | "
            f"{'' if m.is_bare else f'{m.extra_shards:.2f}'} | {errors[0]} | {errors[1]} |"
        )
        if of_chunks:
            cells = min(m.case.chunk_tokens, m.case.num_tokens) * m.columns
            memory = "" if m.is_bare else f"{statistics.median(m.extra_bytes) / cells:.1f}"
            line += f" {m.case.chunk_tokens} | {memory} |"
        lines.append(line)
    return "\n".join(lines)


def summary(groups: dict[str, Group]) -> str:
    """Ours beside the best chunk size of each way, in words."""
    lines = []
    for title, group in groups.items():
        own = group.measurements[0]
        beside = [
            f"{m.case.label} {m.median_s / own.median_s:.2f} ({m.median_cpu_s / own.median_cpu_s:.2f})"
            for m in best_chunks(group.measurements)
            if not m.is_bare
        ]
        bare = [
            f"{own.median_s / m.median_s:.2f} ({own.median_cpu_s / m.median_cpu_s:.2f}) of the {m.case.label}"
            for m in group.measurements
            if m.is_bare
        ]
        line = f"- {title}: extra memory {own.extra_shards:.2f} u."
        line += f" Time (CPU time) as a multiple of ours: {'; '.join(beside)}." if beside else ""
        line += f" Ours takes {'; '.join(bare)}." if bare else ""
        lines.append(line)
    return "\n".join(lines)


def report(groups: dict[str, Group], machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [
        "Medians (with the range) of interleaved fresh processes, forward and backward, bfloat16, one thread "
        f"a rank; {versions}.\n"
        "The machine is shared: compare within a table, whose load average at its start and end stands above "
        "it. Errors are\n"
        "relative to float64 (L2, of a few tokens); u is one bfloat16 shard of the logits.",
        summary(groups),
    ]
    for title, group in groups.items():
        case = group.measurements[0].case
        note = f"{title}: T = {case.num_tokens}, V = {case.vocab}, load {group.load[0]} to {group.load[1]}"
        if case.kind == "linear":
            note += (
                f"; hidden sizes {case.hidden[0]} and {case.hidden[1]}; memory beyond inputs and gradients "
                "(the table's in float32)"
            )
        parts.append(f"{note}.\n\n{table(group.measurements, of_chunks=case.kind == 'linear')}")
    return "\n\n".join(parts) + "\n"


def draw(groups: dict[str, Group], path: Path) -> None:
    """Bars of time and of extra memory for every contestant, a row of panels for each group."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [len(group.measurements) for group in groups.values()]
    with matplotlib.rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(12, sum(0.9 + 0.24 * count for count in rows)), layout="constrained")
        panels = figure.subplots(
            len(groups), 2, sharey="row", squeeze=False, gridspec_kw={"height_ratios": rows}
        )
        for (title, group), axes in zip(groups.items(), panels, strict=True):
            medians = [m.median_s for m in group.measurements]
            _draw_bars(axes[0], group.measurements, medians, max(max(m.seconds) for m in group.measurements))
            axes[0].set_title(title, loc="left", fontweight="bold")
            axes[0].set_xlabel("seconds, forward and backward (line: fastest to slowest run)")
            for place, m in enumerate(group.measurements):
                axes[0].plot([min(m.seconds), max(m.seconds)], [place] * 2, color="0.2", linewidth=1)
            memory = [0.0 if m.is_bare else m.extra_shards for m in group.measurements]
            _draw_bars(axes[1], group.measurements, memory, max(memory))
            axes[1].set_xlabel("extra memory in u, one bfloat16 shard of the logits")
        figure.savefig(path, dpi=130, format="png", metadata={"Software": None})


def _draw_bars(
    axis: Any, measurements: Sequence[Measurement], values: Sequence[float], longest: float
) -> None:
    colours = [COLOURS.get(m.case.contestant.split()[0], COLOURS[""]) for m in measurements]
    places = range(len(measurements))
    axis.barh(places, values, color=colours, height=0.7)
    axis.set_yticks(places, [m.case.label for m in measurements])
    axis.set_ylim(len(measurements) - 0.5, -0.5)
    for place, m, value in zip(places, measurements, values, strict=True):
        axis.text(
            1.0,
            place,
            "-" if m.is_bare and not value else f"{value:.2f}",
            transform=axis.get_yaxis_transform(),
            horizontalalignment="right",
            verticalalignment="center",
        )
    axis.set_xlim(0, 1.15 * longest)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.88", linewidth=0.6)
    axis.set_axisbelow(True)
