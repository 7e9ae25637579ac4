"""One rank of one case of `benchmarks/kernels.py`: checks the numbers, then runs it once and prints JSON.

    python benchmarks/kernels_child.py '{"kind": ..., "contestant": ..., ...}' STORE RANK WORLD_SIZE

STORE is a file that does not exist yet. A process runs one case, so that peaks of memory and warm caches of
one contestant never help or hurt another.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import re
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

from megatron_scope.kernels import reference  # noqa: E402
from megatron_scope.kernels.fused_linear import Coefficients, distill_loss  # noqa: E402

CHECKED_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """`kind` is "logits" or "linear"; `vocab` counts all columns, `hidden` the student's and teacher's
    hidden sizes.
    """

    kind: str
    contestant: str
    num_tokens: int
    vocab: int
    hidden: tuple[int, int] = (1024, 2048)
    chunk_tokens: int = 128


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run to be timed, the bytes of the gradients it leaves (not extra memory), and its parity: the largest
    relative error of values and gradients from float64 (None where nothing is to be checked).
    """

    run: Callable[[], Any]
    gradient_bytes: int
    value_error: float | None
    gradient_error: float | None


def memory(field: str) -> int:
    """VmHWM or VmRSS of this process in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; the benchmark needs Linux")
    return 1024 * int(found[1])


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
    """`ours`, or the bare GEMMs of the same chunks in a dtype: logits of both models, then the two gradients
    of the student.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    student, teacher = (
        (normal(case.num_tokens, d, scale=1.0), normal(case.vocab, d, scale=2 / d**0.5)) for d in case.hidden
    )
    targets = torch.randint(0, case.vocab, (case.num_tokens,), generator=generator)
    factors = Coefficients(
        *(None if name == "jsd" else torch.rand(case.num_tokens) for name in Coefficients._fields)
    )
    gradient_bytes = 4 * student[1].numel() + 2 * student[0].numel()  # the table's is summed in float32
    if case.contestant != "ours":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[case.contestant.split()[-1]]
        return Prepared(_bare_products(student, teacher, dtype, case.chunk_tokens), 0, None, None)

    def differentiate(rows: slice, vocab: int) -> tuple[Tensor, ...]:
        hidden, weight = (t.detach().requires_grad_(True) for t in (student[0][rows], student[1][:vocab]))
        chosen = Coefficients(*(None if factor is None else factor[rows] for factor in factors))
        loss, _ = distill_loss(
            hidden,
            weight,
            teacher[0][rows],
            teacher[1][:vocab],
            targets[rows] % vocab,
            chosen,
            chunk_tokens=case.chunk_tokens,
        )
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad

    rows, vocab = slice(0, CHECKED_TOKENS), min(case.vocab, 10_000)
    loss, hidden_grad, weight_grad = differentiate(rows, vocab)
    hidden, weight = (t.double().requires_grad_(True) for t in (student[0][rows], student[1][:vocab]))
    chosen = Coefficients(*(None if factor is None else factor[rows] for factor in factors))
    exact, _ = reference.distill_loss(
        hidden, weight, teacher[0][rows], teacher[1][:vocab], targets[rows] % vocab, chosen
    )
    exact.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Prepared(
        run=lambda: differentiate(slice(0, case.num_tokens), case.vocab),
        gradient_bytes=gradient_bytes,
        value_error=relative_error(loss, exact.detach()),
        gradient_error=max(
            relative_error(hidden_grad, hidden.grad), relative_error(weight_grad, weight.grad)
        ),
    )


def _bare_products(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], dtype: torch.dtype, chunk_tokens: int
) -> Callable[[], Any]:
    hidden, weight, teacher_hidden, teacher_weight = (t.to(dtype) for t in (*student, *teacher))
    dz, other = torch.empty(2, chunk_tokens, weight.shape[0], dtype=dtype)
    weight_grad, hidden_grad = torch.zeros_like(weight), torch.empty_like(hidden)
    dz.zero_()  # so that no page is touched first within the measured time
    other.zero_()
    hidden_grad.zero_()

    def run() -> None:
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            here = slice(0, len(hidden[rows]))
            torch.mm(hidden[rows], weight.T, out=dz[here])
            torch.mm(teacher_hidden[rows], teacher_weight.T, out=other[here])
            torch.mm(dz[here], weight, out=hidden_grad[rows])
            weight_grad.addmm_(dz[here].T, hidden[rows])

    return run


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    store, rank, world_size = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    prepared = prepare_logits(case, rank, world_size) if case.kind == "logits" else prepare_linear(case)
    if world_size > 1:
        dist.barrier()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the check left free in the heap would hide what the run needs
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    started = time.perf_counter()
    kept = prepared.run()
    seconds = time.perf_counter() - started
    extra = memory("VmHWM") - before - prepared.gradient_bytes
    del kept
    print(
        json.dumps(
            {
                "seconds": seconds,
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
