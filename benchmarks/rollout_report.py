"""Rows and tables of `rollout.py`."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from rollout_sync import SyncRow

LIMIT = 0.05  # of the client's time over the server's
KB, MB = 1e3, 1e6
WIDTH = 120  # of the report's lines, tables apart


@dataclasses.dataclass(frozen=True)
class OverheadRow:
    """The runs of one client (lean or pool) on one server, as `rollout_client.time_it` gives them."""

    engine: str
    client: str
    runs: tuple[dict[str, Any], ...]

    def median(self, key: str) -> float:
        return statistics.median(run[key] for run in self.runs)

    @property
    def share(self) -> float:
        """The client's processor time over that of the server, median over the runs."""
        return statistics.median(run["client_cpu_seconds"] / run["server_cpu_seconds"] for run in self.runs)

    @property
    def milliseconds_a_response(self) -> float:
        return 1e3 * statistics.median(run["client_cpu_seconds"] / run["num_responses"] for run in self.runs)


@dataclasses.dataclass(frozen=True)
class FlightRow:
    """Bytes of either side above what it held before: while all requests wait in the server, and at most."""

    num_responses: int
    num_tokens: int
    client_waiting_bytes: int
    client_peak_bytes: int
    server_waiting_bytes: int
    server_peak_bytes: int


def overhead_table(rows: Sequence[OverheadRow]) -> str:
    lines = [
        "| server | client | seconds (min to max) | CPU seconds, client | CPU seconds, server | "
        "client of server | client ms a response | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = [run["seconds"] for run in row.runs]
        lines.append(
            f"| {row.engine} | {row.client} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to "
            f"{max(seconds):.2f}) | {row.median('client_cpu_seconds'):.2f} | "
            f"{row.median('server_cpu_seconds'):.2f} | {row.share:.1%} | {row.milliseconds_a_response:.2f} | "
            f"{row.median('num_tokens'):.0f} |"
        )
    return "\n".join(lines)


def wall_ratios(rows: Sequence[OverheadRow]) -> dict[str, list[float]]:
    """By server: the pool's seconds over those of the lean client's run just before it."""
    by_client = {(row.engine, row.client): row.runs for row in rows}
    return {
        engine: [
            ours["seconds"] / lean["seconds"]
            for ours, lean in zip(by_client[engine, "pool"], by_client[engine, "lean"], strict=True)
        ]
        for engine in dict.fromkeys(row.engine for row in rows)
    }


def flight_table(rows: Sequence[FlightRow]) -> str:
    lines = [
        "| requests in flight | client MB, all waiting | at most | server MB, all waiting | at most |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        numbers = (
            row.client_waiting_bytes,
            row.client_peak_bytes,
            row.server_waiting_bytes,
            row.server_peak_bytes,
        )
        lines.append(f"| {row.num_responses} | {' | '.join(f'{value / MB:.1f}' for value in numbers)} |")
    return "\n".join(lines)


def growth(rows: Sequence[FlightRow]) -> dict[str, float]:
    """Bytes at most for one more request, client and server, from the fewest to the most."""
    few, many = rows[0], rows[-1]
    more = max(1, many.num_responses - few.num_responses)
    return {
        side: (getattr(many, f"{side}_peak_bytes") - getattr(few, f"{side}_peak_bytes")) / more
        for side in ("client", "server")
    }


def sync_table(rows: Sequence[SyncRow]) -> str:
    lines = [
        "| server | layout | transport | seconds (min to max) | first | written MB | shards of a rank MB | "
        "peak over them MB | in buckets | controller MB | server MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row.engine} | {row.layout} | {row.transport} | {row.median_seconds:.2f} "
            f"({min(row.seconds):.2f} to {max(row.seconds):.2f}) | {row.first_seconds:.2f} | "
            f"{row.written_bytes / MB:.0f} | {row.shard_bytes / MB:.0f} | {row.rank_peak_bytes / MB:.0f} | "
            f"{row.peak_in_buckets:.2f} | {row.controller_peak_bytes / MB:.0f} | "
            f"{row.server_peak_bytes / MB:.0f} |"
        )
    return "\n".join(lines)


def _overhead_section(rows: Sequence[OverheadRow], options: argparse.Namespace) -> str:
    ratios = wall_ratios(rows)
    shares = {row.engine: row.share for row in rows if row.client == "pool"}
    verdicts = "\n".join(
        f"- {engine}: the pool and its client take {shares[engine]:.1%} of the server's processor time "
        f"({'within' if shares[engine] <= LIMIT else 'over'} {LIMIT:.0%}); their wall clock is "
        f"{statistics.median(found):.3f} of the lean client's ({min(found):.3f} to {max(found):.3f})"
        for engine, found in ratios.items()
    )
    text = paragraph(
        f"{options.prompts} prompts of {options.prompt_tokens} tokens x {options.samples} samples of up to "
        f"{options.new_tokens} tokens, {options.concurrency} at a time; a Qwen2 of {options.layers} layers, "
        f"{options.hidden} wide, float32. Medians of {options.repeats} runs of each client in turns. `pool` "
        "is a run's own path from requests to checked records; `lean` posts the same bodies and parses the "
        "JSON. Processor time of the client is that of its process while it draws, of the server that of "
        "all its processes meanwhile."
    )
    return f"## Overhead of pool and client\n\n{text}\n\n{overhead_table(rows)}\n\n{verdicts}\n"


def _flight_section(rows: Sequence[FlightRow]) -> str:
    more = growth(rows)
    text = paragraph(
        "The embedded server, paused until all requests are in it, then drained; responses are dropped as "
        "they come. The prompts are the same few in every row, since the server keeps what it has read, up "
        "to its --max-total-tokens. Resident memory above what the process held before, a fresh pair of "
        "processes for each row."
    )
    told = (
        f"\nOne more request takes at most {more['client'] / KB:.1f} KB of the client and "
        f"{more['server'] / KB:.1f} KB of the server.\n"
    )
    return f"## Requests in flight\n\n{text}\n\n{flight_table(rows)}\n{told if len(rows) > 1 else ''}"


def _sync_section(rows: Sequence[SyncRow], options: argparse.Namespace) -> str:
    broadcast = [row for row in rows if row.transport == "broadcast"]
    highest = max(broadcast, key=lambda row: row.peak_in_buckets)
    whole = min(row.model_bytes for row in rows)
    text = paragraph(
        f"A Qwen2 of {whole / MB:.0f} MB in float32, whose largest parameter has "
        f"{highest.largest_bytes / MB:.0f} MB; buckets of {options.bucket_mb} MB. Medians of "
        f"{options.publishes} publishes after the first, which also makes the process groups. Seconds of the "
        "slowest rank, from the weights in the shards to the version read back. Peaks are the highest "
        "resident memory of a process of its kind in any publish, above what it held just before; a "
        "server's is that of its largest process, mapped files included. The ranks' C library is told to "
        "give back what is freed (MALLOC_TRIM_THRESHOLD_): what it keeps by itself would hide what is in "
        "use."
    )
    bound = paragraph(
        f"By broadcast a rank needs at most {highest.peak_in_buckets:.2f} buckets beside its shards, the "
        "parameter that is put together included."
    )
    return f"## Publishing\n\n{text}\n\n{sync_table(rows)}\n\n{bound}\n"


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def report(found: dict[str, list[Any]], about: dict[str, Any], options: argparse.Namespace) -> str:
    """The parts that were measured, as Markdown."""
    sections = {
        "overhead": lambda rows: _overhead_section(rows, options),
        "flight": _flight_section,
        "sync": lambda rows: _sync_section(rows, options),
    }
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    return f"{facts}.\n\n" + "\n".join(sections[part](rows) for part, rows in found.items())
