"""The full-vocabulary kernels on one GPU, beside the ceilings of its memory and its GEMMs.

    python benchmarks/kernels_gpu.py [--out benchmarks/results]

One tensor-parallel rank's share of the work at the sizes of a large model, without the all-gather of 36 bytes
a token: reverse KL and the target's log-prob with their gradient. The floor of the logits level is what must
move, both shards read twice and one written (10 bytes a token and column in bfloat16), at the bandwidth that
a large copy reaches in the same run; that of the fused layer is the operations of its four GEMMs at the rate
of a bfloat16 GEMM of a chunk's size. Times are medians over iterations by CUDA events after warm-ups, with
the 10th and 90th percentile. `--device cpu` with small sizes only shows that the script works.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import kernels_contestants as contestants  # noqa: E402  (needs the path)

from megatron_scope.kernels.dispatch import VARIABLE  # noqa: E402
from megatron_scope.kernels.fused_linear import Coefficients, distill_loss  # noqa: E402

RIVAL_CHUNK = 1024  # tokens; a GPU wants larger ones than a CPU
RIVALS: dict[str, Callable[..., contestants.Outputs]] = {
    "log_softmax + kl_div": contestants.gathered,
    "per-operation autograd": contestants.per_operation,
    f"custom function, chunks of {RIVAL_CHUNK}": contestants.chunked(RIVAL_CHUNK),
    f"checkpointed chunks of {RIVAL_CHUNK}": contestants.checkpointed(RIVAL_CHUNK),
}
LOGITS_BYTES = 10  # a token and column: four reads and a write of bfloat16


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, memory in bytes beyond the inputs."""

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    extra_bytes: int
    share_of_ceiling: float | None = None


class Timer:
    """Times work on a device and takes its peak memory."""

    def __init__(self, device: torch.device, warmups: int, iterations: int) -> None:
        self.device, self._warmups, self._iterations = device, warmups, iterations

    def measure(self, name: str, work: Callable[[], Any], floor_ms: float | None = None) -> Row:
        for _ in range(self._warmups):
            work()
        extra = self._extra_bytes(work)
        times = sorted(self._one(work) for _ in range(self._iterations))
        median = statistics.median(times)
        tenth = len(times) // 10
        share = None if floor_ms is None else floor_ms / median
        return Row(name, median, times[tenth], times[-1 - tenth], extra, share)

    def _extra_bytes(self, work: Callable[[], Any]) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _one(self, work: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def random(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(torch.bfloat16)


def with_kernels(kind: str | None, work: Callable[[], Any]) -> Callable[[], Any]:
    """The work with MEGATRON_SCOPE_KERNELS set to `kind`, or as the package chooses (None)."""

    def run() -> Any:
        os.environ.pop(VARIABLE, None)
        if kind is not None:
            os.environ[VARIABLE] = kind
        return work()

    return run


def copy_rate(timer: Timer, num_bytes: int) -> float:
    """Bytes per millisecond, read and written, of a large copy."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return num_bytes / timer.measure("copy", lambda: target.copy_(source)).median_ms


def gemm_rate(timer: Timer, rows: int, width: int, columns: int) -> float:
    """Floating-point operations per millisecond of a bfloat16 GEMM."""
    a, b = random(rows, width, device=timer.device), random(columns, width, device=timer.device)
    return 2 * rows * width * columns / timer.measure("gemm", lambda: a @ b.T).median_ms


def logits_level(timer: Timer, tokens: int, columns: int) -> tuple[list[Row], dict[str, float]]:
    """Ours and the usual ways on one shard of logits."""
    device = timer.device
    student, teacher = (random(tokens, columns, device=device, scale=3.0) for _ in range(2))
    targets = torch.randint(columns, (tokens,), device=device)
    kl_factor, logprob_factor = torch.rand(2, tokens, device=device)
    shard = contestants.Shard(None, 0, columns)
    student.requires_grad_(True)

    def differentiated(function: Callable[..., contestants.Outputs]) -> Callable[[], None]:
        def work() -> None:
            kl, logprob = function(student, teacher, targets, shard)
            loss = kl_factor * kl if logprob is None else kl_factor * kl + logprob_factor * logprob
            (student.grad,) = torch.autograd.grad(loss.sum(), student)

        return work

    num_bytes = LOGITS_BYTES * tokens * columns
    rate = copy_rate(timer, num_bytes)
    own = differentiated(contestants.ours)
    rows = [
        timer.measure("ours", with_kernels(None, own), num_bytes / rate),
        timer.measure("ours, plain torch", with_kernels("torch", own), num_bytes / rate),
        *(
            timer.measure(name, differentiated(function), num_bytes / rate)
            for name, function in RIVALS.items()
        ),
    ]
    return rows, {"copy_gb_per_s": rate / 1e6}


def fused_layer(
    timer: Timer, tokens: int, columns: int, width: int, chunk: int
) -> tuple[list[Row], dict[str, float]]:
    """`distill_loss` on one shard of both output tables."""
    device = timer.device
    hidden = [random(tokens, width, device=device) for _ in range(2)]
    tables = [random(columns, width, device=device, scale=width**-0.5) for _ in range(2)]
    targets = torch.randint(columns, (tokens,), device=device)
    logprob_factor, kl_factor = torch.rand(2, tokens, device=device)
    factors = Coefficients(logprob=logprob_factor, reverse_kl=kl_factor)
    for tensor in (hidden[0], tables[0]):
        tensor.requires_grad_(True)

    def work() -> None:
        loss, _ = distill_loss(
            hidden[0], tables[0], hidden[1], tables[1], targets, factors, chunk_tokens=chunk
        )
        torch.autograd.grad(loss, (hidden[0], tables[0]))

    rate = gemm_rate(timer, min(chunk, tokens), width, columns)
    floor = 8 * width * columns * tokens / rate
    return [timer.measure("ours", with_kernels(None, work), floor)], {"gemm_tflop_per_s": rate / 1e9}


def table(title: str, rows: list[Row], ceiling: dict[str, float]) -> str:
    said = ", ".join(f"{name} {value:.1f}" for name, value in ceiling.items())
    lines = [f"{title}; {said}.", "", "| | ms | p10 to p90 | share of ceiling | extra GB |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        share = "" if row.share_of_ceiling is None else f"{row.share_of_ceiling:.2f}"
        spread = f"{row.p10_ms:.2f} to {row.p90_ms:.2f}"
        lines.append(
            f"| {row.name} | {row.median_ms:.2f} | {spread} | {share} | {row.extra_bytes / 1e9:.2f} |"
        )
    return "\n".join(lines)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Full-vocabulary kernels beside a GPU's ceilings.")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--columns", type=int, default=19_072, help="152,576 rows over 8 ranks")
    parser.add_argument("--width", type=int, default=8192, help="hidden size of both models")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a chunk of the fused layer")
    parser.add_argument("--warmups", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=50)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; run it on a GPU machine, or with --device cpu and small sizes")
    torch.manual_seed(0)
    timer = Timer(device, options.warmups, options.iterations)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {"device": name, "torch": torch.__version__, "tokens": options.tokens, "columns": options.columns}
    parts = {
        "logits level": logits_level(timer, options.tokens, options.columns),
        "fused linear layer": fused_layer(
            timer, options.tokens, options.columns, options.width, options.chunk
        ),
    }
    text = "\n\n".join(
        [", ".join(f"{key} {value}" for key, value in about.items()) + "."]
        + [table(title, *found) for title, found in parts.items()]
    )
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        title: {"ceiling": ceiling, "rows": [dataclasses.asdict(row) for row in rows]}
        for title, (rows, ceiling) in parts.items()
    }
    stem = options.out / "kernels_gpu"
    stem.with_suffix(".json").write_text(json.dumps({"machine": about, "parts": found}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
