"""The publish stage: the student's weights to the rollout servers, by either transport."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from megatron_scope import weight_group
from megatron_scope.backend import rendezvous
from megatron_scope.backend.broadcast import WeightSender
from megatron_scope.backend.distribute import gather_everywhere, on_rank_zero
from megatron_scope.backend.export import gather_on_first, save_hf_folder
from megatron_scope.backend.model import StageModel
from megatron_scope.backend.setup import Ranks
from megatron_scope.config.schema import Config, Engine, Transport
from megatron_scope.controller.process import ControllerProcess
from megatron_scope.convert.mapping import exported_tensors, largest_in_hand
from megatron_scope.errors import ScopeError, SyncError
from megatron_scope.records import ServedModel, StageTransfer, WeightBucket, WeightTransfer
from megatron_scope.run_folder import RunFolder
from megatron_scope.sync.buckets import bucket_size, plan_buckets
from megatron_scope.sync.compare import check_served
from megatron_scope.sync.disk import remove_old_versions

MEGABYTE = 1_000_000
# Beyond sync.timeout_s, which the controller watches too: it can say which server kept the others waiting.
GRACE_S = 10.0
POLL_S = 0.01
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OK = "ok"  # a sender's report


class Publisher(Protocol):
    """Hands weights to the servers. Collectives: every rank calls them."""

    def publish(self, version: int) -> None:
        """Hands over the weights as they are now, under the number of updates that made them."""
        ...

    def close(self) -> None:
        """Lets go of what lives between publishes, on this rank."""
        ...


def build_publisher(
    config: Config, stage: StageModel, ranks: Ranks, folder: RunFolder, controller: ControllerProcess | None
) -> Publisher:
    """The transport that sync.transport names; `controller` is rank 0's."""
    if config.sync.transport is Transport.BROADCAST:
        return BroadcastPublisher(config, stage, ranks, controller)
    return DiskPublisher(stage, ranks, folder, controller)


class DiskPublisher:
    """Weights as folders under RUN/weights, of which only the last stays."""

    def __init__(
        self, stage: StageModel, ranks: Ranks, folder: RunFolder, controller: ControllerProcess | None
    ) -> None:
        self._stage, self._ranks, self._folder, self._controller = stage, ranks, folder, controller

    def publish(self, version: int) -> None:
        """Writes the folder and has every server load it."""
        out = self._folder.weights_of(version)
        save_hf_folder(self._stage, self._ranks, out)

        def hand_over() -> None:
            assert self._controller is not None
            self._controller.call("publish", str(out), version)
            remove_old_versions(self._folder.weights, keep=out)

        on_rank_zero(self._ranks, hand_over)

    def close(self) -> None:
        """Nothing lives between publishes."""


@dataclasses.dataclass(frozen=True)
class _Route:
    """What the sending ranks must know of a transfer."""

    groups: dict[int, str]  # name by pipeline stage
    world_size: int
    backend: str
    new: bool
    stop_key: str  # set in the store when it is no use to go on


class BroadcastPublisher:
    """Weights over process groups: one for each pipeline stage, in which the stage's first rank is rank 0 and
    the servers are the others.

    The groups live as long as the servers stay the same. After an error they are left, and nothing more can
    be published by this object.
    """

    def __init__(
        self, config: Config, stage: StageModel, ranks: Ranks, controller: ControllerProcess | None
    ) -> None:
        """A collective. SyncError on rank 0, and an error on every rank, where rank 0's store cannot listen
        or a sender cannot reach it.
        """
        sync = config.sync
        self._sync, self._ranks = sync, ranks
        dtype = stage.config.params_dtype
        in_hand = largest_in_hand(stage.entries, stage.shape, ranks.tensor_size) * dtype.itemsize
        size = bucket_size(int(sync.bucket_mb * MEGABYTE), in_hand)
        buckets = plan_buckets(exported_tensors(stage.entries), dtype, size)
        self._sender = WeightSender(stage, ranks, buckets)
        mine = (ranks.pipeline_rank, buckets) if self._sender.sends else None
        plans = gather_on_first(ranks, mine) if ranks.replica == 0 else []
        self._lead: _Lead | None = None

        def listen() -> int:
            assert controller is not None
            stages = dict(plan for plan in plans if plan is not None)
            architecture = stage.source.family.architecture
            self._lead = _Lead(config, controller, architecture, stages, ranks.device.type)
            return self._lead.store_port

        self._store_port = on_rank_zero(ranks, listen)
        self._signals = self._meet()  # the store, by a connection of its own: the group's may be waiting

    def publish(self, version: int) -> None:
        """Sends the weights; SyncError on rank 0, and an error on every rank, where any side failed."""
        lead = self._lead

        def begin() -> _Route:
            assert lead is not None
            route = lead.prepare(version)
            lead.start(route)
            return route

        route = on_rank_zero(self._ranks, begin)
        deadline = time.monotonic() + self._sync.timeout_s + GRACE_S
        self._send(route, deadline)
        failure = lead.finish(route, deadline) if lead is not None else None
        try:
            if isinstance(failure, _HungRank):
                raise failure  # by itself: a collective would wait for that rank too
            on_rank_zero(self._ranks, lambda: _raise(failure))
        except ScopeError:
            self._sender.leave()
            raise

    def close(self) -> None:
        """Leaves the groups."""
        self._sender.leave()

    def _send(self, route: _Route, deadline: float) -> None:
        """This rank's part. What went wrong in it goes to rank 0 through the store, where a rank that hangs
        shows by its silence.
        """
        sender = self._sender
        if not sender.sends:
            return sender.send(lambda: None)

        def check() -> None:
            if self._signals.check([route.stop_key]):
                raise _Stopped
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all sent within {self._sync.timeout_s:g} s (sync.timeout_s)")

        def join() -> None:
            if route.new:
                sender.join(lambda: self._join(route), check)

        failure = _failure_of(join)
        # Also after a failure: the stage's other ranks take part in it.
        later = _failure_of(lambda: sender.send(check, failed=failure is not None))
        failure = failure or later
        told = _OK
        if failure is not None and not isinstance(failure, _Stopped):
            told = f"rank {self._ranks.rank}: {_said(failure)}"
            self._signals.set(route.stop_key, "1")
        self._signals.set(_report_key(route, self._ranks.pipeline_rank), told)

    def _join(self, route: _Route) -> dist.ProcessGroup:
        return weight_group.join(
            self._store(),
            rank=weight_group.SENDER,
            world_size=route.world_size,
            name=route.groups[self._ranks.pipeline_rank],
            backend=route.backend,
            timeout_s=self._sync.timeout_s + 2 * GRACE_S,
        )

    def _meet(self) -> Any:
        """A sender's connection to rank 0's store, None on other ranks. A collective: all ranks hear of one
        that cannot connect before any server is told to wait for it.
        """
        store: list[Any] = []
        failure = _failure_of(lambda: store.append(self._store())) if self._sender.sends else None
        told = f"rank {self._ranks.rank}: {_said(failure)}" if failure is not None else None
        failures = [said for said in gather_everywhere(self._ranks, told) if said]
        if failures:
            on_rank_zero(self._ranks, lambda: _raise(SyncError("; ".join(failures))))
        return store[0] if store else None

    def _store(self) -> Any:
        """A connection to rank 0's store; other ranks reach it where they reached rank 0 at their start."""
        return rendezvous.connect(
            "127.0.0.1" if self._ranks.rank == 0 else os.environ["MASTER_ADDR"], self._store_port
        )


class _Stopped(Exception):
    """Another side failed and tells why."""


class _HungRank(SyncError):
    """A rank of the trainer does not answer."""


def _raise(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure


class _Lead:
    """What rank 0 alone does: it knows the servers and the whole plan, and has the controller speak."""

    def __init__(
        self,
        config: Config,
        controller: ControllerProcess,
        architecture: str,
        stages: dict[int, tuple[WeightBucket, ...]],
        device: str,
    ) -> None:
        self._sync, self._controller = config.sync, controller
        self._architecture, self._stages = architecture, stages
        self._backend = "nccl" if device == "cuda" else "gloo"
        # The embedded server is the run's own: started with what belongs to the student.
        self._warned: set[str] | None = None if config.rollout.engine is Engine.EMBEDDED else set()
        self._store = rendezvous.listen(config.sync.master_port)
        self._signals = rendezvous.connect("127.0.0.1", self._store.port)
        self._members: dict[str, int] = {}  # the groups' servers: URL and ranks
        self._groups: dict[int, str] = {}
        self._sent: int | None = None  # the version that they have
        self._transfer: WeightTransfer | None = None
        self._outcome: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def store_port(self) -> int:
        """Where the store listens, on every address of this host."""
        return self._store.port

    def prepare(self, version: int) -> _Route:
        """Meets the servers, compares their model, and decides on the groups."""
        served: list[ServedModel] = self._controller.call("meet_servers", version)
        members = {model.url: model.tensor_parallel for model in served}
        # One that was started anew does not have the last version, and is in no group.
        same = members == self._members and all(model.weight_version == str(self._sent) for model in served)
        if not same:
            for model in served:
                self._check(model)
            name = f"megatron_scope-{uuid.uuid4().hex[:12]}"
            self._members = members
            self._groups = {number: f"{name}-stage{number}" for number in self._stages}
        world_size = 1 + sum(members.values())
        self._transfer = WeightTransfer(
            version=version,
            stages=tuple(
                StageTransfer(self._groups[number], buckets) for number, buckets in self._stages.items()
            ),
            rank_offsets=_offsets(members),
            world_size=world_size,
            backend=self._backend,
            master_address=self._sync.master_address or _own_address(members),
            master_port=self._store.port,
            new=not same,
        )
        return _Route(
            self._groups,
            world_size,
            self._backend,
            not same,
            f"stop-{version}-{uuid.uuid4()}",
        )

    def _check(self, model: ServedModel) -> None:
        """Compares a server's model with the student; says once for each server what could not be
        compared.
        """
        buckets = (bucket for plan in self._stages.values() for bucket in plan)
        doubt = check_served(model, self._architecture, buckets)
        if doubt is not None and self._warned is not None and model.url not in self._warned:
            self._warned.add(model.url)
            print(f"warning: {doubt}", file=sys.stderr, flush=True)

    def start(self, route: _Route) -> None:
        """Has the servers told; when one fails, the senders hear of it through the store."""
        result = self._controller.begin("broadcast", self._transfer)

        def watch() -> None:
            try:
                result()
            except BaseException as error:  # raised by `finish`
                self._error = error
                self._signals.set(route.stop_key, "1")

        self._error = None
        self._outcome = threading.Thread(target=watch, name="broadcast-outcome", daemon=True)
        self._outcome.start()

    def finish(self, route: _Route, deadline: float) -> BaseException | None:
        """Waits for servers and senders; one error for all that went wrong on either side."""
        assert self._outcome is not None and self._transfer is not None
        self._outcome.join()
        version = self._transfer.version
        reports = {stage: self._report(route, stage, deadline) for stage in self._stages}
        if self._error is not None and not isinstance(self._error, ScopeError):
            return self._error
        told = [] if self._error is None else [str(self._error)]
        told += [report for report in reports.values() if report not in (None, _OK)]
        told += [
            f"the sending rank of pipeline stage {stage} does not answer; is it stopped?"
            for stage, report in reports.items()
            if report is None
        ]
        if told:
            kind = _HungRank if None in reports.values() else SyncError
            return kind(f"weight version {version} was not published: {'; '.join(told)}")
        self._sent = version
        return None

    def _report(self, route: _Route, stage: int, deadline: float) -> str | None:
        """What the sender of a stage has to say, None when it says nothing; after a failure of the servers it
        does so soon.
        """
        if self._error is not None:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        key = _report_key(route, stage)
        while not self._signals.check([key]):
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)
        return self._signals.get(key).decode()


def _report_key(route: _Route, stage: int) -> str:
    return f"{route.stop_key}-report-{stage}"


def _said(failure: Exception) -> str:
    """In one line."""
    if isinstance(failure, ScopeError):
        return str(failure)
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"


def _failure_of(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # of torch.distributed, of no one kind; all ranks hear of it
        return error
    return None


def _offsets(members: dict[str, int]) -> dict[str, int]:
    """The first rank of each server in a group, after the sender's."""
    offsets, start = {}, weight_group.SENDER + 1
    for url, num_ranks in members.items():
        offsets[url] = start
        start += num_ranks
    return offsets


def _own_address(urls: Any) -> str:
    """Where servers reach this host."""
    if all(urllib.parse.urlsplit(url).hostname in LOOPBACK for url in urls):
        return "127.0.0.1"
    given = os.environ.get("MASTER_ADDR")
    return given if given and given not in LOOPBACK else socket.gethostname()
