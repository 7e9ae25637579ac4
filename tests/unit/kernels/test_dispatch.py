"""Which kernels a pass over a shard runs on."""

import os
import subprocess
import sys
import types

import pytest
import torch

from megatron_scope.kernels import dispatch, tiles
from megatron_scope.kernels.vocab_parallel import distill_stats
from tests.unit.kernels.logits import make

ON_CPU = torch.zeros(1, 1)
ON_CUDA = types.SimpleNamespace(is_cuda=True, device="cuda:0")  # all that is looked at
TRITON = types.ModuleType("triton_tiles")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing asked for, and Triton installed."""
    monkeypatch.delenv("MEGATRON_SCOPE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_triton_tiles", lambda: TRITON)
    return monkeypatch


def test_a_cpu_runs_torch_and_cuda_triton(environment):
    assert dispatch.kernels_for(ON_CPU) is tiles and dispatch.kernels_for(ON_CUDA) is TRITON
    environment.setenv("TRITON_INTERPRET", "1")  # somebody debugs another kernel: not asked for here
    assert dispatch.kernels_for(ON_CPU) is tiles


def test_cuda_without_triton_runs_torch(environment):
    environment.setattr(dispatch, "_triton_tiles", lambda: None)
    assert dispatch.kernels_for(ON_CUDA) is tiles


def test_torch_can_be_asked_for(environment):
    environment.setenv("MEGATRON_SCOPE_KERNELS", "torch")
    assert dispatch.kernels_for(ON_CUDA) is tiles and dispatch.kernels_for(ON_CPU) is tiles


def test_triton_can_be_asked_for_where_it_can_run(environment):
    environment.setenv("MEGATRON_SCOPE_KERNELS", "triton")
    assert dispatch.kernels_for(ON_CUDA) is TRITON
    environment.setenv("TRITON_INTERPRET", "1")
    assert dispatch.kernels_for(ON_CPU) is TRITON


def test_what_cannot_be_had_is_one_clear_error(environment):
    environment.setenv("MEGATRON_SCOPE_KERNELS", "triton")
    with pytest.raises(ValueError, match="is triton but the logits are on cpu; expected CUDA; unset it"):
        distill_stats(*make(2, 3))
    environment.setattr(dispatch, "_triton_tiles", lambda: None)
    with pytest.raises(ValueError, match="is triton but Triton is not installed; pip install triton"):
        dispatch.kernels_for(ON_CUDA)
    environment.setenv("MEGATRON_SCOPE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="is 'cuda'; expected torch or triton, or unset it"):
        dispatch.kernels_for(ON_CPU)


def test_triton_is_imported_only_where_it_runs():
    program = """
import sys, torch
from megatron_scope.kernels.fused_linear import distill_loss
from megatron_scope.kernels.vocab_parallel import distill_stats
distill_stats(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
assert not [name for name in sys.modules if name.startswith("megatron_scope.kernels.triton")]
"""
    environ = {name: value for name, value in os.environ.items() if name != "MEGATRON_SCOPE_KERNELS"}
    subprocess.run([sys.executable, "-c", program], env=environ, check=True, timeout=120)


def test_a_missing_triton_is_noticed_without_an_error(environment):
    environment.undo()
    environment.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    dispatch._triton_tiles.cache_clear()
    try:
        assert dispatch._triton_tiles() is None
    finally:
        dispatch._triton_tiles.cache_clear()
