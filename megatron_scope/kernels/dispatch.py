"""Passes over a shard, on the kernels that suit where the logits lie: Triton's on CUDA, `tiles` elsewhere.

The environment variable MEGATRON_SCOPE_KERNELS chooses them by hand: `torch` for `tiles` everywhere, also to
find out whether Triton is to blame for a result; `triton` for Triton or an error, where TRITON_INTERPRET=1
has its interpreter run the kernels on a CPU, slowly, as the tests do. CUDA without an installed Triton uses
`tiles`.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

from torch import Tensor

from megatron_scope.kernels import tiles
from megatron_scope.kernels.tiles import Shard, TokenStatistics, Upstream

VARIABLE = "MEGATRON_SCOPE_KERNELS"


@functools.cache
def _triton_tiles() -> ModuleType | None:
    """The module `triton_tiles`, None where Triton is not installed."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return None
    return importlib.import_module("megatron_scope.kernels.triton_tiles")


def kernels_for(logits: Tensor) -> ModuleType:
    """`tiles` or `triton_tiles`; ValueError where MEGATRON_SCOPE_KERNELS asks for what cannot be had."""
    wanted = os.environ.get(VARIABLE)
    if wanted not in (None, "torch", "triton"):
        raise ValueError(f"{VARIABLE} is {wanted!r}; expected torch or triton, or unset it")
    if wanted == "torch" or (wanted is None and not logits.is_cuda):
        return tiles
    if wanted == "triton" and not logits.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{VARIABLE} is triton but the logits are on {logits.device}; expected CUDA; "
            "unset it to use torch there"
        )
    module = _triton_tiles()
    if module is None and wanted == "triton":
        raise ValueError(f"{VARIABLE} is triton but Triton is not installed; pip install triton, or unset it")
    return module or tiles


def gathered_statistics(
    student: Tensor, teacher: Tensor | None, targets: Tensor, shard: Shard
) -> TokenStatistics:
    """The statistics of logits [T, >= L] over all shards; one all-gather."""
    dtype = tiles.compute_dtype(student.dtype)
    local = kernels_for(student).local_statistics(student, teacher, targets, shard, dtype)
    return tiles.token_statistics(tiles.join(shard.gather(local), shard.temperature), shard.temperature)


def with_mixture(
    student: Tensor, teacher: Tensor, token: TokenStatistics, shard: Shard, teacher_weight: float
) -> tuple[TokenStatistics, Tensor]:
    """The statistics with `mixture_kl`, and JSD = (1 - b) KL(p || m) + b KL(q || m), [T]; one all-gather."""
    local = kernels_for(student).mixture_sums(student, teacher, token, shard, teacher_weight)
    sums = shard.gather(local).sum(dim=0)
    jsd = (1.0 - teacher_weight) * sums[:, 0] + teacher_weight * sums[:, 1]
    return token._replace(mixture_kl=sums[:, 0]), jsd


def logits_gradient(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    token: TokenStatistics,
    upstream: Upstream,
    shard: Shard,
    *,
    teacher_weight: float = 0.5,
    out: Tensor,
) -> None:
    """`tiles.logits_gradient`, which says what it is, written to `out` [T, >= L], which may lie over the
    student's logits, row on row.
    """
    kernels_for(student).logits_gradient(
        student, teacher, targets, token, upstream, shard, teacher_weight=teacher_weight, out=out
    )
