"""Products of hidden states [C, d] with an output table [V_local, d] whose results are float32 (float64 for
float64) whatever the operands are, with no copy of the table.

On CUDA the GEMM itself takes 16-bit operands and gives float32. CPU GEMMs cannot: there the table is upcast
tile by tile, and where both operands hold bfloat16 values anyway the float32 GEMM may multiply them as such.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 20  # numbers of the table that are upcast at a time
HALVES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def _bfloat16_products(on: bool) -> Iterator[None]:
    """float32 GEMMs of this process round their operands to bfloat16 where the CPU has instructions for it;
    sums stay float32. Exact for operands that are bfloat16 already.
    """
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    if on:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _row_tiles(num_rows: int, width: int) -> Iterator[slice]:
    rows = max(1, TILE_ELEMENTS // max(1, width))
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def _widens(operand: Tensor, out: Tensor) -> bool:
    """Whether the GEMM itself can take these operands and give this result."""
    return out.is_cuda and out.dtype == torch.float32 and operand.dtype in HALVES


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """hidden [C, d] times the table's first rows [n, d] into `out` [C, n] of float32 or float64."""
    weight = weight[: out.shape[1]]
    if _widens(weight, out):
        torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=out.dtype, out=out)
        return
    wide = hidden.to(out.dtype)
    both_bfloat16 = hidden.dtype == weight.dtype == torch.bfloat16
    if weight.dtype == out.dtype:
        torch.mm(wide, weight.T, out=out)
        return
    with _bfloat16_products(both_bfloat16):
        for rows in _row_tiles(*weight.shape):
            torch.mm(wide, weight[rows].to(out.dtype).T, out=out[:, rows])


def hidden_gradient(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """dz [C, n] times the table's first rows [n, d] into `out` [C, d]; dz has the table's dtype."""
    out.copy_(dz @ weight[: dz.shape[1]])


def add_weight_gradient(dz: Tensor, hidden: Tensor, out: Tensor) -> None:
    """Adds dz^T [n, C] times hidden [C, d] to the first rows of `out` [V_local, d] of float32 or float64."""
    out = out[: dz.shape[1]]
    if _widens(dz, out):
        for rows in _row_tiles(*out.shape):
            out[rows] += torch.mm(dz[:, rows].T, hidden.to(dz.dtype), out_dtype=out.dtype)
        return
    wide = hidden.to(out.dtype)
    if dz.dtype == out.dtype:
        out.addmm_(dz.T, wide)
        return
    with _bfloat16_products(hidden.dtype == dz.dtype == torch.bfloat16):
        for rows in _row_tiles(*out.shape):
            out[rows].addmm_(dz[:, rows].to(out.dtype).T, wide)


def narrowed(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous float32 matrix in another dtype; a 16-bit result lies in the first half of the matrix's
    own memory, whose contents are lost, so that there are never two.
    """
    if gradient.dtype == dtype:
        return gradient
    if dtype.itemsize > gradient.dtype.itemsize:
        return gradient.to(dtype)
    result = gradient.view(-1).view(dtype)[: gradient.numel()].view_as(gradient)
    for rows in _row_tiles(*gradient.shape):  # upwards: what is overwritten has been read
        result[rows] = gradient[rows].to(dtype)
    return result
