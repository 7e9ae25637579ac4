"""The sending rank: what it holds, what it sends, and what it does when it cannot go on."""

from __future__ import annotations

import types
import weakref
from typing import Any

import pytest
import torch

from megatron_scope.backend import broadcast
from megatron_scope.backend.broadcast import WeightSender
from megatron_scope.records import WeightBucket

TENSORS = {f"t{number}": torch.randn(3 + number, 4) for number in range(7)}


def buckets() -> list[WeightBucket]:
    """Two tensors in each but the last."""
    names = list(TENSORS)
    groups = [names[start : start + 2] for start in range(0, len(names), 2)]
    return [
        WeightBucket(
            tuple(group),
            ("float32",) * len(group),
            tuple(tuple(TENSORS[name].shape) for name in group),
            sum(TENSORS[name].nbytes for name in group),
        )
        for group in groups
    ]


class Network:
    """Broadcasts that take a few looks to be done, and where they fail when told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.sent: list[bytes] = []
        self.left = False
        self.most_alive = 0  # buckets held at one time
        self._fails_at = fails_at
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def broadcast(self, group: Any, flat: torch.Tensor) -> Any:
        assert group == "group" and flat.dtype == torch.uint8 and flat.is_contiguous()
        self._alive.append(weakref.ref(flat))
        alive = sum(reference() is not None for reference in self._alive)
        self.most_alive = max(self.most_alive, alive)
        looks = iter([False, False])
        number = len(self._alive) - 1

        def wait() -> None:
            if number == self._fails_at:
                raise RuntimeError("connection closed")
            self.sent.append(flat.numpy().tobytes())

        return types.SimpleNamespace(is_completed=lambda: next(looks, True), wait=wait)

    def leave(self, group: Any) -> None:
        assert group == "group"
        self.left = True


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """rank(network, place_in_stage=0) -> (a sender that has joined, the tensors that it has taken)."""

    def make(network: Network, place_in_stage: int = 0) -> tuple[WeightSender, list[str]]:
        taken: list[str] = []

        def tensors(*_: Any) -> Any:
            for name, value in TENSORS.items():
                taken.append(name)
                yield name, value

        monkeypatch.setattr(broadcast, "stage_tensors", tensors)
        monkeypatch.setattr(broadcast.weight_group, "broadcast", network.broadcast)
        monkeypatch.setattr(broadcast.weight_group, "leave", network.leave)
        stage: Any = types.SimpleNamespace(module=types.SimpleNamespace(get_parameter=None))
        ranks: Any = types.SimpleNamespace(place_in_stage=place_in_stage, device=torch.device("cpu"))
        sender = WeightSender(stage, ranks, buckets())
        made: Any = "group"
        sender.join(lambda: made, lambda: None)
        return sender, taken

    return make


def test_the_buckets_are_the_tensors_bytes_in_order(rank):
    network = Network()
    sender, _ = rank(network)
    sender.send(lambda: None)
    assert b"".join(network.sent) == b"".join(value.numpy().tobytes() for value in TENSORS.values())
    assert [len(sent) for sent in network.sent] == [bucket.num_bytes for bucket in buckets()]
    assert not network.left


def test_two_buckets_are_held_at_a_time(rank):
    network = Network()
    sender, _ = rank(network)
    sender.send(lambda: None)
    assert len(network.sent) == 4 and network.most_alive == 2


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_failure_is_raised_after_the_stage_has_been_exported(rank, fails_at):
    """The other ranks of the stage give their shards to the end."""
    network = Network(fails_at)
    sender, taken = rank(network)
    with pytest.raises(RuntimeError, match="connection closed"):
        sender.send(lambda: None)
    assert taken == list(TENSORS) and network.left and len(network.sent) == fails_at


def test_a_wait_ends_when_it_is_no_use(rank):
    network = Network()
    sender, taken = rank(network)

    def check() -> None:
        raise TimeoutError("no use")

    with pytest.raises(TimeoutError, match="no use"):
        sender.send(check)
    assert taken == list(TENSORS) and network.left and network.sent == []


@pytest.mark.parametrize(("place", "failed"), [(1, False), (0, True)])
def test_a_rank_that_does_not_send_takes_part_all_the_same(rank, place, failed):
    network = Network()
    sender, taken = rank(network, place)
    sender.send(lambda: None, failed=failed)
    assert taken == list(TENSORS) and network.sent == []


def test_joining_is_given_up_when_it_is_no_use(rank):
    sender, _ = rank(Network())
    never = broadcast.threading.Event()

    def check() -> None:
        raise TimeoutError("no use")

    try:
        with pytest.raises(TimeoutError, match="no use"):
            sender.join(never.wait, check)
    finally:
        never.set()


def test_the_error_of_joining_is_raised(rank):
    sender, _ = rank(Network())

    def refuse() -> Any:
        raise RuntimeError("nobody there")

    with pytest.raises(RuntimeError, match="nobody there"):
        sender.join(refuse, lambda: None)
