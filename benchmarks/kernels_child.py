"""One rank of one case of `benchmarks/kernels.py`: checks the numbers, then runs it once and prints JSON.

    python benchmarks/kernels_child.py '{"kind": ..., "contestant": ..., ...}' STORE RANK WORLD_SIZE

STORE is a file that does not exist yet. A process runs one case, so that peaks of memory and warm caches of
one contestant never help or hurt another.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import kernels_contestants as contestants  # noqa: E402  (needs the path)
import kernels_linear as linear  # noqa: E402
import process_memory  # noqa: E402
from kernels_report import Case  # noqa: E402

from megatron_scope.kernels import reference  # noqa: E402

CHECKED_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run to be timed, the bytes of the gradients it leaves (not extra memory), and its parity: the largest
    relative error of values and gradients from float64 (None where nothing is to be checked).
    """

    run: Callable[[], Any]
    gradient_bytes: int
    value_error: float | None
    gradient_error: float | None


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def prepare_logits(case: Case, rank: int, world_size: int) -> Prepared:
    width = case.vocab // world_size
    group = dist.group.WORLD if world_size > 1 else None
    shard = contestants.Shard(group, rank * width, width)
    function = contestants.LOGITS[case.contestant]
    generator = torch.Generator().manual_seed(rank)
    student, teacher = (
        (3 * torch.randn(case.num_tokens, width, generator=generator)).bfloat16() for _ in range(2)
    )
    shared = torch.Generator().manual_seed(1000)
    targets = torch.randint(0, width * world_size, (case.num_tokens,), generator=shared)
    weights = torch.rand(2, case.num_tokens, generator=shared)

    def total(kl: Tensor, logprob: Tensor | None, rows: slice) -> Tensor:
        loss = (weights[0, rows] * kl).sum()
        return loss if logprob is None else loss + (weights[1, rows] * logprob).sum()

    def differentiate(rows: slice) -> tuple[Tensor, Tensor | None, Tensor]:
        leaf = student[rows].detach().requires_grad_(True)
        kl, logprob = function(leaf, teacher[rows], targets[rows], shard)
        total(kl, logprob, rows).backward()
        assert leaf.grad is not None
        return kl.detach(), None if logprob is None else logprob.detach(), leaf.grad

    rows = slice(0, CHECKED_TOKENS)
    kl, logprob, grad = differentiate(rows)
    wholes = []
    for part in (student[rows], teacher[rows]):
        parts = [torch.empty_like(part) for _ in range(world_size)]
        if world_size > 1:
            dist.all_gather(parts, part.contiguous())
        else:
            parts = [part]
        wholes.append(torch.cat(parts, dim=1).double())
    exact_student = wholes[0].requires_grad_(True)
    stats = reference.distill_stats(exact_student, wholes[1], targets[rows])
    assert stats.reverse_kl is not None
    exact_logprob = None if logprob is None else stats.logprob
    total(stats.reverse_kl, exact_logprob, rows).backward()
    assert exact_student.grad is not None
    exact_grad = exact_student.grad[:, shard.start : shard.start + width]
    return Prepared(
        run=lambda: differentiate(slice(0, case.num_tokens)),
        gradient_bytes=0,  # the logits' gradient counts as extra memory
        value_error=relative_error(kl, stats.reverse_kl.detach()),
        gradient_error=relative_error(grad, exact_grad),
    )


def prepare_linear(case: Case) -> Prepared:
    name, chunk_tokens = case.contestant, case.chunk_tokens
    whole = linear.make_problem(case.num_tokens, case.vocab, case.hidden, uniform=name == linear.LIGER)
    if name in linear.BARE:
        return Prepared(linear.BARE[name](whole, chunk_tokens), 0, None, None)

    def differentiate(num_tokens: int, vocab: int) -> tuple[Tensor, linear.Problem]:
        problem = whole.part(num_tokens, vocab)
        loss = linear.LINEAR[name](problem, chunk_tokens)
        loss.backward()
        return loss.detach(), problem

    small = CHECKED_TOKENS, min(case.vocab, 10_000)
    loss, problem = differentiate(*small)
    double = whole.part(*small, torch.float64)
    exact = linear.exact(double, with_logprob=name == linear.OURS)
    exact.backward()
    return Prepared(
        run=lambda: differentiate(case.num_tokens, case.vocab),
        # The table's is summed in float32, whatever the contestant does.
        gradient_bytes=4 * whole.student_weight.numel() + 2 * whole.student_hidden.numel(),
        value_error=relative_error(loss, exact.detach()),
        gradient_error=max(
            relative_error(mine, want)
            for mine, want in zip(problem.gradients(), double.gradients(), strict=True)
        ),
    )


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    store, rank, world_size = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    prepared = prepare_logits(case, rank, world_size) if case.kind == "logits" else prepare_linear(case)
    if world_size > 1:
        dist.barrier()
    before = process_memory.begin()
    started, cpu_started = time.perf_counter(), time.process_time()
    kept = prepared.run()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    extra = process_memory.resident_bytes("VmHWM") - before - prepared.gradient_bytes
    del kept
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "extra_bytes": extra,
                "value_error": prepared.value_error,
                "gradient_error": prepared.gradient_error,
            }
        )
    )
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
