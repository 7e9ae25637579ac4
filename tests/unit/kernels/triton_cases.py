"""Triton's passes over a shard, on CUDA where there is a device, otherwise under Triton's interpreter.

Triton takes up its interpreter when it is imported, which other tests' imports may have done without, so the
interpreter has a process of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_scope.kernels import dispatch, fused_linear, vocab_parallel
from megatron_scope.kernels.fused_linear import Coefficients
from megatron_scope.kernels.tiles import Shard, TokenStatistics, Upstream, compute_dtype
from tests.unit.kernels import hidden, logits

HAS_CUDA = torch.cuda.is_available()
# The interpreter cuts off what bfloat16 cannot hold, where a GPU rounds to the nearest.
HALF_ERROR = 2.0**-8 if HAS_CUDA else 2.0**-7
TIMEOUT_S = 240


@contextlib.contextmanager
def runner() -> Iterator[Callable[..., Any]]:
    """run(function, *arguments) has MEGATRON_SCOPE_KERNELS=triton; results and arguments lie on the CPU."""
    if HAS_CUDA:

        def run_here(function: Callable[..., Any], *arguments: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(dispatch.VARIABLE, "triton")
                return function(*arguments)

        yield run_here
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=_prepare_interpreter) as pool:

        def run_there(function: Callable[..., Any], *arguments: Any) -> Any:
            return pool.submit(function, *arguments).result(TIMEOUT_S)

        yield run_there


def _prepare_interpreter() -> None:
    os.environ.update({"TRITON_INTERPRET": "1", dispatch.VARIABLE: "triton"})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # 0 * inf is computed, then left out


@contextlib.contextmanager
def small_tiles() -> Iterator[Any]:
    """The module, whose tiles have 8 columns, so that a short row has many."""
    from megatron_scope.kernels import triton_tiles

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tiles, "LANES", 2)
        patch.setattr(triton_tiles, "LANE_COLUMNS", 4)
        patch.setattr(triton_tiles, "TILE_COLUMNS", 8)
        yield triton_tiles


def _moved(value: Any, device: str) -> Any:
    """Tensors, also in tuples, on another device with the same strides."""
    if isinstance(value, tuple):
        values = [_moved(one, device) for one in value]
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def there(value: Any) -> Any:
    return _moved(value, "cuda" if HAS_CUDA else "cpu")


def back(value: Any) -> Any:
    return _moved(value, "cpu")


# ---- the passes, in small tiles


def statistics(student: Tensor, teacher: Tensor | None, targets: Tensor, shard: Shard) -> Tensor:
    student, teacher, targets = there((student, teacher, targets))
    with small_tiles() as triton_tiles:
        dtype = compute_dtype(student.dtype)
        return back(triton_tiles.local_statistics(student, teacher, targets, shard, dtype))


def mixture(
    student: Tensor, teacher: Tensor, token: TokenStatistics, shard: Shard, teacher_weight: float
) -> Tensor:
    student, teacher, token = there((student, teacher, token))
    with small_tiles() as triton_tiles:
        return back(triton_tiles.mixture_sums(student, teacher, token, shard, teacher_weight))


def gradient(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    token: TokenStatistics,
    upstream: Upstream,
    shard: Shard,
    out: Tensor | torch.dtype,
    teacher_weight: float = 0.5,
) -> Tensor:
    """The gradient in `out`, or of that dtype over the memory of the student's logits, whose rows follow each
    other without gaps.
    """
    student, teacher, targets, token, upstream = there((student, teacher, targets, token, upstream))
    out = student.view(out)[:, : student.shape[1]] if isinstance(out, torch.dtype) else there(out)
    with small_tiles() as triton_tiles:
        triton_tiles.logits_gradient(
            student, teacher, targets, token, upstream, shard, teacher_weight=teacher_weight, out=out
        )
    return back(out)


# ---- the package's functions, in tiles as they are


def distill_stats(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    factors: dict[str, Tensor],
    settings: dict[str, Any],
) -> tuple[vocab_parallel.DistillStats, Tensor]:
    """The statistics, and the gradient of their sum with these factors."""
    student, teacher, targets = there((student, teacher, targets))

    def stats_of(z: Tensor) -> vocab_parallel.DistillStats:
        return vocab_parallel.distill_stats(z, teacher, targets, **settings)

    factors = {name: there(factor) for name, factor in factors.items()}
    return back(stats_of(student)), back(logits.gradient(stats_of, student, factors))


def jensen_shannon(
    student: Tensor, teacher: Tensor, factor: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The divergence, and the gradient of its sum with this factor."""
    student, teacher, factor = there((student, teacher, factor))
    student.requires_grad_(True)
    jsd = vocab_parallel.jensen_shannon(student, teacher, **settings)
    (grad,) = torch.autograd.grad((jsd * factor).sum(), student)
    return back(jsd.detach()), back(grad)


def distill_loss(inputs: hidden.Inputs, factors: Coefficients, settings: dict[str, Any]) -> tuple[Any, ...]:
    """Loss, statistics and both gradients."""
    return back(hidden.differentiate(fused_linear.distill_loss, there(inputs), there(factors), **settings))
