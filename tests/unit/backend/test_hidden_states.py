"""Hidden states come back as they were kept, from memory and from the spill file, or are made by windows."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_scope.backend.hidden_states import HiddenStates
from megatron_scope.backend.token_loss import OnDemand, TeacherStates
from megatron_scope.config.schema import Divergence
from megatron_scope.records import MicroBatch

ALONE = SimpleNamespace(tensor_size=1, tensor_rank=0, device=torch.device("cpu"))
SHAPES = {4: (3, 5), 0: (1, 5), 7: (6, 5)}
BYTES = sum(4 * rows * width for rows, width in SHAPES.values())


def states(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {index: torch.randn(shape, generator=generator).to(dtype) for index, shape in SHAPES.items()}


def batch(response):
    """A micro-batch of which nothing but its rows' responses is read."""
    none = np.zeros(0, dtype=np.int64)
    return MicroBatch(none, none, none, none, none, np.array(response), none, none)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit_bytes", [BYTES, BYTES // 2, 0])
def test_rows_come_back_end_to_end_in_the_order_asked_for(limit_bytes, dtype):
    kept, given = HiddenStates(ALONE, limit_bytes), states(dtype)
    for index, hidden in given.items():
        kept.keep(index, hidden)
    for wanted in ([7], [0, 4], [7, 0, 4, 7]):
        assert torch.equal(kept.rows(wanted), torch.cat([given[index] for index in wanted]))


@pytest.mark.parametrize("limit_bytes", [BYTES, 0])
def test_what_is_kept_does_not_follow_the_caller(limit_bytes):
    kept, hidden = HiddenStates(ALONE, limit_bytes), torch.ones(2, 3)
    kept.keep(1, hidden)
    hidden.zero_()
    assert kept.rows([1]).eq(1).all()


def test_a_file_is_used_beyond_the_limit_only_and_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def open_files():
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return [os.readlink(link) for link in links if os.path.exists(link) or os.path.islink(link)]

    kept = HiddenStates(ALONE, 4 * 2 * 3)
    kept.keep(0, torch.ones(2, 3))
    assert not any(str(tmp_path) in file for file in open_files())
    kept.keep(1, torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []
    assert any(str(tmp_path) in file for file in open_files())


def test_rows_of_a_micro_batch_are_known_by_their_response():
    kept = HiddenStates(ALONE, BYTES)
    for index, hidden in states().items():
        kept.keep(index, hidden)
    assert kept.has(batch([4, 4, 5, 7])).tolist() == [True, True, False, True]
    kept.clear()
    assert not kept.has(batch([4, 4, 5, 7])).any()


def test_states_on_demand_are_made_for_a_window_at_a_time():
    made = []

    def teacher_pass(indices, hidden):
        made.append(indices)
        for index in indices:
            hidden.keep(index, torch.full((1, 2), float(index)))

    hidden = HiddenStates(ALONE, limit_bytes=None)
    batches = [batch([5, 5, 1]), batch([2]), batch([3])]
    states = TeacherStates(None, hidden, Divergence.JSD, scale=1.0, on_demand=OnDemand(2, teacher_pass))
    seen = []
    for window in states.windows(batches):
        seen.append([micro_batch.response.tolist() for micro_batch in window])
        assert [hidden.has(micro_batch).all() for micro_batch in batches] == [
            any(micro_batch is member for member in window) for micro_batch in batches
        ]
    assert seen == [[[5, 5, 1], [2]], [[3]]]
    assert made == [[1, 2, 5], [3]]
