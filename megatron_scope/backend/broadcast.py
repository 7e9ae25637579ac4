"""Weights out of their shards straight to the rollout servers: this rank's part. Collectives: every rank
calls them.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scope import weight_group
from megatron_scope.backend.export import stage_tensors
from megatron_scope.backend.model import StageModel
from megatron_scope.backend.setup import Ranks
from megatron_scope.records import WeightBucket

POLL_S = 0.001
_NOTHING = ("nothing", torch.empty(0))  # what comes after the last tensor

Check = Callable[[], None]  # raises when it is no use to wait any longer


class WeightSender:
    """Sends the buckets of a pipeline stage over a group in which the rollout servers receive them.

    The first rank of the stage sends; the others only give it their shards. It holds two buckets at a time,
    one on its way and one that is being filled, and the one parameter that is being put together.
    """

    def __init__(self, stage: StageModel, ranks: Ranks, buckets: Sequence[WeightBucket]) -> None:
        self._stage, self._ranks, self._buckets = stage, ranks, buckets
        self._group: dist.ProcessGroup | None = None

    @property
    def sends(self) -> bool:
        """Whether this rank is one that sends."""
        return self._ranks.place_in_stage == 0 and len(self._buckets) > 0

    def join(self, make: Callable[[], dist.ProcessGroup], check: Check) -> None:
        """Takes the group that `make` blocks for; gives up, with its error, as soon as `check` raises."""
        self.leave()
        made: list[dist.ProcessGroup | Exception] = []

        def run() -> None:
            try:
                made.append(make())
            except Exception as error:  # of torch.distributed, of no one kind; raised below
                made.append(error)

        thread = threading.Thread(target=run, name="weight-group", daemon=True)
        thread.start()
        while thread.is_alive():
            check()
            thread.join(POLL_S)
        if isinstance(made[0], Exception):
            raise made[0]
        self._group = made[0]

    def send(self, check: Check, *, failed: bool = False) -> None:
        """Sends the weights as they are now.

        A collective of the stage's ranks, which this rank runs to the end even when it cannot send any more
        (or has `failed` before): the error is raised after that. `check` is asked while it waits.
        """
        tensors = stage_tensors(self._stage, self._ranks, self._stage.module.get_parameter)
        failure: Exception | None = None
        if self.sends and not failed:
            try:
                self._send_all(tensors, check)
            except Exception as error:  # of torch and torch.distributed, of no one kind
                failure = error
                self.leave()  # so that the servers do not wait
                traceback.clear_frames(error.__traceback__)  # they hold buckets; memory may be short
        for _ in tensors:  # what is left of them: the stage's other ranks wait in the collectives
            pass
        if failure is not None:
            raise failure

    def leave(self) -> None:
        """Leaves the group, if there is one, whatever is under way in it."""
        group, self._group = self._group, None
        if group is not None:
            weight_group.leave(group)

    def _send_all(self, tensors: Iterator[tuple[str, Tensor]], check: Check) -> None:
        assert self._group is not None
        on_its_way: dist.Work | None = None
        for flat in self._packed(tensors):
            _wait(on_its_way, check)
            on_its_way = weight_group.broadcast(self._group, flat)
        _wait(on_its_way, check)

    def _packed(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
        """The flat buckets (uint8, on the model's device) one after another."""
        for bucket in self._buckets:
            flat = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._ranks.device)
            start = 0
            for expected, shape in zip(bucket.names, bucket.shapes, strict=True):
                name, tensor = next(tensors, _NOTHING)
                if name != expected or tuple(tensor.shape) != shape:
                    raise AssertionError(f"{name} {tuple(tensor.shape)} came; planned: {expected} {shape}")
                data = tensor.contiguous().view(-1).view(torch.uint8)
                flat[start : start + len(data)].copy_(data)
                start += len(data)
                del tensor, data  # before the next parameter is put together
            yield flat
        for _ in tensors:
            raise AssertionError("more tensors came than were planned")


def _wait(work: dist.Work | None, check: Check) -> None:
    """Waits for a broadcast; raises its error, or that of `check`."""
    if work is None:
        return
    while not work.is_completed():
        check()
        time.sleep(POLL_S)
    work.wait()
