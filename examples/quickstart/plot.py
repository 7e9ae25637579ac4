"""The comparison as one picture: a row a method, a panel a measure, a colour a temperature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scores import BASE, LABELS, TEMPERATURES, Comparison, K

# Blue and vermilion of Okabe and Ito's palette, which colour-blind readers tell apart; the shapes differ too.
STYLES = {"1.0": ("#0072B2", "o"), "0.6": ("#D55E00", "D")}
PANELS = (
    ("average", f"Accuracy (Avg@{K})", "% of single answers that are right"),
    ("passed", f"Pass@{K}", f"% of problems that {K} answers solve at least once"),
    ("solutions", "Diversity", "different fully correct solutions in {samples} answers"),
)
ROW_INCHES, LANES = 0.62, 0.62  # height of a row, and the share of it that marks take


def draw(comparison: Comparison, path: Path) -> None:
    """Writes a PNG: large marks and numbers are means over seeds, small ones seeds, lines their intervals."""
    import matplotlib
    from matplotlib.figure import Figure

    methods = list(comparison.results)
    with matplotlib.rc_context({"font.size": 9.5, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(12, 1.75 + ROW_INCHES * len(methods)), layout="constrained")
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for axis, (measure, title, unit) in zip(axes, PANELS, strict=True):
            for row, method in enumerate(methods):
                _draw_row(axis, comparison, method, measure, row)
            for temperature, (colour, _) in STYLES.items():
                before = _values(comparison, BASE, temperature, measure).mean()
                axis.axvline(before, color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.55, zorder=0)
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel(unit.format(samples=comparison.num_samples))
            _strip(axis, len(methods), most=np.inf if measure == "solutions" else 100)
        axes[0].set_yticks(range(len(methods)), [LABELS[method] for method in methods])
        _name_temperatures(figure, axes[0])
        figure.suptitle(_caption(comparison), x=0.01, ha="left", fontsize=9.5)
        figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def _values(comparison: Comparison, method: str, temperature: str, measure: str) -> np.ndarray:
    return np.array([getattr(result, measure).value for result in comparison.results[method][temperature]])


def _draw_row(axis: Any, comparison: Comparison, method: str, measure: str, row: int) -> None:
    """Temperature by temperature, each seed in a lane of its own; the mean in the middle of the lanes."""
    seeds = len(comparison.seeds)
    lane = LANES / (len(TEMPERATURES) * seeds)
    for block, temperature in enumerate(TEMPERATURES):
        colour, marker = STYLES[temperature]
        top = row - LANES / 2 + block * seeds * lane
        for number, result in enumerate(comparison.results[method][temperature]):
            estimate, height = getattr(result, measure), top + (number + 0.5) * lane
            alpha = 1.0 if seeds == 1 else 0.55
            axis.plot([estimate.low, estimate.high], [height] * 2, color=colour, linewidth=1.6, alpha=alpha)
            if seeds > 1:
                axis.plot(estimate.value, height, marker, color=colour, markersize=3, alpha=alpha)
        mean = _values(comparison, method, temperature, measure).mean()
        axis.plot(mean, top + seeds * lane / 2, marker, color=colour, markersize=7, markeredgecolor="white")
        axis.text(
            0.99,
            top + seeds * lane / 2,
            f"{mean:.1f}",
            transform=axis.get_yaxis_transform(),
            horizontalalignment="right",
            verticalalignment="center",
            color=colour,
        )


def _strip(axis: Any, num_rows: int, most: float) -> None:
    """Leaves what carries meaning: stripes from the labels to their marks, and a light grid.

    `most` is the largest value there can be; no tick lies beyond it.
    """
    for row in range(0, num_rows, 2):
        axis.axhspan(row - 0.5, row + 0.5, color="0.96", zorder=-1, linewidth=0)
    axis.set_ylim(num_rows - 0.5, -0.5)
    left, right = axis.get_xlim()
    right += 0.14 * (right - left)  # room for the means at the edge
    axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= min(right, most)])
    axis.set_xlim(left, right)
    axis.grid(axis="x", color="0.88", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _name_temperatures(figure: Any, axis: Any) -> None:
    marks = [
        axis.plot([], [], marker, color=colour, markersize=7, label=f"temperature {temperature}")[0]
        for temperature, (colour, marker) in STYLES.items()
    ]
    legend = figure.legend(
        handles=marks, loc="upper right", frameon=False, labelcolor="linecolor", handletextpad=0.1
    )
    legend.set_in_layout(False)  # it stands beside the caption, not above it


def _caption(comparison: Comparison) -> str:
    several = len(comparison.seeds) > 1
    marks = (
        f"Large marks and numbers: means of {len(comparison.seeds)} seeds; small marks: seeds; solid lines"
        if several
        else "Marks and numbers: one seed; solid lines"
    )
    return (
        f"One weak student, {comparison.steps} steps of training by each method, "
        f"{comparison.num_problems} unseen problems. Further right is better in every panel.\n"
        f"{marks}: 95 % intervals over problems; dashed lines: the student before training."
    )
