"""Hosting Megatron-core on a machine without CUDA.

Megatron-core names CUDA in its code, not in its mathematics. `host()` gives those names a CPU meaning; each
patch states the line of Megatron-core (0.16) that needs it. On a machine with CUDA nothing is touched.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
import torch.utils._device

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn")
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


def host() -> None:
    """Makes Megatron-core usable without CUDA; a no-op with one. Call it before Megatron is imported;
    idempotent.
    """
    if torch.cuda.is_available() or getattr(torch.cuda, "_hosted_by_megatron_scope", False):
        return
    _leave_functions_uncompiled()
    _name_the_device()
    _place_factories()
    _name_tensor_types()
    _name_the_generator()
    _hand_out_token_counts()
    torch.cuda._hosted_by_megatron_scope = True  # pyright: ignore[reportAttributeAccessIssue]


def _name_the_device() -> None:
    # "The current device" is asked for as the place of new buffers (tensor_parallel/mappings.py,
    # p2p_communication.py, param_and_grad_buffer.py) and is synchronised around point-to-point communication
    # (p2p_communication.py).
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.current_stream = lambda device=None: _NoStream()  # distributed_data_parallel.py waits on it
    torch.cuda.default_stream = lambda device=None: _NoStream()
    # moe/token_dispatcher.py copies token counts to the host on a stream of its own.
    torch.cuda.Stream = _NoStream
    torch.cuda.stream = contextlib.nullcontext
    # optimizer.py and checkpoint loading move tensors "to the GPU".
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


class _NoStream:
    """A CPU runs in order: waiting for a stream, or an event on one, is done before it starts."""

    def wait_stream(self, stream: Any) -> None:
        del stream

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None:
        pass


def _name_the_generator() -> None:
    # The random-state tracker (tensor_parallel/random.py) forks CUDA's generator around dropout and
    # initialisation, and activation recompute restores it.
    torch.cuda.get_rng_state = lambda device="cpu": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cpu": torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _hand_out_token_counts() -> None:
    # The dispatcher wants the counts that its all-to-all splits by as numpy (token_dispatcher.py), which
    # maybe_move_tensor_to_cpu (moe_utils.py) makes of CUDA tensors only.
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        del record_stream
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = move
    token_dispatcher.maybe_move_tensor_to_cpu = move
    # moe_utils.py defines it only where Transformer Engine is installed, and asks for it everywhere.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def _place_factories() -> None:
    # schedules.py, optimizer.py and clip_grads.py create small tensors with device="cuda". Wrapping the
    # factories costs nothing elsewhere; a TorchFunctionMode would tax every operation of the model. `with
    # torch.device(...)` finds the factories by identity and remembers them at its first use: that must be
    # before this.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _name_tensor_types() -> None:
    # distrib_optimizer.py sorts parameters by the string of their type and accepts CUDA's only.
    original = torch.Tensor.type

    def type_or_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and self.device.type == "cpu" and self.dtype in _TYPE_NAMES:
            return _TYPE_NAMES[self.dtype]
        return original(self, *args, **kwargs)

    torch.Tensor.type = type_or_name


def _leave_functions_uncompiled() -> None:
    # `jit_fuser` is torch.compile: on a CPU it costs a C++ build at start-up and saves nothing at this size.
    # Importing megatron.core already decorates functions, so the switch is Dynamo's own, read when it is
    # first imported.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
