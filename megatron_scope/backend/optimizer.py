"""The trainable student: Megatron's data-parallel wrapper, distributed optimizer and gradient clipping."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_scope.backend.model import DTYPES, StageModel
from megatron_scope.config.schema import OptimizerConfig, TrainConfig
from megatron_scope.errors import TrainingError


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A stage model with gradients and an optimizer."""

    stage: StageModel
    wrapped: DistributedDataParallel
    optimizer: Any
    clip_grad: float

    def zero_grad(self) -> None:
        """Clears the gradients before a step's first micro-batch."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        """The norm of the gradient over all ranks, before clipping."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def step(self, lr: float) -> float:
        """Clips, updates the parameters at this learning rate and returns the gradient's norm before
        clipping.

        Raises TrainingError, on every rank, when the norm is not finite; parameters and optimizer are then as
        before.
        """
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient's norm is {norm}; the optimizer was not touched. Lower optimizer.lr or "
                "look at the rollouts"
            )
        if self.clip_grad > 0:
            for part in self.optimizer.chained_optimizers:
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, max_norm=self.clip_grad, total_norm=norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step_with_ready_grads()
        return norm

    def main_grad(self, parameter: str) -> Tensor:
        """A parameter's summed gradient shard by its name in this stage, float32 (after
        `run(force_all_reduce=True)`).
        """
        value: Any = self.stage.module.get_parameter(parameter)
        return value.main_grad

    def release(self) -> None:
        """Ends training for good, so that model, buffers and process groups can be freed.

        The wrapper's hooks in autograd, which Python's collector cannot see, make cycles of them: through the
        wrapper itself, through the config to the optimizer, whose float32 shards are views of parameters, and
        through the graph of the last routing probabilities, which Megatron's token dispatchers keep.
        """
        self.wrapped.grad_accs.clear()
        self.stage.config.grad_scale_func = None
        for module in self.stage.module.modules():
            if (dispatcher := getattr(module, "token_dispatcher", None)) is not None:
                dispatcher.probs = None


def make_trainable(stage: StageModel, train: TrainConfig, optimizer: OptimizerConfig) -> Trainable:
    """Wraps a stage for training with Adam on float32 master weights, sharded over the replicas."""
    dtype = DTYPES[train.precision]
    wrapped = DistributedDataParallel(
        config=stage.config,
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        module=stage.module,
    )
    inner = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            clip_grad=optimizer.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [wrapped],  # pyright: ignore[reportArgumentType]
    )
    stage.config.finalize_model_grads_func = finalize_model_grads  # pyright: ignore[reportAttributeAccessIssue]
    stage.config.grad_scale_func = inner.scale_loss  # pyright: ignore[reportAttributeAccessIssue]
    return Trainable(stage, wrapped, inner, optimizer.clip_grad)
